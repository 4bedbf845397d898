"""The four arms of every comparison, by name. No model and no torch here: scores are made without them.

    A original_dense       the checkpoint as it was            A - B  training drift
    B converted_dense      converted weights, full attention   B - D  budget cost
    C converted_sparse     blocks of the index branch          D - C  indexer error
    D converted_oracle     blocks of the true attention mass

`eval/models.py` loads what stands behind them.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

ARMS = ("original_dense", "converted_dense", "converted_sparse", "converted_oracle")
DENSE = ARMS[:2]
"""Arms that read every block and therefore have no budget."""


@dataclass(frozen=True)
class ArmRun:
    """One arm at one budget; `top_k` is None where all blocks are read."""

    arm: str
    top_k: int | None = None

    @property
    def label(self) -> str:
        """Name in files and tables, for example `converted_sparse-k16`."""
        return self.arm if self.top_k is None else f"{self.arm}-k{self.top_k}"

    @classmethod
    def parse(cls, label: str) -> ArmRun:
        """Back from a label.

        Raises:
            ValueError: not the label of an arm, with the nearest one.
        """
        arm, _, budget = label.partition("-k")
        if arm in DENSE and not budget:
            return cls(arm)
        if arm in ARMS and arm not in DENSE and budget.isdigit() and int(budget):
            return cls(arm, int(budget))
        near = difflib.get_close_matches(arm, ARMS, n=1, cutoff=0.0)[0]
        wanted = near if near in DENSE else f"{near}-k16"
        raise ValueError(f"{label!r} is no arm: name it like {wanted!r}")


def arm_runs(arms: Iterable[str], top_ks: Sequence[int]) -> list[ArmRun]:
    """Every arm at every budget that matters to it, the original first so that it loads once.

    Raises:
        ValueError: no arm.
    """
    chosen = set(arms)
    if not chosen:
        raise ValueError(f"`arms` is empty: name at least one of {', '.join(ARMS)}")
    runs = [ArmRun(arm) for arm in DENSE if arm in chosen]
    for top_k in top_ks:
        for arm in ("converted_sparse", "converted_oracle"):
            if arm in chosen:
                runs.append(ArmRun(arm, top_k))
    return runs


def comparisons(runs: Sequence[ArmRun]) -> list[tuple[str, ArmRun, ArmRun]]:
    """(meaning, first, second) of every pair among the runs that says something."""
    have = {run.label: run for run in runs}
    dense, before = have.get("converted_dense"), have.get("original_dense")
    pairs: list[tuple[str, ArmRun | None, ArmRun | None]] = [("training drift", before, dense)]
    for top_k in sorted({run.top_k for run in runs if run.top_k is not None}):
        sparse = have.get(ArmRun("converted_sparse", top_k).label)
        oracle = have.get(ArmRun("converted_oracle", top_k).label)
        pairs += [
            ("budget cost", dense, oracle),
            ("indexer error", oracle, sparse),
            ("cost of sparsity", dense, sparse),
            ("whole conversion", before, sparse),
        ]
    return [(name, one, two) for name, one, two in pairs if one and two]
