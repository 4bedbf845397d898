"""Every family named in docs/method.md converts without code of its own."""

from dataclasses import dataclass

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from dense2sparse.model.attention import AttentionCall, attention_mode
from dense2sparse.model.convert import backbone_parameters, convert, index_parameters, load, save
from dense2sparse.recipes.schema import Sparsity

TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 128,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MOE = {
    "num_experts_per_tok": 2,
    "num_local_experts": 4,
    "num_experts": 4,
    "moe_intermediate_size": 32,
}
HYBRID = {
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    "sliding_window": 24,
}
FAMILIES: dict[str, dict] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "qwen3_moe": MOE,
    "mistral": {"sliding_window": None},
    "mixtral": {**MOE, "sliding_window": None},
    "smollm3": {"no_rope_layers": [1, 1, 1, 0]},
    "olmo2": {},
    "olmo3": HYBRID,
    "granite": {"attention_multiplier": 0.1, "logits_scaling": 2.0, "residual_multiplier": 0.5},
    "phi3": {"sliding_window": None, "partial_rotary_factor": 1.0},
    "gemma3_text": HYBRID,
    "glm": {"partial_rotary_factor": 0.5},
    "glm4": {"partial_rotary_factor": 0.5},
    "cohere": {"use_qk_norm": True},
    "stablelm": {"partial_rotary_factor": 0.25},
    "starcoder2": {"sliding_window": None},
    "exaone4": {**HYBRID, "sliding_window_pattern": 2},
    "ernie4_5": {},
    "seed_oss": {"attention_dropout": 0.0, "residual_dropout": 0.0},
    "apertus": {},
}
SPARSITY = Sparsity(block_size=16, top_k=3, dense_layers=[0], init="pca")
NUM_TOKENS = 96


@dataclass
class Row:
    input_ids: torch.Tensor
    position_ids: torch.Tensor


def row(batch=2, length=NUM_TOKENS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 128, (batch, length), generator=generator)
    return Row(ids, torch.arange(length).expand(batch, length))


def dense_model(family, **changes):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**TINY, **FAMILIES[family], **changes})
    model = AutoModelForCausalLM.from_config(config).eval()
    # The usual start gives scores near zero, where every selection looks alike; biases start at zero.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "q_proj" in name or "k_proj" in name or "qkv_proj" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def converted(family, sparsity=SPARSITY, **changes):
    return convert(dense_model(family, **changes), sparsity, [row(8, seed=9)])


