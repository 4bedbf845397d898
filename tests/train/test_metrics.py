"""Metrics: declared names only, the same numbers everywhere, no step twice after a resume."""

from __future__ import annotations

import io
import json
import runpy
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from dense2sparse.eval.wandb_run import start_wandb
from dense2sparse.train import evaluate
from dense2sparse.train import metrics as recording
from dense2sparse.train.context import RunContext
from dense2sparse.train.loop import Position
from dense2sparse.train.metrics import Metrics, Progress, check_names, read_records, truncate

WANDB_FILE = runpy.run_path(str(Path(__file__).parents[1] / "wandb_file.py"))


@pytest.mark.parametrize(
    "name",
    [
        "train/loss_lm",
        "train/grad_norm/index",
        "index/kl/layer_07",
        "index/learned_coverage/layer_101",
        "index/learned_coverage_min",
        "eval/ruler/1k/niah_single_1",
        "eval/perplexity/converted_sparse/k16",
        "eval/ruler/128k/mean/converted_sparse-k16",
        "eval/ruler/points_lost/whole_conversion/converted_sparse-k16",
    ],
)
def test_declared_names_are_accepted(name):
    check_names({name: 1.0})


@pytest.mark.parametrize(
    "name",
    [
        "train/loss",
        "train/loss_lm ",
        "Train/loss_lm",
        "index/kl/layer_7",
        "index/kl/layer_NN",
        "throughput(tps)",
        "eval/other/1",
        "eval/ruler",
    ],
)
def test_any_other_name_is_refused(name):
    with pytest.raises(ValueError, match="is not declared in train/metrics.py"):
        check_names({name: 1.0})


@pytest.mark.parametrize("value", ["1", None, True])
def test_a_metric_is_a_number(value):
    with pytest.raises(ValueError, match="must be a number"):
        check_names({"train/loss_lm": value})


def log(metrics: Metrics, step: int, stage_index: int, value: float) -> None:
    metrics.log(
        {"train/loss_lm": value},
        step=step,
        tokens=step * 10,
        stage_index=stage_index,
        stage=f"{stage_index}-sparse",
    )


def test_truncation_keeps_earlier_stages_and_steps_up_to_the_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics = Metrics(path)
    for step, stage in [(1, 0), (2, 0), (2, 1), (3, 1), (4, 1), (4, 2)]:
        log(metrics, step, stage, float(step))
    metrics.close()
    with path.open("a") as file:
        file.write('{"step": 5, "tok')  # killed while writing
    truncate(path, stage_index=1, step=3)
    assert [(r["step"], r["stage_index"]) for r in read_records(path)] == [
        (1, 0),
        (2, 0),
        (2, 1),
        (3, 1),
    ]
    truncate(path, stage_index=1, step=-1)
    assert [(r["step"], r["stage_index"]) for r in read_records(path)] == [(1, 0), (2, 0)]


def test_a_torn_line_is_cut_before_the_next_record(tmp_path):
    path = tmp_path / "metrics.jsonl"
    first = Metrics(path)
    log(first, 1, 0, 1.0)
    first.close()
    with path.open("a") as file:
        file.write('{"step": 2, "tok')
    second = Metrics(path)
    log(second, 2, 0, 2.0)
    second.close()
    assert [record["step"] for record in read_records(path)] == [1, 2]


