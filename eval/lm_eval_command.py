"""`dense2sparse lm-eval RUN --tasks arc_easy,gsm8k`: short-context tasks of lm-eval on a converted model.

    dense2sparse lm-eval runs/quickstart --tasks arc_easy --limit 100
    dense2sparse lm-eval FOLDER --tasks mmlu --mode dense --num-fewshot 5 --output mmlu.json

For regressions in what a model knew (MMLU, GSM8K, ARC), never for long contexts: those are `ruler` and
`longbench` stages. A prompt of up to top_k * block_size tokens is attended to in full in either mode: its
score shows what training changed, against `--mode original`; `--top-k` makes the budget bite. The package
is an optional extra, `pip install 'dense2sparse[lm-eval]'`. Prompts go one at a time: padding would move
the blocks. In a run's folder the numbers lie under eval/lm-eval/ARM/, and the next report shows them.
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import importlib
import importlib.util
import json
import logging
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .errors import sentence

MODES = {
    "sparse": "converted_sparse",
    "dense": "converted_dense",
    "original": "original_dense",
}
"""Arm of each mode (eval/arms.py)."""
PRECISIONS = ("bf16", "fp32")
EXTRA = "pip install 'dense2sparse[lm-eval]'"
_BAD_INPUT = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 with one sentence for a mistake."""
    options = _parse(arguments)
    try:
        tasks = _check(options)
        evaluate(options, tasks)
    except (ValueError, OSError) as error:
        said = sentence(error)
        if said is None:
            raise
        print(f"error: {said}", file=sys.stderr)
        return _BAD_INPUT
    return 0


def evaluate(options: argparse.Namespace, tasks: list[str]) -> dict[str, Any]:
    """Run the tasks on the model; print the scores, write them where a place is known, and return them.

    Raises:
        ValueError: lm-eval is missing, knows no such task, or the folder holds no converted model.
    """
    harness, wrapper, manager = _harness(tasks, options.include)
    import torch
    from transformers import AutoTokenizer
    from transformers.utils import logging as hf_logging

    from ..model.convert import load, load_dense
    from .arms import ArmRun
    from .models import attending, checkpoint_fingerprint

    hf_logging.disable_progress_bar()
    folder = _checkpoint(options)
    run = ArmRun(MODES[options.mode], _budget(folder, options))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = options.precision or ("bf16" if device.type == "cuda" else "fp32")
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    made = load_dense if options.mode == "original" else load
    model: Any = made(folder, dtype=dtype)
    model = model.to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with attending(model, run):
        found = harness.simple_evaluate(
            model=wrapper.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1),
            tasks=tasks,
            num_fewshot=options.num_fewshot,
            limit=options.limit,
            task_manager=manager,
            log_samples=True,
            apply_chat_template=options.chat,
        )
    content = {
        "checkpoint": checkpoint_fingerprint(folder),
        "arm": run.label,
        "precision": precision,
        "lm_eval": _version(),
        "limit": options.limit,
        "num_fewshot": options.num_fewshot,
        "chat": options.chat,
        "samples": found.get("n-samples", {}),
        "results": found["results"],
        "group_subtasks": found.get("group_subtasks", {}),
        "higher_is_better": found.get("higher_is_better", {}),
        "answers": {task: answers(many) for task, many in found["samples"].items()},
    }
    print(table(found["results"], title=run.label), flush=True)
    _write(options, folder, run.label, tasks, content)
    return content


