"""A finished run's folder with invented answers and losses, scored by the real code: what the report reads.

`write(folder)` makes the same files whenever it is called; `write(folder, **LARGE)` all of RULER.
Sparse attention loses needles that lie deep in long prompts, so every block of the report has something
to show. All numbers in it are invented.
"""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

from dense2sparse.eval import longbench_score, perplexity, score
from dense2sparse.recipes.stages import RULER_TASKS

LENGTHS = (4096, 16384, 32768)
TASKS = ("niah_single_1", "niah_single_2", "niah_multikey_3", "vt", "cwe", "fwe")
BASE = {"niah_single_1": 1.0, "niah_single_2": 0.97, "niah_multikey_3": 0.8, "vt": 0.86}
LARGE: dict[str, Any] = {
    "tasks": RULER_TASKS,
    "lengths": (4096, 8192, 16384, 32768, 65536, 131072),
    "budgets": (8, 16),
}
LAYERS = tuple(range(2, 12))
ARMS = ("original_dense", "converted_dense")
SHAPE = {"layers": 12, "query_heads": 16, "head_width": 64, "sparse_layers": 10}
SHAPE |= {"index_heads": 4, "index_width": 64, "block_size": 128}


def write(
    folder: Path,
    *,
    samples: int = 24,
    tasks: tuple[str, ...] = TASKS,
    lengths: tuple[int, ...] = LENGTHS,
    budgets: tuple[int, ...] = (4, 16, 64),
) -> Path:
    """A run with RULER, LongBench, lm-eval, perplexity and training."""
    labels = [
        *ARMS,
        *(f"converted_{arm}-k{k}" for k in budgets for arm in ("sparse", "oracle")),
    ]
    after = ["1-warmup", "2-sparse"]
    head = {"state": None, "after": after, "checkpoint": "c0ffee" * 10, "checkpoint_top_k": 16}
    head |= {"positions": {"window": 32768, "rope": {"rope_type": "yarn", "factor": 4.0}}}
    _json(folder / "recipe.json", _recipe())
    _json(folder / "environment.json", _ENVIRONMENT)
    _json(folder / "stages/1-warmup/done.json", {"kind": "warmup", "seconds": 5400.0})
    _json(folder / "stages/2-sparse/done.json", {"kind": "sparse", "seconds": 12600.0})
    (folder / "metrics.jsonl").write_text(_metrics(), encoding="utf-8")
    _json(folder / "eval/ruler/stage-4.json", {**_ruler(labels, samples, tasks, lengths), **head})
    _json(folder / "eval/perplexity/stage-3.json", {**_perplexity(labels), **head})
    _json(folder / "eval/longbench/stage-5.json", {**_longbench(), **head})
    for place, label in enumerate((*ARMS, "converted_sparse-k16")):
        _json(folder / f"eval/lm-eval/{label}/short.json", _lm_eval(label, place))
    return folder


def _json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def _recipe() -> dict[str, Any]:
    kinds = ("probe", "warmup", "sparse", "perplexity", "ruler", "longbench", "report")
    sparsity = {"top_k": 16, "block_size": 128, "init": "pca"}
    stages = [{"kind": kind} for kind in kinds]
    return {"name": "invented", "model": {"hub": "none/invented-1b"}, "sparsity": sparsity} | {
        "stages": stages
    }


_ENVIRONMENT = {
    "date": "2026-01-01T00:00:00+00:00",
    "commit": "0123456789abcdef",
    "packages": {"dense2sparse": "0", "torch": "0", "transformers": "0"},
    "device": "none, all numbers are invented",
}


def _metrics() -> str:
    rng, lines = random.Random(1), []
    for step in range(1, 121):
        stage = 1 if step <= 60 else 2
        fall = math.exp(-(step - 60 * (stage - 1)) / 20)
        record: dict[str, Any] = {
            "step": step,
            "tokens": 2_000_000 * step,
            "stage_index": stage,
            "stage": f"{stage}-{('warmup', 'sparse')[stage - 1]}",
            "train/loss_lm": 2.31 + 0.02 * fall * (stage - 1) + rng.gauss(0, 0.01),
            "train/loss_kl": (1.4 if stage == 1 else 0.3) * fall + 0.12 + rng.gauss(0, 0.01),
            "train/grad_norm/index": 0.3 + fall + abs(rng.gauss(0, 0.05)),
        }
        if stage == 2:
            record["train/grad_norm/backbone"] = 0.6 + 0.4 * fall + abs(rng.gauss(0, 0.03))
        if step % 15 == 0:
            risen = 1 - math.exp(-step / 40)
            for place, task in enumerate(("niah_single_2", "niah_multikey_3", "vt")):
                record[f"probe/{task}"] = 5.0 * round(20 * risen * (1 - 0.2 * place))
            record["perf/probe_s"] = 11.5
        if step % 20 == 0:
            mean = 0.98 - 0.12 * fall
            record |= {
                f"index/learned_coverage/layer_{n:02d}": mean - 0.004 * abs(n - 6) for n in LAYERS
            }
            record |= {
                "index/learned_coverage_mean": mean - 0.01,
                "index/learned_coverage_min": mean - 0.02,
                "heldout/loss_lm": 2.30 + 0.01 * fall,
            }
        lines.append(json.dumps(record))
    return "\n".join(lines) + "\n"


