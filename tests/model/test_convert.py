"""Refusals of conversion and loading, and what the closed form promises."""

import json
import shutil
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    Gemma3Config,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from dense2sparse.kernels.ops import select_blocks
from dense2sparse.model.attention import AttentionCall
from dense2sparse.model.convert import (
    backbone_parameters,
    check_shards,
    convert,
    geometry_of,
    index_parameters,
    is_converted,
    load,
    load_dense,
    save,
)
from dense2sparse.model.geometry import Geometry, check_heads
from dense2sparse.model.probe import attention_modules, observe, transforms
from dense2sparse.recipes.schema import Sparsity


@dataclass
class Row:
    input_ids: torch.Tensor
    position_ids: torch.Tensor


def row(length=200, batch=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 128, (batch, length), generator=generator)
    return Row(ids, torch.arange(length).expand(batch, length))


def llama(**changes):
    torch.manual_seed(0)
    settings = {
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
        "initializer_range": 0.3,
    }
    return LlamaForCausalLM(LlamaConfig(**{**settings, **changes})).eval()


SMALL = {"block_size": 16, "top_k": 3, "dense_layers": [0]}


@pytest.mark.parametrize(
    ("model", "sparsity", "words"),
    [
        ({"num_key_value_heads": 8}, {}, "num_key_value_heads=8 equals num_attention_heads"),
        (
            {"num_key_value_heads": 1},
            {"index_dim": 16},
            "index_dim=16 is more than the 1 KV heads of width 8 can fill",
        ),
        ({}, {"index_dim": 20}, "index_dim=20 is no multiple of the head width 8"),
        ({}, {"dense_layers": [5]}, "dense_layers names layer 5, the model has layers 0 to 2"),
        ({}, {"dense_layers": [0, 1, 2]}, "no layer is left to convert"),
    ],
)
def test_a_geometry_that_cannot_hold_is_refused_in_one_sentence(model, sparsity, words):
    with pytest.raises(ValueError, match=words) as refusal:
        convert(llama(**model), Sparsity(**{**SMALL, **sparsity}), [row()])
    assert "\n" not in str(refusal.value)


def test_multi_query_models_convert_with_one_index_head():
    model = convert(llama(num_key_value_heads=1), Sparsity(**SMALL), [row()])
    assert geometry_of(model).num_index_heads == 1 and geometry_of(model).index_dim == 8


def test_converting_twice_and_without_rows_is_refused():
    with pytest.raises(ValueError, match="no calibration row"):
        convert(llama(), Sparsity(**SMALL), [])
    model = convert(llama(), Sparsity(**SMALL), [row()])
    with pytest.raises(ValueError, match="converted already"):
        convert(model, Sparsity(**SMALL), [row()])


def test_default_dense_layers_and_index_width():
    geometry = geometry_of(convert(llama(num_hidden_layers=11), Sparsity(block_size=16), [row()]))
    assert geometry.sparse_layers == tuple(range(2, 11))
    assert geometry.index_dim == 16, "two KV heads of width 8 fill no more than 16"


def test_full_rank_closed_form_scores_equal_the_groups_mean_logits():
    """With m = G components nothing is lost: the index scores are the mean logits of the group's heads."""
    model = convert(llama(), Sparsity(**SMALL, index_dim=16), [row(seed=s) for s in range(4)])
    kl = []

    def compare(seen):
        if seen.layer == 0:
            return
        index_q, index_k = seen.attention.index_states(seen.hidden, seen.positions)
        mean_q = seen.q.unflatten(1, (2, 4)).mean(2)
        logits = torch.einsum("bgnd,bgsd->bgns", mean_q, seen.k)
        torch.testing.assert_close(index_q @ index_k.mT, logits, rtol=1e-3, atol=1e-3)
        kl.append(seen.layer)

    observe(model, row(seed=7), compare)
    assert kl == [1, 2]


