"""The stages on a tiny converted model: arms agree where they must, reruns do nothing, refusals."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from transformers.utils import logging

from dense2sparse.data.loader import heldout_rows
from dense2sparse.eval import benchmarks, models, perplexity, run, stages
from dense2sparse.eval.arms import ArmRun
from dense2sparse.eval.ruler_corpus import PUBLIC_DOMAIN, Corpus
from dense2sparse.model import convert
from dense2sparse.model.execution import Execution, dispatch_of
from dense2sparse.recipes.load import load as load_recipe

RECIPE = """
name: tiny
output_dir: {home}/runs
model: {{path: {home}/dense}}
sparsity: {{block_size: 16, top_k: 4, index_dim: 16, dense_layers: [0], init: random}}
data:
  row_len: 128
  cache_dir: {home}/cache
  sources:
    - {{name: prose, kind: text, path: {home}/prose.txt}}
  heldout:
    - {{name: other, kind: text, path: {home}/other.txt}}
stages:
  - {{kind: probe, top_k: [2, 4], rows: 2}}
  - {{kind: perplexity, rows: 3, top_k: [4, 64]}}
  - {{kind: ruler, tasks: [niah_single_1], lengths: [512], samples: 2, top_k: [4, 64]}}
  - {{kind: report}}
train: {{precision: fp32}}
wandb: {{mode: disabled}}
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory, tiny_model, tokenizer, works):
    """A dense folder, its conversion, text and recipe."""
    home = tmp_path_factory.mktemp("stages")
    tiny_model.save_pretrained(home / "dense")
    tokenizer.save_pretrained(home / "dense")
    for name in ("prose", "other"):
        (home / f"{name}.txt").write_text(works["made-up"], encoding="utf-8")
    (home / "recipe.yaml").write_text(RECIPE.format(home=home), encoding="utf-8")
    recipe = load_recipe(home / "recipe.yaml")
    model = convert.load_dense(home / "dense")
    row = SimpleNamespace(
        input_ids=torch.randint(2, 900, (1, 64)),
        position_ids=torch.arange(64)[None],
        document_ids=torch.zeros(1, 64, dtype=torch.int32),
    )
    convert.save(convert.convert(model, recipe.sparsity, [row]), home / "converted")
    return home


@pytest.fixture(autouse=True)
def no_network(monkeypatch, ruler_like_words, works):
    """RULER's words are the made-up ones, with answers of four tokens."""
    templates = {
        family: replace(template, new_tokens=4)
        for family, template in ruler_like_words.templates.items()
    }
    words = replace(ruler_like_words, templates=templates)
    corpus = Corpus(PUBLIC_DOMAIN, words, works)
    monkeypatch.setattr(benchmarks, "read_corpus", lambda name, cache, **wanted: corpus)


@pytest.fixture()
def context(home, tmp_path):
    def make(**changes):
        given = {
            "recipe": load_recipe(home / "recipe.yaml"),
            "run_dir": tmp_path / "run",
            "original": home / "dense",
            "converted": home / "converted",
            "rank": 0,
            "world_size": 1,
            "device": torch.device("cpu"),
            "dtype": torch.float32,
            "barrier": lambda: None,
            "log": lambda values: None,
        }
        return stages.EvalContext(**{**given, **changes})

    return make


def stage_of(context, kind):
    return next(stage for stage in context.recipe.stages if stage.kind == kind)


def test_execution_options_reach_the_models_and_fp8_results_stand_apart(context, home):
    overrides = ["execution.backend=reference", "execution.index_precision=fp8"]
    ctx = context(recipe=load_recipe(home / "recipe.yaml", overrides))
    loaded, sparse = ctx.models(), ArmRun("converted_sparse", 4)
    held = loaded.of(sparse)
    found = {dispatch_of(layer.self_attn).execution for layer in held.model.layers}
    assert found == {Execution(backend="reference", index_precision="fp8")}
    usual = context()
    assert ctx.keyed(loaded, sparse, "0" * 12) != usual.keyed(usual.models(), sparse, "0" * 12)


