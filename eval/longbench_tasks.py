"""What LongBench's tasks are: category, language, metric and the reference's rules for prompts and answers.

Facts of THUDM/LongBench `2e00731` (task.md, LongBench/pred.py, LongBench/eval.py, pred.py), no words of it:
prompts are read from packages (`longbench_sources.py`). Three suites: `v1` with 21 tasks, `e` with 13 of
them over other records in length buckets, `v2` with one task of four-choice questions.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Suite = Literal["v1", "e", "v2"]
Metric = Literal[
    "qa_f1",
    "qa_f1_zh",
    "rouge",
    "rouge_zh",
    "classification",
    "count",
    "retrieval",
    "retrieval_zh",
    "code",
]
SUITES: tuple[Suite, ...] = ("v1", "e", "v2")
V2 = "v2"
V2_NEW_TOKENS = 128
V2_MAX_LENGTH = 120_000
"""Prompt tokens from which version 2 loses its middle in the reference."""
V2_RECORDS = 503
CATEGORIES = (
    "single-document QA",
    "multi-document QA",
    "summarization",
    "few-shot",
    "synthetic",
    "code",
)
BUCKETS = ("0-4k", "4-8k", "8k+")
DIFFICULTIES = ("easy", "hard")
V2_LENGTHS = ("short", "medium", "long")


@dataclass(frozen=True)
class Task:
    """One task of version 1, and of LongBench-E where `in_e`."""

    category: str
    language: Literal["en", "zh", "code"]
    """Code counts in the English and in the Chinese average."""
    metric: Metric
    in_e: bool = False
    chat: bool = True
    """Whether the chat template is put around the prompt; the reference leaves six tasks without."""
    first_line: bool = False
    """Only the first line is scored."""
    stops_at_newline: bool = False
    """The newline token ends the answer, and the first token is neither it nor an end token."""
    records: int = 200


_SINGLE, _MULTI, _SUMMARY, _FEW, _SYNTHETIC, _CODE = CATEGORIES
TASKS: dict[str, Task] = {
    "narrativeqa": Task(_SINGLE, "en", "qa_f1"),
    "qasper": Task(_SINGLE, "en", "qa_f1", in_e=True),
    "multifieldqa_en": Task(_SINGLE, "en", "qa_f1", in_e=True, records=150),
    "multifieldqa_zh": Task(_SINGLE, "zh", "qa_f1_zh"),
    "hotpotqa": Task(_MULTI, "en", "qa_f1", in_e=True),
    "2wikimqa": Task(_MULTI, "en", "qa_f1", in_e=True),
    "musique": Task(_MULTI, "en", "qa_f1"),
    "dureader": Task(_MULTI, "zh", "rouge_zh"),
    "gov_report": Task(_SUMMARY, "en", "rouge", in_e=True),
    "qmsum": Task(_SUMMARY, "en", "rouge"),
    "multi_news": Task(_SUMMARY, "en", "rouge", in_e=True),
    "vcsum": Task(_SUMMARY, "zh", "rouge_zh"),
    "trec": Task(_FEW, "en", "classification", in_e=True, chat=False, first_line=True),
    "triviaqa": Task(_FEW, "en", "qa_f1", in_e=True, chat=False, first_line=True),
    "samsum": Task(
        _FEW, "en", "rouge", in_e=True, chat=False, first_line=True, stops_at_newline=True
    ),
    "lsht": Task(_FEW, "zh", "classification", chat=False, first_line=True),
    "passage_count": Task(_SYNTHETIC, "en", "count", in_e=True),
    "passage_retrieval_en": Task(_SYNTHETIC, "en", "retrieval", in_e=True),
    "passage_retrieval_zh": Task(_SYNTHETIC, "zh", "retrieval_zh"),
    "lcc": Task(_CODE, "code", "code", in_e=True, chat=False, records=500),
    "repobench-p": Task(_CODE, "code", "code", in_e=True, chat=False, records=500),
}


def base(task: str) -> str:
    """`qasper` of `qasper` and of `qasper_e`."""
    return task.removesuffix("_e")


def suite_of(task: str) -> Suite:
    """The suite that a full task name belongs to: `v2`, names that end in `_e`, all others."""
    if task == V2:
        return "v2"
    return "e" if task.endswith("_e") else "v1"


def bucket(length: int) -> str:
    """LongBench-E's bucket of a record's `length` field (words, or characters in Chinese)."""
    return BUCKETS[0] if length < 4000 else BUCKETS[1] if length < 8000 else BUCKETS[2]


def chosen(suites: Sequence[str], tasks: Sequence[str] = ()) -> list[str]:
    """Full names of the tasks of these suites, in their order; `tasks` narrows v1 and e to base names.

    Raises:
        ValueError: an unknown suite or task (with the nearest), or a task that no chosen suite has.
    """
    for name in suites:
        _known("longbench.suites", name, SUITES)
    for name in tasks:
        _known("longbench.tasks", name, tuple(TASKS))
    names: list[str] = []
    for suite in dict.fromkeys(suites):
        if suite == "v2":
            names.append(V2)
            continue
        picked = [name for name in TASKS if not tasks or name in tasks]
        names += picked if suite == "v1" else [f"{name}_e" for name in picked if TASKS[name].in_e]
    for name in tasks:
        if name not in map(base, names):
            raise ValueError(
                f"longbench.tasks: {name} is not part of the chosen suites ({', '.join(suites)}): "
                "add v1 to longbench.suites or leave the task out"
            )
    return names


def _known(key: str, name: str, known: Sequence[str]) -> None:
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"{key}: {name!r} does not exist, did you mean {near!r}? Known: {', '.join(known)}"
        )
