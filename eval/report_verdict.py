"""The top of the report: what the conversion cost in sentences, and the headline figures.

Both speak of the newest weights that were measured, and of every stage that measured them.
"""

from __future__ import annotations

from typing import Any

from .report_blocks import Card
from .report_data import RunFiles, duration
from .report_results import listed, measured_tasks, ruler_name, signed, span, start_name, when


def verdict(run: RunFiles) -> list[str]:
    """What the conversion cost, in sentences with intervals; one sentence a budget."""
    perplexities, rulers = run.final("perplexity"), run.final("ruler")
    if not perplexities and not rulers:
        return ["Nothing has been measured yet: no evaluation stage of this run has finished."]
    parts: dict[int, list[str]] = {}
    for result in perplexities:
        several = f" (stage {result['stage']})" if perplexities[1:] else ""
        for top_k, said in _perplexity_parts(run, result, several):
            parts.setdefault(top_k, []).append(said)
    for result in rulers:
        for top_k, said in _ruler_parts(run, result):
            parts.setdefault(top_k, []).append(said)
    blocks = f" of {perplexities[-1]['blocks']}" if perplexities else ""
    lines = [
        f"Reading {top_k}{blocks} blocks, {', and '.join(_head_and_last(said))}."
        for top_k, said in parts.items()
    ] or ["Measured, but without a pair of arms to compare."]
    lines[0] = _unfinished(run, [*perplexities, *rulers][-1]) + lines[0]
    causes = [_decomposition(run, result) for result in perplexities[-1:]]
    return [line for line in (*lines, *causes, _start(run)) if line]


def cards(run: RunFiles) -> list[Card]:
    """Headline figures; only what was measured."""
    found: list[Card] = []
    dense = "converted_dense"
    for result in run.final("perplexity"):
        arms, top_k = result["arms"], _budget(run, result)
        sparse = arms.get(f"converted_sparse-k{top_k}")
        if sparse:
            against = f"{arms[dense]['perplexity']:.2f} dense" if dense in arms else ""
            found.append(Card(f"{sparse['perplexity']:.2f}", f"perplexity, k = {top_k}", against))
    for result in run.final("ruler"):
        arms, top_k = result["arms"], _budget(run, result)
        sparse = arms.get(f"converted_sparse-k{top_k}", {"means": {}})
        for length, mean in sparse["means"].items():
            base = arms.get(dense, {}).get("means", {}).get(length)
            tasks = measured_tasks(result, length)
            detail = f"{result['samples']} prompts a task"
            if base is not None:
                detail = f"{base:.1f} dense; {detail}"
            label = f"{ruler_name(tasks)} at {length}, k = {top_k}"
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


def _budget(run: RunFiles, result: dict[str, Any]) -> int | None:
    """The budget that was trained for where this stage measured it, else its largest."""
    measured = _budgets(result)
    wanted = run.top_k()
    return wanted if wanted in measured else max(measured, default=None)


def _budgets(result: dict[str, Any]) -> list[int]:
    return sorted({int(label.partition("-k")[2]) for label in result["arms"] if "-k" in label})


def _perplexity_parts(run: RunFiles, result: dict[str, Any], which: str) -> list[tuple[int, str]]:
    """(budget, what to say of it)."""
    top_k = _budget(run, result)
    pair = _main_pair(result, top_k)
    if pair is None or top_k is None:
        return []
    change = pair["change_pct"]
    moved = f"{_moved(change['estimate'], 2, ' %')} than {_reference(pair)}"
    return [(top_k, f"perplexity{which} is {moved} ({_interval(change, 2, ' %')})")]


def _ruler_parts(run: RunFiles, result: dict[str, Any]) -> list[tuple[int, str]]:
    """(budget, what to say of it) at each length."""
    top_k = _budget(run, result)
    pair = _main_pair(result, top_k)
    if pair is None or top_k is None:
        return []
    found = []
    for entry in pair["lengths"]:
        lost, tasks = entry["lost"], [task["task"] for task in entry["tasks"]]
        gain = {"estimate": -lost["estimate"], "low": -lost["high"], "high": -lost["low"]}
        the = "" if len(tasks) == 1 else "the "
        where = f"{the}{ruler_name(tasks)} at {entry['length']} tokens ({lost['samples']} prompts)"
        if entry["unseen_share"] is None:
            moved = f"{_moved(gain['estimate'], 1, ' points')} ({_interval(gain, 1, ' points')})"
        else:
            moved = "the same in every answer"
        found.append((top_k, f"{where} is {moved}"))
    return found


def _head_and_last(parts: list[str]) -> list[str]:
    """All but the last, and the last."""
    return [", ".join(parts[:-1]), parts[-1]] if parts[1:] else parts


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
        pairs = [(top_k, _main_pair(result, top_k)) for top_k in _budgets(result)]
        said = [
            f"{signed(pair['change_pct']['estimate'])} % ({span(pair['change_pct'])} %) at k = {top_k}"
            for top_k, pair in pairs
            if pair
        ]
        if said:
            return f"Before training, the {start_name(run)} had moved perplexity by {listed(said)}."
    return ""


def _main_pair(result: dict[str, Any], top_k: int | None) -> dict[str, Any] | None:
    """What sparsity alone cost, or the whole conversion where dense attention was not measured."""
    return _pair(result, "cost of sparsity", top_k) or _pair(result, "whole conversion", top_k)


def _pair(result: dict[str, Any], meaning: str, top_k: int | None) -> dict[str, Any] | None:
    for pair in result["comparisons"]:
        budget = pair["second"].partition("-k")[2]
        if pair["meaning"] == meaning and (not budget or int(budget) == top_k):
            return pair
    return None


def _reference(pair: dict[str, Any]) -> str:
    dense = pair["first"] == "converted_dense"
    return "with full attention" if dense else "that of the original model"


def _moved(value: float, digits: int, unit: str) -> str:
    word = "higher" if value >= 0 else "lower"
    return f"{abs(value):.{digits}f}{unit} {word}"


def _interval(gap: dict[str, Any], digits: int, unit: str) -> str:
    zero = ", zero is inside" if gap["low"] <= 0 <= gap["high"] else ""
    return f"95 % interval {span(gap, digits)}{unit}{zero}"


def _decomposition(run: RunFiles, result: dict[str, Any]) -> str:
    """Where the perplexity went."""
    named = (
        ("training drift", "training itself"),
        ("budget cost", "reading fewer blocks"),
        ("indexer error", "choosing others than the best"),
    )
    parts = []
    for meaning, words in named:
        pair = _pair(result, meaning, _budget(run, result))
        if pair:
            gap = pair["change_pct"]
            parts.append(f"{words} {signed(gap['estimate'])} % ({span(gap)} %)")
    return "Perplexity by cause: " + "; ".join(parts) + "." if parts else ""
