"""Report section of RULER: means by length, task x length, causes, cells that differ, flipped examples."""

from __future__ import annotations

from typing import Any

from ..recipes.stages import RULER_TASKS
from .report_blocks import Block, Cell, Flip, Flips, Section, Side, Table, Text
from .report_costs import Cost, cost_cell, costs
from .report_data import RunFiles
from .report_words import (
    MEANINGS,
    MOOT,
    arm_name,
    budget_of,
    budgets,
    counted,
    find_pair,
    length_name,
    listed,
    main_budget,
    main_pair,
    measured_in,
    measured_lengths,
    measured_tasks,
    plain,
    ruler_name,
    shown_arms,
    signed,
    span,
    when,
)
from .tables import EFFECTIVE

_TINT_POINTS = 20.0
"""A change of so many points has the full tint."""


_MANY = 12
"""Rows that a table may have before it is folded away."""


def ruler_section(run: RunFiles) -> Section:
    """Every RULER stage; causes and examples of those that measured the newest weights."""
    intro = (
        "Four arms answer the same prompts: A the checkpoint as it was, B its converted weights with full "
        "attention, D with the k best blocks by true attention mass, C with the k blocks that the index "
        "branch chooses."
    )
    section = Section("RULER", intro=intro)
    final = run.final("ruler")
    for result in run.results["ruler"]:
        tasks = measured_tasks(result)
        if not tasks:
            continue
        title = f"{ruler_name(tasks)}, {when(run, result)}{measured_in(result)}"
        section.blocks.extend([Text(title, "head"), Text(f"Corpus {result['label']}.", "warn")])
        section.blocks.extend(_by_length(run, result))
        if result in final:
            section.blocks.extend(_causes(result))
        section.blocks.extend(_heat_maps(run, result))
        if result in final:
            section.blocks.extend(_notes(result))
            section.blocks.extend(flips(run, result))
    return section


def flips(run: RunFiles, result: dict[str, Any]) -> list[Block]:
    """Answers of B that sparse attention lost, at each budget; else what A had and C lost."""
    blocks: list[Block] = []
    for pair in result["comparisons"]:
        if pair["meaning"] != "cost of sparsity":
            continue
        lost = [flip for flip in pair["flips"] if flip["scores"][0] > flip["scores"][1]]
        if not lost:
            continue
        shown = [
            Flip(flip["id"], ", ".join(flip["references"]), _sides(pair, flip)) for flip in lost
        ]
        of = listed(sorted({flip["id"].split("/")[0] for flip in lost}))
        summary = f"Answers lost with sparse attention at k = {budget_of(pair['second'])}: {of}"
        seen = budget_of(pair["second"]) == str(main_budget(run, result))
        blocks.append(Flips(summary, shown, seen))
    return blocks


def _sides(pair: dict[str, Any], flip: dict[str, Any]) -> tuple[Side, Side]:
    recalls = flip.get("recall") or [None, None]
    sides = []
    for place, which in enumerate(("first", "second")):
        said, recall = flip[which].strip(), recalls[place]
        note = "" if recall is None else f"needle's block selected in {100 * recall:.0f} %"
        name, score = arm_name(pair[which]), flip["scores"][place]
        sides.append(
            Side(name, f"{score:.0f}", said or "(empty)", note, score == max(flip["scores"]))
        )
    return sides[0], sides[1]


def _heat_maps(run: RunFiles, result: dict[str, Any]) -> list[Block]:
    """Task x length for B and C at the main budget, and what C lost; other arms in one table a length."""
    top_k = main_budget(run, result)
    lengths, tasks = measured_lengths(result), measured_tasks(result)
    dense, sparse = "converted_dense", f"converted_sparse-k{top_k}"
    blocks: list[Block] = []
    columns = ["task", *map(length_name, lengths)]
    if len(lengths) > 1:
        for label in (label for label in (dense, sparse) if label in result["arms"]):
            scores = result["arms"][label]["scores"]
            rows: list[list[Cell | str]] = [
                [task, *(_score(scores.get(length, {}).get(task)) for length in lengths)]
                for task in tasks
            ]
            blocks.append(
                Table(columns, rows, f"{arm_name(label)}; * {MOOT}", half=True, grid=True)
            )
        blocks += _lost_map(find_pair(result, "cost of sparsity", top_k), lengths, tasks)
    folded = len(lengths) > 1
    return blocks + [_arms_table(result, length, folded=folded) for length in lengths]


