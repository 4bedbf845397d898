"""Each sparse layer's KL is computed once a pass, in the backward pass, whatever recomputes activations."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dense2sparse.kernels import ops
from dense2sparse.model.attention import AttentionCall
from dense2sparse.model.convert import backbone_parameters, convert, index_parameters
from dense2sparse.model.execution import Execution, set_execution
from dense2sparse.recipes.schema import Sparsity

LAYERS, SPARSE, WEIGHT = 4, [1, 2, 3], 0.7
RECOMPUTE = [None, False, True]
"""No activation checkpointing, non-reentrant, reentrant."""


class Row:
    def __init__(self, length, seed=0, rows=2):
        generator = torch.Generator().manual_seed(seed)
        self.input_ids = torch.randint(3, 64, (rows, length), generator=generator)
        self.position_ids = torch.arange(length).repeat(rows, 1)


@pytest.fixture()
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        pad_token_id=0,
        initializer_range=0.3,
    )
    sparsity = Sparsity(block_size=16, top_k=2, dense_layers=[0])
    return convert(LlamaForCausalLM(config), sparsity, [Row(64, seed=9)]).train()


@pytest.fixture()
def computed(monkeypatch):
    """A list that grows by one at every KL: whether gradients are recorded there."""
    calls, usual = [], ops.index_kl

    def watched(*tensors, **options):
        calls.append(torch.is_grad_enabled())
        return usual(*tensors, **options)

    monkeypatch.setattr(ops, "index_kl", watched)
    return calls


def checkpointed(model, use_reentrant):
    """Recompute every decoder layer, or none."""
    if use_reentrant is None:
        model.gradient_checkpointing_disable()
    else:
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model.enable_input_require_grads()
    return model


def lm_loss(model, row, call):
    logits = model(row.input_ids, msa_call=call, use_cache=False).logits
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), row.input_ids[:, 1:].flatten()
    )


def gradients(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("fraction", [1.0, 0.5])
@pytest.mark.parametrize("mode", ["warmup", "sparse"])
def test_kl_is_computed_once_a_layer_and_changes_no_bit(
    model, computed, mode, fraction, monkeypatch
):
    """Compared with a KL of its own graph that is added to the loss, without recomputation."""
    if fraction < 1:
        monkeypatch.setattr("dense2sparse.kernels.tiled.TILE_QUERIES", 16)
    fields = {
        "kl_weight": WEIGHT,
        "kl_fraction": fraction if mode == "warmup" else 1.0,
        "kl_seed": 5,
    }
    row = Row(96)
    beside = AttentionCall(mode, attach_kl=False, **fields)
    loss = lm_loss(checkpointed(model, None), row, beside)
    (loss + WEIGHT * sum(report.kl for report in beside.reports.values())).backward()
    expected = gradients(model)
    assert expected.keys() == dict(model.named_parameters()).keys()
    for use_reentrant in RECOMPUTE:
        computed.clear()
        call = AttentionCall(mode, **fields)
        loss = lm_loss(checkpointed(model, use_reentrant), row, call)
        assert not computed, "nothing of it is kept until the backward pass"
        loss.backward()
        assert computed == [True] * len(SPARSE)
        found = gradients(model)
        assert found.keys() == expected.keys()
        for name, grad in found.items():
            assert torch.equal(grad, expected[name]), name
        for layer in SPARSE:
            assert torch.equal(call.reports[layer].kl, beside.reports[layer].kl.detach())
            assert not call.reports[layer].kl.requires_grad


@pytest.mark.parametrize("mode", ["warmup", "sparse"])
def test_triton_kernels_compute_it_in_the_backward_pass_too(model, computed, mode):
    """Against the torch path; two documents in a row, so that the kernels are told of them."""
    row, found = Row(40, rows=1), []
    documents = (torch.arange(40) >= 9).int()[None]
    for backend, use_reentrant in (("torch", None), ("triton", False)):
        set_execution(model, Execution(backend=backend))
        computed.clear()
        call = AttentionCall(mode, document_ids=documents, kl_weight=WEIGHT)
        lm_loss(checkpointed(model, use_reentrant), row, call).backward()
        assert computed == [True] * len(SPARSE)
        kls = [call.reports[layer].kl for layer in SPARSE]
        found.append([*kls, *gradients(model).values()])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("use_reentrant", RECOMPUTE)
def test_micro_batches_that_wait_for_each_other_keep_their_own_kl(model, computed, use_reentrant):
    """Two passes, then two backward passes in the other order."""
    rows = [Row(64, seed=1), Row(80, seed=2)]
    checkpointed(model, use_reentrant)
    alone = []
    for row in rows:
        call = AttentionCall("sparse", kl_weight=WEIGHT)
        lm_loss(model, row, call).backward()
        alone.append({layer: float(call.reports[layer].kl) for layer in SPARSE})
    model.zero_grad()
    computed.clear()
    calls = [AttentionCall("sparse", kl_weight=WEIGHT) for _ in rows]
    losses = [lm_loss(model, row, call) for row, call in zip(rows, calls, strict=True)]
    for loss in reversed(losses):
        loss.backward()
    assert len(computed) == 2 * len(SPARSE)
    assert [{n: float(call.reports[n].kl) for n in SPARSE} for call in calls] == alone


def test_without_gradients_the_value_is_there_at_once_in_evaluation_mode(model, computed):
    """In training mode such a pass may be the first of reentrant checkpointing: its KL comes later."""
    row = Row(64)
    with torch.no_grad():
        call = AttentionCall("warmup", kl_weight=WEIGHT)
        model.eval()(row.input_ids, msa_call=call, use_cache=False)
        assert computed == [False] * len(SPARSE) and all(call.reports[n].kl > 0 for n in SPARSE)
        call = AttentionCall("warmup", kl_weight=WEIGHT)
        model.train()(row.input_ids, msa_call=call, use_cache=False)
        assert len(computed) == len(SPARSE) and all(call.reports[n].kl is None for n in SPARSE)
        call = AttentionCall("warmup", kl_weight=WEIGHT, attach_kl=False)
        model(row.input_ids, msa_call=call, use_cache=False)
        assert len(computed) == 2 * len(SPARSE) and all(call.reports[n].kl > 0 for n in SPARSE)


def test_what_is_not_trained_gets_no_gradient_and_the_kl_is_reported_all_the_same(model, computed):
    """A frozen index branch; then a frozen backbone; then nothing at all that needs a gradient."""
    row = Row(64)
    branches = [p for _, p in index_parameters(model)], [p for _, p in backbone_parameters(model)]
    for index, backbone in ((False, True), (True, False), (False, False)):
        for trained, part in zip((index, backbone), branches, strict=True):
            for parameter in part:
                parameter.requires_grad_(trained)
        computed.clear()
        call = AttentionCall("sparse", kl_weight=WEIGHT)
        loss = lm_loss(model, row, call)
        if index or backbone:
            loss.backward()
        assert len(computed) == len(SPARSE) and all(call.reports[n].kl > 0 for n in SPARSE)
        for trained, part in zip((index, backbone), branches, strict=True):
            assert all((p.grad is not None) == trained for p in part)
        model.zero_grad()


def test_no_kl_is_computed_where_none_is_asked_for(model, computed):
    call = AttentionCall("sparse", measure=True)
    lm_loss(checkpointed(model, False), Row(64), call).backward()
    assert not computed
    assert all(call.reports[n].kl is None and call.reports[n].measures for n in SPARSE)
