"""lm-eval on a converted model: mistakes in one sentence, and the real package's number against our own.

The package brings dozens of others, so it is not part of the tests' environment. It is taken from there if
it is (`pip install 'dense2sparse[lm-eval]'`), else from a folder that pip filled (`--target` CACHE).
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from dense2sparse.eval import lm_eval_command
from dense2sparse.eval.report import write_report
from dense2sparse.model import convert
from dense2sparse.model.attention import attention_mode
from dense2sparse.recipes.schema import Sparsity

CACHE = Path(__file__).resolve().parents[2] / ".cache" / "dense2sparse" / "lm-eval"
TEXTS = ["rain falls and wind blows under the old stone bridge. " * 5, "seven lamps walk. " * 12]
TASK = """
task: tiny_text
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: byte_perplexity}}]
"""
CHOICE = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: ["under", "lamps", "rain"]
doc_to_target: 1
metric_list: [{{metric: acc}}]
"""


@pytest.fixture(scope="module")
def run_dir(tokenizer, tmp_path_factory) -> Path:
    """A run that has begun: tiny, with its tokenizer, blocks of 16, four of them a query."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=1,
        initializer_range=0.2,
    )
    model = LlamaForCausalLM(config)
    home = tmp_path_factory.mktemp("lm-eval")
    model.save_pretrained(home / "dense")
    tokenizer.save_pretrained(home / "dense")
    sparsity = Sparsity(block_size=16, top_k=4, init="random", dense_layers=[0], index_dim=16)
    ids, places = torch.randint(3, 200, (1, 64)), torch.arange(64)[None]
    documents = torch.zeros(1, 64, dtype=torch.int32)
    row = SimpleNamespace(input_ids=ids, position_ids=places, document_ids=documents)
    convert.convert(model, sparsity, [row])
    convert.save(model, home / "run/start/hf", also=tokenizer)
    mark = json.dumps({"original": str(home / "dense")})
    (home / "run/start/done.json").write_text(mark, encoding="utf-8")
    return home / "run"


@pytest.fixture(scope="module")
def task_folder(tmp_path_factory) -> Path:
    """Tasks of our own on local data, as lm-eval reads them."""
    folder = tmp_path_factory.mktemp("lm-eval-task")
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    (folder / "texts.jsonl").write_text(lines)
    for name, task in (("tiny", TASK), ("choice", CHOICE)):
        (folder / f"{name}.yaml").write_text(task.format(data=folder / "texts.jsonl"))
    return folder


def run(commands: list[list[str]], cache: Path) -> subprocess.CompletedProcess:
    """Commands in a process of their own, the cached package behind everything else on the path."""
    if importlib.util.find_spec("lm_eval") is None and not (CACHE / "lm_eval").is_dir():
        pytest.skip(f"lm-eval is neither installed nor in {CACHE}: see the head of this file")
    code = (
        f"import json, sys; sys.path.append({str(CACHE)!r}); "
        "from dense2sparse.eval.lm_eval_command import main; "
        "sys.exit(max(main(arguments) for arguments in json.loads(sys.argv[1])))"
    )
    environment = {**os.environ, "HF_DATASETS_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-c", code, json.dumps(commands)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=240,
    )


def byte_perplexity(run: Path, mode: str, top_k: int | None) -> float:
    """What the definition says: every token after the begin token, over bytes."""
    folder = run / "start" / "hf"
    model = convert.load(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    loss = 0.0
    for text in TEXTS:
        ids = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
        assert 64 < len(ids) < 512
        row = torch.tensor([ids])
        with torch.no_grad(), attention_mode(model, mode, top_k=top_k):
            logits = model(input_ids=row[:, :-1]).logits
        loss += float(torch.nn.functional.cross_entropy(logits[0], row[0, 1:], reduction="sum"))
    return math.exp(loss / sum(len(text.encode()) for text in TEXTS))


def test_the_real_package_scores_each_arm_and_the_report_compares_them(
    run_dir, task_folder, tmp_path
):
    shared = [str(run_dir), "--tasks", "tiny_text,tiny_choice", "--include", str(task_folder)]
    shared += ["--precision", "fp32"]
    done = run([[*shared, "--top-k", "2"], [*shared, "--mode", "original"]], tmp_path / "cache")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "tiny_text" in done.stdout and "byte_perplexity" in done.stdout
    home = run_dir / "eval" / "lm-eval"
    found = {path.parent.name: json.loads(path.read_text()) for path in home.glob("*/*.json")}
    scores = {
        arm: content["results"]["tiny_text"]["byte_perplexity,none"]
        for arm, content in found.items()
    }
    ours = {mode: byte_perplexity(run_dir, mode, 2) for mode in ("sparse", "dense")}
    assert scores == {
        "converted_sparse-k2": pytest.approx(ours["sparse"], rel=1e-4),
        "original_dense": pytest.approx(ours["dense"], rel=1e-4),
    }
    assert abs(ours["sparse"] / ours["dense"] - 1) > 1e-3
    for content in found.values():
        accuracy = content["results"]["tiny_choice"]["acc,none"]
        known = content["answers"]["tiny_choice"]["scores"]["acc,none"]
        assert len(known) == len(TEXTS) and sum(known.values()) / len(known) == accuracy
        assert "old stone bridge" not in json.dumps(content), "no word of a task is stored"
    section = write_report(run_dir)["markdown"].read_text().split("## Short tasks of lm-eval")[1]
    assert f"| tiny_text (byte_perplexity) | {scores['original_dense']:.4f} | " in section
    change = next(line for line in section.splitlines()[9:] if line.startswith("| tiny_choice"))
    assert "unpaired" not in change


def test_original_needs_a_run_that_says_what_it_began_with(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(lm_eval_command, "_harness", lambda tasks, include: (None, None, None))
    assert lm_eval_command.main([str(tmp_path), "--tasks", "a", "--mode", "original"]) == 2
    error = capsys.readouterr().err
    assert "does not say which dense checkpoint it began with" in error and error.count("\n") == 1


def test_a_task_that_does_not_exist_is_refused_with_the_nearest():
    lm_eval_command.check_names(["arc_easy"], ["arc_easy", "gsm8k"])
    with pytest.raises(ValueError, match=r"--tasks arc_esay: .* the nearest is arc_easy"):
        lm_eval_command.check_names(["gsm8k", "arc_esay"], ["arc_easy", "gsm8k"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--mode", "sparce"], "--mode sparce is not known: use sparse or dense or original"),
        (["--mode", "dense", "--top-k", "4"], "--top-k 4 has no effect with --mode dense"),
        (["--limit", "0"], "--limit 0: use a number of at least 1"),
        (["--tasks", " ,"], "--tasks is empty"),
        (["--precision", "int4"], "--precision int4 is not known: use bf16 or fp32"),
    ],
)
def test_a_mistake_is_one_sentence_before_anything_is_loaded(tmp_path, capsys, arguments, said):
    assert lm_eval_command.main([str(tmp_path), "--tasks", "arc_easy", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert captured.err.startswith("error: ") and said in captured.err


def test_a_missing_package_is_one_sentence_with_the_command_that_gets_it(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert lm_eval_command.main([str(tmp_path), "--tasks", "arc_easy"]) == 2
    assert capsys.readouterr().err == (
        "error: lm-eval is not installed: pip install 'dense2sparse[lm-eval]'\n"
    )


def test_the_table_names_metric_filter_value_and_error():
    results = {"gsm8k": {"alias": "gsm8k", "acc,strict": 0.25, "acc_stderr,strict": 0.125}}
    header, line = lm_eval_command.table(results, title="converted_dense").splitlines()
    assert header.split() == ["converted_dense", "metric", "value", "stderr"]
    assert line.split() == ["gsm8k", "acc", "(strict)", "0.2500", "0.1250"]