@pytest.mark.parametrize("family", FAMILIES)
def test_full_budget_equals_the_dense_model_and_decoding_equals_the_whole_row(family):
    model = dense_model(family)
    inputs = row()
    with torch.no_grad():
        dense = model(inputs.input_ids).logits
        convert(model, SPARSITY, [row(8, seed=9)])
        full = model(inputs.input_ids, msa_call=AttentionCall("sparse", top_k=6)).logits
        torch.testing.assert_close(full, dense, atol=1e-4, rtol=1e-4)
        oracle = model(inputs.input_ids, msa_call=AttentionCall("oracle", top_k=6)).logits
        torch.testing.assert_close(oracle, dense, atol=1e-4, rtol=1e-4)

        sparse = model(inputs.input_ids).logits
        assert (sparse - dense).abs().max() > 1e-4, "three of six blocks must change something"
        cache = model(inputs.input_ids[:, :70], use_cache=True)
        steps = [cache.logits]
        for token in range(70, NUM_TOKENS):
            ids = inputs.input_ids[:, token : token + 1]
            cache = model(ids, past_key_values=cache.past_key_values, use_cache=True)
            steps.append(cache.logits)
    torch.testing.assert_close(torch.cat(steps, 1), sparse, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_converted_folder_loads_as_sparse_here_and_as_dense_elsewhere(family, tmp_path):
    model = converted(family)
    inputs = row(seed=1)
    save(model, tmp_path / "hf")
    again = load(tmp_path / "hf")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    with torch.no_grad():
        assert torch.equal(again(inputs.input_ids).logits, model(inputs.input_ids).logits)
        with attention_mode(model, "dense"):
            dense = model(inputs.input_ids).logits
        torch.testing.assert_close(plain(inputs.input_ids).logits, dense, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", ["warmup", "sparse"])
def test_kl_reaches_only_index_weights_with_and_without_checkpointing(family, mode):
    model = converted(family).train()
    inputs = row(1, seed=2)
    targets = inputs.input_ids.roll(-1, 1)
    gradients = []
    for checkpointing in (None, False, True):
        model.zero_grad()
        if checkpointing is None:
            model.gradient_checkpointing_disable()
        else:
            model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
            model.enable_input_require_grads()
        call = AttentionCall(mode, kl_weight=0.7)
        logits = model(inputs.input_ids, msa_call=call, use_cache=False).logits
        torch.nn.functional.cross_entropy(logits[0], targets[0]).backward()
        assert all(report.kl > 0 for report in call.reports.values())
        gradients.append(
            {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        )
    for name, _ in index_parameters(model):
        assert gradients[0][name].abs().max() > 0, name
        for other in gradients[1:]:
            torch.testing.assert_close(other[name], gradients[0][name], rtol=1e-4, atol=1e-7)

    model.zero_grad()
    model.gradient_checkpointing_disable()
    call = AttentionCall(mode)
    logits = model(inputs.input_ids, msa_call=call, use_cache=False).logits
    torch.nn.functional.cross_entropy(logits[0], targets[0]).backward()
    assert all(p.grad is None for _, p in index_parameters(model)), (
        "the LM loss reaches no index weight"
    )
    for name, parameter in backbone_parameters(model):
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, gradients[0][name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_closed_form_starts_closer_to_the_teacher_than_random(family):
    kl = {}
    for init in ("pca", "random"):
        model = converted(family, SPARSITY.model_copy(update={"init": init, "index_dim": None}))
        call = AttentionCall("warmup", kl_weight=1.0)
        with torch.no_grad():
            model(row(seed=3).input_ids, msa_call=call)
        kl[init] = sum(float(report.kl) for report in call.reports.values())
    assert kl["pca"] < kl["random"]


def test_documents_in_a_row_do_not_see_each_other():
    model = converted("gemma3_text")
    a, b = row(1, 40, seed=4), row(1, 56, seed=5)
    packed = torch.cat([a.input_ids, b.input_ids], 1)
    positions = torch.cat([a.position_ids, b.position_ids], 1)
    documents = (torch.arange(96) >= 40).int()[None]
    with torch.no_grad():
        apart = torch.cat([model(part.input_ids).logits for part in (a, b)], 1)
        found = model(packed, position_ids=positions, use_cache=False).logits
        given = AttentionCall("sparse", document_ids=documents)
        told = model(packed, position_ids=positions, msa_call=given, use_cache=False).logits
    torch.testing.assert_close(found, apart, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(told, apart, atol=1e-4, rtol=1e-4)


def test_documents_named_without_restarting_positions_are_refused_for_sliding_layers():
    model = converted("gemma3_text")
    documents = (torch.arange(96) >= 40).int()[None]
    call = AttentionCall("sparse", document_ids=documents)
    with pytest.raises(ValueError, match="position_ids run on"):
        model(row(1).input_ids, msa_call=call, use_cache=False)


@pytest.mark.parametrize("family", ["gemma3_text", "exaone4", "olmo3"])
def test_hybrids_generate_as_without_a_cache_and_padded(family):
    model = converted(family)
    inputs = row(1, 60, seed=6).input_ids
    options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None}
    alone = model.generate(inputs, attention_mask=torch.ones_like(inputs), **options)
    plain = model.generate(
        inputs, attention_mask=torch.ones_like(inputs), use_cache=False, **options
    )
    assert torch.equal(alone, plain)
    padded = torch.nn.functional.pad(inputs, (13, 0))
    mask = torch.nn.functional.pad(torch.ones_like(inputs), (13, 0))
    left = model.generate(padded, attention_mask=mask, **options)
    assert torch.equal(left[:, 13:], alone)


def test_soft_capping_is_refused():
    with pytest.raises(ValueError, match="uses softcap"):
        config = AutoConfig.for_model("gemma2", **{**TINY, **HYBRID})
        convert(AutoModelForCausalLM.from_config(config), SPARSITY, [row()])
