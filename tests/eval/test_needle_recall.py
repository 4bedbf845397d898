"""Needle-block recall: by hand, against one pass over the whole row, in models with sliding windows."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from dense2sparse.eval import generate as generating
from dense2sparse.eval.arms import ArmRun
from dense2sparse.eval.generate import MEASURED, answer, generate, prefill
from dense2sparse.eval.models import MODES, attending
from dense2sparse.eval.recall import answer_selection, summarise
from dense2sparse.model import convert
from dense2sparse.model.attention import AttentionCall
from dense2sparse.recipes.schema import Sparsity

BLOCK = 16
ARMS = [ArmRun("converted_sparse", 4), ArmRun("converted_oracle", 4)]


@pytest.fixture(scope="module")
def converted(answering, tmp_path_factory, tokenizer):
    home = tmp_path_factory.mktemp("recall")
    answering.build_home(home, answering.lively_model(), tokenizer)
    return convert.load(home / "converted", dtype=torch.float32, mode="dense").eval()


@pytest.fixture(scope="module")
def windowed():
    """Qwen3 with one layer of full attention between two that see 32 tokens."""
    torch.manual_seed(1)
    config = Qwen3Config(
        vocab_size=900,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        use_sliding_window=True,
        sliding_window=32,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        initializer_range=0.25,
    )
    row = SimpleNamespace(
        input_ids=torch.randint(2, 900, (1, 64)),
        position_ids=torch.arange(64)[None],
        document_ids=torch.zeros(1, 64, dtype=torch.int32),
    )
    sparsity = Sparsity(block_size=BLOCK, top_k=4, index_dim=16, dense_layers=[], init="random")
    return convert.convert(Qwen3ForCausalLM(config).eval(), sparsity, [row]).eval()


def by_hand(model, run, ids, prompt_len):
    """Layer -> (G, A, K) ids of the answer positions, from one pass over the whole row, no cache."""
    call = AttentionCall(MODES[run.arm], top_k=run.top_k)
    with torch.no_grad():
        model(input_ids=torch.tensor([ids]), use_cache=False, msa_call=call)
    return {
        layer: report.block_ids[0, :, prompt_len - 1 : len(ids) - 1]
        for layer, report in call.reports.items()
    }


@pytest.mark.parametrize("run", ARMS, ids=lambda run: run.label)
@pytest.mark.parametrize("new_tokens", [1, 2, 7])
@pytest.mark.parametrize("chunk", [None, 50])
@pytest.mark.parametrize("which", ["converted", "windowed"])
def test_selection_while_answering_is_that_of_one_pass_over_the_whole_row(
    request, which, run, new_tokens, chunk
):
    model = request.getfixturevalue(which)
    prompt = torch.randint(2, 900, (157,), generator=torch.Generator().manual_seed(5)).tolist()
    with attending(model, run):
        made = generate(model, prompt, new_tokens=new_tokens, prefill_chunk=chunk)
        ids = prompt + made.ids
        reread = []

        def again(length):
            reread.append(length)
            return prefill(model, ids[:length], chunk)[1]

        found = answer_selection(model, run, made.cache, ids, len(prompt), again)
        expected = by_hand(model, run, ids, len(prompt))
    assert found.keys() == expected.keys() and len(found)
    for layer, blocks in found.items():
        assert blocks.shape[1] == len(made.ids)
        same = [set(one) == set(two) for one, two in zip(_rows(blocks), _rows(expected[layer]))]  # noqa: B905
        assert all(same)
    assert bool(reread) == (which == "windowed"), "only a cache that cannot be cut is made again"


def _rows(blocks):
    return blocks.flatten(0, 1).tolist()


def test_recall_by_hand():
    ids = torch.tensor(
        [
            [[0, 3, 9, -1], [3, 4, 9, 10]],  # group 0: two answer positions
            [[0, 4, 5, 9], [0, 1, 2, 9]],
        ]
    )
    inside, across = [50, 55], [60, 70]  # block 3; blocks 3 and 4
    found = summarise({1: ids, 2: None}, [inside, across], BLOCK, num_blocks=10)
    # Layer 1, needle in block 3: 1, 1; 0, 0. Four tokens in 3 and six in 4: 0.4, 1; 0.6, 0. Layer 2
    # reads all.
    assert found["by_layer"] == {"1": 4 / 8, "2": 1.0}
    assert found["share"] == pytest.approx((4 / 8 + 1) / 2, abs=1e-4)
    assert found["first"] == pytest.approx(((1 + 0 + 0.4 + 0.6) / 4 + 1) / 2, abs=1e-4)
    assert found["any"] == pytest.approx(((1 + 0 + 1 + 0.6) / 4 + 1) / 2, abs=1e-4)
    assert found["kept"] == pytest.approx((3.5 / 10 + 1) / 2, abs=1e-4)
    assert found["positions"] == 2


def test_recording_changes_no_answer_and_no_mode(converted, answering, tokenizer, ruler_like_words):
    sample = replace(answering.prompts(tokenizer, ruler_like_words.nouns, 1)[0], new_tokens=6)
    run = ARMS[0]
    with attending(converted, run):
        with_recall = answer(converted, tokenizer, sample, run=run)
        without = answer(converted, tokenizer, sample)
        again = answer(converted, tokenizer, sample, run=run, prefill_chunk=64)
    assert with_recall.pop("needle") == again.pop("needle")
    for record in (with_recall, without, again):
        for key in MEASURED:
            record.pop(key)
    assert with_recall == without == again


def test_dense_arms_and_prompts_without_needles_record_nothing(
    converted, answering, tokenizer, ruler_like_words, monkeypatch
):
    monkeypatch.setattr(generating, "answer_recall", None)
    sample = answering.prompts(tokenizer, ruler_like_words.nouns, 1)[0]
    dense = ArmRun("converted_dense")
    with attending(converted, dense):
        assert "needle" not in answer(converted, tokenizer, sample, run=dense)
    with attending(converted, ARMS[0]):
        assert "needle" not in answer(converted, tokenizer, replace(sample, spans=[]), run=ARMS[0])
