"""Report section of needles: score by depth and length, and whether the needle's block was selected."""

from __future__ import annotations

from typing import Any

from .charts import Series, line_chart
from .report_blocks import Block, Cell, Chart, Section, Table, Text
from .report_data import RunFiles
from .report_words import (
    arm_name,
    colour_of,
    length_name,
    main_budget,
    measured_tasks,
    ruler_name,
    shown_arms,
    when,
)

_DEPTHS = 10


def needle_section(run: RunFiles) -> Section:
    """Depth grids and needle-block recall of the newest weights."""
    intro = (
        "Depth is where in the prompt the only needle lies. A needle counts as selected by a layer and a "
        "group where every block that it touches is read at an answer position (eval/recall.py)."
    )
    section = Section("Needles: depth, and whether their block was selected", intro=intro)
    for result in run.final("ruler"):
        blocks = _grids(run, result) + _recall(run, result)
        if blocks:
            title = f"{ruler_name(measured_tasks(result))}, {when(run, result)}"
            section.blocks.extend([Text(title, "head"), *blocks])
    return section


def _grids(run: RunFiles, result: dict[str, Any]) -> list[Block]:
    """Depth x length for B and for C at the main budget."""
    blocks: list[Block] = []
    labels = ["converted_dense", f"converted_sparse-k{main_budget(run, result)}"]
    for label in labels:
        depths = (result["arms"].get(label) or {}).get("depths")
        if not depths:
            continue
        lengths = sorted(depths, key=int)
        found = {
            (length, round(_DEPTHS * entry["depth"])): entry
            for length in lengths
            for entry in depths[length]
        }
        rows: list[list[Cell | str]] = []
        for tenth in range(_DEPTHS):
            name = f"{100 * tenth // _DEPTHS} to {100 * (tenth + 1) // _DEPTHS} %"
            rows.append([name, *(_cell(found.get((length, tenth))) for length in lengths)])
        caption = (
            f"{arm_name(label)}: mean score by depth of the needle; empty where no sample lies"
        )
        blocks.append(
            Table(["depth", *map(length_name, lengths)], rows, caption, half=True, grid=True)
        )
    return blocks


def _cell(entry: dict[str, Any] | None) -> Cell | str:
    if entry is None:
        return ""
    return Cell(f"{entry['score']:.0f}", entry["score"], f"{entry['samples']} samples")


def _recall(run: RunFiles, result: dict[str, Any]) -> list[Block]:
    """By task and length, by layer, and the score of samples by how much of the needle was read."""
    arms = {
        label: found
        for label in shown_arms(run, result)
        if (found := result["arms"][label].get("needles"))
    }
    if not arms:
        return []
    blocks: list[Block] = [_correctness(label, found) for label, found in arms.items()]
    blocks += [_by_layer(arms), *(_by_task(label, found) for label, found in arms.items())]
    return blocks


def _correctness(label: str, found: dict[str, Any]) -> Table:
    rows: list[list[Cell | str]] = []
    for entry in found["by_recall"]:
        end = "100" if entry["high"] == 1 else f"{100 * entry['high']:.0f}"
        score = entry["score"]
        shown: Cell | str = "" if score is None else Cell(f"{score:.1f}", score)
        rows.append([f"{100 * entry['low']:.0f} to {end} %", str(entry["samples"]), shown])
    link = found["correlation"]
    said = "recall or score is constant" if link is None else f"correlation {link:.2f}"
    caption = (
        f"{arm_name(label)}: mean score by share of layers and groups that read the needle; {said}"
    )
    return Table(["needle's block read in", "samples", "mean score"], rows, caption, half=True)


def _by_layer(arms: dict[str, Any]) -> Chart:
    series = [
        Series(
            arm_name(label),
            [(float(layer), share) for layer, share in found["layers"].items()],
            colour_of(label),
        )
        for label, found in arms.items()
    ]
    chart = line_chart(series, x_label="layer", y_label="share selected", y_range=(0.0, 1.0))
    return Chart(
        chart, "Share of groups and answer positions that select the needle's block, by layer"
    )


def _by_task(label: str, found: dict[str, Any]) -> Table:
    lengths = sorted(found["lengths"], key=int)
    tasks = sorted({task for by_task in found["lengths"].values() for task in by_task})
    rows: list[list[Cell | str]] = []
    for task in tasks:
        row: list[Cell | str] = [task]
        for length in lengths:
            cell = found["lengths"][length].get(task)
            if cell is None:
                row.append("")
                continue
            note = f"at the first answer position {100 * cell['first']:.0f} %; {cell['samples']} samples"
            chance = f"chance {100 * cell['kept']:.0f}"
            row.append(Cell(f"{100 * cell['any']:.0f}", 100 * cell["any"], note, chance))
        rows.append(row)
    caption = (
        f"{arm_name(label)}: per cent of layers and groups that read the needle at one answer position at "
        "least; chance is the share of blocks that is read"
    )
    return Table(["task", *map(length_name, lengths)], rows, caption, grid=True)
