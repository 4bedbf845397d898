"""The top of the report: what the conversion cost in sentences, and the colour of the verdict.

Both speak of the newest weights that were measured, and of every stage that measured them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..recipes.stages import RULER_TASKS
from .report_data import RunFiles
from .report_words import (
    MEANINGS,
    any_pair,
    budget_of,
    budgets,
    counted,
    find_pair,
    listed,
    longbench_name,
    main_budget,
    main_pair,
    measured_lengths,
    measured_tasks,
    overall,
    pair_tasks,
    plain,
    reach,
    ruler_name,
    scored_results,
    signed,
    span,
    start_name,
    suite_pairs,
    upper,
    when,
)

_CAUSES = ("training drift", "budget cost", "indexer error")
_TONES = {"non-inferior": "good", "inferior": "bad", "undecided": "open"}


@dataclass(frozen=True)
class Verdict:
    """What is read first: one sentence and what explains it, then what the other stages say."""

    head: list[str]
    rest: list[str]
    tone: str
    """`good`, `bad` or `open`, as the first sentence says of the margin; empty where it says nothing."""


def verdict(run: RunFiles) -> Verdict:
    """What the conversion cost, by the stage over most RULER tasks where there is one."""
    scored, perplexities = scored_results(run), run.final("perplexity")
    measured = [*(one for _, one in scored), *perplexities]
    if not measured:
        words = "Nothing has been measured yet: no evaluation stage of this run has finished."
        return Verdict([words], [], "")
    told: list[Verdict] = []
    for kind, one in scored:
        top_k = main_budget(run, one)
        found = any_pair(one, top_k)
        for place, pair in enumerate(suite_pairs(found) if found else []):
            entry = overall(pair)
            if entry is None:
                continue
            said = _score_line(kind, one, pair, entry)
            causes = _causes(one, top_k, place, explain=not told)
            lines = [said, _moot(pair, entry), causes, _prompts(kind, one)]
            tone = _TONES.get(entry.get("verdict", ""), "") if _is_main(pair) else ""
            told.append(Verdict([line for line in lines if line], [], tone))
    rest = [" ".join(one.head) for one in told[1:]]
    rest += [_perplexity_line(run, one, perplexities) for one in perplexities]
    rest = [line for line in (*rest, _start(run)) if line]
    head = told[0].head if told else rest[:1]
    head = head or ["Measured, but without a pair of arms to compare."]
    head[0] = _unfinished(run, measured[0]) + head[0]
    return Verdict(head, rest if told else rest[1:], told[0].tone if told else "")


def _score_line(
    kind: str, result: dict[str, Any], pair: dict[str, Any], entry: dict[str, Any]
) -> str:
    """`Converted to read 16 blocks, the model loses ... (interval), which is within the margin ...`"""
    tasks = measured_tasks(result)
    what = f"{'the ' if tasks[1:] else ''}{ruler_name(tasks)} {reach(measured_lengths(result))}"
    if kind == "longbench":
        what = f"{'the ' if pair_tasks(pair)[1:] else ''}{longbench_name(pair)}"
    answers = counted(int(entry["lost"]["samples"]), "paired answer")
    begin = _subject(result, pair)
    lost = entry["lost"]
    if entry["unseen_share"] is not None:
        share = upper(entry["unseen_share"])
        said = (
            f"has the same score on every prompt of {what} ({answers}; up to {share} could change)"
        )
    elif lost["estimate"] < 0:
        _, ends = plain(lost).split(" (")
        said = f"gains {-lost['estimate']:.1f} points of {what} (95 % interval of what is lost "
        said += f"{ends[:-1]}, {answers})"
    else:
        points, ends = plain(lost).split(" (")
        said = f"loses {points} points of {what} (95 % interval {ends[:-1]}, {answers})"
    parts = [f"{begin} {said}", _judged(result, entry)]
    return ", ".join(part for part in parts if part) + "."


def _subject(result: dict[str, Any], pair: dict[str, Any]) -> str:
    """Who lost or gained: the model by what it reads, or the second arm of another comparison."""
    if not _is_main(pair):
        return f"{_only(pair)}: the second arm"
    read = f"{budget_of(pair['second'])} {_blocks(result)}"
    if pair["meaning"] == "whole conversion":
        return f"Converted to read {read}, the model"
    return f"Reading {read} instead of all, the converted model"


def _only(pair: dict[str, Any]) -> str:
    meaning = pair["meaning"]
    return f"Only a part was measured, {meaning} ({MEANINGS[meaning]})"


def _is_main(pair: dict[str, Any]) -> bool:
    return pair["meaning"] in ("whole conversion", "cost of sparsity")


def _moot(pair: dict[str, Any], entry: dict[str, Any]) -> str:
    """A warning where half of the cells or more could hardly have shown a difference."""
    moot = entry.get("uninformative") or 0
    cells = sum(len(one["tasks"]) for one in pair["lengths"])
    if 2 * moot < cells or not moot:
        return ""
    which = "every one of its cells" if moot == cells else f"{moot} of its {cells} cells"
    return f"But {which} can hardly show a loss: both arms are below 10 or above 99 there."


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


def _causes(result: dict[str, Any], top_k: int | None, suite: int, *, explain: bool) -> str:
    """`By cause: training drift 0.1 (0.0 to 0.2), budget cost 0.3 ... and indexer error 0.8 ....`

    `suite`: place in `suite_pairs`.
    """
    parts, changed = [], False
    for meaning in _CAUSES:
        pair = find_pair(result, meaning, top_k)
        entry = None if pair is None else overall(suite_pairs(pair)[suite])
        if entry is None:
            continue
        same = entry["unseen_share"] is not None
        changed = changed or not same
        words = MEANINGS[meaning].partition(": ")[2].replace("best k", f"best {top_k}")
        why = f"; {words})" if explain else ")"
        parts.append(f"{meaning} {'none' if same else plain(entry['lost'])[:-1] + why}")
    return f"By cause: {listed(parts)}." if changed and parts[1:] else ""


def _prompts(kind: str, result: dict[str, Any]) -> str:
    """What the first sentence's prompts are worth elsewhere, and which tasks they lack."""
    if kind != "ruler":
        return ""
    count = len(measured_tasks(result))
    lacks = "" if count == len(RULER_TASKS) else f"; {count} of RULER's {len(RULER_TASKS)} tasks"
    return f"Prompts: {result['label']}{lacks}."


