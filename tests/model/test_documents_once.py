"""A forward pass learns once where the documents of its rows end, not once a layer."""

from collections import Counter

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dense2sparse.kernels import library_dense, ops, reference
from dense2sparse.kernels.documents import Documents
from dense2sparse.kernels.library_dense import Library
from dense2sparse.model import attention
from dense2sparse.model.attention import AttentionCall
from dense2sparse.model.convert import convert
from dense2sparse.recipes.schema import Sparsity

LENGTH, CUT = 80, 33
WAITS = ("nonzero", "cpu", "tolist", "item", "__bool__", "__int__", "__float__")
"""Methods of a tensor that wait for its device."""


class Row:
    def __init__(self):
        generator = torch.Generator().manual_seed(3)
        self.input_ids = torch.randint(3, 64, (2, LENGTH), generator=generator)
        whole = torch.arange(LENGTH)
        parts = torch.cat([whole[:CUT], whole[: LENGTH - CUT]])
        self.position_ids = torch.stack([parts, whole])
        self.document_ids = torch.stack([whole >= CUT, whole >= LENGTH]).int()


def model_of(sparse_layers):
    """Two dense layers and some sparse ones."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=2 + sparse_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        pad_token_id=0,
        initializer_range=0.3,
    )
    sparsity = Sparsity(block_size=16, top_k=2, dense_layers=[0, 1])
    return convert(LlamaForCausalLM(config), sparsity, [Row()]).train()


def causal(q, k, v, scale):
    return reference.dense_attention(q, k, v, scale=scale)


def packed(q, k, v, query_bounds, key_bounds, max_queries, max_keys, scale):
    """A library's packed form that reads nothing back: one row of as many queries as keys."""
    ids = torch.searchsorted(key_bounds, torch.arange(len(k)), right=True)[None]
    rows = (x.transpose(0, 1)[None] for x in (q, k, v))
    out, lse = reference.dense_attention(*rows, scale=scale, document_ids=ids)
    return out[0].transpose(0, 1), lse[0]


@pytest.fixture()
def waits(monkeypatch):
    """How often anything waited for a device; dense attention is a library's, as on a GPU."""
    counted = Counter()

    def watch(owner, name):
        usual = getattr(owner, name)

        def watched(*inputs, **options):
            counted[name] += 1
            return usual(*inputs, **options)

        monkeypatch.setattr(owner, name, watched)

    for name in WAITS:
        watch(torch.Tensor, name)
    monkeypatch.setattr(library_dense, "LIBRARIES", {"cpu": Library("cpu", causal, packed)})
    monkeypatch.setattr(library_dense, "_candidates_for", lambda q: ("cpu",))
    monkeypatch.setattr(ops._TORCH, "dense_attention", library_dense.dense_attention)
    return counted


def step(model, mode, given, recompute):
    """Logits of a pass and its gradients; the documents are given, or found in the position ids."""
    row = Row()
    model.gradient_checkpointing_disable()
    if recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    documents = row.document_ids if given else None
    call = AttentionCall(mode, document_ids=documents, kl_weight=0.5)
    options = {"position_ids": row.position_ids, "msa_call": call, "use_cache": False}
    logits = model(row.input_ids, **options).logits
    logits.square().mean().backward()
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    return [logits.detach(), *found]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("mode", ["warmup", "sparse"])
def test_waits_of_a_pass_are_the_same_with_one_sparse_layer_and_three(
    waits, mode, given, recompute
):
    """Recomputation included. `cpu` brings the ids to the host, `nonzero` and `tolist` work there."""
    seen = []
    for sparse_layers in (1, 3):
        model = model_of(sparse_layers)
        waits.clear()
        step(model, mode, given, recompute)
        seen.append(dict(waits))
    assert seen[0] == seen[1]
    assert seen[0]["nonzero"] == 1 and seen[0]["cpu"] == 1


@pytest.mark.parametrize("mode", ["warmup", "sparse"])
def test_a_pass_is_to_the_bit_what_it_is_with_ids_read_in_every_layer(monkeypatch, mode):
    model, read = model_of(2), []
    usual = Documents.of
    monkeypatch.setattr(Documents, "of", lambda *given: read.append(1) or usual(*given))
    ours = step(model, mode, True, False)
    assert len(read) == 1
    monkeypatch.setattr(AttentionCall, "documents", lambda self, ids, device: ids)
    theirs = step(model, mode, True, False)
    assert len(read) > 4, "the ids themselves are read in every operation"
    for one, two in zip(ours, theirs, strict=True):
        assert torch.equal(one, two)


def test_layers_with_a_sliding_window_look_at_their_mask_once():
    call = AttentionCall("sparse", document_ids=Row().document_ids)
    sees = torch.ones(LENGTH, LENGTH).tril().bool()[None, None].repeat(2, 1, 1, 1)
    run_on, restarted = sees, sees.clone()
    restarted[0, :, CUT:, :CUT] = False
    with pytest.raises(ValueError, match="position_ids run on"):
        call.check_bounds(run_on, call.document_ids, torch.device("cpu"))
    call.check_bounds(restarted, call.document_ids, torch.device("cpu"))
    looked = []
    original = attention.torch.Tensor.__bool__
    try:
        attention.torch.Tensor.__bool__ = lambda self: looked.append(1) or original(self)
        call.check_bounds(restarted, call.document_ids, torch.device("cpu"))
    finally:
        attention.torch.Tensor.__bool__ = original
    assert not looked
    with pytest.raises(ValueError, match="position_ids run on"):
        call.check_bounds(None, call.document_ids, torch.device("cpu"))
