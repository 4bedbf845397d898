"""How much filling fits a length: as NVIDIA's generator finds it, and faster.

Published: one binary search for a task and length, then every sample that is too long shrinks by steps.
All draws of the search belong to the task's random order, so they are repeated here call by call.
Native: every sample is fitted alone, from a start that a trial sample of the same task gives.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator

from .ruler_lists import CommonWords, FrequentWords
from .ruler_material import Dice, DoesNotFit, Draft, Material, Redraw
from .ruler_questions import Documents
from .ruler_tasks import TASKS, Family, Tracking, solved

_TRIES = 50
"""Draws of the smallest form before a task is given up; the published generator would go on for ever."""
_SLACK = 200
"""A native prompt may leave 1/200 of its length free, or one unit of filling."""
_TRIAL_TOKENS = 16384
"""A trial sample of a longer length is filled up to here; the rest is extrapolated."""
_LEAST = 1e-3
"""Tokens that a unit of filling costs at least, so that nothing is divided by zero."""


def published_drafts(
    task: str,
    length: int,
    seed: int,
    material: Material,
    tokens: Callable[[Draft], int],
    new_tokens: int,
) -> Iterator[Draft]:
    """Drafts of a task in the published order, without end; `tokens` counts a rendered prompt.

    Raises:
        DoesNotFit: not even the smallest form fits.
    """
    family = TASKS[task]
    dice = Dice(seed)

    def cost(draft: Draft) -> int:
        return tokens(draft) + new_tokens

    if isinstance(family, FrequentWords):
        yield from _frequent_words(family, dice, length, new_tokens, material, cost)
        return
    example = _example(family, dice, material) if isinstance(family, Tracking) else None
    extra = material.count_tokens(solved(example)) if example else 0

    def trial(size: int) -> Draft:
        return _drawn(lambda: family.draft(dice, size, length, 0, material))

    def fits(size: int) -> bool:
        return cost(trial(size)) + extra <= length

    step = family.step(length)
    if isinstance(family, CommonWords):
        probe = family.probe_size
        reach = int(length // (tokens(trial(probe)) / probe)) * 2
    else:
        reach = int(length / (tokens(trial(step)) / step) * 3)
    size = _search(fits, step, max(reach, 2 * step))
    for index in itertools.count():

        def one(used: int, index: int = index) -> Draft:
            draft = family.draft(dice, used, length, index, material)
            if example and isinstance(family, Tracking):
                return family.with_example(dice, draft, example)
            return draft

        yield _shrunk(task, one, size, step, cost, length)


class NativeSizing:
    """Fits the samples of one corpus and tokenizer; every sample is a function of its name alone."""

    def __init__(self, material: Material, tokens: Callable[[Draft], int]) -> None:
        self._material, self._tokens = material, tokens
        self._starts: dict[tuple[str, int, int, int], tuple[int, float]] = {}

    def draft(self, task: str, length: int, seed: int, index: int, new_tokens: int) -> Draft:
        """A draft that fills the length but for 1/200 of it, or one unit of filling.

        Raises:
            DoesNotFit: not even the smallest form fits; the message names both sizes.
        """
        family = TASKS[task]
        low = self._smallest(family, index)
        limit = length - new_tokens

        def made(size: int) -> Draft:
            return self._made(family, f"{task}/{length}/{seed}/{index}", size, length, index)

        start, per_unit = self._start(task, length, seed, new_tokens)
        # Samples of one size differ: aim at the middle of what is accepted.
        middle = length / (2 * _SLACK)
        best: Draft | None = None
        under, over = low - 1, None
        size = max(low, start - int(middle / per_unit))
        before: tuple[int, int] | None = None
        for _ in range(12):
            draft = made(size)
            left = limit - self._tokens(draft)
            if before is not None and abs(size - before[0]) > size // 100:
                per_unit = max((before[1] - left) / (size - before[0]), _LEAST)
            before = size, left
            if left >= 0:
                best, under = draft, size
                if left <= max(length // _SLACK, per_unit):
                    return draft
            else:
                over = size
            ahead = int((left - middle) / per_unit)
            size = max(size + (ahead or (1 if left >= 0 else -1)), under + 1)
            if over is not None:
                if over - under <= 1:
                    break
                size = min(size, over - 1)
        if best is not None:
            return best
        fitting = largest(lambda size: self._tokens(made(size)), limit, low)
        if fitting is None:
            raise too_long(task, self._tokens(made(low)) + new_tokens, length)
        return made(fitting)

    def _start(self, task: str, length: int, seed: int, new_tokens: int) -> tuple[int, float]:
        """Size at which a trial sample fills the length, and what one more unit costs."""
        key = (task, length, seed, new_tokens)
        if key not in self._starts:
            family = TASKS[task]
            low = self._smallest(family, 0)

            def cost(size: int) -> int:
                name = f"{task}/{length}/{seed}/trial"
                return self._tokens(self._made(family, name, size, length, 0))

            limit = length - new_tokens
            least = cost(low)
            if least > limit:
                raise too_long(task, least + new_tokens, length)
            size = largest(cost, min(limit, max(2 * least, _TRIAL_TOKENS)), low)
            assert size is not None
            filled = cost(size)
            per_unit = max((filled - least) / (size - low), _LEAST) if size > low else 1.0
            if limit > 2 * filled:
                size += int((limit - filled) / per_unit)
            self._starts[key] = size, per_unit
        return self._starts[key]

    def _made(self, family: Family, name: str, size: int, length: int, index: int) -> Draft:
        dice = Dice.named(name)
        draft = family.draft(dice, size, length, index, self._material)
        if isinstance(family, Tracking):
            example = family.example(dice, self._example_size(family, length), self._material)
            return family.with_example(dice, draft, example)
        return draft

    def _example_size(self, family: Tracking, length: int) -> int:
        """Lines of the worked example: as published, but a quarter of a short length at most."""
        key = ("example", length, 0, 0)
        if key not in self._starts:

            def cost(size: int) -> int:
                dice = Dice.named(f"example/{length}")
                return self._material.count_tokens(
                    solved(family.example(dice, size, self._material))
                )

            limit = min(family.example_tokens, length // 4)
            size = largest(cost, limit, family.min_size)
            self._starts[key] = size or family.min_size, 0.0
        return self._starts[key][0]

    def _smallest(self, family: Family, index: int) -> int:
        if isinstance(family, Documents):
            return family.smallest(index, self._material)
        return family.min_size


def too_long(task: str, needed: int, length: int) -> DoesNotFit:
    """What to say where a task does not fit."""
    return DoesNotFit(f"{task} needs {needed} tokens in its smallest form, {length} are given")


def largest(cost: Callable[[int], int], limit: int, low: int, high: int = 1 << 24) -> int | None:
    """Largest size with cost(size) <= limit, for a cost that grows with size; None if `low` is too much.

    Guesses by slope between known ends, halves in turn: some six evaluations where bisection takes twenty.
    """
    low_cost = cost(low)
    if low_cost > limit:
        return None
    probe = max(2 * low, low + 8)
    while probe < high:
        probe_cost = cost(probe)
        if probe_cost > limit:
            high, high_cost = probe, probe_cost
            break
        slope = max((probe_cost - low_cost) / (probe - low), 1e-3)
        low, low_cost = probe, probe_cost
        probe = min(low + max(8, int(1.05 * (limit - low_cost) / slope)), 64 * low)
    else:
        return low
    halve = False
    while high - low > 1:
        share = 0.5 if halve else (limit - low_cost) / max(1, high_cost - low_cost)
        middle = min(max(low + int(share * (high - low)), low + 1), high - 1)
        middle_cost = cost(middle)
        if middle_cost <= limit:
            low, low_cost = middle, middle_cost
        else:
            high, high_cost = middle, middle_cost
        halve = not halve
    return low


def _example(family: Tracking, dice: Dice, material: Material) -> Draft:
    """The worked example of variable tracking: 500 tokens without a chat template, as published."""
    step = family.example_step

    def cost(draft: Draft) -> int:
        return material.count_tokens(draft.question + draft.answer_prefix)

    def trial(size: int) -> int:
        return cost(_drawn(lambda: family.example(dice, size, material)))

    reach = int(family.example_tokens / (trial(step) / step) * 3)
    size = _search(lambda size: trial(size) <= family.example_tokens, step, max(reach, 2 * step))
    return _shrunk(
        "the worked example of vt",
        lambda used: family.example(dice, used, material),
        size,
        step,
        cost,
        family.example_tokens,
    )


def _frequent_words(
    family: FrequentWords,
    dice: Dice,
    length: int,
    new_tokens: int,
    material: Material,
    cost: Callable[[Draft], int],
) -> Iterator[Draft]:
    """The published walk: up from a guess until the length is full, then down for every sample."""
    room = length - new_tokens
    step = room // 32
    vocabulary = family.vocabulary(dice, room)
    size = room // family.word_len
    while cost(family.text(size, vocabulary, dice, material)) < length:
        size += step
    size -= step
    while True:
        vocabulary = family.vocabulary(dice, room)
        used = size
        draft = family.text(used, vocabulary, dice, material)
        while cost(draft) > length:
            if used <= step:
                raise too_long("fwe", cost(draft), length)
            used -= step
            draft = family.text(used, vocabulary, dice, material)
        yield draft


def _shrunk(
    task: str,
    draw: Callable[[int], Draft],
    size: int,
    step: int,
    cost: Callable[[Draft], int],
    limit: int,
) -> Draft:
    """A draft of `size`, or of the first smaller size by `step` that fits; what is drawn in vain counts."""
    tries = 0
    while True:
        needed = limit + 1
        with contextlib.suppress(Redraw):
            draft = draw(size)
            needed = cost(draft)
            if needed <= limit:
                return draft
        if size > step:
            size -= step
            continue
        tries += 1
        if tries == _TRIES:
            raise too_long(task, needed, limit)


def _search(fits: Callable[[int], bool], low: int, high: int) -> int:
    """The published binary search; `low` if nothing fits."""
    smallest, found = low, None
    while low <= high:
        middle = (low + high) // 2
        if fits(middle):
            found, low = middle, middle + 1
        else:
            high = middle - 1
    return smallest if found is None else found


def _drawn(draw: Callable[[], Draft]) -> Draft:
    """Repeat a draw until it gives a draft."""
    for _ in range(_TRIES):
        try:
            return draw()
        except Redraw:
            continue
    raise DoesNotFit("no prompt can be drawn: the length is too short for the task")
