"""Report section of lm-eval: every score that `dense2sparse lm-eval` left, and what changed between arms.

The command measures one arm at a time, so differences are made here. Where its files hold every sample's
value, and their mean is the score, arms are compared sample by sample (eval/statistics.py); else from the
two standard errors, which is wider, and is called unpaired.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .arms import ArmRun, comparisons
from .lm_eval_command import metrics_of
from .report_blocks import Block, Cell, Section, Table, Text
from .report_data import RunFiles
from .report_words import arm_name, budget_of, signed, span
from .statistics import Interval, paired_bootstrap

_SETTINGS = ("lm_eval", "limit", "num_fewshot", "chat", "precision")
_Z = 1.96
Key = tuple[str, str]
"""Task, and `metric,filter`."""


@dataclass(frozen=True)
class Score:
    """One arm's score of one task and metric."""

    value: float
    stderr: float | None
    lower_is_better: bool = False
    part: bool = False
    """Whether another row is a mean over it."""
    samples: dict[str, float] = field(default_factory=dict)
    """Value of each sample by its number in the task; empty where they are not known."""
    prompts: str = ""
    """Checksum of what was asked."""


@dataclass(frozen=True)
class Alike:
    """Arms measured alike: same settings, and B and C of the same weights."""

    words: str
    arms: dict[str, dict[Key, Score]]

    def tasks(self) -> list[Key]:
        """Every task and metric that any arm has, means over tasks before their parts."""
        found = {key: score for scores in self.arms.values() for key, score in scores.items()}
        return sorted(found, key=lambda key: (found[key].part, key))

    def pairs(self) -> list[tuple[str, str, str]]:
        """(meaning, first, second) of the arms that say something together."""
        found = comparisons([ArmRun.parse(label) for label in self.arms])
        return [(meaning, one.label, two.label) for meaning, one, two in found]


def lm_eval_section(run: RunFiles) -> Section:
    """A table of scores for each way that they were measured, and one of differences."""
    intro = (
        "Short questions, answered as lm-eval asks and scores them; what they show is whether the model "
        "still knows what it knew. A prompt that is no longer than the budget is read whole in C too."
    )
    section = Section("Short tasks of lm-eval", intro=intro)
    for group in lm_eval_groups(run):
        section.blocks.append(Text(group.words, "head"))
        parts = {key for arm in group.arms.values() for key, one in arm.items() if one.part}
        whole = [key for key in group.tasks() if key not in parts]
        section.blocks.extend(_tables(group, whole))
        if parts:
            fold = "Tasks that the means above are made of"
            section.blocks.extend(_tables(group, sorted(parts), fold))
    return section


def lm_eval_rows(run: RunFiles) -> Iterator[dict[str, Any]]:
    """Lines of results.csv: scores with their standard errors, and differences."""
    for group in lm_eval_groups(run):
        for label, scores in group.arms.items():
            for (task, metric), score in scores.items():
                shared = {"task": task, "arm": label, "samples": len(score.samples) or ""}
                yield {**shared, "measure": f"{metric} ({group.words})", "value": score.value}
                if score.stderr is not None:
                    named = f"{metric} standard error ({group.words})"
                    yield {**shared, "measure": named, "value": score.stderr}
        for meaning, first, second in group.pairs():
            for key in group.tasks():
                interval, paired = lost(group.arms[first].get(key), group.arms[second].get(key))
                if interval is not None:
                    kind = "paired" if paired else "unpaired"
                    named = f"{meaning}, {key[1]} (lost, {kind}; {group.words})"
                    ends = {
                        "low": interval.low,
                        "high": interval.high,
                        "samples": interval.samples or "",
                    }
                    shared = {"task": key[0], "arm": f"{first} > {second}", "measure": named}
                    yield {**shared, "value": interval.estimate, **ends}


def lm_eval_groups(run: RunFiles) -> list[Alike]:
    """The files of a run, by how they were measured; within a group later files win, which say the same."""
    originals = [one for one in run.lm_eval if one["arm"] == "original_dense"]
    converted = [one for one in run.lm_eval if one["arm"] != "original_dense"]
    found: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for one in converted:
        found.setdefault((_settings(one), one.get("checkpoint", "")), []).append(one)
    for one in originals:
        same = [files for (settings, _), files in found.items() if settings == _settings(one)]
        for files in same or [found.setdefault((_settings(one), ""), [])]:
            files.append(one)
    checkpoints = {checkpoint for _, checkpoint in found if checkpoint}
    groups = []
    for (_, checkpoint), files in found.items():
        arms: dict[str, dict[Key, Score]] = {}
        for one in sorted(files, key=lambda one: (one["arm"] != "original_dense", one["arm"])):
            arms.setdefault(one["arm"], {}).update(scores_of(one))
        several = f", checkpoint {checkpoint[:12]}" if checkpoint and len(checkpoints) > 1 else ""
        groups.append(Alike(_words(files[0]) + several, arms))
    return groups


