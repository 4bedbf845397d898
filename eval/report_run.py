"""Report sections of the run itself: curves, index branch, environment, what is missing."""

from __future__ import annotations

import json

from .charts import Series, line_chart
from .report_blocks import Cell, Chart, Details, Section, Table, Text
from .report_data import RunFiles, duration
from .report_results import measured_tasks, when

_CURVES = (
    (
        "Language model loss",
        "nats a token",
        (("train/loss_lm", "training"), ("heldout/loss_lm", "held out")),
    ),
    ("KL between index branch and attention", "nats", (("train/loss_kl", "KL"),)),
    (
        "Learned coverage on held-out rows",
        "share of what the oracle adds",
        (
            ("index/learned_coverage_mean", "mean over layers"),
            ("index/learned_coverage_min", "worst layer"),
        ),
    ),
    (
        "Gradient norms before clipping",
        "norm",
        (("train/grad_norm/backbone", "backbone"), ("train/grad_norm/index", "index branch")),
    ),
)


def training_section(run: RunFiles) -> Section:
    """Curves against training tokens."""
    section = Section("Training")
    begins: dict[int, tuple[float, str]] = {}
    for record in run.metrics:
        if "stage_index" in record:
            begins.setdefault(record["stage_index"], (float(record["tokens"]), record["stage"]))
    trained = dict(run.training_stages())
    marks = [mark for number, mark in sorted(begins.items()) if number in trained]
    for title, unit, lines in _CURVES:
        series = [
            Series(name, points, colour)
            for colour, (metric, name) in enumerate(lines)
            if (points := run.series(metric))
        ]
        chart = line_chart(series, x_label="training tokens", y_label=unit, marks=marks)
        section.blocks.append(Chart(chart, title, half=True))
    if not run.metrics:
        section.blocks.append(Text("No metrics.jsonl: this run trained nothing yet.", "warn"))
    return section


def index_section(run: RunFiles) -> Section:
    """Learned coverage by layer after each training stage, and at the start where it was probed."""
    section = Section("Index branch: learned coverage after each stage")
    states: list[tuple[str, dict[int, float]]] = []
    for result in run.results["probe"]:
        for entry in result["budgets"]:
            layers = entry["layers"].get("learned_coverage")
            if layers and entry["top_k"] == run.top_k():
                named = {int(layer): value for layer, value in layers.items()}
                states.append((f"probe {when(run, result)}", named))
    for number, label in run.training_stages():
        layers = run.by_layer("learned_coverage", number)
        if layers:
            states.append((f"after {label}", layers))
    if not states:
        return section
    rows: list[list[Cell | str]] = []
    for label, layers in states:
        worst = min(layers.items(), key=lambda item: item[1])[0]
        mean = sum(layers.values()) / len(layers)
        rows.append(
            [label, f"{mean:.4f}", f"{layers[worst]:.4f}", f"layer {worst}", str(len(layers))]
        )
    caption = (
        "share of the attention mass beyond the forced blocks that the index branch finds, of what the "
        "oracle finds with as many blocks; last measurement of each stage"
    )
    section.blocks.append(Table(["state", "mean", "worst", "where", "layers"], rows, caption))
    series = [
        Series(label, [(float(layer), value) for layer, value in layers.items()], colour)
        for colour, (label, layers) in enumerate(states)
    ]
    chart = line_chart(series, x_label="layer", y_label="learned coverage")
    section.blocks.append(Chart(chart, "Learned coverage by layer"))
    return section


def missing_section(run: RunFiles) -> Section:
    """What this report does not say."""
    section = Section("What was not measured, and what limits the rest")
    for kind, words in (
        ("probe", "the oracle probe"),
        ("perplexity", "perplexity"),
        ("ruler", "RULER"),
    ):
        if not run.results[kind]:
            section.blocks.append(Text(f"Not measured: {words}."))
    longbench = run.results["longbench"]
    reason = longbench[-1]["reason"] if longbench else "no such stage in this run"
    section.blocks.append(Text(f"Not measured: LongBench ({reason})."))
    for ruler in run.final("ruler"):
        tasks = ", ".join(measured_tasks(ruler)) or "no task"
        section.blocks.append(
            Text(
                f"RULER, {tasks}: {ruler['label']}. With {ruler['samples']} prompts a task, intervals are "
                "wide; read them, not the points."
            )
        )
    if run.results["ruler"]:
        section.blocks.append(
            Text("RULER: the question-answering tasks are not part of this version.")
        )
    section.blocks.append(
        Text(
            "One run, one seed: the intervals cover the choice of prompts and rows, not another training. "
            "Seconds are those of this implementation and machine, and no claim about speed."
        )
    )
    return section


def environment_section(run: RunFiles) -> Section:
    """Where and with what the run was made."""
    section = Section("Environment and recipe")
    rows: list[list[Cell | str]] = []
    for key, value in run.environment.items():
        shown = (
            ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value
        )
        rows.append([key, shown if isinstance(shown, str) else json.dumps(shown)])
    if rows:
        section.blocks.append(Table(["key", "value"], rows))
    else:
        section.blocks.append(Text("No environment.json in the run's folder.", "warn"))
    times: list[list[Cell | str]] = [
        [f"{number}-{done.get('kind', '')}", f"{duration(done):.0f} s"]
        for number, done in run.done.items()
        if duration(done)
    ]
    if times:
        section.blocks.append(Table(["stage", "time"], times))
    sums = _checksums(run)
    if sums:
        section.blocks.append(Table(["data", "checksum"], sums))
    recipe = json.dumps(run.recipe, indent=2, ensure_ascii=False)
    section.blocks.append(Details("Resolved recipe", recipe))
    return section


def _checksums(run: RunFiles) -> list[list[Cell | str]]:
    found = [
        (f"ruler prompts, stage {one['stage']}", one["prompts"]) for one in run.results["ruler"]
    ]
    found += [
        (f"held-out rows, stage {one['stage']}", one["rows_digest"])
        for one in run.results["perplexity"]
    ]
    found += [
        (f"checkpoint measured in stage {one['stage']}", one["checkpoint"])
        for results in run.results.values()
        for one in results
        if "checkpoint" in one
    ]
    return [[name, digest[:16]] for name, digest in found]
