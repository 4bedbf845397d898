"""Models and training steps of the step benchmark: known sizes, random weights, the package's own modules.

A step is what train/loop.py does in a micro batch and its update: train/losses.py's Objective over a model
of transformers, converted by model/convert.py, attention through model/attention.py, activations
recomputed (with a frozen backbone there are none to keep). The optimizer is torch's fused AdamW on float32
masters, on one GPU; DeepSpeed is not needed and not measured.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Qwen3Config

from dense2sparse.kernels import ops
from dense2sparse.model import convert
from dense2sparse.model.attention import NAME, AttentionCall, register
from dense2sparse.model.execution import Execution, set_execution
from dense2sparse.train.engine import parameter_groups, set_checkpointing
from dense2sparse.train.flops import ModelCost
from dense2sparse.train.losses import Objective

MODES = ("dense", "sparse", "warmup frozen", "warmup trained")
BLOCK_SIZE, TOP_K = 128, 16


@dataclass(frozen=True)
class Size:
    """A model's shape, after its published configuration."""

    name: str
    hidden: int
    inner: int
    """Width of the MLP; of a mixture of experts, of the experts that a token meets, together."""
    layers: int
    heads: int
    groups: int
    width: int
    vocabulary: int
    tied: bool
    of_layers: int | None = None
    """Layers of the whole model, where this is a part of it."""
    num_experts: int = 0
    block_size: int = BLOCK_SIZE
    top_k: int = TOP_K
    index_width: int = 128

    @property
    def dense_layers(self) -> int:
        """First layers that keep full attention: as model/geometry.py decides, of a part in proportion."""
        whole = self.of_layers or self.layers
        kept = 3 if whole >= 30 else -(-whole // 10)
        return max(1, round(kept * self.layers / whole))

    def part(self, layers: int) -> Size:
        """The same with fewer layers."""
        return replace(self, layers=layers, of_layers=self.of_layers or self.layers)

    def whole(self) -> Size:
        """The model that this is a part of."""
        return replace(self, layers=self.of_layers or self.layers, of_layers=None)

    def cost(self, converted: bool = True) -> ModelCost:
        """What train/flops.py counts; equals its `model_cost` of the model."""
        attention = self.hidden * self.width * (2 * self.heads + 2 * self.groups)
        router = self.hidden * self.num_experts
        layer = attention + 3 * self.hidden * self.inner + router
        sparse = self.layers - self.dense_layers if converted else 0
        index = self.hidden * self.index_width * (self.groups + 1)
        return ModelCost(
            backbone_weights=self.layers * layer + self.vocabulary * self.hidden,
            index_weights=sparse * index,
            num_layers=self.layers,
            num_sparse_layers=sparse,
            query_width=self.heads * self.width,
            index_width=self.groups * self.index_width,
            budget_tokens=self.top_k * self.block_size,
        )


SIZES: dict[str, Size] = {
    size.name: size
    for size in (
        Size("0.6B", 1024, 3072, 28, 16, 8, 128, 151936, True),
        Size("4B", 2560, 9728, 36, 32, 8, 128, 151936, True),
        Size("tiny", 32, 48, 2, 4, 2, 16, 96, True, block_size=16, top_k=2, index_width=16),
    )
}
"""Qwen3-0.6B and Qwen3-4B, and one for tests."""


@dataclass
class Row:
    """One micro batch; fields of data.loader.Batch."""

    input_ids: Tensor
    position_ids: Tensor
    document_ids: Tensor
    targets: Tensor


def random_row(size: Size, rows: int, length: int, device: torch.device) -> Row:
    """Random tokens, one document a row; document ids on the CPU, where the loader has them."""
    generator = torch.Generator(device).manual_seed(0)
    ids = torch.randint(size.vocabulary, (rows, length), generator=generator, device=device)
    positions = torch.arange(length, device=device).expand(rows, -1).contiguous()
    targets = torch.full_like(ids, -100)
    targets[:, :-1] = ids[:, 1:]
    return Row(ids, positions, torch.zeros(ids.shape, dtype=torch.int32), targets)


def build(
    size: Size, mode: str, dtype: torch.dtype, device: torch.device, backend: str = "auto"
) -> tuple[Objective, list[dict[str, Any]]]:
    """Objective and parameter groups of a mode; weights in float32, not yet in `dtype`.

    The dense model has no index branch; its attention runs through the same library path.
    """
    torch.manual_seed(0)
    config = Qwen3Config(
        hidden_size=size.hidden,
        intermediate_size=size.inner,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.groups,
        head_dim=size.width,
        vocab_size=size.vocabulary,
        tie_word_embeddings=size.tied,
        max_position_embeddings=1 << 20,
        use_cache=False,
    )
    with torch.device(device):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if mode == "dense":
        register()
        model.config._attn_implementation = NAME
    else:
        convert.convert(model, _sparsity(size), [random_row(size, 1, 32, device)])
    set_execution(model, Execution(backend=backend))
    stage = SimpleNamespace(
        backbone_lr=None if mode == "warmup frozen" else 5e-6,
        index_lr=1e-4,
        weight_decay=0.0,
        activation_checkpointing=True,
    )
    set_checkpointing(model, stage)
    branches = convert.index_parameters(model), convert.backbone_parameters(model)
    groups = parameter_groups(stage, *branches)  # type: ignore[arg-type]
    objective = Objective(model)
    objective.train()
    return objective, groups


def _sparsity(size: Size) -> Any:
    return SimpleNamespace(
        block_size=size.block_size,
        top_k=size.top_k,
        local_blocks=1,
        init_blocks=0,
        index_dim=size.index_width,
        dense_layers=list(range(size.dense_layers)),
        init="random",
        index_norm="auto",
    )


class Update:
    """AdamW on float32 masters, with clipping; the model's weights are rounded to its dtype."""

    def __init__(
        self, objective: nn.Module, groups: list[dict[str, Any]], dtype: torch.dtype, fused: bool
    ) -> None:
        self.weights: list[Tensor] = []
        self.masters: list[Tensor] = []
        for group in groups:
            exact = [p.detach().clone() for p in group["params"]]
            self.weights += group["params"]
            self.masters += exact
            group["params"] = exact
        # Parameters only: rotary frequencies stay in float32.
        for parameter in objective.parameters():
            parameter.data = parameter.data.to(dtype)
        self._optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=fused)

    def __call__(self) -> None:
        for weight, master in zip(self.weights, self.masters, strict=True):
            assert weight.grad is not None
            master.grad, weight.grad = weight.grad.float(), None
        torch.nn.utils.clip_grad_norm_(self.masters, 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_copy_(self.weights, self.masters)


def gradients(objective: Objective, mode: str, row: Row) -> tuple[Tensor, Tensor | None]:
    """Forward and backward pass of a micro batch: loss, and the sum of the layers' KL (None if dense)."""
    frozen = mode == "warmup frozen"
    call = AttentionCall(
        mode.split()[0],  # type: ignore[arg-type]
        document_ids=row.document_ids,
        kl_weight=None if mode == "dense" else 1.0,
        attach_kl=not frozen,
    )
    normaliser = float((row.input_ids.shape[1] - 1) * len(row.input_ids))
    loss, _ = objective(
        row.input_ids,
        row.position_ids,
        row.targets,
        call,
        normaliser,
        kl_scale=1.0 if frozen else None,
        with_lm=False,
    )
    loss.backward()  # an attached KL is computed there
    kls: list[Any] = [report.kl for report in call.reports.values()]
    call.reports.clear()
    return loss.detach(), torch.stack(kls).detach().sum() if kls else None


@contextmanager
def selecting(block_ids: Tensor | None) -> Iterator[None]:
    """Inside, selection runs and its result is thrown away for `block_ids`, where there are such.

    Random weights on random tokens select almost independently at neighbouring tokens, a trained model
    does not, and sparse attention's speed hangs on that (bench_data.py).
    """
    usual = ops.select_blocks

    def select(*args: Any, **options: Any) -> Tensor:
        found = usual(*args, **options)
        return found if block_ids is None else block_ids.clone()

    ops.select_blocks = select
    try:
        yield
    finally:
        ops.select_blocks = usual
