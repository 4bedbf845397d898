"""How long an evaluation takes: an estimate before it starts, and a bar while it runs.

The estimate comes from one trial of each arm when it begins: a short prompt is read and a few tokens are
decoded. Reading is scaled by the arithmetic of dense attention (linear in the tokens for the weights,
quadratic for the scores), decoding by its steps, each answer counted at its limit. Answers that end early
take less, and so does selecting in long prompts; a GPU that the trial's prompt does not fill makes the
estimate too high as well.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from .generate import generate

TRIAL_TOKENS = {"cpu": 256, "cuda": 2048}
"""Tokens of the trial's prompt by type of device."""
_STEPS = 4
_BAR = 20


class Sized(Protocol):
    """A prompt as far as its cost goes."""

    @property
    def num_tokens(self) -> int: ...
    @property
    def new_tokens(self) -> int: ...


@dataclass(frozen=True)
class Speed:
    """Seconds of a prompt, from the trial."""

    s_per_unit: float
    """Seconds for what one token of the weights' arithmetic costs."""
    s_per_step: float
    """Seconds of a decoding step."""
    quadratic: float
    """Arithmetic of one attention score over that of one token of the weights."""

    def prompt_s(self, sample: Sized) -> float:
        """Seconds of one prompt with its whole answer."""
        return self.s_per_unit * units(sample.num_tokens, self.quadratic) + (
            self.s_per_step * sample.new_tokens
        )


def units(num_tokens: int, quadratic: float) -> float:
    """Arithmetic of a prompt, in tokens that pass through the weights."""
    return num_tokens + quadratic * num_tokens**2 / 2


def quadratic_share(model: Any) -> float:
    """Arithmetic of one query-key pair in all layers over that of one token in all weights.

    4 * layers * heads * width FLOP against 2 * parameters. Of a mixture of experts all parameters count.
    """
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    parameters = sum(one.numel() for one in model.parameters())
    return 2 * config.num_hidden_layers * heads * width / parameters


def trial(model: Any, longest: int) -> Speed:
    """Time a short prompt on a model, after one that warms it up.

    Args:
        longest: tokens of the longest prompt to come; the trial is never longer.
    """
    tokens = max(1, min(longest, TRIAL_TOKENS.get(model.device.type, 256)))
    ids = [1] * tokens
    generate(model, ids, new_tokens=2)
    made = generate(model, ids, new_tokens=1 + _STEPS)
    quadratic = quadratic_share(model)
    return Speed(made.prefill_s / units(tokens, quadratic), made.decode_s / _STEPS, quadratic)


def estimate(speed: Speed, samples: Sequence[Sized], world_size: int) -> float:
    """Seconds for these prompts over `world_size` ranks that work as fast as the one of the trial."""
    return sum(map(speed.prompt_s, samples)) / world_size


def told(seconds: float) -> str:
    """A time as people say it: `40 s`, `12 min`, `3.5 h`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


class Clock:
    """A line now and then: a bar, how fast, how long it still takes."""

    def __init__(
        self,
        samples: Sequence[Sized],
        progress: Callable[[str], None],
        every_s: float,
        quadratic: float = 0.0,
    ) -> None:
        self._quadratic = quadratic
        self._all_work = self._left_work = sum(map(self._work, samples))
        self._all = self._left = len(samples)
        self._progress, self._every_s = progress, every_s
        self._begun = self._last = time.perf_counter()

    def _work(self, sample: Sized) -> float:
        return units(sample.num_tokens, self._quadratic)

    def tick(self, sample: Sized) -> None:
        """One prompt is done."""
        self._left_work -= self._work(sample)
        self._left -= 1
        now = time.perf_counter()
        if now - self._last < self._every_s and self._left:
            return
        self._last = now
        spent, done = now - self._begun, self._all - self._left
        speed = spent / max(1.0, self._all_work - self._left_work)
        left_s = speed * self._left_work if self._left else 0.0
        full = _BAR * done // self._all
        bar = "\N{FULL BLOCK}" * full + "\N{LIGHT SHADE}" * (_BAR - full)
        self._progress(
            f"{bar} {done}/{self._all} prompts, {spent / done:.1f} s each, {told(left_s)} left"
        )
