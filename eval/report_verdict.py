"""The top of the report: what the conversion cost in sentences, and the headline figures.

Both speak of the newest weights that were measured, and of every stage that measured them.
"""

from __future__ import annotations

from typing import Any

from .report_blocks import Card
from .report_data import RunFiles, duration
from .report_words import (
    budgets,
    find_pair,
    length_name,
    listed,
    main_budget,
    measured_lengths,
    measured_tasks,
    overall,
    plain,
    ruler_name,
    signed,
    span,
    start_name,
    when,
)

_CAUSES = ("training drift", "budget cost", "indexer error")


def verdict(run: RunFiles) -> list[str]:
    """What the conversion cost: one sentence with interval, margin and causes; then the other measures."""
    scored = [
        (kind, one)
        for kind in ("ruler", "longbench")
        for one in run.final(kind)
        if kind == "ruler" or one.get("measured")
    ]
    perplexities = run.final("perplexity")
    if not scored and not perplexities:
        return ["Nothing has been measured yet: no evaluation stage of this run has finished."]
    # The result over most cells speaks first: a mean over tasks, not one of them.
    scored.sort(key=lambda found: (found[0] != "ruler", -len(measured_tasks(found[1]))))
    lines = [_score_line(run, kind, one) for kind, one in scored]
    lines += [_perplexity_line(run, one, perplexities) for one in perplexities]
    lines = [line for line in lines if line] or ["Measured, but without a pair of arms to compare."]
    newest = [*perplexities, *(one for _, one in scored)][-1]
    lines[0] = _unfinished(run, newest) + lines[0]
    return [line for line in (*lines, _start(run)) if line]


def _score_line(run: RunFiles, kind: str, result: dict[str, Any]) -> str:
    """`Converted to read 16 blocks, the model loses ... (interval), within the margin ..., by cause ...`"""
    top_k = main_budget(run, result)
    pair = _main_pair(result, top_k)
    entry = None if pair is None else overall(pair)
    if pair is None or entry is None:
        return ""
    tasks, lengths = measured_tasks(result), measured_lengths(result)
    where = f"at {listed([length_name(length) for length in lengths])} tokens"
    what = f"{'the ' if tasks[1:] else ''}{ruler_name(tasks)} {where}"
    if kind == "longbench":
        what = f"the LongBench mean of {len(tasks)} tasks" if tasks[1:] else f"LongBench {tasks[0]}"
    answers = f"{entry['lost']['samples']} paired answers"
    whole = pair["meaning"] == "whole conversion"
    begin = "Converted to read" if whole else "Reading"
    begin += f" {top_k} {_blocks(result)}{'' if whole else ' instead of all'}, the"
    begin += f" {'' if whole else 'converted '}model"
    if entry["unseen_share"] is not None:
        share = f"{100 * entry['unseen_share']:.0f} %"
        said = (
            f"has the same score on every prompt of {what} ({answers}; up to {share} could change)"
        )
    else:
        lost = entry["lost"]
        points, ends = plain(lost).split(" (")
        said = f"loses {points} points of {what} (95 % interval {ends[:-1]}, {answers})"
        if lost["estimate"] < 0:
            said = f"gains {-lost['estimate']:.1f} points of {what} (95 % interval of what is lost "
            said += f"{ends[:-1]}, {answers})"
    parts = [f"{begin} {said}", _judged(result, entry), _causes(result, top_k)]
    return ", ".join(part for part in parts if part) + "." + _moot(pair, entry)


def _moot(pair: dict[str, Any], entry: dict[str, Any]) -> str:
    """A warning where half of the cells or more could hardly have shown a difference."""
    moot = entry.get("uninformative") or 0
    cells = sum(len(one["tasks"]) for one in pair["lengths"])
    if 2 * moot < cells or not moot:
        return ""
    which = "every one of its cells" if moot == cells else f"{moot} of its {cells} cells"
    return f" But {which} can hardly show a loss: both arms are below 10 or above 99 there."


def _blocks(result: dict[str, Any]) -> str:
    size = result.get("block_size")
    return f"blocks of {size} tokens" if size else "blocks"


def _judged(result: dict[str, Any], entry: dict[str, Any]) -> str:
    """What the recorded verdict says about the margin."""
    margin = result.get("margin")
    if margin is None or "verdict" not in entry:
        return ""
    points = f"{margin:g} point{'' if margin == 1 else 's'}"
    return {
        "non-inferior": f"which is within the margin of {points}",
        "inferior": f"which is beyond the margin of {points}",
        "undecided": f"too few answers to say whether that is within the margin of {points}",
    }[entry["verdict"]]


