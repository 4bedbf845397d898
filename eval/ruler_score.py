"""RULER's score of an answer: how many references occur in it, whatever the case. Needs nothing but text.

`all` is the mean over the references; `part`, the metric of qa_1 and qa_2, is 100 where any of them occurs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

METRICS = ("all", "part")
THOUGHT_BEGINS, THOUGHT_ENDS = "<think>", "</think>"
_CONTROL = re.compile(r"[\x00-\x1f]")


def clean(text: str) -> str:
    """A prediction as RULER scores it: control characters are line ends, the ends are stripped."""
    return _CONTROL.sub("\n", text.strip()).strip()


def final_answer(text: str, mode: str) -> str:
    """What counts of a prediction: in `reasoning` what follows the thought, nothing if it has no end.

    A template may open the thought itself, so a text without `<think>` is one too unless it ended.
    """
    if mode != "reasoning":
        return text
    return text.rpartition(THOUGHT_ENDS)[2] if THOUGHT_ENDS in text else ""


def hits(text: str, references: Sequence[str]) -> list[bool]:
    """Which references occur in the text, whatever the case."""
    lowered = clean(text).lower()
    return [reference.lower() in lowered for reference in references]


def score(found: Sequence[bool], metric: str = "all") -> float:
    """RULER's score of one sample, 0 to 100.

    Raises:
        ValueError: no such metric.
    """
    if metric not in METRICS:
        raise ValueError(f"metric={metric!r} is not known: use {' or '.join(METRICS)}")
    if metric == "part":
        return 100.0 if any(found) else 0.0
    return 100.0 * sum(found) / len(found)


def score_record(record: Mapping[str, Any]) -> float:
    """Score of a prediction record with `task`, `prediction`, `references`, `metric` and `mode` if any."""
    answer = final_answer(record["prediction"], record.get("mode", "base"))
    return score(hits(answer, record["references"]), metric_of(record))


def metric_of(record: Mapping[str, Any]) -> str:
    """The record's `metric`; of one that names none the task's."""
    return record.get("metric", "part" if record["task"] in ("qa_1", "qa_2") else "all")


def settled(text: str, references: Sequence[str], metric: str, mode: str) -> bool:
    """Whether more text cannot change the score: it is full already, and only grows."""
    return mode != "reasoning" and score(hits(text, references), metric) == 100.0
