"""The recipe's ruler section: presets, what goes together, what the evaluation knows too."""

from __future__ import annotations

import pytest

from dense2sparse.eval.ruler import PARITIES
from dense2sparse.eval.ruler_prompt import MODES
from dense2sparse.recipes.stages import RULER_PRESETS, RulerStage


def stage(**given):
    return RulerStage.model_validate({"kind": "ruler", **given})


@pytest.mark.parametrize(
    ("preset", "samples", "lengths"),
    [
        ("smoke", 5, [1024, 2048]),
        ("quick", 50, [4096, 16384, 32768]),
        ("paper", 500, [4096, 8192, 16384, 32768, 65536, 131072]),
    ],
)
def test_preset_stands_for_lengths_and_samples(preset, samples, lengths):
    made = stage(preset=preset)
    assert (made.samples, made.lengths) == (samples, lengths)
    assert stage(preset=preset, samples=7, lengths=[4096]).samples == 7
    assert stage(preset=preset, lengths=[2048]).samples == samples
    assert preset in RULER_PRESETS


def test_recipe_and_evaluation_know_the_same_modes_and_parities():
    for mode in MODES:
        assert stage(mode=mode).mode == mode
    for parity in PARITIES:
        assert stage(parity=parity, corpus="nvidia").parity == parity


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"preset": "papr"}, "preset"),
        ({"parity": "nvidia"}, "parity=nvidia needs `corpus: nvidia`"),
        ({"tasks": ["vt", "qa_2"]}, "`tasks` names qa_2, whose questions are in `corpus: nvidia`"),
        ({"reasoning_tokens": 9}, "`reasoning_tokens` has no effect with mode=auto"),
        ({"lengths": [1 << 21]}, "lengths"),
        ({"samples": 0, "preset": "smoke"}, "samples"),
    ],
)
def test_what_does_not_go_together_is_refused(given, words):
    with pytest.raises(ValueError, match=words):
        stage(**given)
    assert stage(tasks=["qa_2"], corpus="nvidia").tasks == ["qa_2"]
