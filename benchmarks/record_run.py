"""Keep the figures of a finished run: one JSON file with what it ran on beside them.

    python benchmarks/record_run.py runs/quickstart benchmarks/results/quickstart-pca.json

Reads only the run's folder (report's results.csv, eval stages, metrics.jsonl, environment.json,
recipe.json) and prints the tables that README.md shows.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any


def main() -> int:
    """Write the JSON file; exit code 2 with one sentence if the run is not finished."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    if not (options.run / "finished.json").is_file():
        print(f"{options.run} has no finished.json: let the run end first", file=sys.stderr)
        return 2
    record = collect(options.run)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(record, indent=1) + "\n")
    print(tables(record))
    return 0


def collect(run: Path) -> dict[str, Any]:
    """Everything worth keeping of one run."""
    results = sorted(run.glob("eval/*/stage-*.json"), key=lambda p: int(p.stem.split("-")[1]))
    return {
        "recipe": read(run / "recipe.json"),
        "environment": read(run / "environment.json"),
        "finished": read(run / "finished.json"),
        "evaluation": [without_details(read(path)) for path in results],
        "training": training(run / "metrics.jsonl"),
    }


def read(path: Path) -> Any:
    """A JSON file."""
    return json.loads(path.read_text())


def without_details(result: dict[str, Any]) -> dict[str, Any]:
    """A stage's result without single examples and rows."""
    heavy = ("flips", "losses", "by_row")
    if isinstance(result, dict):
        return {k: without_details(v) for k, v in result.items() if k not in heavy}
    if isinstance(result, list):
        return [without_details(item) for item in result]
    return result


def training(path: Path) -> list[dict[str, Any]]:
    """Per training stage: first and last losses, measures, speed and memory."""
    stages: dict[str, dict[str, Any]] = {}
    for line in path.read_text().splitlines():
        record = json.loads(line)
        if "train/loss_kl" not in record and "index/learned_coverage_mean" not in record:
            continue
        stage = stages.setdefault(record["stage"], {"stage": record["stage"], "measured": []})
        if "train/loss_kl" in record:
            kept = {name: record[name] for name in ("step", "train/loss_lm", "train/loss_kl")}
            stage.setdefault("first", kept)
            stage["last"] = kept
            stage.setdefault("step_s", []).append(record["perf/step_s"])
            stage["peak_gib"] = record["memory/peak_gib"]
        else:
            wanted = ("_mean", "_min", "mean_union_blocks")
            stage["measured"].append(
                {k: v for k, v in record.items() if k == "step" or k.endswith(wanted)}
            )
    for stage in stages.values():
        steps = sorted(stage.pop("step_s", [])) or [None]
        stage["median_step_s"] = steps[len(steps) // 2]
    return list(stages.values())


def tables(record: dict[str, Any]) -> str:
    """Markdown tables: perplexity and RULER by arm and budget, coverage by stage."""
    lines = []
    for result in record["evaluation"]:
        where = f"stage {result['stage']} ({result['kind']})"
        if result["kind"] == "perplexity":
            lines += [f"\n{where}\n", "| arm | perplexity |", "|---|---|"]
            lines += [f"| {n} | {a['perplexity']:.3f} |" for n, a in result["arms"].items()]
        if result["kind"] == "ruler":
            lines += [f"\n{where}, {result['samples']} prompts a task\n", "| arm | means | cells |"]
            lines += ["|---|---|---|"]
            for name, arm in result["arms"].items():
                cells = {t: c["score"] for row in arm["scores"].values() for t, c in row.items()}
                lines.append(f"| {name} | {arm['means']} | {cells} |")
        if result["kind"] == "probe":
            lines += [f"\n{where}\n", json.dumps(result["budgets"])[:2000]]
    for stage in record["training"]:
        lines += [f"\n{stage['stage']}: {stage['first']} -> {stage['last']}"]
        lines += [f"  median step {stage['median_step_s']:.2f} s, peak {stage['peak_gib']:.2f} GiB"]
        lines += [f"  {measured}" for measured in stage["measured"]]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