def _lost_map(pair: dict[str, Any] | None, lengths: list[str], tasks: list[str]) -> list[Block]:
    if pair is None:
        return []
    found = {
        (str(entry["length"]), task["task"]): task
        for entry in pair["lengths"]
        for task in entry["tasks"]
    }
    rows: list[list[Cell | str]] = []
    for task in tasks:
        row: list[Cell | str] = [task]
        for length in lengths:
            cell = found.get((length, task))
            row.append("" if cell is None else _change(cell))
        rows.append(row)
    caption = (
        f"Change in points from B to C ({arm_name(pair['second'])}), with 95 % intervals; an asterisk and "
        "hatching where both arms are below 10 or above 99"
    )
    return [Table(["task", *map(length_name, lengths)], rows, caption, grid=True)]


def _change(task: dict[str, Any]) -> Cell:
    gained = _negated(task["lost"])
    heat = 100 * gained["estimate"] / _TINT_POINTS
    note = f"{task['worse']} worse, {task['better']} better, Holm-adjusted p = {task['p_holm']:.3f}"
    mark = "differs, " if task["p_holm"] < 0.05 else ""
    moot = bool(task.get("uninformative"))
    return Cell(signed(gained["estimate"], 1), heat, mark + note, span(gained, 1), moot)


def _negated(lost: dict[str, Any]) -> dict[str, Any]:
    return {"estimate": -lost["estimate"], "low": -lost["high"], "high": -lost["low"]}


def _arms_table(result: dict[str, Any], length: str, *, folded: bool) -> Table:
    """Task by arm at one length, every budget; the mean of the tasks and the seconds below."""
    arms = {label: arm for label, arm in result["arms"].items() if length in arm["scores"]}
    tasks = measured_tasks(result, length)
    rows: list[list[Cell | str]] = [
        [task, *(_score(arm["scores"][length].get(task)) for arm in arms.values())]
        for task in tasks
    ]
    if len(tasks) > 1:
        means = [arm["means"][length] for arm in arms.values()]
        rows.append([f"mean of these {len(tasks)} tasks", *(Cell(f"{m:.1f}", m) for m in means)])
    rows.append(["seconds, all lengths", *(f"{arm['seconds']:.0f}" for arm in arms.values())])
    caption = (
        f"{length_name(length)} tokens, {counted(result['samples'], 'prompt')} a task, the same in every "
        f"arm. * {MOOT}"
    )
    if not folded and any(arm.get("ruler") for arm in arms.values()):
        caption += ". RULER's effective length and weighted averages: not computed: one length"
    fold = f"Every arm and budget at {length_name(length)} tokens" if folded else ""
    return Table(["task", *map(arm_name, arms)], rows, caption, fold=fold)


def _score(cell: dict[str, Any] | None) -> Cell | str:
    if cell is None:
        return ""
    note = f"{cell['samples']} prompts; stopped: {cell['stopped']}; empty: {cell['empty']}"
    return Cell(f"{cell['score']:.1f}", cell["score"], note, moot=cell["uninformative"])


def _by_length(run: RunFiles, result: dict[str, Any]) -> list[Block]:
    """Means by length of every shown arm, and below them what each cause cost."""
    lengths = measured_lengths(result)
    if len(lengths) < 2:
        return []
    top_k = main_budget(run, result)
    shown = {label: result["arms"][label] for label in shown_arms(run, result)}
    own = any(arm.get("ruler") for arm in shown.values())
    rows: list[list[Cell | str]] = []
    for label, arm in shown.items():
        means = arm["means"]
        cells = [Cell(f"{means[n]:.1f}", means[n]) if n in means else "" for n in lengths]
        rows.append([arm_name(label), *cells, *(_own_figures(arm, lengths) if own else [])])
    for meaning, words in MEANINGS.items():
        pair = find_pair(result, meaning, top_k)
        if pair is None:
            continue
        entries = {str(entry["length"]): entry for entry in pair["lengths"]}
        cells = [cost_cell(_cost(pair, entries[n])) if n in entries else "" for n in lengths]
        rows.append([Cell(meaning, small=words), *cells, *[""] * len(_OWN) * own])
    caption = (
        f"{ruler_name(measured_tasks(result))} by length; below the arms the points that are lost from one "
        "to the next, with 95 % intervals"
    )
    blocks: list[Block] = [Table(["", *map(length_name, lengths), *_OWN * own], rows, caption)]
    return [*blocks, Text(_own_words(result))] if own else blocks


_OWN = ("wAvg (inc)", "wAvg (dec)", "effective length")


