"""What a family's attention does to q and k, found by trying instead of by reading its code.

A layer is run on hand-made inputs and its q and k are caught where transformers hands them to the
attention function. So conversion needs no code per family: fused projections, biases, QK-norms, partial or
interleaved rotary tables and layers without positions all show in what comes out.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .attention import NAME
from .indexer import family_class, rotate


class RowLike(Protocol):
    """Tokens of one or more rows: ids (B, N), positions (B, N) and document ids (B, N)."""

    @property
    def input_ids(self) -> Tensor: ...
    @property
    def position_ids(self) -> Tensor: ...


@dataclass(frozen=True)
class Transforms:
    """How one layer's q and k follow from its input."""

    full: bool
    """Attends to the whole prefix (no sliding window)."""
    rotary: bool
    """Position embeddings change q and k."""
    bias: bool
    """q or k of a zero input is not zero."""
    norm: bool
    """q or k does not grow with its input."""
    scaling: float | None
    """Scale of the main scores as the family passes it."""


@dataclass(frozen=True)
class Observation:
    """One layer on one batch of rows."""

    layer: int
    attention: nn.Module
    hidden: Tensor
    """(B, N, hidden) input of the attention module."""
    positions: tuple[Tensor, Tensor]
    """cos and sin, (B or 1, N, rotary width)."""
    q: Tensor
    """(B, H, N, D) as handed to the attention function."""
    k: Tensor
    """(B, G, N, D) likewise."""
    facts: dict[str, Any]


def attention_modules(model: nn.Module) -> dict[int, nn.Module]:
    """Self-attention modules by layer index."""
    found = {}
    for module in model.modules():
        layer = getattr(module, "layer_idx", None)
        if isinstance(layer, int) and "Attention" in type(module).__name__:
            found[layer] = module
    return found


@torch.no_grad()
def observe(model: nn.Module, row: RowLike, visit: Callable[[Observation], None]) -> None:
    """Run the model on `row` and show `visit` every layer's q and k as the layer makes them."""
    inputs: dict[int, tuple[Tensor, tuple[Tensor, Tensor]]] = {}

    def remember(module, args, kwargs):
        hidden = args[0] if args else kwargs["hidden_states"]
        inputs[module.layer_idx] = (hidden, kwargs["position_embeddings"])

    def caught(module, q, k, **facts):
        hidden, positions = inputs[module.layer_idx]
        visit(Observation(module.layer_idx, module, hidden, positions, q, k, facts))

    attentions = attention_modules(model).values()
    hooks = [m.register_forward_pre_hook(remember, with_kwargs=True) for m in attentions]
    config: Any = model.config
    implementation, training = config._attn_implementation, model.training
    config._attn_implementation = NAME
    try:
        model.eval()
        device = next(model.parameters()).device
        model(
            input_ids=row.input_ids.to(device),
            position_ids=row.position_ids.to(device),
            use_cache=False,
            logits_to_keep=1,
            msa_observer=caught,
        )
    finally:
        config._attn_implementation = implementation
        model.train(training)
        for hook in hooks:
            hook.remove()


def transforms(observation: Observation) -> Transforms:
    """Try an observed layer on a zero input, a doubled input and an unrotated one.

    Raises:
        ValueError: attention that MSA does not define (soft-capping, sinks).
    """
    attention = observation.attention
    for name in ("softcap", "s_aux"):
        if observation.facts["extra"].get(name) is not None:
            raise ValueError(
                f"{type(attention).__name__} uses {name}, which sparse attention does not define: "
                "this family cannot be converted"
            )
    hidden = observation.hidden[:1, -4:]
    cos, sin = (table[:1, -4:] for table in observation.positions)
    still = (torch.ones_like(cos), torch.zeros_like(sin))

    def states(x, positions):
        caught: list[Tensor] = []

        def keep(_module, q, k, **_facts):
            caught.append(torch.cat([q.flatten(), k.flatten()]).double())

        attention(
            hidden_states=x,
            position_embeddings=positions,
            attention_mask=None,
            past_key_values=None,
            msa_observer=keep,
        )
        return caught[0]

    plain, zero = states(hidden, still), states(torch.zeros_like(hidden), still)
    size = plain.abs().max()
    linear = states(2 * hidden, still) - 2 * plain + zero
    # Tables of a first token do not rotate: tokens near the row's end tell.
    turned = states(hidden, (cos, sin)) - plain
    return Transforms(
        full=observation.facts["sliding_window"] is None,
        rotary=bool(turned.abs().max() > 1e-4 * size),
        bias=bool(zero.abs().max() > 1e-4 * size),
        norm=bool(linear.abs().max() > 1e-2 * size),
        scaling=observation.facts["scaling"],
    )


def unrotate(observation: Observation, x: Tensor) -> Tensor:
    """Undo the rotary embedding on x (B, heads, N, D); also of tables with an attention factor."""
    cos, sin = observation.positions
    squared = cos.square() + sin.square()
    return rotate(observation.attention, x, cos / squared, -sin / squared)


def rotary_planes(
    attention: nn.Module, rotary: bool, width: int, rotary_width: int
) -> list[list[int]]:
    """Channels that turn together: [real, imaginary] pairs, and [channel] for those that do not turn.

    A pair (a, b) turns as z = x_a + i x_b. Found by turning each unit vector a quarter, so half-split,
    interleaved and partial tables need no case of their own.
    """
    turning = rotary_width if rotary else 0
    single = [[channel] for channel in range(turning, width)]
    if not turning:
        return single
    weight = next(attention.parameters())
    unit = torch.eye(turning, device=weight.device)[None, None]
    quarter = (torch.zeros_like(unit[0]), torch.ones_like(unit[0]))
    family = sys.modules[family_class(type(attention)).__module__]
    turned, _ = family.apply_rotary_pos_emb(unit, unit[:, :0], *quarter)
    image = turned[0, 0].abs().argmax(-1).tolist()
    sign = turned[0, 0].sum(-1).tolist()
    pairs = [[channel, image[channel]] for channel in range(turning) if sign[channel] > 0]
    assert len(pairs) * 2 == turning, "a rotary embedding turns channels in pairs"
    return pairs + single