def _causes(result: dict[str, Any], top_k: int | None) -> str:
    """`by cause: training drift +0.1, budget cost +0.3, indexer error +0.8 (the largest)`."""
    parts, changed = [], False
    for meaning in _CAUSES:
        pair = find_pair(result, meaning, top_k)
        entry = None if pair is None else overall(pair)
        if entry is None:
            continue
        same = entry["unseen_share"] is not None
        changed = changed or not same
        parts.append(f"{meaning} {'none' if same else plain(entry['lost'])}")
    return f"by cause: {listed(parts)}" if changed and parts[1:] else ""


def _perplexity_line(run: RunFiles, result: dict[str, Any], every: list[dict[str, Any]]) -> str:
    top_k = main_budget(run, result)
    pair = _main_pair(result, top_k)
    if pair is None:
        return ""
    change = pair["change_pct"]
    several = f" (stage {result['stage']})" if every[1:] else ""
    moved = f"{_moved(change['estimate'], 2, ' %')} than {_reference(pair)}"
    said = f"Reading {top_k} of {result['blocks']} blocks, perplexity{several} is {moved}"
    parts = [f"{said} ({_interval(change, 2, ' %')})"]
    named = [(name, find_pair(result, name, top_k)) for name in _CAUSES]
    causes = [
        f"{name} {signed(found['change_pct']['estimate'])} % ({span(found['change_pct'])} %)"
        for name, found in named
        if found
    ]
    if len(causes) > 1:
        parts.append(f"by cause: {listed(causes)}")
    return ", ".join(parts) + "."


def cards(run: RunFiles) -> list[Card]:
    """Headline figures; only what was measured."""
    found: list[Card] = []
    dense = "converted_dense"
    for result in run.final("perplexity"):
        arms, top_k = result["arms"], main_budget(run, result)
        sparse = arms.get(f"converted_sparse-k{top_k}")
        if sparse:
            against = f"{arms[dense]['perplexity']:.2f} dense" if dense in arms else ""
            found.append(Card(f"{sparse['perplexity']:.2f}", f"perplexity, k = {top_k}", against))
    for result in run.final("ruler"):
        arms, top_k = result["arms"], main_budget(run, result)
        sparse = arms.get(f"converted_sparse-k{top_k}", {"means": {}})
        for length, mean in sparse["means"].items():
            base = arms.get(dense, {}).get("means", {}).get(length)
            tasks = measured_tasks(result, length)
            detail = f"{result['samples']} prompts a task"
            if base is not None:
                detail = f"{base:.1f} dense; {detail}"
            label = f"{ruler_name(tasks)} at {length_name(length)}, k = {top_k}"
            found.append(Card(f"{mean:.1f}", label, detail))
    return [*found, *_training_cards(run)]


def _training_cards(run: RunFiles) -> list[Card]:
    found: list[Card] = []
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
        trained = [done for done in run.done.values() if done.get("kind") in ("warmup", "sparse")]
        seconds = sum(map(duration, trained))
        detail = f"{seconds / 60:.1f} min of training" if seconds else ""
        found.append(Card(f"{tokens:,}", "training tokens", detail))
    return found


def _unfinished(run: RunFiles, result: dict[str, Any]) -> str:
    """What to say first where the recipe's training had not ended when this was measured."""
    if result.get("state") or len(result.get("after") or []) >= len(run.trainings()):
        return ""
    return f"Measured {when(run, result)}, not yet at the end of training. "


def _start(run: RunFiles) -> str:
    """What perplexity the untrained index branch reaches at each budget, where training followed."""
    final = run.final("perplexity")
    for result in run.results["perplexity"]:
        if result.get("state") or result.get("after") or result in final:
            continue
        pairs = [(top_k, _main_pair(result, top_k)) for top_k in budgets(result)]
        said = [
            f"{signed(pair['change_pct']['estimate'])} % ({span(pair['change_pct'])} %) at k = {top_k}"
            for top_k, pair in pairs
            if pair
        ]
        if said:
            return f"Before training, the {start_name(run)} had moved perplexity by {listed(said)}."
    return ""


def _main_pair(result: dict[str, Any], top_k: int | None) -> dict[str, Any] | None:
    """The whole conversion, or what sparsity alone cost where the original was not measured."""
    return find_pair(result, "whole conversion", top_k) or find_pair(
        result, "cost of sparsity", top_k
    )


def _reference(pair: dict[str, Any]) -> str:
    dense = pair["first"] == "converted_dense"
    return "with full attention" if dense else "that of the original model"


def _moved(value: float, digits: int, unit: str) -> str:
    word = "higher" if value >= 0 else "lower"
    return f"{abs(value):.{digits}f}{unit} {word}"


def _interval(gap: dict[str, Any], digits: int, unit: str) -> str:
    zero = ", zero is inside" if gap["low"] <= 0 <= gap["high"] else ""
    return f"95 % interval {span(gap, digits)}{unit}{zero}"
