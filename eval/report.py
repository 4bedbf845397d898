"""The report of a run: `report.html` (one file, no network, no script), `report.md` and `results.csv`.

Reads nothing but files under the run's folder, so anyone who has that folder can make it again:
`python -m dense2sparse.eval.report RUN_DIR`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .errors import sentence
from .records import write_text
from .report_blocks import Page, Text, to_html, to_markdown
from .report_budget import budget_section
from .report_cards import cards, lead
from .report_csv import to_csv
from .report_data import RunFiles, read_run
from .report_index import index_section, probe_section
from .report_lm_eval import lm_eval_section
from .report_longbench import longbench_section
from .report_needles import needle_section
from .report_perplexity import perplexity_section
from .report_ruler import ruler_section
from .report_run import environment_section, missing_section, outputs_section, training_section
from .report_style import STYLE
from .report_verdict import verdict

SECTIONS = (
    ruler_section,
    needle_section,
    longbench_section,
    lm_eval_section,
    perplexity_section,
    budget_section,
    index_section,
    probe_section,
    training_section,
    outputs_section,
    missing_section,
    environment_section,
)
"""In the order of the page; a section without blocks is left out."""


def write_report(run_dir: Path) -> dict[str, Path]:
    """Write the three files into `run_dir`, each atomically; returns their paths by kind.

    Raises:
        ValueError: not a run's folder, or a damaged file in it.
    """
    run = read_run(run_dir)
    page = build(run)
    files = {
        "html": run_dir / "report.html",
        "markdown": run_dir / "report.md",
        "csv": run_dir / "results.csv",
    }
    write_text(files["html"], to_html(page, STYLE))
    write_text(files["markdown"], to_markdown(page))
    write_text(files["csv"], to_csv(run))
    return files


def build(run: RunFiles) -> Page:
    """The page, section by section; what the run has not is left out, and said."""
    said = verdict(run)
    sections = [make(run) for make in SECTIONS]
    model = run.recipe.get("model", {})
    source = model.get("path") or model.get("hub") or model.get("wheel") or "unknown checkpoint"
    commit = str(run.environment.get("commit", ""))[:12]
    parts = [
        source,
        str(run.environment.get("date", ""))[:10],
        f"commit {commit}" if commit else "",
    ]
    return Page(
        title=f"Dense to sparse: {run.name}",
        subtitle=" · ".join(part for part in parts if part),
        verdict=said.head,
        tone=said.tone,
        cards=cards(run),
        lead=[*lead(run), *map(Text, said.rest)],
        sections=[section for section in sections if section.blocks],
    )


def main(arguments: list[str] | None = None) -> int:
    """`python -m dense2sparse.eval.report RUN_DIR`; exit code 2 for a folder that cannot be read."""
    parser = argparse.ArgumentParser(prog="dense2sparse report", description=__doc__)
    parser.add_argument("run_dir", type=Path, help="folder of a run, such as runs/quickstart")
    options = parser.parse_args(arguments)
    try:
        files = write_report(options.run_dir)
    except (ValueError, OSError) as error:
        said = sentence(error)
        if said is None:
            raise
        print(f"error: {said}", file=sys.stderr)
        return 2
    for path in files.values():
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
