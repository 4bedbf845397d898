"""Scores of predictions, also of those made elsewhere: data files in, one data file and a table out.

    python -m dense2sparse.eval.score FOLDER [--margin 1.0] [--compare FIRST SECOND]

FOLDER holds one folder an arm, named by the arm (`original_dense`, `converted_dense`,
`converted_sparse-k16`, `converted_oracle-k16`, or any name for `--compare`), each with `*.jsonl` of one
object a prediction: `id`, `task`, `length`, `references`, `prediction`, and what else eval/predict.py
writes; `benchmark` may be left out where the task is one of RULER's or LongBench's. `scores.json` is
written into FOLDER. No model, no torch: whoever has the files can check every number.
"""

from __future__ import annotations

import argparse
import difflib
import itertools
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..recipes.stages import RULER_TASKS
from . import longbench_score, ruler_score, tables
from .arms import ARMS, ArmRun, comparisons
from .errors import sentence
from .longbench_tasks import SUITES, chosen
from .records import PREDICTIONS, read_predictions, write_json
from .tables import Predictions

DEFAULT_MARGIN = 1.0
"""Points; the recipe's report stage names another."""
_METRICS: dict[str, Callable[[Mapping[str, Any]], float]] = {
    "ruler": ruler_score.score_record,
    "longbench": longbench_score.score,
}
_TASKS = {**dict.fromkeys(RULER_TASKS, "ruler"), **dict.fromkeys(chosen(SUITES), "longbench")}
_NEEDED = {"id": str, "task": str, "length": int, "references": list, "prediction": str}
_OPTIONAL = {"benchmark": str, "metric": str, "mode": str, "stopped": str, "facts": dict}
_RECALL = ("share", "first", "any", "kept")
_SAME = ("checkpoint", "precision", "index_precision", "prompts")


def score_of(record: Mapping[str, Any]) -> float:
    """Score of one prediction, 0 to 100, by the metric of its benchmark and task.

    Raises:
        ValueError: a benchmark or a task that is not known.
    """
    return _METRICS[benchmark_of(record)](record)


def benchmark_of(record: Mapping[str, Any]) -> str:
    """`ruler` or `longbench`: what the record says, else what its task belongs to.

    Raises:
        ValueError: another benchmark, or none and a task of neither (with the nearest).
    """
    task = record["task"]
    benchmark = record.get("benchmark", _TASKS.get(task))
    if benchmark is None:
        near = difflib.get_close_matches(task, _TASKS, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"task={task!r} of prediction {record['id']} is neither RULER's nor LongBench's, did you mean "
            f"{near!r}? Records of a task of your own need `benchmark`: {' or '.join(_METRICS)}"
        )
    if benchmark not in _METRICS:
        raise ValueError(
            f"benchmark={benchmark!r} of prediction {record['id']}: use {' or '.join(_METRICS)}"
        )
    return benchmark


def scored(records: Mapping[str, Mapping[str, Any]]) -> Predictions:
    """The records with their `score`."""
    return {name: {**record, "score": score_of(record)} for name, record in records.items()}


def evaluate(
    arms: Mapping[str, Predictions], *, margin: float, pairs: Sequence[tuple[str, str]] = ()
) -> dict[str, Any]:
    """Every table of some arms' scored predictions.

    Args:
        arms: label -> scored predictions, the same prompts in each.
        margin: points that may be lost.
        pairs: further comparisons (first, second) beside those that the arms' names mean.

    Raises:
        ValueError: arms that did not answer the same prompts.
    """
    check_same_prompts(arms)
    runs = [run for label in arms if (run := _run(label)) is not None]
    named = [(name, one.label, two.label) for name, one, two in comparisons(runs)]
    named += [("difference", first, second) for first, second in pairs]
    found: dict[str, Any] = {"margin": margin, "arms": {}, "comparisons": []}
    for label, records in arms.items():
        run = _run(label)
        table = tables.cells(records)
        found["arms"][label] = {
            "arm": label if run is None else run.arm,
            "top_k": None if run is None else run.top_k,
            "scores": table,
            "means": tables.means(table),
            "ruler": tables.ruler_summary(table) if _is_ruler(records) else None,
            "needles": tables.needles(records),
            "depths": tables.depths(records),
        }
    for meaning, first, second in named:
        found["comparisons"].append(
            {
                "meaning": meaning,
                "first": first,
                "second": second,
                **tables.compare_suites(arms[first], arms[second], margin=margin),
                "flips": tables.flips(arms[first], arms[second]),
            }
        )
    return found


