"""Words and number forms that the report's sections share: arms, meanings, intervals, tasks, lengths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..recipes.stages import RULER_TASKS
from .report_data import RunFiles

LETTERS = {
    "original_dense": ("A", "original, dense"),
    "converted_dense": ("B", "converted, dense"),
    "converted_sparse": ("C", "converted, sparse"),
    "converted_oracle": ("D", "converted, oracle"),
}
COLOURS = {
    "original_dense": 0,
    "converted_dense": 2,
    "converted_sparse": 1,
    "converted_oracle": 4,
    "training drift": 0,
    "budget cost": 2,
    "indexer error": 1,
    "cost of sparsity": 3,
    "whole conversion": 4,
}
"""Of arms and of meanings, as places in the palette (report_style.py)."""
MEANINGS = {
    "training drift": "A to B: training moved the weights",
    "budget cost": "B to D: only the best k blocks are read",
    "indexer error": "D to C: the index branch chose others",
    "cost of sparsity": "B to C: the last two",
    "whole conversion": "A to C: all of it",
}
MOOT = "below 10 or above 99: says little about a difference"
NARROW = 10
"""Fewer pairs than this leave a bootstrap interval narrower than it should be."""


def arm_name(label: str) -> str:
    """`converted_sparse-k16` -> `C converted, sparse, k = 16`; other labels as they are."""
    arm, _, budget = label.partition("-k")
    if arm not in LETTERS:
        return label
    letter, words = LETTERS[arm]
    return f"{letter} {words}" + (f", k = {budget}" if budget else "")


def short_name(label: str) -> str:
    """`C sparse`, for tables with many columns of one budget."""
    arm = label.partition("-k")[0]
    return f"{LETTERS[arm][0]} {arm.partition('_')[2]}" if arm in LETTERS else label


def colour_of(label: str) -> int:
    """Palette place of an arm."""
    return COLOURS.get(label.partition("-k")[0], 5)


def budget_of(label: str) -> str:
    """`16` of `converted_sparse-k16`, empty for arms that read every block."""
    return label.partition("-k")[2]


def budgets(result: dict[str, Any]) -> list[int]:
    """Budgets that a result measured, ascending."""
    return sorted({int(label.partition("-k")[2]) for label in result["arms"] if "-k" in label})


def main_budget(run: RunFiles, result: dict[str, Any]) -> int | None:
    """The budget that was trained for where this stage measured it, else its largest."""
    measured = budgets(result)
    wanted = run.top_k()
    return wanted if wanted in measured else max(measured, default=None)


def shown_arms(run: RunFiles, result: dict[str, Any]) -> list[str]:
    """Labels of the arms at the main budget, in the order A, B, D, C (each step is one cause)."""
    top_k = main_budget(run, result)
    order = ["original_dense", "converted_dense", f"converted_oracle-k{top_k}"]
    order.append(f"converted_sparse-k{top_k}")
    known = [label for label in order if label in result["arms"]]
    return known or list(result["arms"])


def find_pair(result: dict[str, Any], meaning: str, top_k: int | None) -> dict[str, Any] | None:
    """The comparison with this meaning, at this budget where it has one."""
    for pair in result["comparisons"]:
        budget = budget_of(pair["second"])
        if pair["meaning"] == meaning and (not budget or int(budget) == top_k):
            return pair
    return None


def main_pair(result: dict[str, Any], top_k: int | None) -> dict[str, Any] | None:
    """The whole conversion, or what sparsity alone cost where the original was not measured."""
    return find_pair(result, "whole conversion", top_k) or find_pair(
        result, "cost of sparsity", top_k
    )


def any_pair(result: dict[str, Any], top_k: int | None) -> dict[str, Any] | None:
    """`main_pair`, or where neither was measured whatever comparison there is."""
    found = (find_pair(result, meaning, top_k) for meaning in MEANINGS)
    return main_pair(result, top_k) or next((pair for pair in found if pair), None)


def suite_pairs(pair: dict[str, Any]) -> list[dict[str, Any]]:
    """A comparison for each suite of LongBench that it has, as if it were of that alone, v1 first."""
    others = pair.get("suites") or {}
    return [pair, *({**pair, **entry, "suite": suite} for suite, entry in others.items())]


def pair_tasks(pair: dict[str, Any]) -> list[str]:
    """Tasks that a comparison is of."""
    return sorted({task["task"] for entry in pair["lengths"] for task in entry["tasks"]})


def suite_name(pair: dict[str, Any]) -> str:
    """`LongBench`, `LongBench-E` or `LongBench v2`."""
    return {"e": "LongBench-E", "v2": "LongBench v2"}.get(pair.get("suite", ""), "LongBench")


def longbench_name(pair: dict[str, Any]) -> str:
    """What a comparison of LongBench is of: one task by its name, many by their number."""
    tasks = pair_tasks(pair)
    if len(tasks) > 1:
        return f"{suite_name(pair)} mean of {len(tasks)} tasks"
    return suite_name(pair) + (f" {tasks[0]}" if tasks != ["v2"] else "")


def overall(pair: dict[str, Any]) -> dict[str, Any] | None:
    """A comparison over all lengths: `lost`, `unseen_share`, and `verdict` where it was recorded."""
    found = pair.get("overall")
    if found is None and len(pair["lengths"]) == 1:
        found = pair["lengths"][0]
    return found


def signed(value: float, digits: int = 2) -> str:
    """A difference with its sign; what rounds to zero has none."""
    text = f"{value:+.{digits}f}"
    return f"{0:.{digits}f}" if float(text) == 0 else text.replace("-", "\N{MINUS SIGN}")


def plain(interval: dict[str, Any], digits: int = 1) -> str:
    """`4.9 (3.0 to 6.7)`: an estimate and its interval, plus signs left out."""
    ends = [signed(interval[name], digits) for name in ("estimate", "low", "high")]
    middle, low, high = (end.removeprefix("+") for end in ends)
    return f"{middle} ({low} to {high})"


def span(interval: dict[str, Any], digits: int = 2) -> str:
    """`low to high` of a stored interval."""
    return f"{signed(interval['low'], digits)} to {signed(interval['high'], digits)}"


def length_name(length: int | str) -> str:
    """`4K` for 4096; what is no multiple of 1024 in full."""
    tokens = int(length)
    if tokens % 1024 or not tokens:
        return f"{tokens:,}"
    return f"{tokens // 1024}K" if tokens < 1 << 20 else f"{tokens / (1 << 20):g}M"


def position_name(first: int, last: int) -> str:
    """`2K to 4K`."""
    return f"{length_name(first) if first else 0} to {length_name(last)}"


def when(run: RunFiles, result: dict[str, Any]) -> str:
    """Which training stages had been run before a measurement, or which checkpoint it was."""
    if result.get("state"):
        return str(result["state"]) + _which_checkpoint(run, result)
    trained = result.get("after") or []
    return "after " + ", ".join(trained) if trained else f"before training: {start_name(run)}"


def _which_checkpoint(run: RunFiles, result: dict[str, Any]) -> str:
    """Its fingerprint, where another one was measured under the same words."""
    every = [one for many in run.results.values() for one in many]
    named = {one.get("checkpoint") for one in every if one.get("state") == result["state"]}
    return f" (checkpoint {str(result.get('checkpoint'))[:8]})" if len(named) > 1 else ""


def measured_in(result: dict[str, Any]) -> str:
    """`, float32`, with the index scores' precision where that is another; empty if not recorded."""
    index = result.get("index_precision", "input")
    words = [result.get("precision", ""), "" if index == "input" else f"index scores in {index}"]
    return "".join(f", {word}" for word in words if word)


