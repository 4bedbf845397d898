"""Report sections of the run itself: verdict, curves, index branch, environment, what is missing."""

from __future__ import annotations

import json
from typing import Any

from .charts import Series, line_chart
from .report_blocks import Card, Cell, Chart, Details, Section, Table, Text
from .report_data import RunFiles
from .report_results import signed, span, when

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


def main_budget(run: RunFiles) -> int | None:
    """The recipe's budget where it was measured, else the largest that was."""
    measured = sorted(
        {
            int(label.partition("-k")[2])
            for kind in ("perplexity", "ruler")
            for label in ((run.last(kind) or {}).get("arms") or {})
            if "-k" in label
        }
    )
    wanted = run.recipe.get("sparsity", {}).get("top_k")
    return wanted if wanted in measured else (measured[-1] if measured else None)


def verdict(run: RunFiles) -> list[str]:
    """What the conversion cost, in sentences with intervals."""
    top_k = main_budget(run)
    if top_k is None:
        return ["Nothing has been measured yet: no evaluation stage of this run has finished."]
    perplexity, ruler = run.last("perplexity"), run.last("ruler")
    parts: list[str] = []
    gap = _main_pair(perplexity, top_k)
    if gap:
        change = gap["change_pct"]
        parts.append(
            f"perplexity is {_moved(change['estimate'], 2, ' %')} than {_reference(gap)} "
            f"({_interval(change, 2, ' %')})"
        )
    lost = _main_pair(ruler, top_k)
    for entry in lost["lengths"] if lost else []:
        gain = {name: -entry["lost"][name] for name in ("estimate", "low", "high")}
        gain["low"], gain["high"] = gain["high"], gain["low"]
        where = f"the RULER mean at {entry['length']} tokens"
        if entry["unseen_share"] is None:
            moved = f"{_moved(gain['estimate'], 1, ' points')} ({_interval(gain, 1, ' points')})"
        else:
            moved = f"the same in all {entry['lost']['samples']} answers"
        parts.append(f"{where} is {moved}")
    blocks = f" of {perplexity['blocks']}" if perplexity else ""
    if not parts:
        return [
            f"Read with {top_k}{blocks} blocks: measured, but without a pair of arms to compare."
        ]
    said = ", ".join(parts[:-1]) + (", and " if parts[1:] else "") + parts[-1]
    lines = [f"Reading {top_k}{blocks} blocks, {said}."]
    source = _decomposition(perplexity, top_k)
    return [*lines, source] if source else lines


def _main_pair(result: dict[str, Any] | None, top_k: int) -> dict[str, Any] | None:
    """What sparsity alone cost, or the whole conversion where dense attention was not measured."""
    if result is None:
        return None
    return _pair(result, "cost of sparsity", top_k) or _pair(result, "whole conversion", top_k)


def _reference(pair: dict[str, Any]) -> str:
    dense = pair["first"] == "converted_dense"
    return "with full attention" if dense else "that of the original model"


def _moved(value: float, digits: int, unit: str) -> str:
    word = "higher" if value >= 0 else "lower"
    return f"{abs(value):.{digits}f}{unit} {word}"


def _interval(gap: dict[str, Any], digits: int, unit: str) -> str:
    zero = ", zero is inside" if gap["low"] <= 0 <= gap["high"] else ""
    return f"95 % interval {span(gap, digits)}{unit}{zero}"


def cards(run: RunFiles) -> list[Card]:
    """Headline figures; only what was measured."""
    found: list[Card] = []
    top_k = main_budget(run)
    sparse, dense = f"converted_sparse-k{top_k}", "converted_dense"
    perplexity, ruler = run.last("perplexity"), run.last("ruler")
    if perplexity and sparse in perplexity["arms"]:
        arms = perplexity["arms"]
        against = f"{arms[dense]['perplexity']:.2f} dense" if dense in arms else ""
        found.append(Card(f"{arms[sparse]['perplexity']:.2f}", f"perplexity, k = {top_k}", against))
    if ruler and sparse in ruler["arms"]:
        for length, mean in ruler["arms"][sparse]["means"].items():
            base = ruler["arms"].get(dense, {}).get("means", {}).get(length)
            against = f"{base:.1f} dense" if base is not None else ""
            found.append(Card(f"{mean:.1f}", f"RULER mean at {length}, k = {top_k}", against))
    stages = [
        (label, layers)
        for number, label in run.training_stages()
        if (layers := run.by_layer("learned_coverage", number))
    ]
    if stages:
        label, layers = stages[-1]
        worst = min(layers, key=lambda layer: layers[layer])
        mean = sum(layers.values()) / len(layers)
        detail = f"worst layer {layers[worst]:.3f} (layer {worst}), after {label}"
        found.append(Card(f"{mean:.3f}", "learned coverage, mean", detail))
    tokens = max((record.get("tokens", 0) for record in run.metrics), default=0)
    if tokens:
        seconds = _seconds(run, ("warmup", "sparse"))
        detail = f"{seconds / 60:.1f} min of training" if seconds else ""
        found.append(Card(f"{tokens:,}", "training tokens", detail))
    return found


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
        wanted = run.recipe.get("sparsity", {}).get("top_k")
        for entry in result["budgets"]:
            layers = entry["layers"].get("learned_coverage")
            if layers and entry["top_k"] == wanted:
                named = {int(layer): value for layer, value in layers.items()}
                states.append((f"probe {when(result)}", named))
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
    longbench = run.last("longbench")
    reason = longbench["reason"] if longbench else "no such stage in this run"
    section.blocks.append(Text(f"Not measured: LongBench ({reason})."))
    ruler = run.last("ruler")
    if ruler:
        section.blocks.append(
            Text(
                f"RULER: {ruler['label']}. The question-answering tasks are not part of this version. With "
                f"{ruler['samples']} prompts a task, intervals are wide; read them, not the points."
            )
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
        [f"{number}-{done.get('kind', '')}", f"{_duration(done):.0f} s"]
        for number, done in run.done.items()
        if _duration(done)
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


def _duration(done: dict[str, Any]) -> float:
    return float(done.get("seconds") or done.get("seconds_since_start_or_resume") or 0.0)


def _seconds(run: RunFiles, kinds: tuple[str, ...]) -> float:
    return sum(_duration(done) for done in run.done.values() if done.get("kind") in kinds)


def _pair(result: dict[str, Any], meaning: str, top_k: int | None) -> dict[str, Any] | None:
    for pair in result["comparisons"]:
        budget = pair["second"].partition("-k")[2]
        if pair["meaning"] == meaning and (not budget or int(budget) == top_k):
            return pair
    return None


def _decomposition(perplexity: dict[str, Any] | None, top_k: int) -> str:
    """Where the perplexity went."""
    if not perplexity:
        return ""
    named = (
        ("training drift", "training itself"),
        ("budget cost", "reading fewer blocks"),
        ("indexer error", "choosing others than the best"),
    )
    parts = []
    for meaning, words in named:
        pair = _pair(perplexity, meaning, top_k)
        if pair:
            gap = pair["change_pct"]
            parts.append(f"{words} {signed(gap['estimate'])} % ({span(gap)} %)")
    return "Perplexity by cause: " + "; ".join(parts) + "." if parts else ""