def lost(first: Score | None, second: Score | None) -> tuple[Interval | None, bool]:
    """What is lost from one arm to another in the metric's unit, positive is worse; and whether paired.

    None where an arm lacks the score, or where nothing is known of its uncertainty.
    """
    if first is None or second is None:
        return None, False
    sign = -1.0 if first.lower_is_better else 1.0
    if first.samples.keys() == second.samples.keys() and _same_prompts(first, second):
        gaps = [sign * (value - second.samples[name]) for name, value in first.samples.items()]
        largest = max(abs(v) for score in (first, second) for v in score.samples.values())
        return paired_bootstrap({"": gaps}, unseen=max(1.0, largest)), True
    if first.stderr is None or second.stderr is None:
        return None, False
    gap = sign * (first.value - second.value)
    half = _Z * math.hypot(first.stderr, second.stderr)
    return Interval(gap, gap - half, gap + half, 0), False


def _same_prompts(first: Score, second: Score) -> bool:
    return bool(first.samples) and bool(first.prompts.strip()) and first.prompts == second.prompts


def scores_of(content: Mapping[str, Any]) -> dict[Key, Score]:
    """Scores of one file; samples only where their mean is the score."""
    members = content.get("group_subtasks") or {}
    parts = {task for tasks in members.values() for task in tasks}
    better = content.get("higher_is_better") or {}
    answers = content.get("answers") or {}
    found = {}
    for task, values in content["results"].items():
        for name, value, stderr in metrics_of(values):
            leaves = _leaves(task, members)
            samples = {
                f"{leaf} {number}": sample
                for leaf in leaves
                for number, sample in answers.get(leaf, {}).get("scores", {}).get(name, {}).items()
            }
            if not samples or not math.isclose(
                sum(samples.values()) / len(samples), value, rel_tol=1e-6, abs_tol=1e-9
            ):
                samples = {}
            lower = better.get(task, {}).get(name.partition(",")[0]) is False
            prompts = " ".join(answers.get(leaf, {}).get("prompts", "") for leaf in leaves)
            found[task, name] = Score(value, stderr, lower, task in parts, samples, prompts)
    return found


def _leaves(task: str, members: Mapping[str, Sequence[str]]) -> list[str]:
    """The tasks with samples that a task or group stands for."""
    if task not in members:
        return [task]
    return [leaf for member in members[task] for leaf in _leaves(member, members)]


def _tables(group: Alike, keys: Sequence[Key], fold: str = "") -> list[Block]:
    rows: list[list[Cell | str]] = []
    for key in keys:
        scores = [arm.get(key) for arm in group.arms.values()]
        rows.append([_name(key), *map(_score_cell, scores)])
    caption = "Scores as lm-eval gives them, with its standard errors"
    blocks: list[Block] = [Table(["task", *map(arm_name, group.arms)], rows, caption, fold=fold)]
    pairs = group.pairs()
    if not pairs:
        return blocks
    changes: list[list[Cell | str]] = []
    for key in keys:
        row: list[Cell | str] = [_name(key)]
        for _, first, second in pairs:
            row.append(_lost_cell(*lost(group.arms[first].get(key), group.arms[second].get(key))))
        changes.append(row)
    heads = [
        meaning + (f", k = {budget_of(second)}" if budget_of(second) else "")
        for meaning, _, second in pairs
    ]
    caption = (
        "What is lost from one arm to the next, in the unit of the metric, with 95 % intervals; positive "
        "is worse. Unpaired: from the two standard errors, wider than from answers to the same questions"
    )
    return [
        *blocks,
        Table(["task", *heads], changes, caption, fold=f"{fold}: losses" if fold else ""),
    ]


def _name(key: Key) -> Cell:
    metric, _, kind = key[1].partition(",")
    return Cell(key[0], small=metric if kind == "none" else f"{metric}, {kind}")


def _score_cell(score: Score | None) -> Cell | str:
    if score is None:
        return ""
    count = f", {len(score.samples):,} questions" if score.samples else ""
    error = "" if score.stderr is None else f"\N{PLUS-MINUS SIGN} {score.stderr:.4f}"
    return Cell(f"{score.value:.4f}", small=(error + count).removeprefix(", "))


def _lost_cell(interval: Interval | None, paired: bool) -> Cell | str:
    if interval is None:
        return ""
    ends = span(interval.record(), 4) + ("" if paired else ", unpaired")
    return Cell(signed(interval.estimate, 4), small=ends)


def _settings(content: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(str(content.get(name)) for name in _SETTINGS)


def _words(content: Mapping[str, Any]) -> str:
    """`lm-eval 0.4.13, the first 100 questions of each task, 5 examples, chat template, bf16`."""
    parts = [f"lm-eval {content.get('lm_eval', 'unknown')}"]
    if content.get("limit"):
        parts.append(f"the first {content['limit']} questions of each task")
    if content.get("num_fewshot") is not None:
        parts.append(f"{content['num_fewshot']} examples in a prompt")
    if content.get("chat"):
        parts.append("chat template")
    return ", ".join([*parts, str(content.get("precision", ""))]).removesuffix(", ")
