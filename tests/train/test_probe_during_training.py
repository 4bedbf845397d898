"""The probe during training: it changes nothing to the bit, and scores the weights of the moment."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dense2sparse.eval import ruler
from dense2sparse.eval.sources import SourceUnavailable, ruler_words
from dense2sparse.recipes import schema
from dense2sparse.recipes.load import RecipeError, load
from dense2sparse.train import probe as probing

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
CACHE = HERE.parents[1] / ".cache" / "dense2sparse"
STAGES = (0, 1, 2, 3)
STATE = ("random", "optimizer", "masters", "live", "modes", "loader")


def cases() -> list[dict]:
    """Every ZeRO stage, with a probe at every step and without; one of them in bf16."""
    made = []
    for zero in STAGES:
        partitioned = {
            "zero_optimization": {
                "stage3_param_persistence_threshold": 0,
                "stage3_prefetch_bucket_size": 5000,
            }
        }
        for every in (None, 1):
            made.append(
                {
                    "name": f"z{zero}-{'probed' if every else 'plain'}",
                    "zero": zero,
                    "precision": "bf16" if zero == 1 else "fp32",
                    "probe": every,
                    "deepspeed": partitioned if zero == 3 else {},
                }
            )
    return made


@pytest.fixture(scope="module")
def results(
    start_folder, tiny_inputs, tmp_path_factory, test_environment, patience
) -> dict[str, list[dict]]:
    """What each of two ranks saw, by case."""
    folder = tmp_path_factory.mktemp("probe")
    (folder / "start").symlink_to(start_folder)
    (folder / "tokenizer").symlink_to(tiny_inputs / "dense")
    (folder / "cases.json").write_text(json.dumps(cases()))
    processes = []
    for rank in range(2):
        with (folder / f"output-{rank}.txt").open("w") as output:
            command = [sys.executable, HERE / "worker_probe.py", folder, str(rank), "2"]
            environment = test_environment
            processes.append(
                subprocess.Popen(command, stdout=output, stderr=output, env=environment)
            )
    output = folder / "output-0.txt"
    assert patience(processes).ended(output.read_text) == [0, 0], output.read_text()[-3000:]
    return {
        case["name"]: [
            torch.load(folder / f"{case['name']}-{rank}.pt", weights_only=False)
            for rank in range(2)
        ]
        for case in cases()
    }


@pytest.mark.parametrize("zero", STAGES)
def test_a_probe_leaves_weights_optimizer_random_states_and_data_to_the_bit(results, zero):
    for with_probe, without in zip(
        results[f"z{zero}-probed"], results[f"z{zero}-plain"], strict=True
    ):
        assert {k: with_probe[k] for k in STATE} == {k: without[k] for k in STATE}


@pytest.mark.parametrize("zero", STAGES)
def test_every_recorded_number_of_training_is_the_same_with_a_probe(results, zero):
    def numbers(name: str) -> list[dict]:
        kept = []
        for record in results[name][0]["records"]:
            if not any(key.startswith("probe/") for key in record):
                clock = ("perf/", "memory/")
                kept.append({k: v for k, v in record.items() if not k.startswith(clock)})
        return kept

    assert numbers(f"z{zero}-probed") == numbers(f"z{zero}-plain")


@pytest.mark.parametrize("zero", STAGES)
def test_probes_come_before_the_first_step_and_after_each(results, zero):
    found = [r for r in results[f"z{zero}-probed"][0]["records"] if "probe/vt" in r]
    assert [record["step"] for record in found] == [0, 1, 2]
    assert all(0 <= r[f"probe/{task}"] <= 100 for r in found for task in ("niah_single_2", "vt"))
    assert all(record["perf/probe_s"] > 0 for record in found)
    assert not any("probe/vt" in r for r in results[f"z{zero}-plain"][0]["records"])


@pytest.mark.parametrize("zero", STAGES)
def test_answers_are_those_of_the_weights_after_the_last_step(results, zero):
    """A model without an engine, given the live weights, says the same; each rank answers its share."""
    plain = results[f"z{zero}-probed"][0]["plain"]
    answered: dict[str, str] = {}
    for rank in results[f"z{zero}-probed"]:
        assert len(rank["answers"]) == 5
        answered |= rank["answers"]
    assert answered == plain
    assert len(set(answered.values())) > 1


def test_scores_are_means_over_all_prompts_whoever_answered(results):
    """Three prompts on two ranks: the surplus one does not count."""
    ranks = results["z0-probed"]
    last = [r for r in ranks[0]["records"] if "probe/vt" in r][-1]
    for task, count in (("niah_single_2", 3), ("vt", 5)):
        said = {k: v for k, v in ranks[0]["plain"].items() if k.startswith(task)}
        assert len(said) == count
        scores = [100 * sum(letter in text for letter in "abc") / 3 for text in said.values()]
        assert last[f"probe/{task}"] == pytest.approx(sum(scores) / count)


def test_rows_shorter_than_any_prompt_are_refused_with_the_recipe():
    assert schema.MIN_PROMPT_LEN == ruler.MIN_LENGTH
    quickstart = Path(schema.__file__).with_name("quickstart.yaml")
    with pytest.raises(
        RecipeError, match=r"train\.probe_every=5 asks prompts .* data\.row_len=256"
    ):
        load(quickstart, ["train.probe_every=5", "data.row_len=256"])


def context_of(tmp_path: Path, row_len: int) -> SimpleNamespace:
    """What `probe_prompts` reads of a run."""
    said: list[str] = []
    recipe = SimpleNamespace(
        train=SimpleNamespace(probe_every=2, probe_samples=2),
        data=SimpleNamespace(row_len=row_len, cache_dir=tmp_path),
    )
    return SimpleNamespace(
        recipe=recipe, run_dir=tmp_path, rank=0, barrier=lambda: None, say=said.append, said=said
    )


def test_rows_above_the_window_are_refused_before_a_model_is_loaded(tiny_inputs, tmp_path):
    with pytest.raises(ValueError, match=r"probe_every=2 .*data.row_len.*window of 512"):
        probing.probe_prompts(context_of(tmp_path, 1024), tiny_inputs / "dense")


def test_no_probe_reads_nothing(tmp_path):
    context = context_of(tmp_path, 1024)
    context.recipe.train.probe_every = None
    assert probing.probe_prompts(context, tmp_path / "missing") is None


def test_a_run_records_the_probe_of_published_templates(
    tiny_inputs, make_recipe, nursery, tmp_path
):
    """The real run; two prompts a task of 2,048 bytes, so the long keys may have to give way."""
    try:
        ruler_words(CACHE)
    except SourceUnavailable as error:
        pytest.skip(str(error))
    recipe, dense = make_recipe(tmp_path), tmp_path / "dense"
    shutil.copytree(tiny_inputs / "dense", dense)
    config = json.loads((dense / "config.json").read_text())
    (dense / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 2048}))
    text = recipe.read_text()
    first, _, rest = text.partition("  - {kind: sparse")
    recipe.write_text(first + rest.partition("weight_decay: 0.1}\n")[2])
    changes = [f"model.path={dense}", f"data.cache_dir={CACHE}", "data.row_len=2048"]
    changes += ["stages.0.steps=2", "stages.0.micro_batch_size=1", "train.checkpoint_every=100"]
    changes += ["train.probe_every=2", "train.probe_samples=2"]
    nursery.run(recipe, changes, output=tmp_path / "output.txt")
    lines = (tmp_path / "runs" / "tiny" / "metrics.jsonl").read_text().splitlines()
    found = [record for record in map(json.loads, lines) if "probe/vt" in record]
    assert [record["step"] for record in found] == [0, 2]
    named = {key for key in found[0] if key.startswith("probe/")}
    assert named in (
        {"probe/niah_single_2", "probe/niah_multikey_3", "probe/vt"},
        {"probe/niah_single_2", "probe/niah_multikey_1", "probe/vt"},
    )