def test_truncated_closed_form_is_the_best_of_its_rank():
    """One component of two: closer to the mean logits than the same with the other eigenvector."""
    model = convert(
        llama(hidden_size=128), Sparsity(**SMALL, index_dim=16), [row(seed=s) for s in range(4)]
    )
    full = convert(
        llama(hidden_size=128), Sparsity(**SMALL, index_dim=32), [row(seed=s) for s in range(4)]
    )
    errors = {}

    def compare(name, slices):
        def visit(seen):
            if seen.layer != 1:
                return
            index_q, index_k = seen.attention.index_states(seen.hidden, seen.positions)
            logits = torch.einsum("bgnd,bgsd->bgns", seen.q.unflatten(1, (2, 4)).mean(2), seen.k)
            scores = index_q[..., slices] @ index_k[..., slices].mT
            errors[name] = float((scores - logits).square().mean())

        return visit

    observe(model, row(seed=7), compare("first", slice(0, 16)))
    observe(full, row(seed=7), compare("second", slice(16, 32)))
    assert errors["first"] < errors["second"]


@pytest.mark.parametrize("family", ["llama", "qwen2_bias", "qwen3_norm"])
def test_transforms_are_found_by_trying(family):
    if family == "qwen3_norm":
        sizes = {
            "hidden_size": 64,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "head_dim": 8,
        }
        config = Qwen3Config(
            vocab_size=128, intermediate_size=96, num_hidden_layers=2, pad_token_id=0, **sizes
        )
        model = Qwen3ForCausalLM(config)
    else:
        model = llama(attention_bias=family == "qwen2_bias")
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.data.normal_()
    found = {}
    observe(model, row(), lambda seen: found.__setitem__(seen.layer, transforms(seen)))
    first = found[0]
    assert first.full and first.rotary
    assert first.bias == (family == "qwen2_bias")
    assert first.norm == (family == "qwen3_norm")


def test_random_start_has_a_norm_and_depends_on_its_seed_only():
    a, b, c = (
        convert(llama(), Sparsity(**SMALL, init="random"), [row()], seed=seed) for seed in (1, 1, 2)
    )
    weights = [dict(index_parameters(model)) for model in (a, b, c)]
    name = "model.layers.1.self_attn.index_q_proj.weight"
    assert "model.layers.1.self_attn.index_q_norm.weight" in weights[0]
    assert torch.equal(weights[0][name], weights[1][name])
    assert not torch.equal(weights[0][name], weights[2][name])


@pytest.fixture
def folder(tmp_path):
    model = convert(llama(), Sparsity(**SMALL), [row()])
    save(model, tmp_path / "hf")
    return tmp_path / "hf"


def edit_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_published_names(folder):
    tensors = load_file(folder / "model.safetensors")
    index = {name for name in tensors if "index" in name}
    prefix = "model.layers.1.self_attn.index_"
    assert {prefix + "q_proj.weight", prefix + "k_proj.weight"} <= index and len(index) == 4
    block = json.loads((folder / "config.json").read_text())["sparse_attention_config"]
    assert block["sparse_attention_freq"] == [0, 1, 1] == block["sparse_disable_index_value"]
    assert block["sparse_block_size"] == 16 and block["sparse_topk_blocks"] == 3
    assert block["use_sparse_attention"] is True and block["sparse_score_type"] == "max"
    assert Geometry.from_config(block, 3).to_config() == block
    assert is_converted(folder)


def test_missing_index_tensor_is_refused(folder):
    edit_tensors(folder, lambda t: t.pop("model.layers.2.self_attn.index_k_proj.weight"))
    with pytest.raises(ValueError, match="lacks 1 index tensors, model.layers.2"):
        load(folder)


def test_unused_index_tensor_is_refused(folder):
    def add(tensors):
        tensors["model.layers.0.self_attn.index_k_proj.weight"] = torch.zeros(8, 64)

    edit_tensors(folder, add)
    with pytest.raises(ValueError, match="has unused 1 index tensors, model.layers.0"):
        load(folder)


def test_index_tensor_of_another_shape_is_refused(folder):
    def change(tensors):
        tensors["model.layers.1.self_attn.index_k_proj.weight"] = torch.zeros(8, 64)

    edit_tensors(folder, change)
    with pytest.raises(ValueError, match=r"has shape \(8, 64\)"):
        load(folder)


def test_missing_backbone_tensor_is_refused(folder):
    edit_tensors(folder, lambda t: t.pop("model.norm.weight"))
    with pytest.raises(ValueError, match="lacks 1 tensors of the model, model.norm.weight"):
        load(folder)


def test_a_config_without_the_block_or_without_layer_list_is_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    block = config.pop("sparse_attention_config")
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="no sparse_attention_config"):
        load(folder)
    block.pop("sparse_attention_freq")
    (folder / "config.json").write_text(json.dumps({**config, "sparse_attention_config": block}))
    with pytest.raises(ValueError, match="has no 'sparse_attention_freq'"):
        load(folder)


