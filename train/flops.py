"""Analytic cost of a training token, the device's peak and the peak memory: the parts of MFU.

Model FLOPs, after msa.md section 6: matrix products only, recomputation not counted, a token sees
the keys of its own document. The forward pass of a token costs 2 FLOPs per weight that multiplies
it; per layer and visible key the attention costs 4 H_q d_h and the index scores 2 H_idx d_idx. A
backward pass costs twice its forward pass, and half of that where only the inputs need a gradient.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

# Dense peak in TFLOP/s without sparsity, from the vendors' data sheets: (bf16, fp32 without TF32).
# Longer names first: "H100 PCIe" must not be read as "H100".
_GPU_PEAK_TFLOPS: tuple[tuple[str, float, float], ...] = (
    ("GB200", 2500.0, 80.0),
    ("B200", 2250.0, 75.0),
    ("GH200", 989.0, 67.0),
    ("H200", 989.0, 67.0),
    ("H100 PCIe", 756.0, 51.0),
    ("H100 NVL", 835.0, 60.0),
    ("H100", 989.0, 67.0),
    ("H800", 989.0, 67.0),
    ("H20", 148.0, 44.0),
    ("A100", 312.0, 19.5),
    ("A800", 312.0, 19.5),
    ("L40S", 362.0, 91.6),
    ("L40", 181.0, 90.5),
    ("L4", 121.0, 30.3),
    ("A10", 125.0, 31.2),
    ("RTX 4090", 165.2, 82.6),
    ("RTX 3090", 71.0, 35.6),
)


@dataclass(frozen=True)
class ModelCost:
    """What the FLOP count needs to know of a converted model; counts, not gigas."""

    backbone_weights: int
    """Weights that multiply every token: linear layers and the output head; of experts the active ones."""
    index_weights: int
    num_layers: int
    num_sparse_layers: int
    query_width: int
    """H_q d_h."""
    index_width: int
    """H_idx d_idx."""
    budget_tokens: int
    """k B_k."""


def model_cost(
    model: Any, index_names: set[str], sparse: Mapping[str, Any] | None = None
) -> ModelCost:
    """Read a `ModelCost` off a converted model (its tensors may lie on the meta device).

    Args:
        index_names: names of the index branch's parameters.
        sparse: a `sparse_attention_config` block; default the model's own.
    """
    sparse = sparse or model.config.sparse_attention_config
    config = model.config.get_text_config()
    head = model.get_output_embeddings().weight
    embedding = model.get_input_embeddings().weight
    num_experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None)
    active = (getattr(config, "num_experts_per_tok", None) or 1) / (num_experts or 1)
    backbone, index = 0.0, 0.0
    for name, weight in model.named_parameters():
        if weight is embedding or weight is head or weight.dim() < 2:
            continue
        count = getattr(weight, "ds_numel", weight.numel())
        if name in index_names:
            index += count
        else:
            backbone += count * (active if num_experts and ".experts" in name else 1.0)
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return ModelCost(
        backbone_weights=round(backbone) + getattr(head, "ds_numel", head.numel()),
        index_weights=round(index),
        num_layers=config.num_hidden_layers,
        num_sparse_layers=sum(sparse["sparse_attention_freq"]),
        query_width=heads * width,
        index_width=sparse["sparse_num_index_heads"] * sparse["sparse_index_dim"],
        budget_tokens=sparse["sparse_topk_blocks"] * sparse["sparse_block_size"],
    )


def flops_per_token(
    cost: ModelCost, *, mode: str, frozen: bool, visible_keys: float, kl_fraction: float = 1.0
) -> float:
    """Model FLOPs of training on one token.

    Args:
        mode: "warmup" (full attention, KL over the row) or "sparse" (top-k, KL over the selection).
        frozen: whether the backbone runs forward only.
        visible_keys: mean number of keys a query may see, its own included (mean position + 1).
        kl_fraction: share of the queries whose KL is computed (warm-up).
    """
    kept = min(visible_keys, float(cost.budget_tokens))
    num_dense = cost.num_layers - cost.num_sparse_layers
    main_keys = num_dense * visible_keys + cost.num_sparse_layers * (
        kept if mode == "sparse" else visible_keys
    )
    backbone = 2.0 * cost.backbone_weights + 4.0 * cost.query_width * main_keys
    # Every score is needed forward (to select, or as student); only the KL's support has a gradient.
    scored = 2.0 * cost.index_width * cost.num_sparse_layers
    students = visible_keys if mode == "sparse" else visible_keys * kl_fraction
    index_forward = 2.0 * cost.index_weights + scored * students
    support = kept if mode == "sparse" else students
    # The index branch reads a detached input: its weights need a gradient, its input does not.
    index_backward = 2.0 * cost.index_weights + 2.0 * scored * support
    return backbone * (1.0 if frozen else 3.0) + index_forward + index_backward


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Peak FLOP/s of one rank's device; None for a GPU that is not in the table.

    On CPU there is no data sheet to read: it is measured, as the best of five products of two
    768 x 768 float32 matrices with this rank's threads. MFU on CPU is relative to that.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for part, bf16, fp32 in _GPU_PEAK_TFLOPS:
            if part in name:
                return (bf16 if precision == "bf16" else fp32) * 1e12
        return None
    size = 768
    left, right = torch.ones(size, size), torch.ones(size, size)
    best = float("inf")
    for _ in range(5):
        begun = time.perf_counter()
        torch.mm(left, right)
        best = min(best, time.perf_counter() - begun)
    return 2.0 * size**3 / best


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory of this process: CUDA allocations, or the resident set on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