def _keeps(label: str, length: int, depth: float) -> float:
    """Invented share of layers that read the needle."""
    arm, _, k = label.partition("-k")
    if not k:
        return 1.0
    room = min(1.0, int(k) * 128 * (9 if arm == "converted_oracle" else 5) / length)
    return max(0.05, min(1.0, 0.25 + 0.75 * room - (0.15 if 0.2 < depth < 0.8 else 0.0)))


def ruler_records(
    label: str, samples: int, tasks: tuple[str, ...] = TASKS, lengths: tuple[int, ...] = LENGTHS
) -> dict[str, dict[str, Any]]:
    """Invented answers of one arm; the same prompts in every arm."""
    records = {}
    for length in lengths:
        for task in tasks:
            for number in range(samples):
                name = f"{task}/{length}/{number:05d}"
                luck = random.Random(name).random()  # the prompt's own, the same in every arm
                depth = random.Random(name + "depth").random()
                keeps = _keeps(label, length, depth) if task.startswith("niah") else 1.0
                hard = {"cwe": 0.5 - 0.1 * (length // 4096).bit_length() + 0.1, "fwe": 0.7}
                right = luck < BASE.get(task, hard.get(task, 0.9)) * (0.45 + 0.55 * keeps)
                if label == "original_dense" and luck > 0.985:
                    right = not right
                wanted = f"{1_000_000 + int(luck * 8_999_999)}"
                said = f" {wanted}." if right else " The text names a number, which is 12."
                record = {
                    "id": name,
                    "task": task,
                    "length": length,
                    "references": [wanted],
                    "prediction": said if right or luck < 0.995 else "",
                    "metric": "all",
                    "stopped": "eos" if right else "budget",
                    "prompt_tokens": length - 140,
                }
                if task.startswith("niah"):
                    first = int(depth * (length - 160))
                    record["spans"] = [[first, first + 12]]
                    if "-k" in label:
                        record["needle"] = _needle(keeps, label, length)
                records[name] = record
    return records


def _needle(keeps: float, label: str, length: int) -> dict[str, Any]:
    blocks = int(label.partition("-k")[2])
    layers = {str(layer): round(keeps * (0.8 + 0.02 * layer), 4) for layer in LAYERS}
    share = {"share": keeps * 0.9, "first": keeps * 0.95, "any": keeps, "positions": 8}
    return {**share, "kept": min(1.0, blocks * 128 / length), "by_layer": layers}


def _ruler(
    labels: list[str], samples: int, tasks: tuple[str, ...], lengths: tuple[int, ...]
) -> dict[str, Any]:
    arms = {label: score.scored(ruler_records(label, samples, tasks, lengths)) for label in labels}
    found = score.evaluate(arms, margin=1.0)
    for arm in found["arms"].values():
        arm["costs"] = {
            str(length): {"samples": samples, "prefill_s": length / 9e4, "s_per_new_token": 0.021}
            | {"seconds": 60.0, "decode_s": 0.6, "peak_gib": 12.5}
            for length in lengths
        }
        arm["seconds"] = 180.0
        arm["shape"] = SHAPE
    head = {"kind": "ruler", "stage": 4, "label": "ruler-pd, not comparable with published scores"}
    head |= {"corpus": "ruler-pd"}
    skipped = [{"task": "cwe", "length": 512, "reason": "cwe needs 1216 tokens"}]
    sizes = {"samples": samples, "lengths": list(lengths), "tasks": list(tasks), "block_size": 128}
    return {**head, **sizes, "prompts": "beef" * 16, "skipped": skipped, **found}


def _lm_eval(label: str, place: int) -> dict[str, Any]:
    """Invented answers of one arm to three tasks, of which two make a mean."""
    answers, results = {}, {}
    for number, task in enumerate(("arc_easy", "mmlu_law", "mmlu_maths")):
        rights = [random.Random(f"{task}{n}").random() < 0.7 - 0.01 * place for n in range(200)]
        share = sum(rights) / len(rights)
        scores = {"acc,none": {str(n): float(right) for n, right in enumerate(rights)}}
        answers[task] = {"prompts": str(number), "scores": scores}
        error = math.sqrt(share * (1 - share) / 199)
        results[task] = {"alias": task, "acc,none": share, "acc_stderr,none": error}
    pair = [results[task]["acc,none"] for task in ("mmlu_law", "mmlu_maths")]
    results["mmlu"] = {"acc,none": sum(pair) / 2, "acc_stderr,none": 0.023}
    settings = {"lm_eval": "0", "limit": 200, "num_fewshot": 5, "chat": False, "precision": "bf16"}
    head = {"arm": label, "checkpoint": "" if place == 0 else "c0ffee" * 10, **settings}
    members = {"mmlu": ["mmlu_law", "mmlu_maths"]}
    return {**head, "results": results, "group_subtasks": members, "answers": answers}


def _perplexity(labels: list[str]) -> dict[str, Any]:
    arms = {}
    for label in labels:
        rng = random.Random(7)
        rows = []
        for _ in range(12):
            level, row = rng.gauss(2.3, 0.05), []
            for place in range(9):
                first, last = perplexity.bucket(place)
                lost = 0.0
                arm, _, k = label.partition("-k")
                if k:
                    beyond = max(0.0, math.log2(last / (128 * int(k))))
                    lost = beyond * (0.004 if arm == "converted_oracle" else 0.009)
                if label != "original_dense":
                    lost += 0.002
                loss = level + 0.5 / (place + 1) + lost * (1 + rng.gauss(0, 0.3))
                row.append(((last - first) * loss, last - first))
            rows.append(row)
        losses = [sum(loss for loss, _ in row) for row in rows]
        tokens = [sum(count for _, count in row) for row in rows]
        mean = sum(losses) / sum(tokens)
        arms[label] = {"loss": mean, "perplexity": math.exp(mean), "row_losses": losses} | {
            "row_tokens": tokens,
            "seconds": 44.0,
            "row_positions": rows,
            "positions": perplexity._positions(rows),
            "shape": SHAPE if label != "original_dense" else {},
        }
    runs = [run for label in labels if (run := score._run(label))]
    pairs = [
        {"meaning": meaning, "first": one.label, "second": two.label}
        | {"change_pct": perplexity.change_pct(arms[two.label], arms[one.label]).record()}
        for meaning, one, two in score.comparisons(runs)
    ]
    head = {"kind": "perplexity", "stage": 3, "rows": 12, "row_len": 32768, "blocks": 256}
    return {**head, "rows_digest": "feed" * 16, "arms": arms, "comparisons": pairs}


def _longbench() -> dict[str, Any]:
    labels = [*ARMS, "converted_oracle-k16", "converted_sparse-k16"]
    tasks = ("qasper", "hotpotqa", "gov_report", "triviaqa", "passage_count", "lcc", "qasper_e")
    arms = {}
    for place, label in enumerate(labels):
        records = {}
        for task in (*tasks, "v2"):
            for number in range(20):
                name = f"{task}/{number:05d}"
                luck = random.Random(name).random()
                right = luck < 0.6 - 0.015 * place
                facts = {"difficulty": ("easy", "hard")[number % 2], "bucket": "0-4k"}
                facts |= {"size": ("short", "medium", "long")[number % 3]}
                text = "The correct answer is (B)" if task == "v2" else "the quiet harbour at noon"
                records[name] = {
                    "id": name,
                    "task": task,
                    "length": 16384,
                    "benchmark": "longbench",
                }
                records[name] |= {
                    "references": ["B" if task == "v2" else text],
                    "prediction": text if right else "something else entirely",
                    "stopped": "eos" if number % 5 else "budget",
                    "facts": facts,
                    "cut_tokens": 900 if number % 7 == 0 else 0,
                }
        arms[label] = score.scored(records)
    found = score.evaluate(arms, margin=1.0)
    for label, arm in found["arms"].items():
        records = list(arms[label].values())
        arm["longbench"] = longbench_score.tables(
            records, {record["id"]: record["score"] for record in records}
        )
        arm["seconds"] = 90.0
    missing = [
        {"task": "vcsum", "reason": "not measured: scored over Chinese words, `pip install jieba`"}
    ]
    sources = {"qasper": {"path": "qasper.jsonl", "sha256": "ab" * 32, "records": 200, "taken": 20}}
    head = {"kind": "longbench", "stage": 5, "measured": True, "label": "LongBench"}
    return {**head, "prompts": "cafe" * 16, "sources": sources, "missing": missing, **found}
