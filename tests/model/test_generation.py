"""`generate` with the key, value and index-key cache equals the model without any cache."""

from dataclasses import dataclass

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

from dense2sparse.kernels import ops
from dense2sparse.model.attention import AttentionCall, attention_mode
from dense2sparse.model.convert import convert
from dense2sparse.recipes.schema import Sparsity


@dataclass
class Row:
    input_ids: torch.Tensor
    position_ids: torch.Tensor


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
        initializer_range=0.3,
    )
    dense = LlamaForCausalLM(config).eval()
    sparsity = Sparsity(block_size=16, top_k=3, dense_layers=[0])
    return convert(dense, sparsity, [Row(prompt(128)[0], torch.arange(128)[None])])


def prompt(length, seed=0, batch=1):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 128, (batch, length), generator=generator)
    return ids, torch.ones_like(ids)


def generate(model, ids, mask, **options):
    options = {"max_new_tokens": 40, "do_sample": False, **options}
    return model.generate(ids, attention_mask=mask, **options)


@pytest.mark.parametrize("mode", ["sparse", "dense", "oracle"])
def test_greedy_equals_the_model_without_a_cache(model, mode):
    ids, mask = prompt(70)
    with attention_mode(model, mode):
        cached = generate(model, ids, mask)
        tokens = ids
        with torch.no_grad():
            for _ in range(40):
                logits = model(tokens, use_cache=False).logits
                tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(cached, tokens)


def test_sampling_equals_the_model_without_a_cache(model):
    ids, mask = prompt(70)
    results = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        results.append(generate(model, ids, mask, do_sample=True, top_p=0.9, use_cache=use_cache))
    assert torch.equal(*results)
    assert not torch.equal(results[0], generate(model, ids, mask)), (
        "sampling must differ from greedy"
    )


def test_a_batch_equals_its_rows_alone(model):
    ids, mask = prompt(70, batch=3)
    together = generate(model, ids, mask)
    for row in range(3):
        alone = generate(model, ids[row : row + 1], mask[:1])
        assert torch.equal(together[row : row + 1], alone)


def test_left_padding_does_not_shift_blocks(model):
    """Trap 4: blocks of a padded prompt start at its first real token."""
    lengths, width = (33, 60, 75), 75
    rows = [prompt(length, seed=length)[0] for length in lengths]
    ids = torch.cat([torch.nn.functional.pad(row, (width - row.shape[1], 0)) for row in rows])
    mask = torch.tensor([[0] * (width - n) + [1] * n for n in lengths])
    together = generate(model, ids, mask)[:, width:]
    for row, length in enumerate(lengths):
        alone = generate(model, rows[row], torch.ones(1, length, dtype=torch.long))[:, length:]
        assert torch.equal(together[row : row + 1], alone)


def test_beam_search_reorders_index_keys(model):
    ids, mask = prompt(70)
    cached = generate(model, ids, mask, num_beams=3, max_new_tokens=12)
    plain = generate(model, ids, mask, num_beams=3, max_new_tokens=12, use_cache=False)
    assert torch.equal(cached, plain)


