"""The attention function that transformers calls in every layer of a converted model.

transformers hands keyword arguments of `model(...)` down to the attention function, so the mode, the
document bounds and the place for a layer's report travel as one argument, `msa_call`; nothing is global.
Registered beside it: a mask function, without which transformers would pass no mask at all and padding
and packing would be lost. It returns document ids, since a block-diagonal causal mask is all we serve.

With a cache of fixed capacity (transformers' StaticCache) S is the capacity. Prefill cuts it to what is
filled. A decoding step keeps it and learns the length from the device, so its launches are the same at
every step and a CUDA graph can hold them; the mask is then transformers' own (B, 1, 1, S).

Shapes: q (B, H, T, D), k and v (B, G, S, D), index q (B, G, T, D_idx), index k (B, 1, S, D_idx).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..kernels import ops
from ..kernels.documents import DocumentIds, Documents
from ..kernels.measures import SelectionMeasures, measure_selection
from .attached_kl import AttachKL
from .bridge import passed
from .document_mask import check_step_mask, document_mask, filled_part
from .execution import Dispatch, Execution, dispatch_of, set_execution
from .geometry import Geometry

NAME = "dense2sparse"
"""Name of the attention implementation in transformers' registry."""

Mode = Literal["dense", "warmup", "sparse", "oracle", "auto"]
"""dense: full attention. warmup: the same, KL over full rows. sparse: blocks of the index branch.
oracle: blocks of the largest true attention mass. auto: dense below the length from which sparse is faster
(model/execution.py), sparse from there on and wherever a KL or a measurement is asked for."""


@dataclass
class LayerReport:
    """What one sparse layer says about one forward pass."""

    kl: Tensor | None = None
    """KL_layer, scalar, unweighted: mean over rows and index heads. An attached one is computed in the
    backward pass and None until then; see `AttentionCall.attach_kl`."""
    block_ids: Tensor | None = None
    """(B, G, N, K) int32; a recomputation under activation checkpointing reads them again (trap 3)."""
    measures: SelectionMeasures | None = None
    """Coverage and recall, where the call asked for them and any query had a choice."""