def test_arms_agree_before_training_and_at_full_budget(context):
    ctx = context()
    result = stages.run_perplexity(ctx, stage_of(ctx, "perplexity"))
    losses = {label: arm["loss"] for label, arm in result["arms"].items()}
    same = ["original_dense", "converted_dense", "converted_sparse-k64", "converted_oracle-k64"]
    assert [losses[label] for label in same] == pytest.approx([losses[same[0]]] * 4, abs=1e-5)
    assert abs(losses["converted_sparse-k4"] - losses[same[0]]) > 1e-5, "the budget has no effect"
    meanings = {(pair["meaning"], pair["second"]) for pair in result["comparisons"]}
    assert ("training drift", "converted_dense") in meanings
    assert ("indexer error", "converted_sparse-k4") in meanings


def test_loss_of_a_row_equals_transformers_own(home, context):
    ctx = context()
    rows = stages._heldout(ctx, 2)
    model = convert.load_dense(home / "dense").eval()
    loss, tokens = perplexity.LossMeter(model).row(rows[0])
    with torch.no_grad():
        expected = model(input_ids=rows[0].input_ids, labels=rows[0].input_ids).loss
    assert tokens == int((rows[0].targets != -100).sum())
    assert loss / tokens == pytest.approx(float(expected), rel=1e-5)


def test_documents_of_a_row_are_run_alone(home):
    model = convert.load_dense(home / "dense").eval()
    ids = torch.randint(2, 900, (1, 40))
    targets = torch.cat([ids[:, 1:], torch.tensor([[-100]])], dim=1)
    targets[0, 14] = -100
    split = SimpleNamespace(
        input_ids=ids,
        targets=targets,
        document_ids=torch.tensor([[0] * 15 + [1] * 25], dtype=torch.int32),
    )
    meter = perplexity.LossMeter(model)
    parts = [meter.document(ids[0, a:b], targets[0, a:b]).sum() for a, b in ((0, 15), (15, 40))]
    assert meter.row(split) == (pytest.approx(float(sum(parts)), rel=1e-6), 38)


def test_head_that_scales_its_logits_is_measured_through_the_model(home):
    model = convert.load_dense(home / "dense").eval()
    ids = torch.randint(2, 900, (30,))
    targets = torch.cat([ids[1:], torch.tensor([-100])])
    plain = perplexity.LossMeter(model).document(ids, targets)
    whole = model.forward

    def scaled(*args, **kwargs):
        output = whole(*args, **kwargs)
        output.logits = output.logits * 0.25
        return output

    model.forward = scaled
    with torch.no_grad():
        logits = model(input_ids=ids[None]).logits[0]
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    found = perplexity.LossMeter(model).document(ids, targets)
    assert torch.allclose(found, expected, atol=1e-6) and not torch.allclose(
        found, plain, atol=1e-3
    )


def test_probe_gives_the_ceiling_by_layer_and_budget(context):
    ctx = context()
    logged = {}
    ctx = context(log=logged.update)
    result = stages.run_stage(ctx, stage_of(ctx, "probe"))
    few, many = result["budgets"]
    assert (few["top_k"], many["top_k"]) == (2, 4)
    assert few["layers"]["oracle_coverage"].keys() == {"1"}, "layer 0 is dense"
    assert 0 < few["mean"]["coverage"] <= few["mean"]["oracle_coverage"] + 1e-6
    assert few["mean"]["oracle_coverage"] < many["mean"]["oracle_coverage"] < 1
    assert logged["eval/probe/oracle_coverage/k2"] == few["mean"]["oracle_coverage"]


def test_second_run_loads_no_model_and_gives_the_same_result(context, monkeypatch):
    ctx = context()
    kinds = {
        "probe": stages.run_probe,
        "perplexity": stages.run_perplexity,
        "ruler": stages.run_ruler,
    }
    first = {kind: runner(ctx, stage_of(ctx, kind)) for kind, runner in kinds.items()}
    monkeypatch.setattr(models, "load", None)
    monkeypatch.setattr(models, "load_dense", None)
    assert first == {kind: runner(ctx, stage_of(ctx, kind)) for kind, runner in kinds.items()}