def answers(samples: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """What a paired comparison needs of lm-eval's logged samples, none of their words.

    Returns:
        `prompts`: checksum of the prompts, in their order. `scores`: `metric,filter` -> sample's number in
        the task -> its value, of metrics that give one number a sample.
    """
    many = sorted(samples, key=lambda one: (one["filter"], one["doc_id"]))
    hashes = [f"{one['doc_id']} {one['prompt_hash']}" for one in many]
    scores: dict[str, dict[str, float]] = {}
    for one in many:
        for metric in one["metrics"]:
            if isinstance(one[metric], int | float):
                place = scores.setdefault(f"{metric},{one['filter']}", {})
                place[str(one["doc_id"])] = float(one[metric])
    return {"prompts": hashlib.sha256("\n".join(hashes).encode()).hexdigest(), "scores": scores}


def table(results: dict[str, dict[str, Any]], *, title: str) -> str:
    """lm-eval's numbers as lines of task, metric, value and standard error, as it names them."""
    lines = [f"{title:<32} {'metric':<28} {'value':>8} {'stderr':>8}"]
    for task, values in results.items():
        for name, value, error in metrics_of(values):
            metric, _, kind = name.partition(",")
            shown = f"{'-':>8}" if error is None else f"{error:8.4f}"
            lines.append(f"{task:<32} {metric + ' (' + kind + ')':<28} {value:8.4f} {shown}")
    return "\n".join(lines)


def metrics_of(values: Mapping[str, Any]) -> Iterator[tuple[str, float, float | None]]:
    """(`metric,filter`, value, standard error or None) of one task's results."""
    for name, value in values.items():
        metric, _, kind = name.partition(",")
        if kind and not metric.endswith("_stderr") and isinstance(value, int | float):
            error = values.get(f"{metric}_stderr,{kind}")
            yield name, float(value), float(error) if isinstance(error, int | float) else None


def check_names(tasks: Sequence[str], known: Iterable[str]) -> None:
    """Refuse a task, group or tag that lm-eval does not have (ValueError with the nearest)."""
    names = set(known)
    for task in tasks:
        if task not in names:
            near = difflib.get_close_matches(task, sorted(names), n=1, cutoff=0.0)
            raise ValueError(
                f"--tasks {task}: lm-eval {_version()} has no such task; the nearest is "
                f"{near[0] if near else 'none'}, and `lm-eval ls tasks` lists them"
            )


def _check(options: argparse.Namespace) -> list[str]:
    """What can be said without the package and the model; returns the task names."""
    if options.mode not in MODES:
        raise ValueError(f"--mode {options.mode} is not known: use {' or '.join(MODES)}")
    if options.precision not in (None, *PRECISIONS):
        raise ValueError(f"--precision {options.precision} is not known: use bf16 or fp32")
    if options.top_k is not None and options.mode != "sparse":
        raise ValueError(
            f"--top-k {options.top_k} has no effect with --mode {options.mode}: remove it"
        )
    for name in ("limit", "top_k"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value}: use a number of at least 1")
    tasks = [name.strip() for name in options.tasks.split(",") if name.strip()]
    if not tasks:
        raise ValueError("--tasks is empty: name tasks of lm-eval, for example arc_easy,gsm8k")
    if not options.source.is_dir():
        raise ValueError(
            f"{options.source} is no folder: give a run such as runs/quickstart, or a converted model"
        )
    return tasks


def _harness(tasks: Sequence[str], include: Path | None) -> tuple[Any, Any, Any]:
    """The package, its module of Hugging Face models, and its tasks; checked for these names."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError(f"lm-eval is not installed: {EXTRA}")
    try:
        harness = importlib.import_module("lm_eval")
        wrapper = importlib.import_module("lm_eval.models.huggingface")
        manager = importlib.import_module("lm_eval.tasks").TaskManager(
            include_path=None if include is None else str(include)
        )
    except ImportError as error:
        raise ValueError(f"lm-eval lacks the package {error.name}: {EXTRA}") from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    check_names(tasks, manager.all_tasks)
    return harness, wrapper, manager


def _checkpoint(options: argparse.Namespace) -> Path:
    """Folder of the weights that the mode asks for.

    Raises:
        ValueError: there are none.
    """
    from ..model.export import newest_weights

    if options.mode != "original":
        return newest_weights(options.source)
    mark = options.source / "start" / "done.json"
    known = json.loads(mark.read_text(encoding="utf-8")).get("original") if mark.is_file() else None
    if known is None or not Path(known).is_dir():
        raise ValueError(
            f"--mode original: {options.source} does not say which dense checkpoint it began with "
            "(start/done.json): give the folder of a run on the machine it was made on"
        )
    return Path(known)


def _budget(folder: Path, options: argparse.Namespace) -> int | None:
    """Blocks per query; None where all are read."""
    from transformers import AutoConfig

    from ..model.convert import CONFIG_KEY
    from ..model.geometry import Geometry

    if options.mode != "sparse":
        return None
    config = AutoConfig.from_pretrained(folder)
    geometry = Geometry.from_config(getattr(config, CONFIG_KEY), config.num_hidden_layers)
    least = geometry.local_blocks + geometry.init_blocks + 1
    if options.top_k is not None and options.top_k < least:
        raise ValueError(f"--top-k {options.top_k} leaves nothing to choose: use at least {least}")
    return options.top_k or geometry.top_k


def _write(
    options: argparse.Namespace, folder: Path, label: str, tasks: list[str], content: dict[str, Any]
) -> None:
    """Keep the numbers under `--output`, or in the run's folder; a bare model's folder is left alone."""
    from .records import write_json

    target = options.output
    if target is None and folder != options.source:
        name = "-".join(sorted(tasks))[:120]
        target = options.source / "eval" / "lm-eval" / label / f"{name}.json"
    if target is not None:
        write_json(target, content)
        print(f"written to {target}", flush=True)


def _version() -> str:
    try:
        return version("lm-eval")
    except PackageNotFoundError:
        return "unknown"


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="dense2sparse lm-eval",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", type=Path, help="run folder, or a converted folder")
    parser.add_argument("--tasks", required=True, help="names of lm-eval, with commas between")
    parser.add_argument("--limit", type=int, help="the first so many samples of each task")
    parser.add_argument("--mode", default="sparse", help="sparse (default), dense or original")
    parser.add_argument("--top-k", type=int, help="blocks per query; default the checkpoint's")
    parser.add_argument("--num-fewshot", type=int, help="examples in a prompt; default the task's")
    parser.add_argument("--chat", action="store_true", help="put prompts in the chat template")
    parser.add_argument("--precision", help="bf16 or fp32; default bf16 on a GPU, fp32 without")
    parser.add_argument("--include", type=Path, help="folder with further task files of lm-eval")
    parser.add_argument(
        "--output", type=Path, help="JSON file to write; default in the run's folder"
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
