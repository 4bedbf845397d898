"""Estimates and progress: what a prompt costs by arithmetic, what is said before the first answer."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from dense2sparse.eval import progress
from dense2sparse.eval.progress import Clock, Speed, estimate, quadratic_share, told, trial, units


def sized(num_tokens: int, new_tokens: int = 10) -> SimpleNamespace:
    return SimpleNamespace(num_tokens=num_tokens, new_tokens=new_tokens)


def test_attention_s_share_of_the_arithmetic_is_counted_from_the_model(tiny_model):
    # Scores and values: 2 x 2 FLOP a pair, 2 layers, 4 heads of 16; the weights: 2 FLOP each.
    parameters = sum(one.numel() for one in tiny_model.parameters())
    assert quadratic_share(tiny_model) == pytest.approx(4 * 2 * 4 * 16 / (2 * parameters))
    assert units(100, 0.02) == 100 + 0.02 * 100**2 / 2, "causal: half of the pairs"


def test_estimate_adds_reading_and_answering_over_all_ranks():
    speed = Speed(s_per_unit=0.01, s_per_step=0.5, quadratic=0.02)
    assert speed.prompt_s(sized(100)) == pytest.approx(0.01 * 200 + 5)
    assert estimate(speed, [sized(100)] * 6, 3) == pytest.approx(2 * 7)


def test_trial_is_never_longer_than_the_longest_prompt(tiny_model, monkeypatch):
    lengths = []
    real = progress.generate

    def watched(model, ids, **given):
        lengths.append(len(ids))
        return real(model, ids, **given)

    monkeypatch.setattr(progress, "generate", watched)
    speed = trial(tiny_model, 40)
    assert set(lengths) == {40} and speed.s_per_unit > 0 and speed.s_per_step > 0
    trial(tiny_model, 100_000)
    assert lengths[-1] == progress.TRIAL_TOKENS["cpu"]


def test_times_are_told_as_people_tell_them():
    assert [told(s) for s in (0.4, 99, 100, 5900, 6000, 90_000)] == [
        "0 s",
        "99 s",
        "2 min",
        "98 min",
        "1.7 h",
        "25.0 h",
    ]


def test_time_left_weighs_long_prompts_by_their_arithmetic(monkeypatch):
    now = iter([0.0, 40.0, 50.0])
    monkeypatch.setattr(progress.time, "perf_counter", lambda: next(now))
    said = []
    clock = Clock([sized(200), sized(100)], said.append, every_s=0.0, quadratic=0.02)
    clock.tick(sized(200))  # 600 units in 40 s; the other prompt has 200
    clock.tick(sized(100))
    assert said[0].endswith("1/2 prompts, 40.0 s each, 13 s left")
    assert said[1].endswith("2/2 prompts, 25.0 s each, 0 s left")
