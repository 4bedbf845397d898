"""Selection and sparse attention agree with transformers' own MiniMax-M3 on shared random weights."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from dense2sparse.model.attention import AttentionCall
from dense2sparse.model.convert import convert, index_parameters
from dense2sparse.recipes.schema import Sparsity

m3 = pytest.importorskip("transformers.models.minimax_m3_vl.modeling_minimax_m3_vl")
M3Config = pytest.importorskip(
    "transformers.models.minimax_m3_vl.configuration_minimax_m3_vl"
).MiniMaxM3VLTextConfig

NUM_TOKENS, BLOCK, TOP_K = 200, 16, 4


class Row:
    input_ids = torch.arange(NUM_TOKENS)[None] % 128
    position_ids = torch.arange(NUM_TOKENS)[None]


def m3_model(layer_type):
    torch.manual_seed(0)
    config = M3Config(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=32,
        dense_intermediate_size=96,
        shared_intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        rotary_dim=16,
        max_position_embeddings=512,
        num_local_experts=4,
        num_experts_per_tok=2,
        mlp_layer_types=["dense"] * 3,
        layer_types=["full_attention"] + [layer_type] * 2,
        index_n_heads=2,
        index_head_dim=32,
        index_block_size=BLOCK,
        index_topk_blocks=TOP_K,
        index_local_blocks=1,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return AutoModelForCausalLM.from_config(config).eval()


def test_blocks_and_outputs_equal_transformers_m3():
    theirs = m3_model("minimax_m3_sparse")
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    ours = m3_model("full_attention")
    state = theirs.state_dict()
    missing, unexpected = ours.load_state_dict(state, strict=False)
    assert not missing and all("indexer" in name for name in unexpected)
    sparsity = Sparsity(
        block_size=BLOCK, top_k=TOP_K, index_dim=32, dense_layers=[0], init="random"
    )
    convert(ours, sparsity, [Row()])
    for name, parameter in index_parameters(ours):
        parameter.data.copy_(state[name.replace("self_attn.index_", "self_attn.indexer.")])

    chosen = {}
    for layer in (1, 2):
        indexer = theirs.model.layers[layer].self_attn.indexer
        indexer.register_forward_hook(
            lambda module, _inputs, ids: chosen.__setitem__(module.layer_idx, ids)
        )
    ids = torch.randint(3, 128, (2, NUM_TOKENS), generator=torch.Generator().manual_seed(1))
    call = AttentionCall("sparse")
    with torch.no_grad():
        expected = theirs(ids, use_cache=False).logits
        logits = ours(ids, msa_call=call, use_cache=False).logits
    for layer in (1, 2):
        theirs_sorted = chosen[layer].masked_fill(chosen[layer] < 0, 99).sort(-1).values
        ours_sorted = call.reports[layer].block_ids.long()
        ours_sorted = ours_sorted.masked_fill(ours_sorted < 0, 99)
        assert torch.equal(ours_sorted, theirs_sorted)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        dense = ours(ids, msa_call=AttentionCall("dense"), use_cache=False).logits
    assert (dense - expected).abs().max() > 1e-3, "four of thirteen blocks must change something"
