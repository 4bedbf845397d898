"""The report of a run: `report.html` (one file, no network, no script), `report.md` and `results.csv`.

Reads nothing but files under the run's folder, so anyone who has that folder can make it again:
`python -m dense2sparse.eval.report RUN_DIR`.
"""

from __future__ import annotations

import argparse
import csv
import io
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from .errors import sentence
from .records import write_text
from .report_blocks import Page, to_html, to_markdown
from .report_data import RunFiles, read_run
from .report_results import perplexity_section, probe_section, ruler_section
from .report_run import (
    environment_section,
    index_section,
    missing_section,
    training_section,
)
from .report_style import STYLE
from .report_verdict import cards, verdict

_COLUMNS = ("kind", "stage", "length", "task", "arm", "measure", "value", "low", "high", "samples")


def write_report(run_dir: Path) -> dict[str, Path]:
    """Write the three files into `run_dir`, each atomically; returns their paths by kind.

    Raises:
        ValueError: not a run's folder, or a damaged file in it.
    """
    run = read_run(run_dir)
    page = build(run)
    files = {
        "html": run_dir / "report.html",
        "markdown": run_dir / "report.md",
        "csv": run_dir / "results.csv",
    }
    write_text(files["html"], to_html(page, STYLE))
    write_text(files["markdown"], to_markdown(page))
    write_text(files["csv"], to_csv(run))
    return files


def build(run: RunFiles) -> Page:
    """The page, section by section; what the run has not is left out, and said."""
    sections = [
        perplexity_section(run),
        ruler_section(run),
        index_section(run),
        probe_section(run),
        training_section(run),
        missing_section(run),
        environment_section(run),
    ]
    model = run.recipe.get("model", {})
    source = model.get("path") or model.get("hub") or model.get("wheel") or "unknown checkpoint"
    commit = str(run.environment.get("commit", ""))[:12]
    parts = [source, str(run.environment.get("date", "")), f"commit {commit}" if commit else ""]
    return Page(
        title=f"Dense to sparse: {run.name}",
        subtitle=" · ".join(part for part in parts if part),
        verdict=verdict(run),
        cards=cards(run),
        sections=[section for section in sections if section.blocks],
    )


def to_csv(run: RunFiles) -> str:
    """Every number of the evaluation stages, one a line."""
    text = io.StringIO()
    writer = csv.DictWriter(text, _COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    for kind, rows in (
        ("perplexity", _perplexity_rows),
        ("ruler", _ruler_rows),
        ("probe", _probe_rows),
    ):
        for result in run.results[kind]:
            for row in rows(result):
                writer.writerow({"kind": kind, "stage": result["stage"], **row})
    return text.getvalue()


def _perplexity_rows(result: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for label, arm in result["arms"].items():
        shared = {"length": result["row_len"], "arm": label, "samples": result["rows"]}
        yield {**shared, "measure": "perplexity", "value": arm["perplexity"]}
    for pair in result["comparisons"]:
        measure = f"{pair['meaning']} (%)"
        yield {"length": result["row_len"], **_gap(pair, measure, pair["change_pct"])}


def _ruler_rows(result: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for label, arm in result["arms"].items():
        for length, tasks in arm["scores"].items():
            for task, cell in tasks.items():
                shared = {"length": length, "task": task, "arm": label, "samples": cell["samples"]}
                yield {**shared, "measure": "score", "value": cell["score"]}
            shared = {"length": length, "task": _mean_of(tasks), "arm": label}
            yield {**shared, "measure": "score", "value": arm["means"][length]}
    for pair in result["comparisons"]:
        for entry in pair["lengths"]:
            measure = f"{pair['meaning']} (points lost)"
            mean = _mean_of(task["task"] for task in entry["tasks"])
            yield {"length": entry["length"], "task": mean, **_gap(pair, measure, entry["lost"])}
            for task in entry["tasks"]:
                shared = {"length": entry["length"], "task": task["task"]}
                yield {**shared, **_gap(pair, measure, task["lost"])}


def _mean_of(tasks: Iterable[str]) -> str:
    return f"mean of {' + '.join(sorted(tasks))}"


def _probe_rows(result: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for entry in result["budgets"]:
        shared = {"length": result["row_len"], "arm": f"converted_oracle-k{entry['top_k']}"}
        for which in ("mean", "worst"):
            for name, value in entry[which].items():
                yield {**shared, "measure": f"{name} ({which} layer)", "value": value}
        gap = entry["loss_gap"]
        yield {**shared, "measure": "loss added (nats)"} | _interval(gap)


def _gap(pair: dict[str, Any], measure: str, interval: dict[str, Any]) -> dict[str, Any]:
    arms = f"{pair['first']} > {pair['second']}"
    return {"arm": arms, "measure": measure, **_interval(interval)}


def _interval(interval: dict[str, Any]) -> dict[str, Any]:
    named = {name: interval[name] for name in ("low", "high", "samples")}
    return {"value": interval["estimate"], **named}


def main(arguments: list[str] | None = None) -> int:
    """`python -m dense2sparse.eval.report RUN_DIR`; exit code 2 for a folder that cannot be read."""
    parser = argparse.ArgumentParser(prog="dense2sparse report", description=__doc__)
    parser.add_argument("run_dir", type=Path, help="folder of a run, such as runs/quickstart")
    options = parser.parse_args(arguments)
    try:
        files = write_report(options.run_dir)
    except (ValueError, OSError) as error:
        said = sentence(error)
        if said is None:
            raise
        print(f"error: {said}", file=sys.stderr)
        return 2
    for path in files.values():
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
