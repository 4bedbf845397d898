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
        return str(result["state"])
    trained = result.get("after") or []
    return "after " + ", ".join(trained) if trained else f"before training: {start_name(run)}"


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
    """(kind, result) of RULER and LongBench, the one over most tasks of RULER first."""
    found = [
        (kind, one)
        for kind in ("ruler", "longbench")
        for one in run.final(kind)
        if kind == "ruler" or one.get("measured")
    ]
    return sorted(found, key=lambda one: (one[0] != "ruler", -len(measured_tasks(one[1]))))


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