def test_prefill_in_chunks_equals_prefill_at_once(model):
    ids, _ = prompt(100)
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        cache, parts = DynamicCache(), []
        for start in range(0, 100, 30):
            parts.append(model(ids[:, start : start + 30], past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("mode", ["sparse", "dense", "oracle"])
@pytest.mark.parametrize("chunk", [7, 40, 64])
def test_generating_from_a_prompt_read_in_chunks_equals_at_once(model, mode, chunk):
    """Chunks shorter than a block, and longer ones that end inside a block; tokens and logits."""
    ids, mask = prompt(100)
    options = {"max_new_tokens": 6, "output_logits": True, "return_dict_in_generate": True}
    with attention_mode(model, mode):
        whole = generate(model, ids, mask, **options)
        chunked = generate(model, ids, mask, prefill_chunk_size=chunk, **options)
    assert torch.equal(chunked.sequences, whole.sequences)
    for ours, theirs in zip(chunked.logits, whole.logits, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def padded(lengths, width):
    """Rows of unequal lengths, padded on the left; also alone."""
    rows = [prompt(length, seed=length)[0] for length in lengths]
    ids = torch.cat([torch.nn.functional.pad(row, (width - row.shape[1], 0)) for row in rows])
    return rows, ids, torch.tensor([[0] * (width - n) + [1] * n for n in lengths])


@pytest.mark.parametrize("chunk", [20, 48])
def test_a_padded_batch_in_chunks_equals_its_rows_alone(model, chunk):
    """The first chunks of a short row hold nothing but padding."""
    rows, ids, mask = padded((33, 60, 75), 75)
    together = generate(model, ids, mask, prefill_chunk_size=chunk, max_new_tokens=8)[:, 75:]
    for row, alone in enumerate(rows):
        expected = generate(model, alone, torch.ones_like(alone), max_new_tokens=8)
        assert torch.equal(together[row], expected[0, alone.shape[1] :])


def test_a_cache_that_cannot_hold_index_keys_is_refused(model):
    ids, _ = prompt(20)
    used = DynamicCache()
    for layer in range(4):
        used.update(torch.zeros(1, 2, 5, 16), torch.zeros(1, 2, 5, 16), layer)
    with pytest.raises(
        ValueError, match="without index keys: pass an empty DynamicCache or StaticCache"
    ):
        model(ids, past_key_values=used)


@pytest.mark.parametrize("mode", ["sparse", "dense"])
@pytest.mark.parametrize("options", [{}, {"prefill_chunk_size": 30}])
def test_a_cache_of_fixed_capacity_generates_the_same(model, mode, options):
    rows, ids, mask = padded((33, 60, 75), 75)
    with attention_mode(model, mode):
        grown = generate(model, ids, mask, max_new_tokens=12)
        fixed = generate(
            model, ids, mask, max_new_tokens=12, cache_implementation="static", **options
        )
    assert torch.equal(fixed, grown)


def test_a_step_on_a_cache_of_fixed_capacity_never_reads_behind_its_length(model):
    """Shapes and launches are those of the capacity; what was not written yet must not matter."""
    ids, _ = prompt(80)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        cache = StaticCache(config=model.config, max_cache_len=128)
        model(ids[:, :70], past_key_values=cache)
        for layer in cache.layers:
            assert layer.keys.shape[2] == 128
            for stored in (layer.keys, layer.values):
                stored[:, :, 70:] = 1e4
            if hasattr(layer, "indexer_keys"):
                layer.indexer_keys[:, 70:] = 1e4
        steps = [
            model(ids[:, token : token + 1], past_key_values=cache).logits
            for token in range(70, 80)
        ]
    torch.testing.assert_close(torch.cat(steps, 1), expected[:, 70:], atol=1e-4, rtol=1e-4)


def test_a_step_on_a_cache_of_fixed_capacity_hands_kernels_one_length_a_row(model, monkeypatch):
    """In memory, not one number seen through a stride of zero: kernels index it by row."""
    seen = []
    decode = ops.sparse_decode

    def watched(*tensors, **options):
        seen.append(options["lengths"])
        return decode(*tensors, **options)

    monkeypatch.setattr(ops, "sparse_decode", watched)
    ids, mask = prompt(70, batch=2)
    generate(model, ids, mask, max_new_tokens=3, cache_implementation="static")
    assert [lengths.tolist() for lengths in seen] == [[71, 71]] * 3 + [[72, 72]] * 3
    assert all(x.is_contiguous() and x.stride() == (1,) and x.dtype == torch.int32 for x in seen)


def test_what_a_cache_of_fixed_capacity_cannot_do_is_refused(model):
    ids, mask = prompt(70)
    with (
        attention_mode(model, "oracle"),
        pytest.raises(ValueError, match="need a cache that grows"),
    ):
        generate(model, ids, mask, cache_implementation="static")
    cache = StaticCache(config=model.config, max_cache_len=80)
    call = AttentionCall("sparse", document_ids=torch.zeros(1, 80, dtype=torch.int32))
    with pytest.raises(ValueError, match="need a cache that grows"):
        model(ids, past_key_values=cache, msa_call=call)


def test_masks_that_are_not_served_are_refused(model):
    ids, _ = prompt(20)
    with pytest.raises(ValueError, match="give a padding mask"):
        model(ids, attention_mask=torch.ones(1, 1, 20, 20, dtype=torch.bool), use_cache=False)
    with pytest.raises(ValueError, match="give a padding mask"):
        cache = model(ids, use_cache=True).past_key_values
        model(ids[:, :1], attention_mask=torch.ones(1, 1, 1, 21).bool(), past_key_values=cache)
    with pytest.raises(ValueError, match="covers 30 tokens, not 20 keys"):
        model(ids, attention_mask=torch.ones(1, 30, dtype=torch.long), use_cache=False)


def test_mode_is_put_back_and_needs_a_sparse_layer(model):
    with pytest.raises(RuntimeError, match="stop"), attention_mode(model, "dense", top_k=2):
        assert model.model.layers[1].self_attn.msa_mode == "dense"
        raise RuntimeError("stop")
    assert model.model.layers[1].self_attn.msa_mode == "sparse"
    with (
        pytest.raises(ValueError, match="convert or load it first"),
        attention_mode(torch.nn.Linear(1, 1), "dense"),
    ):
        pass


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_block_ids_of_the_forward_pass_are_read_again(use_reentrant):
    """Trap 3: the recomputation must not select anew, even where the index branch has changed since."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        initializer_range=0.3,
    )
    small = LlamaForCausalLM(config).train()
    ids = torch.randint(3, 64, (1, 128))
    row = Row(ids, torch.arange(128)[None])
    convert(small, Sparsity(block_size=16, top_k=2, dense_layers=[0]), [row])
    index_q = small.model.layers[1].self_attn.index_q_proj.weight
    start = index_q.detach().clone()
    gradients = []
    for checkpointing, disturbed in ((False, False), (True, True), (False, True)):
        index_q.data.copy_(start)
        small.zero_grad()
        small.gradient_checkpointing_disable()
        if checkpointing:
            small.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            small.enable_input_require_grads()
        call = AttentionCall("sparse")
        if disturbed and not checkpointing:
            index_q.data.normal_(std=3.0, generator=torch.Generator().manual_seed(1))
        loss = small(ids, labels=ids, msa_call=call, use_cache=False).loss
        if disturbed and checkpointing:
            index_q.data.normal_(std=3.0, generator=torch.Generator().manual_seed(1))
        loss.backward()
        gradients.append(small.model.layers[0].self_attn.q_proj.weight.grad.clone())
    plain, recomputed, other = gradients
    torch.testing.assert_close(recomputed, plain)
    assert not torch.allclose(other, plain), "the change must matter to a new selection"


def test_one_call_serves_one_forward_pass(model):
    ids, _ = prompt(70)
    call = AttentionCall("sparse")
    model(ids, msa_call=call, use_cache=False)
    with pytest.raises(ValueError, match="has served a forward pass"):
        model(ids, msa_call=call, use_cache=False)