@dataclass
class AttentionCall:
    """How one forward pass attends; make a new one for every pass: `model(..., msa_call=call)`."""

    mode: Mode
    top_k: int | None = None
    """Blocks per query; None takes the checkpoint's."""
    document_ids: Tensor | None = None
    """(B, S) int32; None takes them from the attention mask or restarting position ids. Where they are
    given, position ids must restart too in models with sliding-window layers. On the CPU, as a loader
    gives them, no pass waits for a device to learn where documents end."""
    kl_weight: float | None = None
    """Weight of each layer's KL in the gradient; None computes no KL."""
    kl_fraction: float = 1.0
    """Share of query tiles whose KL over full rows is computed and stands for all (unbiased)."""
    kl_seed: int = 0
    """Draws these tiles; every layer draws its own."""
    attach_kl: bool = True
    """The KL's gradient travels with the layer's output (traps 1 and 2), and the KL is computed where that
    output's gradient arrives: once a layer, also where activations are recomputed. A pass that records no
    gradients has none in training mode, and has it at once in evaluation mode. False leaves `reports[i].kl`
    with its own graph, for a frozen backbone whose outputs have none."""
    measure: bool = False
    """Fill `reports[i].measures`."""
    reports: dict[int, LayerReport] = field(default_factory=dict)
    """By layer index, sparse layers only."""
    _documents: tuple[Tensor, Documents] | None = field(default=None, init=False, repr=False)
    _checked_mask: Tensor | None = field(default=None, init=False, repr=False)

    def documents(self, ids: Tensor, device: torch.device) -> Documents:
        """What the layers need to know of ids (B, S), made for the first of them."""
        known = self._documents
        if known is None or known[0] is not ids or known[1].ids.device != device:
            known = self._documents = ids, Documents.of(ids, device)
        return known[1]

    def check_bounds(self, mask: Tensor | None, ids: Tensor, device: torch.device) -> None:
        """Layers with a sliding window know documents from position ids only: see once that they do.

        Args:
            mask: (B, 1, T, S) bool, the one mask of these layers.

        Raises:
            ValueError: they see one document where the ids name several.
        """
        bounds = self.documents(ids, device).bounds
        places = [(row, at) for row, starts in enumerate(bounds) for at in starts[1:-1]]
        if not places or (mask is not None and mask is self._checked_mask):
            return
        rows, firsts = torch.tensor(places, device=device).unbind(1)
        if mask is None or bool(mask[rows, 0, firsts, firsts - 1].any()):
            raise ValueError(
                "document_ids name several documents in a row, but position_ids run on: let them restart "
                "at each document, layers with a sliding window go by them"
            )
        self._checked_mask = mask


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    index_q: Tensor | None = None,
    index_k: Tensor | None = None,
    cache_len: Tensor | None = None,
    msa_call: AttentionCall | None = None,
    msa_observer: Callable[..., None] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer; returns (B, T, H, D) as transformers expects. Dropout is not applied.

    `cache_len` (), int64: filled part of a cache of fixed capacity, the new tokens included.

    Raises:
        ValueError: attention with soft-capping or sinks, which MSA does not define.
    """
    msa_call = passed(module, "msa_call", msa_call)
    msa_observer = passed(module, "msa_observer", msa_observer)
    if msa_observer is not None:
        msa_observer(
            module, query, key, scaling=scaling, sliding_window=sliding_window, extra=kwargs
        )
    sdpa = partial(ALL_ATTENTION_FUNCTIONS["sdpa"], scaling=scaling, **kwargs)
    if sliding_window is not None:
        if msa_call is not None and msa_call.document_ids is not None:
            msa_call.check_bounds(attention_mask, msa_call.document_ids, query.device)
        return sdpa(module, query, key, value, attention_mask)
    for name in ("softcap", "s_aux"):
        if kwargs.get(name) is not None:
            raise ValueError(
                f"{type(module).__name__} uses {name}, which sparse attention does not define"
            )
    call = msa_call
    if call is None and index_q is not None:
        call = AttentionCall(module.msa_mode, top_k=module.msa_top_k)
    documents: DocumentIds = attention_mask
    lengths = None
    if attention_mask is not None and attention_mask.dim() == 4:
        if call is not None and call.document_ids is not None:
            raise ValueError("document_ids of a call need a cache that grows: pass a DynamicCache")
        if attention_mask.dtype == torch.int32:
            documents, key, value, index_k = filled_part(attention_mask, key, value, index_k)
        else:
            check_step_mask(
                attention_mask, query.shape[2], index_q is None or cache_len is not None
            )
            if call is None or cache_len is None or _step_is_dense(module, call, query, key):
                return sdpa(module, query, key, value, attention_mask)
            # What the mask hides before the new token is padding; what lies behind it is not read.
            documents = attention_mask[:, 0, 0].int()
            lengths = cache_len.to(torch.int32).repeat(len(key))
    elif msa_call is not None:
        ids = attention_mask if msa_call.document_ids is None else msa_call.document_ids
        documents = None if ids is None else msa_call.documents(ids, query.device)
    offset = key.shape[2] - query.shape[2]
    if call is None or index_q is None or index_k is None:
        common: dict[str, Any] = {"scale": scaling, "document_ids": documents}
        common |= {"query_offset": offset, "backend": dispatch_of(module).execution.backend}
        out, _ = ops.dense_attention(query, key, value, **common)
    else:
        layer = _SparseLayer(module, call, scaling, documents, offset, lengths)
        out = layer(query, key, value, index_q, index_k)
    return out.transpose(1, 2).contiguous(), None


def _step_is_dense(module: Any, call: AttentionCall, query: Tensor, key: Tensor) -> bool:
    """Whether a sparse layer's decoding step on a cache of fixed capacity attends to all of it."""
    if call.mode == "oracle" or call.kl_weight is not None or call.measure:
        raise ValueError(
            "oracle selection, KL and measurements need a cache that grows: pass a DynamicCache, or none"
        )
    if call.mode in ("dense", "warmup"):
        return True
    dispatch = dispatch_of(module)
    if dispatch.execution.index_precision != "input":
        raise ValueError("fp8 scores need a cache that grows: pass a DynamicCache, or none")
    budget = module.msa_geometry.block_size * (call.top_k or module.msa_geometry.top_k)
    # The length is on the device; the capacity decides, since a launch that is replayed must not change.
    return dispatch.runs_dense(
        call.mode == "auto", query, key, budget_tokens=budget, one_token=True
    )


