"""GPU hours of every recipe, projected from measured steps.

A stage of a recipe takes tokens * FLOPs per token / FLOP/s, with the FLOP/s that the same kind of stage
reached in the benchmark, at the nearest length and size. That is a projection: communication between GPUs,
gradient accumulation, data, measurements and checkpoints are not in it, and of a mixture of experts only
the active experts' arithmetic. Where no such stage was measured at between half and twice the length, there
is none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench_record import ROOT
from step_model import SIZES, Size
from step_run import Case

from dense2sparse.recipes.strict_yaml import read_recipe_file

MODELS: dict[str, Size] = {
    "Qwen/Qwen3-0.6B": SIZES["0.6B"],
    "Qwen/Qwen3-4B": SIZES["4B"],
    "meta-llama/Llama-3.1-8B-Instruct": Size(
        "Llama-3.1-8B", 4096, 14336, 32, 32, 8, 128, 128256, False
    ),
    "HuggingFaceTB/SmolLM2-135M-Instruct": Size(
        "SmolLM2-135M", 576, 1536, 30, 9, 3, 64, 49152, True
    ),
    "Qwen/Qwen3-30B-A3B": Size(
        "Qwen3-30B-A3B", 2048, 8 * 768, 48, 32, 4, 128, 151936, False, num_experts=128
    ),
}
"""Models of the recipes, after their published configurations."""


def projections(records: Sequence[dict[str, Any]], folder: Path = ROOT / "recipes") -> list[dict]:
    """One entry for each training stage of each recipe; `gpu_hours` is None where nothing fits.

    Args:
        records: of step_run.Runner.
        folder: of the recipes.
    """
    found = []
    for file in sorted(folder.glob("*.yaml")):
        recipe = read_recipe_file(file)
        for number, stage in enumerate(recipe["stages"]):
            if stage["kind"] in ("warmup", "sparse"):
                entry = {"recipe": recipe["name"], "stage": f"{number}-{stage['kind']}"}
                found.append({**entry, **_stage(recipe, stage, records)})
    return found


def _stage(
    recipe: dict[str, Any], stage: dict[str, Any], records: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    size = MODELS.get(recipe["model"].get("hub", ""))
    length = stage.get("row_len") or recipe["data"]["row_len"]
    mode = _mode(stage)
    entry = {"mode": mode, "length": length, "tokens": stage.get("tokens"), "gpu_hours": None}
    if size is None or entry["tokens"] is None:
        return {**entry, "said": "not measured: the stage or its model is of no known size"}
    case = Case(_with_budget(size, recipe["sparsity"]), length, mode)
    nearest = _nearest(case, records)
    if nearest is None:
        return {**entry, "said": f"not measured: no {mode} step at about {length} tokens"}
    seconds = entry["tokens"] * case.flops_per_token() / (nearest["tflops"] * 1e12)
    said = f"projection from {nearest['size']} at {nearest['length']} tokens"
    return {**entry, "gpu_hours": seconds / 3600, "said": said}


def _mode(stage: dict[str, Any]) -> str:
    if stage["kind"] == "sparse":
        return "sparse"
    return "warmup trained" if stage.get("backbone") == "trained" else "warmup frozen"


def _with_budget(size: Size, sparsity: dict[str, Any]) -> Size:
    names = ("block_size", "top_k")
    return replace(size, **{name: sparsity[name] for name in names if name in sparsity})


def _nearest(case: Case, records: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The measured step of the same mode whose length, then whose size, comes nearest."""

    def distance(record: dict[str, Any]) -> tuple[float, float]:
        weights = case.size.cost().backbone_weights / SIZES[record["size"]].cost().backbone_weights
        return abs(math.log2(record["length"] / case.length)), abs(math.log(weights))

    fitting = [r for r in records if r["mode"] == case.mode and "tflops" in r]
    fitting = [r for r in fitting if distance(r)[0] <= 1.0]
    return min(fitting, key=distance, default=None)
