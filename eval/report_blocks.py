"""Parts a report is made of, and how each looks in HTML and in Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape


@dataclass(frozen=True)
class Cell:
    """One table cell; `heat` (0 to 100) tints it, `note` is its tooltip, `small` stands below."""

    text: str
    heat: float | None = None
    note: str = ""
    small: str = ""


@dataclass(frozen=True)
class Table:
    """A table; the first column is text, the others are numbers."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell | str]]
    caption: str = ""


@dataclass(frozen=True)
class Text:
    """A paragraph; `kind` may be "warn" for what limits a result."""

    text: str
    kind: str = ""


@dataclass(frozen=True)
class Chart:
    """An SVG with a caption; Markdown shows the caption only."""

    svg: str
    caption: str
    half: bool = False
    """Whether two stand side by side."""


@dataclass(frozen=True)
class Card:
    """A headline figure."""

    figure: str
    label: str
    detail: str = ""


@dataclass(frozen=True)
class Details:
    """Something folded away: preformatted text under a summary."""

    summary: str
    text: str


Block = Table | Text | Chart | Details


@dataclass(frozen=True)
class Section:
    """A heading with its blocks."""

    title: str
    blocks: list[Block] = field(default_factory=list)


@dataclass(frozen=True)
class Page:
    """The whole report."""

    title: str
    subtitle: str
    verdict: list[str]
    cards: list[Card]
    sections: list[Section]


def to_html(page: Page, style: str) -> str:
    """One self-contained file."""
    cards = "".join(
        f'<div class="card"><b>{escape(card.figure)}</b><span>{escape(card.label)}</span>'
        f"<small>{escape(card.detail)}</small></div>"
        for card in page.cards
    )
    verdict = "".join(f"<p>{escape(line)}</p>" for line in page.verdict)
    links = "".join(
        f'<a href="#s{place}">{escape(section.title)}</a>'
        for place, section in enumerate(page.sections)
    )
    body = "".join(
        f'<section id="s{place}"><h2>{escape(section.title)}</h2>'
        f"{''.join(map(_html, section.blocks))}</section>"
        for place, section in enumerate(page.sections)
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(page.title)}</title><style>{style}</style></head><body><main>"
        f"<header><h1>{escape(page.title)}</h1><p>{escape(page.subtitle)}</p></header>"
        f'<div class="verdict">{verdict}</div><div class="cards">{cards}</div>'
        f"<nav>{links}</nav>{body}</main></body></html>\n"
    )


def to_markdown(page: Page) -> str:
    """The same in Markdown, without the pictures."""
    lines = [f"# {page.title}", "", page.subtitle, ""]
    lines += [f"**{line}**" if not place else line for place, line in enumerate(page.verdict)]
    lines.append("")
    lines += [
        f"- {card.label}: **{card.figure}**" + (f" ({card.detail})" if card.detail else "")
        for card in page.cards
    ]
    for section in page.sections:
        lines += ["", f"## {section.title}"]
        for block in section.blocks:
            lines += ["", *_markdown(block)]
    return "\n".join(lines) + "\n"


def _html(block: Block) -> str:
    if isinstance(block, Text):
        return f'<p class="{escape(block.kind)}">{escape(block.text)}</p>'
    if isinstance(block, Chart):
        if not block.svg:
            return ""
        width = ' class="half"' if block.half else ""
        caption = escape(block.caption)
        return f"<figure{width}>{block.svg}<figcaption>{caption}</figcaption></figure>"
    if isinstance(block, Details):
        return (
            f"<details><summary>{escape(block.summary)}</summary>"
            f"<pre>{escape(block.text)}</pre></details>"
        )
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in block.columns)
    rows = "".join(f"<tr>{_html_row(row)}</tr>" for row in block.rows)
    caption = f"<caption>{escape(block.caption)}</caption>" if block.caption else ""
    return (
        f'<div class="scroll"><table>{caption}<thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _html_row(row: Sequence[Cell | str]) -> str:
    parts = []
    for place, given in enumerate(row):
        cell = given if isinstance(given, Cell) else Cell(given)
        if place == 0:
            parts.append(f'<th scope="row">{escape(cell.text)}</th>')
            continue
        heat = (
            ""
            if cell.heat is None
            else f' class="heat" style="--heat:{max(0.0, min(100.0, cell.heat)):.0f}%"'
        )
        note = f' title="{escape(cell.note)}"' if cell.note else ""
        small = f"<small>{escape(cell.small)}</small>" if cell.small else ""
        parts.append(f"<td{heat}{note}>{escape(cell.text)}{small}</td>")
    return "".join(parts)


def _markdown(block: Block) -> list[str]:
    if isinstance(block, Text):
        return [f"> {block.text}" if block.kind == "warn" else block.text]
    if isinstance(block, Chart):
        return [f"*{block.caption} (picture: see the HTML report)*"] if block.svg else []
    if isinstance(block, Details):
        return [f"{block.summary}:", "", "```", block.text.replace("```", "'''"), "```"]
    rows = [[_plain(cell) for cell in row] for row in block.rows]
    lines = [f"{block.caption}", ""] if block.caption else []
    lines.append("| " + " | ".join(block.columns) + " |")
    lines.append("|" + "---|" * len(block.columns))
    return lines + [
        "| " + " | ".join(text.replace("|", "\\|") for text in row) + " |" for row in rows
    ]


def _plain(cell: Cell | str) -> str:
    if isinstance(cell, str):
        return cell
    return f"{cell.text} ({cell.small})" if cell.small else cell.text