def test_published_keys_alone_mean_the_published_form():
    published = {
        "use_sparse_attention": True,
        "sparse_index_dim": 64,
        "sparse_num_index_heads": 2,
        "sparse_topk_blocks": 3,
        "sparse_block_size": 16,
        "sparse_init_block": 0,
        "sparse_local_block": 1,
        "sparse_score_type": "max",
        "sparse_attention_freq": [0, 1],
        "sparse_disable_index_value": [0, 1],
    }
    geometry = Geometry.from_config(published, 2)
    assert geometry.index_norm and not geometry.index_bias and geometry.rotary_layers == (1,)
    assert geometry.index_scale == 1 / 8
    for key, value in (
        ("use_sparse_attention", False),
        ("sparse_score_type", "mean"),
        ("sparse_disable_index_value", [0, 0]),
    ):
        with pytest.raises(ValueError, match=f"{key}=.* is not supported"):
            Geometry.from_config({**published, key: value}, 2)
    with pytest.raises(ValueError, match="lists 2 layers, the model has 3"):
        Geometry.from_config(published, 3)


def test_a_model_without_attention_heads_is_refused():
    with pytest.raises(ValueError, match="model type mamba has no attention heads"):
        check_heads(MambaConfig())


def test_a_wrapper_around_a_text_model_is_refused():
    with pytest.raises(ValueError, match="gemma3 wraps a text model"):
        check_heads(Gemma3Config())


def test_missing_and_torn_weight_files_are_refused(folder):
    whole = folder / "model.safetensors"
    data = whole.read_bytes()
    whole.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="is damaged"):
        check_shards(folder)
    whole.unlink()
    with pytest.raises(ValueError, match="has no model.safetensors"):
        load_dense(folder)
    names = {"a": "model-00001-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    with pytest.raises(ValueError, match="has no model-00001-of-00002.safetensors"):
        load(folder)


def test_saving_over_a_folder_leaves_the_old_one_when_it_fails(folder, monkeypatch):
    model = load(folder)
    before = (folder / "model.safetensors").read_bytes()

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    # A stand-in: a disk cannot be filled inside save_pretrained without root.
    monkeypatch.setattr(model, "save_pretrained", full)
    with pytest.raises(OSError, match="No space left"):
        save(model, folder)
    assert (folder / "model.safetensors").read_bytes() == before
    monkeypatch.undo()
    save(model, folder)
    assert sorted(p.name for p in folder.parent.iterdir()) == ["hf"]


def test_parameters_are_split_without_rest(folder):
    model = load(folder)
    index, backbone = dict(index_parameters(model)), dict(backbone_parameters(model))
    assert len(index) == 4 and not index.keys() & backbone.keys()
    assert len(index) + len(backbone) == len(list(model.parameters()))


def test_frozen_warmup_kl_has_its_own_graph():
    model = convert(llama(), Sparsity(**SMALL), [row()])
    for _, parameter in backbone_parameters(model):
        parameter.requires_grad_(False)
    call = AttentionCall("warmup", kl_weight=1.0, attach_kl=False)
    logits = model(row(64, 1).input_ids, msa_call=call, use_cache=False).logits
    assert not logits.requires_grad
    sum(report.kl for report in call.reports.values()).backward()
    assert all(p.grad.abs().sum() > 0 for _, p in index_parameters(model))
    assert all(p.grad is None for _, p in backbone_parameters(model))


def test_selection_of_a_layer_is_that_of_its_index_states(folder):
    model = load(folder)
    call = AttentionCall("sparse")
    inputs = row(100, 1)
    seen_ids = {}

    def select(seen):
        if seen.layer:
            index_q, index_k = seen.attention.index_states(seen.hidden, seen.positions)
            seen_ids[seen.layer] = select_blocks(index_q, index_k, block_size=16, top_k=3)

    with torch.no_grad():
        model(inputs.input_ids, msa_call=call, use_cache=False)
    observe(model, inputs, select)
    for layer, ids in seen_ids.items():
        assert torch.equal(ids, call.reports[layer].block_ids)
    assert set(attention_modules(model)) == {0, 1, 2}
    shutil.rmtree(folder)