def test_other_precision_is_measured_again(context):
    stage = stage_of(context(), "perplexity")
    full, half = (
        stages.run_perplexity(context(dtype=dtype), stage)
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert (full["precision"], half["precision"]) == ("float32", "bfloat16")
    for label, arm in full["arms"].items():
        assert arm["row_losses"] != half["arms"][label]["row_losses"], label


def test_blocks_and_budget_are_those_of_the_checkpoint(context):
    """A recipe for another geometry than the checkpoint has: 16 tokens a block, 4 blocks of 8."""
    ctx = context()
    sparsity = {"block_size": 64, "top_k": 2, "local_blocks": 3, "init_blocks": 4}
    changed = ctx.recipe.sparsity.model_copy(update=sparsity)
    probe, stage = ctx.recipe.stages[:2]
    stage = stage.model_copy(update={"rows": 1, "top_k": []})
    update = {"sparsity": changed, "stages": [probe, stage]}
    ctx = context(recipe=ctx.recipe.model_copy(update=update))
    found = stages.run_perplexity(ctx, stage)
    assert (found["blocks"], found["checkpoint_top_k"]) == (8, 4)
    assert "converted_sparse-k4" in found["arms"] and "converted_sparse-k2" not in found["arms"]
    assert stages.run_probe(ctx, probe)["block_size"] == 16
    with pytest.raises(ValueError, match="has no sparse_attention_config"):
        context(converted=ctx.original).geometry()


def test_two_ranks_give_the_result_of_one(context, tmp_path):
    alone = context()
    stage = stage_of(alone, "perplexity")
    expected = stages.run_perplexity(alone, stage)
    # The rows of rank 1 first, as if rank 0 were slower; then rank 0, which also writes the result.
    shared = {"recipe": alone.recipe, "run_dir": tmp_path / "shared", "world_size": 2}
    helper = context(**shared, rank=1)
    with pytest.raises(FileNotFoundError):
        stages.run_perplexity(helper, stage)  # no result yet: only rank 0 writes it
    found = stages.run_perplexity(context(**shared), stage)
    for label, arm in found["arms"].items():
        assert arm["row_losses"] == pytest.approx(expected["arms"][label]["row_losses"], rel=1e-6)


def test_other_weights_have_another_fingerprint(home, tmp_path, tiny_model):
    before = models.checkpoint_fingerprint(home / "dense")
    assert before == models.checkpoint_fingerprint(home / "dense")
    with torch.no_grad():
        tiny_model.model.norm.weight.add_(0.5)
        tiny_model.save_pretrained(tmp_path / "moved")
        tiny_model.model.norm.weight.sub_(0.5)
    assert models.checkpoint_fingerprint(tmp_path / "moved") != before


def test_one_small_tensor_that_moved_gives_another_fingerprint(tmp_path):
    """As after a frozen warm-up: the index branch is a few per cent of a large file."""
    tensors = {f"part.{place:02d}": torch.zeros(200_000) for place in range(20)}
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    seen = set()
    for place in (None, 0, 7, 19):
        small = {f"index.{number:02d}": torch.zeros(500) for number in range(20)}
        if place is not None:
            small[f"index.{place:02d}"] += 1e-3
        save_file({**tensors, **small}, tmp_path / "model.safetensors")
        seen.add(models.checkpoint_fingerprint(tmp_path))
    assert len(seen) == 4


def test_folder_without_weights_has_no_fingerprint(tmp_path):
    with pytest.raises(ValueError, match="holds no"):
        models.checkpoint_fingerprint(tmp_path)


@pytest.mark.parametrize(
    ("kind", "change", "words"),
    [
        ("ruler", {"tasks": ["niah_singel_1"]}, "did you mean 'niah_single_1'"),
        ("ruler", {"lengths": [4096]}, "above the model's window of 2048"),
        ("ruler", {"top_k": [1]}, r"stages\.2\.top_k=1 leaves nothing to choose"),
        ("perplexity", {"top_k": [1, 8]}, r"use at least 2"),
        ("perplexity", {"arms": []}, "`arms` is empty"),
    ],
)
def test_bad_stage_is_refused_before_a_model_is_loaded(context, monkeypatch, kind, change, words):
    monkeypatch.setattr(models, "load", None)
    monkeypatch.setattr(models, "load_dense", None)
    ctx = context()
    stage = stage_of(ctx, kind).model_copy(update=change)
    changed = [stage if known.kind == kind else known for known in ctx.recipe.stages]
    ctx = context(recipe=ctx.recipe.model_copy(update={"stages": changed}))
    with pytest.raises(ValueError, match=words):
        getattr(stages, f"run_{kind}")(ctx, stage)


def test_evaluation_alone_measures_and_reports_a_foreign_checkpoint(home, tmp_path, capsys):
    output = tmp_path / "elsewhere"
    logging.enable_progress_bar()
    arguments = [str(home / "recipe.yaml"), "--checkpoint", str(home / "converted")]
    assert run.main([*arguments, "--output", str(output), "--local_rank=0"]) == 0
    for name in ("report.html", "report.md", "results.csv", "recipe.json", "environment.json"):
        assert (output / name).is_file(), name
    assert "Loading weights" not in capsys.readouterr().err
    page = (output / "report.md").read_text(encoding="utf-8")
    assert "Reading 4 of 8 blocks" in page
    assert "/converted; 3 held-out rows" in page and "before training" not in page


def test_two_processes_share_the_work_and_agree_with_one(home, patience, tmp_path):
    """The ranks are started as the launcher does, by environment; RULER is left out (network)."""
    both, alone = tmp_path / "both", tmp_path / "alone"
    recipe = home / "without-ruler.yaml"
    lines = (home / "recipe.yaml").read_text(encoding="utf-8").splitlines()
    recipe.write_text("\n".join(line for line in lines if "ruler" not in line), encoding="utf-8")
    given = [str(recipe), "--checkpoint", str(home / "converted"), "--output"]
    command = [sys.executable, "-m", "dense2sparse.eval.run", *given, str(both)]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    meeting = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [
        subprocess.Popen(command, env={**meeting, "RANK": rank, "LOCAL_RANK": rank})
        for rank in ("0", "1")
    ]
    try:
        assert run.main([*given, str(alone)]) == 0
        assert patience(ranks).ended() == [0, 0]
    finally:
        for process in ranks:
            process.kill()
    assert len(list(both.glob("eval/perplexity/*/*/rank-1-of-2.jsonl"))) == 6
    results = [
        json.loads((folder / "eval/perplexity/stage-1.json").read_text(encoding="utf-8"))["arms"]
        for folder in (both, alone)
    ]
    for label, arm in results[0].items():
        assert arm["row_losses"] == pytest.approx(results[1][label]["row_losses"], rel=1e-6)


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ([], "has no converted checkpoint"),
        (["--checkpoint", "{home}/cache"], "holds no config.json"),
        (["--checkpoint", "{home}/dense"], "is a dense model"),
        (["stages.1.rowz=3"], "rowz"),
    ],
)
def test_evaluation_alone_refuses_in_one_sentence(home, capsys, extra, words):
    given = [str(home / "recipe.yaml"), *(part.format(home=home) for part in extra)]
    assert run.main(given) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and words in error


def test_heldout_rows_are_the_same_for_every_arm(home, context):
    ctx = context()
    again = heldout_rows(
        ctx.recipe.data.heldout,
        ctx.tokenizer(),
        row_len=128,
        count=3,
        cache_dir=ctx.recipe.data.cache_dir,
    )
    assert perplexity.rows_digest(again) == perplexity.rows_digest(stages._heldout(ctx, 3))
    again[0].input_ids[0, 0] += 1
    assert perplexity.rows_digest(again) != perplexity.rows_digest(stages._heldout(ctx, 3))