@dataclass(frozen=True)
class _SparseLayer:
    """One sparse layer in one forward pass."""

    module: Any
    call: AttentionCall
    scale: float | None
    documents: DocumentIds
    offset: int
    lengths: Tensor | None
    """(B,) int32, cached tokens of a step on a cache of fixed capacity; None: all keys are there."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, index_q: Tensor, index_k: Tensor) -> Tensor:
        call, execution = self.call, self.dispatch.execution
        wants_report = call.kl_weight is not None or call.measure
        common: dict[str, Any] = {
            "scale": self.scale,
            "document_ids": self.documents,
            "backend": execution.backend,
        }
        chooses = call.mode in ("sparse", "auto", "oracle")
        dense = not chooses or (not wants_report and self._runs_dense(q, k))
        exact = (
            execution.index_precision == "input"
        )  # the decoding kernels score in no other precision
        if q.shape[2] == 1 and not dense and not wants_report and call.mode != "oracle" and exact:
            common["lengths"] = self.lengths
            return ops.sparse_decode(q, k, v, index_q, index_k, **self._budget, **common)
        report = call.reports.setdefault(self.module.layer_idx, LayerReport())
        block_ids: Tensor | None = None
        if dense:
            out, lse = ops.dense_attention(q, k, v, **common, query_offset=self.offset)
        else:
            if report.block_ids is None:
                report.block_ids = self._select(q, k, index_q, index_k)
            elif not _inside_backward():
                raise ValueError(
                    "this AttentionCall has served a forward pass: make a new one for each"
                )
            block_ids = report.block_ids
            common |= {"query_offset": self.offset, "validate": execution.debug}
            size = self.geometry.block_size
            out, lse = ops.sparse_attention(q, k, v, block_ids, block_size=size, **common)
        if call.measure and report.measures is None:
            self._measure(report, q, k, index_q, index_k)
        if call.kl_weight is not None:
            support = q.detach(), k.detach(), lse.detach(), block_ids
            out = self._with_kl(out, support, index_q, index_k, report)
        return out

    def _with_kl(
        self, out: Tensor, support: tuple, index_q, index_k, report: LayerReport
    ) -> Tensor:
        """The output, with the KL attached to it, or the KL reported at once."""
        attach, weight = self.call.attach_kl, self.call.kl_weight
        if attach and any(x.requires_grad for x in (out, index_q, index_k)):
            return AttachKL.apply(out, index_q, index_k, *support, self._kl, weight, report)
        if attach and self.module.training and not torch.is_grad_enabled():
            return (
                out  # the first pass of reentrant checkpointing; its recomputation attaches the KL
            )
        kl = self._kl(index_q, index_k, *support)
        report.kl = kl.detach() if attach else kl
        return out

    def _kl(
        self,
        index_q: Tensor,
        index_k: Tensor,
        q: Tensor,
        k: Tensor,
        lse: Tensor,
        block_ids: Tensor | None,
    ) -> Tensor:
        """The layer's KL over the selected blocks, or over full rows where `block_ids` is None."""
        call, geometry = self.call, self.geometry
        options: dict[str, Any] = {}
        if block_ids is not None:
            options = {"block_ids": block_ids, "block_size": geometry.block_size}
        elif call.kl_fraction < 1:
            # Another number a step and layer.
            seed = call.kl_seed * geometry.num_layers + self.module.layer_idx
            options = {"fraction": call.kl_fraction, "seed": seed}
        return ops.index_kl(
            q,
            k,
            lse,
            index_q,
            index_k,
            **options,
            scale=self.scale,
            index_scale=geometry.index_scale,
            document_ids=self.documents,
            backend=self.dispatch.execution.backend,
        )

    @property
    def geometry(self) -> Geometry:
        return self.module.msa_geometry

    @property
    def dispatch(self) -> Dispatch:
        return dispatch_of(self.module)

    def _runs_dense(self, q: Tensor, k: Tensor) -> bool:
        budget = self._budget
        return self.dispatch.runs_dense(
            self.call.mode == "auto",
            q,
            k,
            budget_tokens=budget["top_k"] * budget["block_size"],
            one_token=q.shape[2] == 1,
        )

    @property
    def _budget(self) -> dict[str, Any]:
        geometry = self.geometry
        return {
            "block_size": geometry.block_size,
            "top_k": self.call.top_k or geometry.top_k,
            "local_blocks": geometry.local_blocks,
            "init_blocks": geometry.init_blocks,
        }

    def _select(self, q: Tensor, k: Tensor, index_q: Tensor, index_k: Tensor) -> Tensor:
        execution = self.dispatch.execution
        where: dict[str, Any] = {
            "document_ids": self.documents,
            "query_offset": self.offset,
            "backend": execution.backend,
        }
        if self.call.mode == "oracle":
            return ops.select_by_mass(q, k, **self._budget, **where, scale=self.scale)
        return ops.select_blocks(index_q, index_k, **self._budget, **where, **execution.precision)

    def _measure(self, report: LayerReport, q, k, index_q, index_k) -> None:
        if self.offset:
            raise ValueError("coverage is measured on whole rows: run without a cache")
        ids = report.block_ids
        if ids is None:
            ids = self._select(q, k, index_q, index_k)
        budget = self._budget
        budget.pop("top_k")
        report.measures = measure_selection(
            q, k, ids, **budget, scale=self.scale, document_ids=self.documents
        )


def _inside_backward() -> bool:
    """Whether autograd is running: a forward pass there is a recomputation under checkpointing."""
    return torch._C._current_graph_task_id() != -1


def register() -> None:
    """Make the implementation known to transformers; harmless when repeated."""
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, document_mask)


@contextmanager
def attention_mode(
    model: nn.Module, mode: Mode, top_k: int | None = None, execution: Execution | None = None
) -> Iterator[None]:
    """Default mode of forward passes without `msa_call`, such as those of `generate`.

    Args:
        execution: how every layer computes meanwhile; None leaves it as it is.
    """
    layers: list[Any] = [module for module in model.modules() if hasattr(module, "msa_mode")]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no sparse layer: convert or load it first")
    before = [(layer.msa_mode, layer.msa_top_k) for layer in layers]
    usual = dispatch_of(layers[0])
    try:
        for layer in layers:
            layer.msa_mode, layer.msa_top_k = mode, top_k
        if execution is not None:
            set_execution(model, execution)
        yield
    finally:
        for layer, (old_mode, old_top_k) in zip(layers, before, strict=True):
            layer.msa_mode, layer.msa_top_k = old_mode, old_top_k
        if execution is not None:
            set_execution(model, usual)
