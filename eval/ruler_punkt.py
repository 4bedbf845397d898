"""Sentences as Punkt finds them, with the English model that NVIDIA's generator uses.

RULER puts its needles between sentences, so byte-equal prompts need the same sentences. The rules are those
of Kiss and Strunk, "Unsupervised Multilingual Sentence Boundary Detection" (2006), in the form and with the
regular expressions of nltk 3.10.4; the model (`punkt_tab`) is read by `sources.py`. Called by
`ruler_material.Haystack` where `parity: nvidia` is asked for.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

# How a word was seen in training: bits of the orthographic context.
_MIDDLE_UPPER, _UPPER = 1 << 2, (1 << 1) | (1 << 2) | (1 << 3)
_BEGIN_LOWER, _LOWER = 1 << 4, (1 << 4) | (1 << 5) | (1 << 6)

_QUOTES = "\u2018\u2019\u201c\u201d\u00ab\u00bb"
_BREAKS_WORD = rf"""[)";}}\]*:@'({{\[{_QUOTES}?!]"""
_DASHES_OR_DOTS = r"(?:-{2,}|\.{2,}|(?:\.\s){2,}\.)"
_CANDIDATE = re.compile(rf"[.?!](?=(?P<after>{_BREAKS_WORD}|\s+(?P<next>\S+)))")
_WORD = re.compile(
    rf"{_DASHES_OR_DOTS}"
    rf"|(?=[^(\"`{{\[:;&#*@)}}\]\-,])\S+?"
    rf"(?=\s|$|{_BREAKS_WORD}|{_DASHES_OR_DOTS}|,(?=$|\s|{_BREAKS_WORD}|{_DASHES_OR_DOTS}))"
    r"|\S"
)
_CLOSING = re.compile(rf"[\"')\]}}{_QUOTES}]+?(?:\s+|(?=--)|$)", re.MULTILINE)
_ELLIPSIS = re.compile(r"\.\.+$")
_NUMBER = re.compile(r"^-?[.,]?\d[\d,.-]*\.?$")
_INITIAL = re.compile(r"[^\W\d]\.$")
_PUNCTUATION = frozenset(";:,.!?")
_WHITE = " \t\n\r\x0b\x0c"


@dataclass(frozen=True)
class PunktModel:
    """What Punkt learned of a language."""

    abbreviations: frozenset[str]
    collocations: frozenset[tuple[str, str]]
    starters: frozenset[str]
    context: Mapping[str, int]


class _Token:
    """A word with what is decided about it."""

    __slots__ = ("abbreviation", "ellipsis", "ends", "kind", "text")

    def __init__(self, text: str, model: PunktModel) -> None:
        self.text = text
        self.kind = _NUMBER.sub("##number##", text.lower())
        self.ends = text in (".", "?", "!")
        self.ellipsis = not self.ends and bool(_ELLIPSIS.match(text))
        self.abbreviation = False
        if text.endswith(".") and not (self.ends or self.ellipsis or text.endswith("..")):
            stem = text[:-1].lower()
            known = model.abbreviations
            self.abbreviation = stem in known or stem.split("-")[-1] in known
            self.ends = not self.abbreviation

    def without_period(self) -> str:
        return self.kind[:-1] if len(self.kind) > 1 and self.kind.endswith(".") else self.kind

    def as_next(self) -> str:
        return self.without_period() if self.ends else self.kind


def sentences(text: str, model: PunktModel) -> list[str]:
    """Sentences of `text` in order; the white space between them is dropped."""
    cuts = list(_cuts(text, model))
    found = []
    taken = 0  # closing quotes that went to the sentence before
    for place, (first, last) in enumerate(cuts):
        first += taken
        taken = 0
        if place + 1 < len(cuts):
            after, end = cuts[place + 1]
            closing = _CLOSING.match(text[after:end])
            if closing:
                found.append(text[first : after + len(closing.group().rstrip())])
                taken = closing.end()
                continue
        if text[first:last]:
            found.append(text[first:last])
    return found


def _cuts(text: str, model: PunktModel) -> Iterator[tuple[int, int]]:
    """[first, last) of every sentence before closing quotes are moved."""
    begin = 0
    for match, context in _candidates(text):
        if _has_break(context, model):
            yield begin, match.end()
            begin = match.start("next") if match["next"] else match.end()
    yield begin, len(text.rstrip())


def _candidates(text: str) -> Iterator[tuple[re.Match[str], str]]:
    """Marks that may end a sentence, with the words around; of marks in one word only the last counts."""
    first = last = 0  # the word before the mark that was met last
    held: re.Match[str] | None = None
    for match in _CANDIDATE.finditer(text):
        before = text[last : match.start()]
        white = max(map(before.rfind, _WHITE))
        begin = last + white + 1 if white > 0 else first
        if held is not None and last <= begin:
            yield held, text[first:last] + held.group() + held["after"]
        held, first, last = match, begin, match.start()
    if held is not None:
        yield held, text[first:last] + held.group() + held["after"]


def _has_break(context: str, model: PunktModel) -> bool:
    """Whether a sentence ends before the last word of `context`."""
    words = [word for line in context.split("\n") for word in _WORD.findall(line)]
    tokens = [_Token(word, model) for word in words]
    # A token's own decision is made before it is looked at as the next one, hence in order.
    for token, following in zip(tokens, tokens[1:], strict=False):
        if token.text.endswith("."):
            _reconsider(token, following, model)
        if token.ends:
            return True
    return False


def _reconsider(token: _Token, following: _Token, model: PunktModel) -> None:
    """Decide again about a word with a period from the word behind it."""
    stem, after = token.without_period(), following.as_next()
    if (stem, after) in model.collocations:
        token.ends, token.abbreviation = False, True
        return
    initial = bool(_INITIAL.match(token.text))
    capital = following.text[0].isupper()
    if (token.abbreviation or token.ellipsis) and not initial:
        starts = _starts_sentence(following, model)
        if starts or (capital and after in model.starters):
            token.ends = True
            return
    if initial or stem == "##number##":
        starts = _starts_sentence(following, model)
        never_lower = not model.context.get(after, 0) & _LOWER
        if starts is False or (starts is None and initial and capital and never_lower):
            token.ends, token.abbreviation = False, True


def _starts_sentence(token: _Token, model: PunktModel) -> bool | None:
    """What the word's use in training says about it as a first word; None if it says nothing."""
    if token.text in _PUNCTUATION:
        return False
    seen = model.context.get(token.as_next(), 0)
    first = token.text[0]
    if first.isupper() and seen & _LOWER and not seen & _MIDDLE_UPPER:
        return True
    if first.islower() and (seen & _UPPER or not seen & _BEGIN_LOWER):
        return False
    return None
