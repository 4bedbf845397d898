"""Share of a training step's time by operation, from the names of the kernels that torch.profiler saw."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from dense2sparse.kernels import (
    triton_attend,
    triton_attend_dkv,
    triton_attend_dq,
    triton_kl_full,
    triton_kl_gradients,
    triton_kl_lists,
    triton_kl_union,
    triton_select,
    triton_unions,
)

SOURCES: tuple[tuple[str, tuple[ModuleType, ...]], ...] = (
    ("select", (triton_select,)),
    ("attend forward", (triton_attend,)),
    ("attend backward", (triton_attend_dkv, triton_attend_dq)),
    ("kl", (triton_kl_full, triton_kl_gradients, triton_kl_lists, triton_kl_union)),
    ("unions and lists", (triton_unions,)),
)
"""Groups of our own kernels, by the files that define them."""
PARTS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("dense attention", ("flash", "fmha", "sdpa", "fort_native", "fprop", "bprop", "attention")),
    ("optimizer", ("multi_tensor", "adam")),
    ("matmul", ("nvjet", "gemm", "cutlass", "cublas", "xmma", "splitk", "mm_kernel")),
    ("unions and lists", ("radix", "searchsorted", "scan")),
)
"""Groups of the other kernels, by a part of the name in lower case; the first that fits."""
GROUPS = (
    "select",
    "attend forward",
    "attend backward",
    "kl",
    "unions and lists",
    "dense attention",
    "matmul",
    "optimizer",
    "rest",
)
Kernel = tuple[float, str, float]
"""Start, name, duration, both times in microseconds."""


def our_names() -> dict[str, list[str]]:
    """Groups that each of our kernels' names may belong to; a name can stand in two files."""
    found: dict[str, list[str]] = {}
    for group, modules in SOURCES:
        for module in modules:
            for name, value in vars(module).items():
                jitted = type(value).__name__ in ("JITFunction", "InterpretedFunction")
                mine = getattr(getattr(value, "fn", None), "__module__", "") == module.__name__
                if jitted and mine and group not in found.setdefault(name, []):
                    found[name].append(group)
    return found


def shares(kernels: Iterable[Kernel]) -> dict[str, float]:
    """Share of the summed time of each group of GROUPS.

    A name that stands in two of our files counts with the last kernel before it that is certain.
    """
    ours = our_names()
    sums = dict.fromkeys(GROUPS, 0.0)
    last = "rest"
    for _, name, duration in sorted(kernels):
        candidates = ours.get(name, [])
        if len(candidates) == 1:
            last = candidates[0]
        if candidates:
            group = last if last in candidates else candidates[0]
        else:
            lower = name.lower()
            fits = (one for one, parts in PARTS if any(part in lower for part in parts))
            group = next(fits, "rest")
        sums[group] += duration
    total = sum(sums.values())
    return {group: value / total for group, value in sums.items()} if total else sums


def profiled(step: Callable[[], Any], device: torch.device) -> tuple[dict[str, float], float]:
    """Shares of one step, and the milliseconds in which the device was busy; of the host on a CPU."""
    cuda = device.type == "cuda"
    activity = ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU
    with profile(activities=[activity]) as seen:
        step()
        if cuda:
            torch.cuda.synchronize()
    kernels: list[Kernel] = []
    for event in seen.events() or []:
        on_device = str(event.device_type).endswith("CUDA")
        # Ranges that a program marks are shown beside the kernels that they hold.
        marked = getattr(event, "is_user_annotation", False) or "#" in event.name
        if on_device == cuda and not marked:
            span = event.time_range
            kernels.append((span.start, event.name, span.end - span.start))
    return shares(kernels), sum(kernel[2] for kernel in kernels) / 1e3
