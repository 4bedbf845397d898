"""Report sections of the run itself: curves, counts of outputs, what is missing, environment, checksums."""

from __future__ import annotations

import json
from typing import Any

from ..recipes.stages import RULER_TASKS
from .charts import Series, line_chart
from .report_blocks import Cell, Chart, Details, Section, Table, Text
from .report_data import RunFiles, duration
from .report_longbench import missing_tasks
from .report_words import arm_name, listed, measured_tasks, ruler_name

NAMES = {
    "probe": "the oracle probe",
    "perplexity": "perplexity",
    "ruler": "RULER",
    "longbench": "LongBench",
}

_CURVES = (
    (
        "Language model loss",
        "nats a token",
        (("train/loss_lm", "training"), ("heldout/loss_lm", "held out")),
    ),
    ("KL between index branch and attention", "nats", (("train/loss_kl", "KL"),)),
    (
        "Learned coverage on held-out rows, of what the oracle finds",
        "share",
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


_PROBE = (
    "Probe during training: RULER tasks at the rows' length, answered by the sparse model; few prompts, so "
    "read the direction and not the points"
)


def training_section(run: RunFiles) -> Section:
    """Curves against training tokens, and where they stood at the end of each stage."""
    section = Section("Training")
    begins: dict[int, tuple[float, str]] = {}
    for record in run.metrics:
        if "stage_index" in record:
            begins.setdefault(record["stage_index"], (float(record["tokens"]), record["stage"]))
    trained = dict(run.training_stages())
    marks = [mark for number, mark in sorted(begins.items()) if number in trained]
    tasks = sorted({name for record in run.metrics for name in record if name.startswith("probe/")})
    probe = (_PROBE, "score", tuple((name, name.removeprefix("probe/")) for name in tasks))
    rows: list[list[Cell | str]] = []
    for title, unit, lines in (*_CURVES, probe):
        series = [
            Series(name, points, colour)
            for colour, (metric, name) in enumerate(lines)
            if (points := run.series(metric))
        ]
        ends = (0.0, 100.0) if unit == "score" else None
        chart = line_chart(
            series, x_label="training tokens", y_label=unit, marks=marks, y_range=ends
        )
        if chart:
            section.blocks.append(Chart(chart, title, half=True))
        for metric, name in lines:
            cells = [_ends(run, metric, number) for number in trained]
            if any(cells):
                rows.append([Cell(metric, small=name), *cells])
    if rows:
        caption = "Last value of each training stage, below it the first"
        section.blocks.append(Table(["measure", *trained.values()], rows, caption))
    if not run.metrics:
        section.blocks.append(Text("No metrics.jsonl: this run trained nothing yet.", "warn"))
    return section


def _ends(run: RunFiles, metric: str, stage_index: int) -> Cell | str:
    values = [
        record[metric]
        for record in run.metrics
        if metric in record and record.get("stage_index") == stage_index
    ]
    return Cell(f"{values[-1]:.4g}", small=f"{values[0]:.4g}") if values else ""


def outputs_section(run: RunFiles) -> Section:
    """How many answers were cut short, empty or at their limit, and how many prompts lost their middle."""
    intro = "At the limit: as many new tokens as the task allows, with no end of its own."
    section = Section("Outputs that were truncated, empty or at their limit", intro=intro)
    rows: list[list[Cell | str]] = []
    for kind in ("ruler", "longbench"):
        for result in run.results[kind]:
            for label, arm in result.get("arms", {}).items():
                cells = [cell for tasks in arm["scores"].values() for cell in tasks.values()]
                answers = sum(cell["samples"] for cell in cells)
                where = f"{NAMES[kind]}, stage {result['stage']}: {arm_name(label)}"
                rows.append([where, f"{answers:,}", *_counts(cells, answers)])
    if rows:
        section.blocks.append(Table(["answers of", "all", *_COUNTED.values()], rows))
    return section


_COUNTED = {"truncated": "prompt truncated", "empty": "empty", "at_limit": "at the limit"}


def _counts(cells: list[dict[str, Any]], answers: int) -> list[str]:
    """Each count with its share; nothing where it was not recorded."""
    found = []
    for name in _COUNTED:
        if not all(name in cell for cell in cells):
            found.append("not recorded")
            continue
        count = sum(cell[name] for cell in cells)
        found.append(f"{count:,} ({100 * count / answers:.1f} %)" if count else "0")
    return found


def missing_section(run: RunFiles) -> Section:
    """What this report does not say."""
    section = Section("What was not measured, and what limits the rest")
    for kind, name in NAMES.items():
        if not any(one.get("measured", True) for one in run.results[kind]):
            said = [one["reason"] for one in run.results[kind] if one.get("reason")]
            reason = said[-1] if said else "no such stage has finished in this run"
            section.blocks.append(Text(f"Not measured: {name} ({reason})."))
            continue
        for result in run.results[kind]:
            for sentence in missing_tasks(result):
                section.blocks.append(Text(f"Not measured: {name}, {sentence}."))
    if not run.lm_eval:
        command = "`dense2sparse lm-eval RUN_DIR --tasks ...` has not been run"
        section.blocks.append(Text(f"Not measured: short tasks of lm-eval ({command})."))
    for ruler in run.final("ruler"):
        name, samples = ruler_name(measured_tasks(ruler)), ruler["samples"]
        worth = (
            "say what that is worth" if samples >= 100 else "are wide; read them, not the points"
        )
        words = f"{name}: {ruler['label']}. With {samples} prompts a task, intervals {worth}."
        section.blocks.append(Text(words))
        absent = [task for task in RULER_TASKS if task not in measured_tasks(ruler)]
        if absent:
            section.blocks.append(Text(f"Not part of these means: {', '.join(absent)}."))
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
    section.blocks.extend(Text(line) for line in _positions(run))
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


def _positions(run: RunFiles) -> list[str]:
    """Window and rope of what was measured, one sentence for all stages that had the same."""
    told: dict[str, list[str]] = {}
    for kind, results in run.results.items():
        for one in results:
            if "positions" in one:
                told.setdefault(_rope(one["positions"]), []).append(
                    f"{kind} (stage {one['stage']})"
                )
    if len(told) == 1:
        return [f"Positions: {words}, the same in every arm." for words in told]
    return [
        f"Positions in {listed(places)}: {words}, the same in every arm."
        for words, places in told.items()
    ]


def _rope(positions: dict[str, Any]) -> str:
    """`window 32768, yarn, factor 4`."""
    rope = positions["rope"] or {}
    factor = [f"factor {rope['factor']:g}"] if "factor" in rope else []
    kind = [rope["rope_type"]] if rope else []
    return ", ".join([f"window {positions['window']}", *kind, *factor])


def _checksums(run: RunFiles) -> list[list[Cell | str]]:
    """What was measured on, by the checksums that the stages recorded."""
    found = [
        (f"{NAMES[kind]} prompts, stage {one['stage']}", one["prompts"])
        for kind in ("ruler", "longbench")
        for one in run.results[kind]
        if one.get("prompts")
    ]
    found += [
        (f"LongBench records of {task}, {source['taken']} of {source['records']}", source["sha256"])
        for one in run.results["longbench"]
        for task, source in (one.get("sources") or {}).items()
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
