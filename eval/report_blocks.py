"""Parts a report is made of, and how each looks in HTML and in Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape


@dataclass(frozen=True)
class Cell:
    """One table cell; `note` is its tooltip, `small` stands below."""

    text: str
    heat: float | None = None
    """Tint from 0 to 100; in a table of changes from -100 (worse) to 100 (better)."""
    note: str = ""
    small: str = ""
    moot: bool = False
    """Uninformative: hatched and marked with an asterisk."""


@dataclass(frozen=True)
class Table:
    """A table; the first column is text, the others are numbers."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell | str]]
    caption: str = ""
    half: bool = False
    """Whether two stand side by side."""
    grid: bool = False
    """A heat map: cells of one width, numbers in the middle."""
    fold: str = ""
    """Summary that it is folded away under."""


@dataclass(frozen=True)
class Text:
    """A paragraph; `kind` may be "warn" for what limits a result, "head" for a title inside a section."""

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


@dataclass(frozen=True)
class Side:
    """One arm's answer: who, its score, what it said, what is known of it."""

    name: str
    score: str
    said: str
    note: str = ""
    right: bool = False


@dataclass(frozen=True)
class Flip:
    """One sample that two arms answered differently."""

    name: str
    wanted: str
    sides: tuple[Side, Side]


@dataclass(frozen=True)
class Flips:
    """Answers side by side."""

    summary: str
    flips: Sequence[Flip]
    open: bool = True


_MANY = 7
"""Columns that fit the page at the usual size."""

Block = Table | Text | Chart | Details | Flips


@dataclass(frozen=True)
class Section:
    """A heading with its blocks; `intro` says in a line how to read it."""

    title: str
    blocks: list[Block] = field(default_factory=list)
    intro: str = ""


@dataclass(frozen=True)
class Page:
    """The whole report."""

    title: str
    subtitle: str
    verdict: list[str]
    """The sentence that everybody reads, then what explains it."""
    cards: list[Card]
    sections: list[Section]
    tone: str = ""
    """What the verdict says of the margin: `good`, `bad` or `open`; empty where it says nothing."""
    lead: list[Block] = field(default_factory=list)
    """Shown before the first section."""


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
        + (f'<p class="intro">{escape(section.intro)}</p>' if section.intro else "")
        + f"{''.join(map(_html, section.blocks))}</section>"
        for place, section in enumerate(page.sections)
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(page.title)}</title><style>{style}</style></head><body><main>"
        f"<header><h1>{escape(page.title)}</h1><p>{escape(page.subtitle)}</p></header>"
        f'<div class="verdict {page.tone}">{verdict}</div><div class="cards">{cards}</div>'
        f"{''.join(map(_html, page.lead))}<nav>{links}</nav>{body}</main></body></html>\n"
    )


def to_markdown(page: Page) -> str:
    """The same in Markdown, without the pictures."""
    lines = [f"# {page.title}", "", page.subtitle, ""]
    for place, line in enumerate(page.verdict):
        lines += [f"**{line}**" if not place else line, ""]
    lines += [
        f"- **{card.figure}** {card.label}" + (f" ({card.detail})" if card.detail else "")
        for card in page.cards
    ]
    for block in page.lead:
        lines += ["", *_markdown(block)]
    for section in page.sections:
        lines += ["", f"## {section.title}"]
        if section.intro:
            lines += ["", section.intro]
        for block in section.blocks:
            lines += ["", *_markdown(block)]
    return "\n".join(lines) + "\n"


def _html(block: Block) -> str:
    if isinstance(block, Text):
        if block.kind == "head":
            return f"<h3>{escape(block.text)}</h3>"
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
    if isinstance(block, Flips):
        shown = "".join(map(_html_flip, block.flips))
        seen = " open" if block.open else ""
        return f"<details{seen}><summary>{escape(block.summary)}</summary>{shown}</details>"
    return _html_table(block)


def _html_table(table: Table) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in table.columns)
    rows = "".join(f"<tr>{_html_row(row)}</tr>" for row in table.rows)
    caption = f"<caption><span>{escape(table.caption)}</span></caption>" if table.caption else ""
    names = " ".join(
        [
            "scroll",
            *["half"] * table.half,
            *["grid"] * table.grid,
            *["many"] * (len(table.columns) > _MANY),
        ]
    )
    html = (
        f'<div class="{names}"><table>{caption}<thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )
    if not table.fold:
        return html
    return f"<details><summary>{escape(table.fold)}</summary>{html}</details>"


def _html_row(row: Sequence[Cell | str]) -> str:
    parts = []
    for place, given in enumerate(row):
        cell = given if isinstance(given, Cell) else Cell(given)
        small = f"<small>{escape(cell.small)}</small>" if cell.small else ""
        if place == 0:
            parts.append(f'<th scope="row">{escape(cell.text)}{small}</th>')
            continue
        names, style = [], ""
        if cell.heat is not None:
            names = ["heat", "worse"] if cell.heat < 0 else ["heat"]
            style = f' style="--heat:{min(100.0, abs(cell.heat)):.0f}%"'
        if cell.moot:
            names.append("moot")
        kind = f' class="{" ".join(names)}"' if names else ""
        note = f' title="{escape(cell.note)}"' if cell.note else ""
        parts.append(f"<td{kind}{style}{note}>{escape(_text(cell))}{small}</td>")
    return "".join(parts)


def _html_flip(flip: Flip) -> str:
    sides = "".join(
        f'<div class="{"right" if side.right else "wrong"}"><b>{escape(side.name)}</b>'
        f"<i>{escape(side.score)}</i><q>{escape(side.said)}</q><small>{escape(side.note)}</small></div>"
        for side in flip.sides
    )
    head = f"<code>{escape(flip.name)}</code> wanted <b>{escape(flip.wanted)}</b>"
    return f'<div class="flip"><p>{head}</p><div class="sides">{sides}</div></div>'


def _markdown(block: Block) -> list[str]:
    if isinstance(block, Text):
        if block.kind == "head":
            return [f"### {block.text}"]
        return [f"> {block.text}" if block.kind == "warn" else block.text]
    if isinstance(block, Chart):
        return [f"*{block.caption} (picture: see the HTML report)*"] if block.svg else []
    if isinstance(block, Details):
        return [f"{block.summary}:", "", "```", _fenced(block.text), "```"]
    if isinstance(block, Flips):
        text = "\n\n".join(
            "\n".join(
                [f"{flip.name}   wanted: {flip.wanted}"]
                + [f"  {side.name} ({side.score}): {side.said}" for side in flip.sides]
            )
            for flip in block.flips
        )
        return [f"{block.summary}:", "", "```", _fenced(text), "```"]
    rows = [[_plain(cell) for cell in row] for row in block.rows]
    caption = ": ".join(part for part in (block.fold, block.caption) if part)
    lines = [caption, ""] if caption else []
    lines.append("| " + " | ".join(block.columns) + " |")
    lines.append("|" + "---|" * len(block.columns))
    return lines + [
        "| " + " | ".join(text.replace("|", "\\|") for text in row) + " |" for row in rows
    ]


def _fenced(text: str) -> str:
    return text.replace("```", "'''")


def _text(cell: Cell) -> str:
    return f"{cell.text}*" if cell.moot else cell.text


def _plain(cell: Cell | str) -> str:
    if isinstance(cell, str):
        return cell
    return f"{_text(cell)} ({cell.small})" if cell.small else _text(cell)