def _perplexity_line(run: RunFiles, result: dict[str, Any], every: list[dict[str, Any]]) -> str:
    top_k = main_budget(run, result)
    pair = any_pair(result, top_k)
    if pair is None:
        return ""
    change = pair["change_pct"]
    several = f" (stage {result['stage']})" if every[1:] else ""
    begin = f"Reading {top_k} of {result['blocks']} blocks, perplexity{several}"
    if not _is_main(pair):
        begin = f"{_only(pair)}: perplexity{several}"
    said = f"{begin} is {_moved(change['estimate'], 2, ' %')} than {_reference(pair)}"
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
        pairs = [(top_k, main_pair(result, top_k)) for top_k in budgets(result)]
        said = [
            f"{signed(pair['change_pct']['estimate'])} % ({span(pair['change_pct'])} %) at k = {top_k}"
            for top_k, pair in pairs
            if pair
        ]
        if said:
            return f"Before training, the {start_name(run)} had moved perplexity by {listed(said)}."
    return ""


def _reference(pair: dict[str, Any]) -> str:
    return {
        "converted_dense": "with full attention",
        "original_dense": "that of the original model",
    }.get(pair["first"], "with the best blocks")


def _moved(value: float, digits: int, unit: str) -> str:
    word = "higher" if value >= 0 else "lower"
    return f"{abs(value):.{digits}f}{unit} {word}"


def _interval(gap: dict[str, Any], digits: int, unit: str) -> str:
    zero = ", zero is inside" if gap["low"] <= 0 <= gap["high"] else ""
    return f"95 % interval {span(gap, digits)}{unit}{zero}"
