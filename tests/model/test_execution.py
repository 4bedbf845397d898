"""Execution options: when a sparse layer runs dense, what is said of it, what reaches the operations."""

import json
import logging

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

from dense2sparse.kernels import ops
from dense2sparse.kernels.break_even import MEASURED, Measured, break_even, read
from dense2sparse.model.attention import AttentionCall, attention_mode
from dense2sparse.model.convert import convert, load, save
from dense2sparse.model.execution import Execution, dispatch_of, set_execution
from dense2sparse.recipes.schema import Sparsity

BLOCK, TOP_K = 16, 3
BUDGET = BLOCK * TOP_K


class Row:
    def __init__(self, length):
        self.input_ids = ids(length)
        self.position_ids = torch.arange(length)[None]


def ids(length):
    return torch.randint(3, 64, (1, length), generator=torch.Generator().manual_seed(length))


@pytest.fixture()
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        pad_token_id=0,
        initializer_range=0.3,
    )
    sparsity = Sparsity(block_size=BLOCK, top_k=TOP_K, dense_layers=[0])
    return convert(LlamaForCausalLM(config).eval(), sparsity, [Row(64)])


@pytest.fixture()
def called(monkeypatch):
    """Operations that run, with their options; the operations themselves are as they were."""
    calls = []

    def watch(name):
        operation = getattr(ops, name)

        def watched(*tensors, **options):
            calls.append((name, options))
            return operation(*tensors, **options)

        monkeypatch.setattr(ops, name, watched)

    for name in ("dense_attention", "sparse_attention", "sparse_decode", "select_blocks"):
        watch(name)
    return calls


def names(calls):
    """Of the two sparse layers; layer 0 is dense in any case."""
    return {name for name, _ in calls[1:]}


@torch.no_grad()
def logits(model, tokens, mode, execution=None, **fields):
    if execution is not None:
        set_execution(model, execution)
    return model(tokens, msa_call=AttentionCall(mode, **fields), use_cache=False).logits


@pytest.mark.parametrize("mode", ["sparse", "oracle", "auto"])
@pytest.mark.parametrize(("length", "dense"), [(BUDGET, True), (BUDGET + 1, False)])
def test_rows_within_the_budget_run_dense_and_longer_ones_do_not(
    model, called, mode, length, dense
):
    found = logits(model, ids(length), mode)
    assert names(called) == {"dense_attention"} if dense else "sparse_attention" in names(called)
    if dense:
        assert torch.equal(found, logits(model, ids(length), "dense"))


@pytest.mark.parametrize("mode", ["sparse", "oracle"])
def test_a_selection_of_every_block_equals_dense_attention(model, called, mode):
    """The shortcut's ground, on the path that a KL keeps from taking it."""
    chosen = logits(model, ids(BUDGET), mode, kl_weight=1.0)
    assert "sparse_attention" in names(called)
    torch.testing.assert_close(chosen, logits(model, ids(BUDGET), "dense"), atol=1e-4, rtol=1e-4)


def test_a_step_runs_dense_until_the_budget_is_full(model, called):
    with torch.no_grad():
        cache = model(ids(BUDGET - 2), use_cache=True).past_key_values
        for step, expected in enumerate(["dense_attention", "dense_attention", "sparse_decode"]):
            called.clear()
            model(ids(1), past_key_values=cache)
            assert names(called) == {expected}, step


def test_auto_runs_dense_below_the_length_that_is_forced(model, called):
    forced = Execution(dense_below=80)
    dense = logits(model, ids(79), "auto", forced)
    assert names(called) == {"dense_attention"}
    assert torch.equal(dense, logits(model, ids(79), "dense"))
    called.clear()
    sparse = logits(model, ids(80), "auto")
    assert "sparse_attention" in names(called)
    assert torch.equal(sparse, logits(model, ids(80), "sparse"))
    called.clear()
    logits(model, ids(79), "sparse")
    assert "sparse_attention" in names(called), "sparse stays sparse whatever is faster"


def test_auto_asks_the_table_for_prefill_and_decoding(model, called):
    measured = (
        Measured("cpu", 64, 32, "prefill", 100),
        Measured("cpu", 64, 32, "decode", 60),
        Measured("another", 64, 32, "prefill", 10_000),
    )
    set_execution(model, Execution(measured=measured))
    with torch.no_grad(), attention_mode(model, "auto"):
        cache = model(ids(99), use_cache=True).past_key_values
        assert names(called) == {"dense_attention"}
        called.clear()
        model(ids(1), past_key_values=cache)
        assert names(called) == {"sparse_decode"}


def test_auto_measures_and_distils_what_it_selects(model, called):
    call = AttentionCall("auto", kl_weight=1.0)
    set_execution(model, Execution(dense_below=1000))
    model(ids(70), msa_call=call, use_cache=False).logits.sum().backward()
    assert call.reports[1].kl is not None and call.reports[1].block_ids is not None


def test_each_decision_is_said_once_a_model(model, caplog):
    caplog.set_level(logging.INFO, "dense2sparse.model.execution")
    for length in (20, 90, 30, 95):
        logits(model, ids(length), "auto")
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2, said
    assert "up to 48 keys run dense" in said[0]
    assert "no break-even length is known of cpu with about 2 heads a group" in said[1]
    logits(model, ids(60), "auto", Execution(dense_below=64))
    assert "mode auto runs dense below 64 keys" in caplog.records[-1].getMessage()