def check_same_prompts(arms: Mapping[str, Predictions]) -> None:
    """Refuse arms that differ in their prompts' ids, tasks, lengths, references or metrics (ValueError)."""
    everything = {name for records in arms.values() for name in records}
    for label, records in arms.items():
        missing = sorted(everything - records.keys())
        if missing:
            raise ValueError(
                f"arm {label} has no prediction of {len(missing)} of {len(everything)} prompts "
                f"({missing[0]} first): predict them, arms are compared prompt by prompt"
            )
    first = next(iter(arms))
    for label, records in arms.items():
        for name, record in records.items():
            other = _asked(arms[first][name])
            for key, value in _asked(record).items():
                if value != other[key]:
                    raise ValueError(
                        f"prompt {name} has another {key} in arm {label} than in {first}: these are "
                        "predictions of different prompts, predict both on the same"
                    )


def _asked(record: Mapping[str, Any]) -> dict[str, Any]:
    """What an answer is an answer to, and what it is scored by."""
    benchmark = benchmark_of(record)
    metric = ruler_score.metric_of(record) if benchmark == "ruler" else record.get("metric")
    asked = {key: record[key] for key in ("task", "length", "references")}
    return {**asked, "benchmark": benchmark, "metric": metric, "mode": record.get("mode", "base")}


def read_folder(folder: Path) -> dict[str, Predictions]:
    """label -> predictions by id of every arm's folder below `folder`, in the order of the arms.

    Raises:
        ValueError: no arms, a damaged or incomplete record, or arms of different checkpoints.
    """
    homes = sorted({path.parent for path in folder.glob("*/*.jsonl")})
    if not homes:
        deeper = sorted({str(path.parent.parent) for path in folder.glob("**/*.jsonl")})
        hint = f" (did you mean {deeper[0]}?)" if deeper else ""
        raise ValueError(
            f"{folder} holds no folder with *.jsonl in it: give the one that holds a folder an arm{hint}"
        )
    arms: dict[str, Predictions] = {}
    notes: dict[str, dict[str, Any]] = {}
    for home in homes:
        note = _note(home)
        label = note.get("label", home.name)
        if label in arms:
            raise ValueError(
                f"{folder} holds arm {label} twice ({home.name} is one): keep one of them"
            )
        arms[label] = _read_arm(home)
        if not arms[label]:
            raise ValueError(f"arm {label} holds no prediction: fill or delete {home}")
        if note:
            notes[label] = note
    _check_notes(notes)
    return dict(sorted(arms.items(), key=lambda one: _place(one[0])))


def _place(label: str) -> tuple[int, int, str]:
    """Sorts A, B, C, D, each by budget, then all other labels."""
    run = _run(label)
    return (len(ARMS), 0, label) if run is None else (ARMS.index(run.arm), run.top_k or 0, label)


def _read_arm(home: Path) -> Predictions:
    records = read_predictions(home)
    for where, record in _placed(home):
        bad = _unusable(record)
        if bad:
            raise ValueError(f"{where}, has {bad[0]}={record.get(bad[0])!r}: it needs {bad[1]}")
        other = records[record["id"]]
        for key in ("task", "length", "references"):
            if record[key] != other.get(key):
                raise ValueError(
                    f"{where}, holds {record['id']} a second time, with another {key}: keep one of them"
                )
    return records


def _placed(home: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file and line, record) of what `read_predictions` read."""
    whole = home / PREDICTIONS
    for path in [whole] if whole.is_file() else sorted(home.glob("*.jsonl")):
        for number, line in enumerate(path.read_bytes().splitlines(), start=1):
            try:
                yield f"{path}, line {number}", json.loads(line)
            except ValueError:
                continue  # a journal's torn last line


def _unusable(record: Mapping[str, Any]) -> tuple[str, str] | None:
    """The first key that the tables cannot use, and what it has to be."""
    needed = ", ".join(f"{key} ({kind.__name__})" for key, kind in _NEEDED.items())
    for key, kind in _NEEDED.items():
        if not isinstance(record.get(key), kind) or isinstance(record[key], bool):
            return key, needed
    if not record["references"] or not all(isinstance(one, str) for one in record["references"]):
        return "references", "texts, at least one"
    for key, kind in _OPTIONAL.items():
        if key in record and not isinstance(record[key], kind):
            return key, f"{kind.__name__}, or no such key"
    needle = record.get("needle")
    if needle and not _is_recall(needle):
        return "needle", f"numbers {', '.join(_RECALL)}, and by_layer with numbers, or no such key"
    spans = record.get("spans")
    if spans and not _is_spans(spans):
        return "spans", "pairs of token places, or no such key"
    if not isinstance(record.get("prompt_tokens", 0), int):
        return "prompt_tokens", "a number, or no such key"
    return None


def _is_recall(needle: Any) -> bool:
    if not isinstance(needle, dict) or not isinstance(needle.get("by_layer"), dict):
        return False
    layers = needle["by_layer"]
    numbers = [*(needle.get(name) for name in _RECALL), *layers.values()]
    return all(isinstance(one, int | float) for one in numbers) and all(map(str.isdigit, layers))


def _is_spans(spans: Any) -> bool:
    return isinstance(spans, list) and all(
        isinstance(span, list) and len(span) == 2 and all(isinstance(end, int) for end in span)
        for span in spans
    )


def _note(home: Path) -> dict[str, Any]:
    """What an arm's folder says of itself; empty for predictions made elsewhere."""
    path = home / "arm.json"
    if not path.is_file():
        return {}
    try:
        note = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{path} is damaged ({error}): delete it to use the folder's name"
        ) from None
    if not isinstance(note, dict) or not isinstance(note.get("label", ""), str):
        raise ValueError(
            f"{path} is damaged (no JSON object with a text `label`): delete it to use the folder's name"
        )
    return note


