"""What a report is made from: files under one run's folder, and nothing else."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

KINDS = ("probe", "perplexity", "ruler", "longbench")

_ARMS: dict[str, type] = {"arms": dict, "comparisons": list}
_PARTS: dict[str, dict[str, type]] = {"probe": {"budgets": list}, **dict.fromkeys(KINDS[1:], _ARMS)}
"""What a measured stage's result cannot do without, by kind."""


@dataclass(frozen=True)
class RunFiles:
    """Everything the report reads; parts that are not there are empty."""

    name: str
    recipe: dict[str, Any]
    environment: dict[str, Any]
    metrics: list[dict[str, Any]]
    results: dict[str, list[dict[str, Any]]]
    """kind -> results of its stages, in the recipe's order."""
    done: dict[int, dict[str, Any]] = field(default_factory=dict)
    """stage number -> its done.json."""
    lm_eval: list[dict[str, Any]] = field(default_factory=list)
    """What `dense2sparse lm-eval` left, a file an arm and list of tasks."""

    def final(self, kind: str) -> list[dict[str, Any]]:
        """Results of a kind that measured the newest weights that any comparison of arms measured."""
        kinds = ("perplexity", "ruler", "longbench")
        found = [one for kind in kinds for one in self.results.get(kind, [])]
        measured = [one for one in found if one.get("measured", True)]
        if not measured:
            return []
        newest = max(measured, key=lambda one: one["stage"])
        wanted = _weights(newest)
        return [one for one in self.results[kind] if _weights(one) == wanted]

    def trainings(self) -> list[str]:
        """Labels of the recipe's training stages, such as `2-warmup`."""
        stages = enumerate(self.recipe.get("stages", []))
        return [f"{n}-{one['kind']}" for n, one in stages if one["kind"] in ("warmup", "sparse")]

    def top_k(self) -> int | None:
        """The budget that was trained for: of the checkpoint that was measured, else the recipe's."""
        for one in (one for kind in ("perplexity", "ruler", "probe") for one in self.results[kind]):
            if "checkpoint_top_k" in one:
                return int(one["checkpoint_top_k"])
        wanted = self.recipe.get("sparsity", {}).get("top_k")
        return int(wanted) if wanted else None

    def series(self, name: str) -> list[tuple[float, float]]:
        """(training tokens, value) of a metric."""
        return [
            (float(record["tokens"]), float(record[name]))
            for record in self.metrics
            if name in record and "tokens" in record
        ]

    def training_stages(self) -> list[tuple[int, str]]:
        """(number, label) of the training stages that left metrics, in order."""
        labels: dict[int, str] = {}
        for record in self.metrics:
            if any(key.startswith("train/") for key in record):
                labels.setdefault(record["stage_index"], record["stage"])
        return sorted(labels.items())

    def by_layer(self, measure: str, stage_index: int) -> dict[int, float]:
        """Last value of `index/<measure>/layer_NN` in a training stage, by layer."""
        prefix = f"index/{measure}/layer_"
        values: dict[int, float] = {}
        for record in self.metrics:
            if record.get("stage_index") == stage_index:
                for key, value in record.items():
                    if key.startswith(prefix):
                        values[int(key.removeprefix(prefix))] = value
        return dict(sorted(values.items()))


def _weights(result: dict[str, Any]) -> tuple[Any, ...]:
    """What a result measured: words may be the same of two checkpoints."""
    return tuple(result.get(key) for key in ("state", "after", "checkpoint"))


def duration(done: dict[str, Any]) -> float:
    """Seconds of a stage, from its done.json."""
    return float(done.get("seconds") or done.get("seconds_since_start_or_resume") or 0.0)


def read_run(run_dir: Path) -> RunFiles:
    """Read a run's folder.

    Raises:
        ValueError: not a folder of a run, or a file in it that is damaged.
    """
    if not run_dir.is_dir():
        raise ValueError(
            f"{run_dir} is not a folder: give the folder of a run, such as runs/quickstart"
        )
    recipe = _json(run_dir / "recipe.json")
    results = {kind: _results(run_dir / "eval" / kind) for kind in KINDS}
    metrics = _lines(run_dir / "metrics.jsonl")
    lm_eval = [_lm_eval(path) for path in sorted(run_dir.glob("eval/lm-eval/*/*.json"))]
    if not recipe and not metrics and not any(results.values()) and not lm_eval:
        raise ValueError(
            f"{run_dir} holds no recipe.json, no metrics.jsonl and no eval results: is it a run's folder?"
        )
    done = {
        int(path.parent.name.split("-")[0]): _json(path)
        for path in run_dir.glob("stages/*/done.json")
        if path.parent.name.split("-")[0].isdigit()
    }
    name = recipe.get("name") or run_dir.resolve().name
    environment = _json(run_dir / "environment.json")
    done = dict(sorted(done.items()))
    return RunFiles(name, recipe, environment, metrics, results, done, lm_eval)


def _results(folder: Path) -> list[dict[str, Any]]:
    results = []
    for path in folder.glob("stage-*.json"):
        results.append(_json(path))
        if not isinstance(results[-1].get("stage"), int):
            raise ValueError(f"{path} names no stage: delete it and run again")
        if results[-1].get("measured", True):
            _check_parts(path, results[-1], _PARTS[folder.name])
    return sorted(results, key=lambda result: result["stage"])


def _check_parts(path: Path, result: dict[str, Any], parts: dict[str, type]) -> None:
    for name, kind in parts.items():
        if not isinstance(result.get(name), kind) or not result[name] and kind is dict:
            raise ValueError(f"{path} is damaged (it has no {name}): delete it and run again")


def _lm_eval(path: Path) -> dict[str, Any]:
    content = _json(path)
    if not isinstance(content.get("arm"), str) or not isinstance(content.get("results"), dict):
        raise ValueError(
            f"{path} names no arm or no results: delete it and run dense2sparse lm-eval again"
        )
    return content


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): delete it and run again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged (no JSON object): delete it and run again")
    return content


def _lines(path: Path) -> list[dict[str, Any]]:
    """Metric records; a torn last line of a killed run is left out."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except ValueError as error:
            if number < len(lines):
                raise ValueError(f"{path}, line {number}, is damaged ({error})") from error
            continue
        if not isinstance(record, dict):
            raise ValueError(f"{path}, line {number}, is damaged (no JSON object)")
        records.append(record)
    return records