def _own_figures(arm: dict[str, Any], lengths: list[str]) -> list[Cell | str]:
    """RULER's own summary of an arm, as the columns `_OWN`."""
    own = arm["ruler"]
    length = own["effective_length"]
    averages: list[Cell | str] = [f"{own[name]:.1f}" for name in ("wavg_inc", "wavg_dec")]
    if length is None:
        return [*averages, f"below {length_name(lengths[0])}"]
    longest = str(length) == lengths[-1]
    return [*averages, Cell(length_name(length), small="or more" * longest)]


def _own_words(result: dict[str, Any]) -> str:
    """What RULER's own figures are, and what keeps them from being compared with published ones."""
    said = (
        "The last three columns are RULER's own figures (arXiv 2404.06654): averages that weigh the "
        "longest (inc) or the shortest length (dec) most, and the longest length up to which every mean "
        f"is at least {EFFECTIVE}."
    )
    lacks = []
    if result.get("corpus") != "nvidia":
        lacks.append("the data is not NVIDIA's")
    if not all(arm["ruler"]["all_tasks"] for arm in result["arms"].values()):
        lacks.append(f"not every length has all {len(RULER_TASKS)} tasks")
    return f"{said} They do not compare with published ones: {listed(lacks)}." if lacks else said


def _causes(result: dict[str, Any]) -> list[Block]:
    """Costs over all lengths; of results that have none, at each length."""
    places: dict[str, list[Cost]] = {}
    pairs: dict[str, int] = {}
    informative: dict[str, list[str]] = {}
    main = [main_pair(result, top_k) for top_k in budgets(result)]
    for pair in result["comparisons"]:
        entries = {f"{entry['length']} tokens": entry for entry in pair["lengths"]}
        if len(entries) > 1 and "overall" in pair:
            entries = {"all lengths": pair["overall"]}
        for place, entry in entries.items():
            pairs[place] = entry["lost"]["samples"]
            places.setdefault(place, []).append(_cost(pair, entry))
            informative.setdefault(place, [])
            if pair in main:
                informative[place] += _informative(pair, entry)
    name = ruler_name(measured_tasks(result))
    blocks: list[Block] = []
    for place, found in places.items():
        caption = (
            f"{name}: points lost at {place}, with 95 % intervals from "
            f"{counted(pairs[place], 'paired answer')}; positive is worse"
        )
        blocks += costs(found, caption, f"points that are lost, {name}, {place}")
        if informative[place]:
            said = f"Points lost without cells where both arms are {MOOT.split(':')[0]}"
            blocks.append(Text(f"{said}: {listed(informative[place])}."))
    return blocks


def _informative(pair: dict[str, Any], entry: dict[str, Any]) -> list[str]:
    """`budget cost, k = 16, 3.1 (1.0 to 5.2)`: the mean over informative cells where there are others."""
    lost = entry.get("lost_informative")
    return [f"{_named(pair)} {plain(lost)}"] if lost and entry["uninformative"] else []


def _named(pair: dict[str, Any]) -> str:
    k = budget_of(pair["second"])
    return f"{pair['meaning']}, k = {k}" if k else str(pair["meaning"])


def _cost(pair: dict[str, Any], entry: dict[str, Any]) -> Cost:
    return Cost(pair["meaning"], budget_of(pair["second"]), entry["lost"], entry["unseen_share"])


def _notes(result: dict[str, Any]) -> list[Block]:
    blocks: list[Block] = []
    name = f"{ruler_name(measured_tasks(result))} ({counted(result['samples'], 'prompt')} a task)"
    for skipped in result["skipped"]:
        blocks.append(Text(f"Left out at {skipped['length']} tokens: {skipped['reason']}.", "warn"))
    changed = [
        [
            _named(pair),
            task["task"],
            length_name(entry["length"]),
            str(task["worse"]),
            str(task["better"]),
            f"{task['p_holm']:.3f}",
        ]
        for pair in result["comparisons"]
        for entry in pair["lengths"]
        for task in entry["tasks"]
        if task["p_holm"] < 0.05
    ]
    test = (
        "the exact sign test (McNemar's where answers are right or wrong) after Holm's correction"
    )
    if not changed:
        return [*blocks, Text(f"{name}: no single cell differs by {test}.")]
    columns = ["comparison", "task", "tokens", "worse", "better", "adjusted p"]
    caption = f"{name}: cells that differ by {test}"
    fold = f"{len(changed)} cells that differ, with their tests" if len(changed) > _MANY else ""
    return [*blocks, Table(columns, changed, caption, fold=fold)]