def upper(share: float) -> str:
    """`12 %`, or `<1 %`: a share that cannot be excluded is not none."""
    return f"{100 * share:.0f} %" if share >= 0.01 else "<1 %"


def counted(count: int, word: str) -> str:
    """`1 prompt`, `5 prompts`."""
    return f"{count:,} {word}{'' if count == 1 else 's'}"


def start_name(run: RunFiles) -> str:
    """What the index branch is before it is trained."""
    made = run.recipe.get("sparsity", {}).get("init", "pca")
    return {"pca": "closed-form start"}.get(made, f"{made} start")


def measured_tasks(result: dict[str, Any], length: int | str | None = None) -> list[str]:
    """Tasks of a stage that have scores, at one length or any; RULER's in the benchmark's order."""
    scores = [arm["scores"] for arm in result["arms"].values()]
    found = {
        task
        for by_length in scores
        for known, tasks in by_length.items()
        if length is None or known == str(length)
        for task in tasks
    }
    places = {task: place for place, task in enumerate(RULER_TASKS)}
    return sorted(found, key=lambda task: (places.get(task, len(places)), task))


def measured_lengths(result: dict[str, Any]) -> list[str]:
    """Lengths that have scores, as the keys they are, ascending."""
    found = {length for arm in result["arms"].values() for length in arm["scores"]}
    return sorted(found, key=int)


def scored_results(run: RunFiles) -> list[tuple[str, dict[str, Any]]]:
    """(kind, result) of RULER and LongBench; of RULER's the best evidence first.

    That is most tasks, then most answers, then the longest prompts.
    """
    found = [
        (kind, one)
        for kind in ("ruler", "longbench")
        for one in run.final(kind)
        if kind == "ruler" or one.get("measured")
    ]
    return sorted(found, key=lambda one: (one[0] != "ruler", *_evidence(one[1])))


def _evidence(result: dict[str, Any]) -> tuple[int, int, int]:
    scores = next(iter(result["arms"].values()))["scores"]
    answers = sum(cell["samples"] for tasks in scores.values() for cell in tasks.values())
    longest = max(map(int, measured_lengths(result)), default=0)
    return -len(measured_tasks(result)), -answers, -longest


def ruler_name(tasks: Sequence[str]) -> str:
    """One task by its name, a few as the mean that a figure is of, many by their number."""
    if len(tasks) == 1:
        return f"RULER {tasks[0]}"
    return f"RULER mean of {listed(tasks) if len(tasks) < 5 else f'{len(tasks)} tasks'}"


def listed(words: Sequence[str]) -> str:
    """`a, b and c`."""
    return " and ".join(part for part in (", ".join(words[:-1]), *words[-1:]) if part)


def reach(lengths: Sequence[str]) -> str:
    """`at 4K and 8K tokens`; of many lengths the ends."""
    names = [length_name(length) for length in lengths]
    if len(names) > 3:
        return f"from {names[0]} to {names[-1]} tokens"
    return f"at {listed(names)} tokens"


def few(pairs: int) -> str:
    """A warning where there are few pairs."""
    return " (so few that they are narrower than they should be)" if pairs < NARROW else ""
