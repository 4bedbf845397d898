"""Scores of predictions, also of those made elsewhere: data files in, one data file and a table out.

    python -m dense2sparse.eval.score FOLDER [--margin 1.0] [--compare FIRST SECOND]

FOLDER holds one folder an arm, named by the arm (`original_dense`, `converted_dense`,
`converted_sparse-k16`, `converted_oracle-k16`, or any name for `--compare`), each with `*.jsonl` of one
object a prediction: `id`, `task`, `length`, `references`, `prediction`, and what else eval/predict.py
writes. `scores.json` is written into FOLDER. No model, no torch: whoever has the files can check every
number.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import longbench_score, ruler_score, tables
from .arms import ArmRun, comparisons
from .errors import sentence
from .records import read_predictions, write_json
from .tables import Predictions

DEFAULT_BENCHMARK = "ruler"
"""Of a record that names none."""
DEFAULT_MARGIN = 1.0
"""Points; the recipe's report stage names another."""
_METRICS: dict[str, Callable[[Mapping[str, Any]], float]] = {
    "ruler": ruler_score.score_record,
    "longbench": longbench_score.score,
}
_NEEDED = {"id": str, "task": str, "length": int, "references": list, "prediction": str}
_SAME = ("checkpoint", "precision", "index_precision", "prompts")


def score_of(record: Mapping[str, Any]) -> float:
    """Score of one prediction, 0 to 100, by the metric of its benchmark and task.

    Raises:
        ValueError: a benchmark that is not known.
    """
    benchmark = record.get("benchmark", DEFAULT_BENCHMARK)
    if benchmark not in _METRICS:
        raise ValueError(
            f"benchmark={benchmark!r} of prediction {record['id']}: use {' or '.join(_METRICS)}"
        )
    return _METRICS[benchmark](record)


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
                **tables.compare(arms[first], arms[second], margin=margin),
                "flips": tables.flips(arms[first], arms[second]),
            }
        )
    return found


def check_same_prompts(arms: Mapping[str, Predictions]) -> None:
    """Refuse arms that differ in their prompts' ids, tasks, lengths or references (ValueError)."""
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
            for key in ("task", "length", "references"):
                if record[key] != arms[first][name][key]:
                    raise ValueError(
                        f"prompt {name} has another {key} in arm {label} than in {first}: these are "
                        "predictions of different prompts, predict both on the same"
                    )


def read_folder(folder: Path) -> dict[str, Predictions]:
    """label -> predictions by id of every arm's folder below `folder`.

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
        if note:
            notes[label] = note
    _check_notes(notes)
    return arms


def _read_arm(home: Path) -> Predictions:
    records = read_predictions(home)
    for name, record in records.items():
        for key, kind in _NEEDED.items():
            if not isinstance(record.get(key), kind):
                raise ValueError(
                    f"prediction {name} in {home} has {key}={record.get(key)!r}: it needs "
                    f"{', '.join(f'{key} ({kind.__name__})' for key, kind in _NEEDED.items())}"
                )
    return records


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
    return note if isinstance(note, dict) else {}


def _check_notes(notes: Mapping[str, Mapping[str, Any]]) -> None:
    """Arms of one converted model must be of one: same checkpoint, precision and prompts."""
    converted = {label: note for label, note in notes.items() if label != "original_dense"}
    for key in _SAME:
        values = {label: note[key] for label, note in converted.items() if key in note}
        if len(set(map(str, values.values()))) > 1:
            one, other = (
                list(values)[0],
                next(label for label in values if values[label] != list(values.values())[0]),
            )
            raise ValueError(
                f"arms {one} and {other} have another {key}: compare predictions of one converted "
                "checkpoint, made alike"
            )


def _is_ruler(records: Predictions) -> bool:
    return all(
        record.get("benchmark", DEFAULT_BENCHMARK) == DEFAULT_BENCHMARK
        for record in records.values()
    )


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
        lost = pair["overall"]["lost"]
        lines.append(
            f"{pair['meaning']} ({pair['first']} - {pair['second']}): {lost['estimate']:+.2f} points lost "
            f"[{lost['low']:+.2f}, {lost['high']:+.2f}], {pair['overall']['verdict']} at a margin of "
            f"{found['margin']:g}"
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