def _check_notes(notes: Mapping[str, Mapping[str, Any]]) -> None:
    """Arms must be made alike: same precision and prompts, the converted ones of one checkpoint."""
    for key in _SAME:
        values = {label: note[key] for label, note in notes.items() if key in note}
        if key == "checkpoint":
            values.pop("original_dense", None)
        for one, other in itertools.pairwise(values):
            if values[one] != values[other]:
                raise ValueError(
                    f"arms {one} and {other} have another {key}: compare predictions of one converted "
                    "checkpoint, made alike"
                )


def _is_ruler(records: Predictions) -> bool:
    return all(benchmark_of(record) == "ruler" for record in records.values())


def _run(label: str) -> ArmRun | None:
    try:
        return ArmRun.parse(label)
    except ValueError:
        return None


def summary(found: Mapping[str, Any]) -> str:
    """What was found, for a terminal: means by arm and length, then each comparison's verdict."""
    lines = []
    for label, arm in found["arms"].items():
        means = "  ".join(f"{length}: {mean:.2f}" for length, mean in arm["means"].items())
        lines.append(f"{label:28} {means}")
        if arm["ruler"]:
            lines.append(f"{'':28} {_ruler_line(arm['ruler'], max(map(int, arm['scores'])))}")
    for pair in found["comparisons"]:
        several = bool(pair["suites"])
        for suite, entry in {pair["suite"]: pair, **pair["suites"]}.items():
            lost = entry["overall"]["lost"]
            lines.append(
                f"{pair['meaning']}{f', {suite}' if several else ''} ({pair['first']} - {pair['second']}): "
                f"{lost['estimate']:+.2f} points lost [{lost['low']:+.2f}, {lost['high']:+.2f}], "
                f"{entry['overall']['verdict']} at a margin of {found['margin']:g}"
            )
    if not found["comparisons"]:
        lines.append("no two arms to compare: name folders by their arm, or give --compare")
    return "\n".join(lines)


def _ruler_line(own: Mapping[str, Any], longest: int) -> str:
    """RULER's own figures of an arm over lengths up to `longest`, and what they lack."""
    if own["wavg_inc"] is None:
        return "RULER's effective length, wAvg(inc), wAvg(dec): not computed: one length"
    length = own["effective_length"] or "below the shortest"
    if length == longest:
        length = f"{length} or more"
    said = f"effective length: {length}  wAvg(inc): {own['wavg_inc']:.2f}  wAvg(dec): {own['wavg_dec']:.2f}"
    if own["all_tasks"]:
        return f"{said} (comparable if the prompts are made of NVIDIA's data)"
    return f"{said} (not comparable with published ones: not all 13 tasks are here)"


def main(arguments: Sequence[str] | None = None) -> int:
    """Score a folder; exit code 2 for one that cannot be scored."""
    parser = argparse.ArgumentParser(
        prog="python -m dense2sparse.eval.score",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="holds one folder of predictions an arm")
    parser.add_argument("--margin", type=float, default=DEFAULT_MARGIN, help="points, default 1")
    parser.add_argument("--compare", nargs=2, action="append", default=[], metavar="ARM")
    options = parser.parse_args(arguments)
    try:
        if not 0 < options.margin < math.inf:
            raise ValueError(f"--margin {options.margin}: use points above 0, for example 1")
        arms = read_folder(options.folder)
        for label in (label for pair in options.compare for label in pair):
            if label not in arms:
                raise ValueError(f"--compare {label}: no such arm, there are {', '.join(arms)}")
        scores = {label: scored(records) for label, records in arms.items()}
        found = evaluate(scores, margin=options.margin, pairs=list(map(tuple, options.compare)))
        write_json(options.folder / "scores.json", found)
    except (ValueError, OSError) as error:
        said = sentence(error)
        if said is None:
            raise
        print(f"error: {said}", file=sys.stderr)
        return 2
    print(summary(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
