"""Report sections of the index branch: learned coverage after each stage, and the oracle probe."""

from __future__ import annotations

from .charts import Series, line_chart
from .report_blocks import Cell, Chart, Section, Table
from .report_data import RunFiles
from .report_words import signed, span, when


def index_section(run: RunFiles) -> Section:
    """Learned coverage by layer after each training stage, and at the start where it was probed."""
    section = Section("Index branch: learned coverage after each stage")
    states: list[tuple[str, dict[int, float]]] = []
    for result in run.results["probe"]:
        for entry in result["budgets"]:
            layers = entry["layers"].get("learned_coverage")
            if layers and entry["top_k"] == run.top_k():
                named = {int(layer): value for layer, value in layers.items()}
                states.append((f"probe {when(run, result)}", named))
    for number, label in run.training_stages():
        layers = run.by_layer("learned_coverage", number)
        if layers:
            states.append((f"after {label}", layers))
    if not states:
        return section
    rows: list[list[Cell | str]] = []
    for label, layers in states:
        worst = min(layers.items(), key=lambda item: item[1])[0]
        mean = sum(layers.values()) / len(layers)
        rows.append(
            [label, f"{mean:.4f}", f"{layers[worst]:.4f}", f"layer {worst}", str(len(layers))]
        )
    caption = (
        "share of the attention mass beyond the forced blocks that the index branch finds, of what the "
        "oracle finds with as many blocks; last measurement of each stage"
    )
    section.blocks.append(Table(["state", "mean", "worst", "where", "layers"], rows, caption))
    series = [
        Series(label, [(float(layer), value) for layer, value in layers.items()], colour)
        for colour, (label, layers) in enumerate(states)
    ]
    chart = line_chart(series, x_label="layer", y_label="learned coverage")
    section.blocks.append(Chart(chart, "Learned coverage by layer"))
    return section


def probe_section(run: RunFiles) -> Section:
    """The ceiling at each budget, before training."""
    section = Section("Oracle probe: the ceiling at each budget")
    for result in run.results["probe"]:
        rows: list[list[Cell | str]] = []
        needles = (result.get("needles") or {}).get("scores", {})
        for entry in result["budgets"]:
            mean, worst = entry["mean"], entry["worst"]
            needle = needles.get(f"converted_oracle-k{entry['top_k']}", {})
            gap = entry["loss_gap"]
            rows.append(
                [
                    f"k = {entry['top_k']}",
                    _share(mean, "oracle_coverage"),
                    _share(worst, "oracle_coverage"),
                    Cell(signed(gap["estimate"], 4), small=span(gap, 4)),
                    _share(mean, "learned_coverage"),
                    _share(worst, "learned_coverage"),
                    ", ".join(f"{value:.0f}" for value in needle.values()) or "not measured",
                ]
            )
        columns = ["budget", "oracle coverage, mean", "worst layer", "loss added by the oracle"]
        columns += ["index branch: learned coverage, mean", "worst layer", "needle score"]
        caption = (
            f"{when(run, result)}; {result['rows']} rows of {result['row_len']} tokens, blocks of "
            f"{result['block_size']}; coverage is the share of attention mass in the kept blocks"
        )
        section.blocks.append(Table(columns, rows, caption))
        series = [
            Series(
                f"k = {entry['top_k']}",
                [
                    (float(layer), value)
                    for layer, value in entry["layers"]["oracle_coverage"].items()
                ],
                colour,
            )
            for colour, entry in enumerate(result["budgets"])
            if "oracle_coverage" in entry["layers"]
        ]
        chart = line_chart(series, x_label="layer", y_label="oracle coverage")
        section.blocks.append(Chart(chart, "Attention mass that the best k blocks hold, by layer"))
    return section


def _share(values: dict[str, float], name: str) -> str:
    return f"{values[name]:.3f}" if name in values else "not measured"