def test_the_backend_reaches_every_operation(model, called):
    """Also the dense layer's."""
    set_execution(model, Execution(backend="torch"))
    with torch.no_grad():
        cache = model(ids(60), use_cache=True).past_key_values
        model(ids(1), past_key_values=cache)
    assert {name for name, _ in called} == {
        "dense_attention",
        "select_blocks",
        "sparse_attention",
        "sparse_decode",
    }
    assert all(options["backend"] == "torch" for _, options in called)


def test_fp8_scores_are_taken_in_prefill_and_in_decoding_alike(model, called):
    """The operation's own rounding: a step selects what the whole row would."""
    tokens = ids(90)
    plain = logits(model, tokens, "sparse")
    whole = logits(model, tokens, "sparse", Execution(index_precision="fp8"))
    assert not torch.allclose(whole, plain, atol=1e-4), "the rounding must move some block"
    called.clear()
    with torch.no_grad():
        cache = model(tokens[:, :70], use_cache=True).past_key_values
        steps = [model(tokens[:, n : n + 1], past_key_values=cache).logits for n in range(70, 90)]
    torch.testing.assert_close(torch.cat(steps, 1), whole[:, 70:], atol=1e-4, rtol=1e-4)
    scored = [options["precision"] for name, options in called if name == "select_blocks"]
    assert scored == ["fp8"] * 2 * 21
    fixed = StaticCache(config=model.config, max_cache_len=90)
    model(tokens[:, :70], past_key_values=fixed)
    with pytest.raises(ValueError, match="fp8 scores need a cache that grows"):
        model(tokens[:, 70:71], past_key_values=fixed)


def test_debug_looks_at_block_ids_before_they_are_used(model, monkeypatch):
    wrong = ops.select_blocks

    def turned_round(*tensors, **options):
        return wrong(*tensors, **options).flip(-1)

    monkeypatch.setattr(ops, "select_blocks", turned_round)
    with pytest.raises(
        ValueError, match=r"block_ids\[0, 0, 0\] = \[-1, -1, 0\] has ids out of order"
    ):
        logits(model, ids(60), "sparse", Execution(debug=True))
    logits(model, ids(60), "sparse", Execution())


def test_options_come_with_loading_and_a_context_puts_them_back(model, tmp_path):
    save(model, tmp_path / "hf")
    again = load(tmp_path / "hf", execution=Execution(backend="reference"), mode="auto")
    attentions = [layer.self_attn for layer in again.model.layers]
    assert {dispatch_of(one).execution.backend for one in attentions} == {"reference"}
    assert len({id(dispatch_of(one)) for one in attentions}) == 1
    assert [getattr(one, "msa_mode", None) for one in attentions] == [None, "auto", "auto"]
    with attention_mode(again, "sparse", execution=Execution(backend="torch")):
        assert dispatch_of(attentions[0]).execution.backend == "torch"
    assert dispatch_of(attentions[0]).execution.backend == "reference"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"backend": "cuda"}, "use one of auto, reference, torch, triton"),
        ({"index_precision": "int4"}, "use 'input' or 'fp8'"),
        ({"dense_below": -1}, "use a number of tokens"),
    ],
)
def test_options_that_cannot_be_are_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        Execution(**options)


def test_the_nearest_measured_layout_of_the_device_counts():
    measured = (
        Measured("H200", 64, 4, "prefill", 12_000),
        Measured("H200", 32, 8, "prefill", 20_000),
        Measured("H200", 32, 8, "decode", 8_000),
    )
    assert break_even("H200", 128, 8, "prefill", measured) == 12_000
    assert break_even("H200", 28, 4, "prefill", measured) == 20_000, "7 heads a group: 4 is nearer"
    assert break_even("H200", 40, 5, "prefill", measured) == 20_000, "8: as near, the later one"
    assert break_even("H200", 32, 8, "decode", measured) == 8_000
    assert break_even("H200", 64, 4, "decode", measured) is None, "four times off is not near"
    assert break_even("H100", 64, 4, "prefill", measured) is None
    assert break_even("H200", 64, 4, "prefill", ()) is None
    assert all(one.tokens > 0 for one in MEASURED)


def test_the_table_is_read_from_a_benchmark(tmp_path):
    entries = [
        {"heads": 64, "groups": 4, "phase": "prefill", "tokens": 16384},
        {"heads": 9, "groups": 3, "phase": "decode", "tokens": None},
    ]
    file = tmp_path / "kernels.json"
    file.write_text(json.dumps({"gpu": {"name": "H200"}, "break_even": entries}))
    assert read(file) == (Measured("H200", 64, 4, "prefill", 16384),)
    file.write_text(json.dumps({"break_even": entries}))
    with pytest.raises(ValueError, match="give a file that benchmarks/kernels.py wrote"):
        read(file)
    entries[0]["phase"] = "training"
    file.write_text(json.dumps({"gpu": {"name": "H200"}, "break_even": entries}))
    with pytest.raises(ValueError, match="cannot be"):
        read(file)
