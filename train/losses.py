"""The objective of a training step: L = L_LM + lambda * sum over sparse layers of KL_layer.

`Objective` wraps the language model, so that the whole step runs inside the engine's forward pass
and ZeRO-3 gathers every weight it needs. The logits of a row are never whole: the head runs over
chunks of tokens, each recomputed in the backward pass by non-reentrant checkpointing, which stays
exact under every ZeRO stage and under gradient accumulation (the tiled helper of DeepSpeed does
not).

Averages. A micro batch's LM loss is divided by `normaliser` = target tokens of the whole step /
(ranks * accumulation), not by its own count: DeepSpeed then averages over ranks and accumulation,
and the result is the mean over all target tokens of the step, however they fell. KL_layer is a mean
over rows, and every micro batch has as many.

Shape legend: B rows, N tokens, V vocabulary, E hidden width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

_CHUNK_ELEMENTS = 1 << 25
"""Logits held at once, in elements: 128 MiB in float32."""


class HeadRule:
    """What a family does to its logits after the head: scale them, then cap them softly."""

    def __init__(self, config: Any) -> None:
        """Read the rule off a text model's configuration (Granite, Cohere, Gemma)."""
        multiply = getattr(config, "logit_scale", None)
        divide = getattr(config, "logits_scaling", None)
        self.scale = (1.0 if multiply is None else multiply) / (1.0 if divide is None else divide)
        self.cap = getattr(config, "final_logit_softcapping", None)

    def __call__(self, logits: Tensor) -> Tensor:
        """Float32 logits of the family, from the head's output (..., V)."""
        logits = logits.float() * self.scale if self.scale != 1.0 else logits.float()
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)


def summed_lm_loss(hidden: Tensor, head: Any, targets: Tensor, rule: HeadRule) -> Tensor:
    """Sum of the cross entropies of all target tokens, in float32.

    Args:
        hidden: (B, N, E) last hidden states, after the final norm.
        head: the output embedding; called once per chunk.
        targets: (B, N) int64, -100 where there is none.
    """
    flat, wanted = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    vocab = getattr(head, "out_features", None) or head.weight.shape[0]
    chunk = max(64, _CHUNK_ELEMENTS // vocab)

    def chunk_loss(part: Tensor, goal: Tensor) -> Tensor:
        return F.cross_entropy(rule(head(part)), goal, ignore_index=-100, reduction="sum")

    total = torch.zeros((), dtype=torch.float32, device=hidden.device)
    for part, goal in zip(flat.split(chunk), wanted.split(chunk), strict=True):
        if torch.is_grad_enabled() and flat.shape[0] > chunk:
            total = total + checkpoint(chunk_loss, part, goal, use_reentrant=False)
        else:
            total = total + chunk_loss(part, goal)
    return total


class Objective(nn.Module):
    """The model with its losses; `forward` returns what the engine differentiates."""

    model: Any
    """The language model, of any transformers family."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self._rule = HeadRule(self.model.config.get_text_config())

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        targets: Tensor,
        call: Any,
        normaliser: float,
        kl_scale: float | None = None,
        with_lm: bool = True,
    ) -> tuple[Tensor, Tensor | None]:
        """One micro batch.

        Args:
            input_ids, position_ids, targets: (B, N) int64.
            call: AttentionCall of this pass; its `reports` are filled, an attached KL in the backward pass.
            normaliser: target tokens a micro batch has in the mean over the step.
            kl_scale: None in joint stages: the loss is the LM loss, and the KL's gradient travels
                with the layers' outputs. Else (frozen backbone) the loss is kl_scale * sum of the KLs.
            with_lm: whether to compute the LM loss where it is not differentiated.

        Returns:
            loss, and the LM loss without a graph (None if it was left out); float32 scalars.
        """
        decoder = self.model.get_decoder()
        outputs = decoder(
            input_ids=input_ids, position_ids=position_ids, msa_call=call, use_cache=False
        )
        head = self.model.get_output_embeddings()
        if kl_scale is None:
            loss = summed_lm_loss(outputs.last_hidden_state, head, targets, self._rule) / normaliser
            return loss, loss.detach()
        lm_loss = None
        if with_lm:
            with torch.no_grad():
                summed = summed_lm_loss(outputs.last_hidden_state, head, targets, self._rule)
                lm_loss = summed / normaliser
        kls = [report.kl.float() for _, report in sorted(call.reports.items())]
        return kl_scale * torch.stack(kls).sum(), lm_loss


@torch.no_grad()
def check_head(model: Any) -> None:
    """Compare the chunked head with the model's own logits once, on eight tokens.

    Raises:
        ValueError: for a family that treats its logits in a way `HeadRule` does not know.
    """
    config = model.config.get_text_config()
    device = model.get_input_embeddings().weight.device
    tokens = torch.arange(1, 9, device=device).unsqueeze(0) % config.vocab_size
    wanted = model(input_ids=tokens, use_cache=False).logits.float()
    hidden = model.get_decoder()(input_ids=tokens, use_cache=False)
    head = model.get_output_embeddings()
    found = HeadRule(config)(head(hidden.last_hidden_state))
    if not torch.allclose(found, wanted, rtol=1e-3, atol=1e-3):
        raise ValueError(
            f"model type {config.model_type!r} changes its logits after the output head in a way that "
            "training does not know: extend HeadRule in train/losses.py"
        )