def test_a_damaged_line_inside_is_refused(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(ValueError, match="line 2 is damaged"):
        read_records(path)


def test_numbers_that_are_not_finite_are_left_out(tmp_path):
    metrics = Metrics(tmp_path / "metrics.jsonl")
    values = {"train/loss_lm": float("nan"), "train/loss_kl": 1.0}
    metrics.log(values, step=1, tokens=1, stage_index=0, stage="0-warmup")
    metrics.close()
    (record,) = read_records(tmp_path / "metrics.jsonl")
    assert record == {
        "step": 1,
        "tokens": 1,
        "stage_index": 0,
        "stage": "0-warmup",
        "train/loss_kl": 1.0,
    }


def wandb_settings(mode: str) -> SimpleNamespace:
    return SimpleNamespace(mode=mode, project="tests", entity=None, group=None, tags=[])


def test_wandb_offline_holds_the_same_numbers_as_the_file(tmp_path, monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    run = start_wandb(
        wandb_settings("offline"), name="t", run_id="abcd1234", run_dir=tmp_path, config={"a": 1}
    )
    metrics = Metrics(tmp_path / "metrics.jsonl", wandb=run)
    for step in (1, 2, 3):
        log(metrics, step, 1, 1.0 / step)
    metrics.close()
    (file,) = tmp_path.glob("wandb/offline-run-*/run-abcd1234.wandb")
    history = WANDB_FILE["history"](file)
    ours = [(r["step"], r["tokens"], r["train/loss_lm"]) for r in read_records(metrics.path)]
    theirs = [(r["step"], r["tokens"], r["train/loss_lm"]) for r in history]
    assert theirs == ours == [(1, 10, 1.0), (2, 20, 0.5), (3, 30, 1.0 / 3)]


def test_an_evaluation_stage_of_a_run_stands_at_its_tokens_with_tables_and_artifact(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "staging"))
    result = {"kind": "perplexity", "stage": 3, "rows": 2, "row_len": 64, "comparisons": []}
    result["arms"] = {"converted_dense": {"perplexity": 9.0, "loss": 2.2}}
    folder = tmp_path / "eval/perplexity"

    def measure(given, stage):
        folder.mkdir(parents=True)
        (folder / "stage-3.json").write_text(json.dumps(result), encoding="utf-8")
        given.log({"eval/perplexity/converted_dense": 9.0})
        return result

    monkeypatch.setattr(evaluate.evaluation, "run_stage", measure)
    where = {"name": "t", "run_id": "eval1234", "run_dir": tmp_path, "config": {}}
    metrics = Metrics(
        tmp_path / "metrics.jsonl", wandb=start_wandb(wandb_settings("offline"), **where)
    )
    recipe = SimpleNamespace(
        name="tiny", stages=[None, None, None, SimpleNamespace(kind="perplexity")]
    )
    context = RunContext(
        recipe=recipe,
        run_dir=tmp_path,
        fingerprint="f",
        commit="c0ffee",
        rank=0,
        world_size=1,
        device=torch.device("cpu"),
        stop=None,
        metrics=metrics,
        wandb_id="eval1234",
    )
    monkeypatch.setattr(RunContext, "dtype", torch.float32)
    monkeypatch.setattr(RunContext, "fingerprint_of", lambda self, index: "f")
    folders = {"original": tmp_path, "converted": tmp_path}
    evaluate.run_evaluation_stage(context, 3, position=Position(0, 7, 700), **folders)
    metrics.close()
    (record,) = read_records(metrics.path)
    assert (record["tokens"], record["eval/perplexity/converted_dense"]) == (700, 9.0)
    (file,) = tmp_path.glob("wandb/offline-run-*/run-eval1234.wandb")
    number, table = WANDB_FILE["history"](file)
    assert (number["tokens"], table["tokens"], table["step"]) == (700, 700, 7)
    assert table["eval/perplexity/stage-3/arms"]["nrows"] == 1
    kept = [
        r.artifact for r in WANDB_FILE["records"](file) if r.WhichOneof("record_type") == "artifact"
    ]
    (own,) = [artifact for artifact in kept if artifact.type == "evaluation"]
    assert own.name == "tiny-3-perplexity"
    assert json.loads(own.metadata) == {"kind": "perplexity", "stage": 3} | {
        "tokens": 700,
        "commit": "c0ffee",
    }


def test_a_run_outlives_wandbs_own_process_and_says_so_once(tmp_path, capsys):
    run = start_wandb(
        wandb_settings("offline"), name="t", run_id="dead1234", run_dir=tmp_path, config={}
    )
    metrics = Metrics(tmp_path / "metrics.jsonl", wandb=run)
    log(metrics, 1, 0, 1.0)
    (core,) = [one for one in psutil.Process().children() if "wandb-core" in one.name()]
    core.kill()
    core.wait()
    for step in (2, 3):
        log(metrics, step, 0, 1.0)
    metrics.close()
    assert [record["step"] for record in read_records(metrics.path)] == [1, 2, 3]
    assert capsys.readouterr().err.count("warning: wandb failed") == 1


def test_wandb_disabled_starts_nothing(tmp_path):
    settings = wandb_settings("disabled")
    assert start_wandb(settings, name="t", run_id="x", run_dir=tmp_path, config={}) is None
    assert not list(tmp_path.iterdir())


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()])
def test_progress_tells_speed_and_time_left(stream):
    now = iter([0.0, 10.0, 20.0, 40.0])
    progress = Progress("1-sparse", 100, stream=stream, clock=lambda: next(now))
    progress.show(10, loss=2.0, kl=0.5, tokens_per_s=1234.0)
    progress.show(20, loss=1.9, kl=0.4, tokens_per_s=1234.0)
    progress.show(30, loss=1.8, kl=0.3, tokens_per_s=1234.0)
    progress.end()
    text = stream.getvalue()
    lines = text.replace("\r", "\n").strip().split("\n")
    assert "? left" in lines[0]
    assert (
        lines[1].rstrip() == "1-sparse  step  20/100  lm 1.9000  kl 0.4000  1,234 tok/s  1m20s left"
    )
    assert "1m45s left" in lines[2]
    assert ("\r" in text) == stream.isatty()


def test_every_declared_name_matches_itself():
    for name in recording.NAMES:
        if not name.endswith("/TASK"):
            check_names({name.replace("NN", "03"): 0.0})


def test_a_probe_is_recorded_under_the_name_of_its_task_alone():
    check_names({"probe/niah_single_2": 50.0, "perf/probe_s": 1.0})
    for name in ("probe/", "probe/TASK", "probe/vt/4k"):
        with pytest.raises(ValueError, match="not declared"):
            check_names({name: 0.0})
