"""LongBench's metrics as its reference computes them, quirks included: pure functions of text.

Rules read in THUDM/LongBench `2e00731` (LongBench/metrics.py and eval.py; pred.py for version 2). Every
metric takes a prediction and one reference and gives 0 to 1; `best` is the maximum over references.
ROUGE stands in `metrics_rouge.py`. Called by `longbench_score.py`; imports nothing heavy.

Chinese metrics cut words with jieba, which is optional: without it they raise `NotScorable`, because any
other cut gives other scores.
"""

from __future__ import annotations

import difflib
import importlib.util
import logging
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import chain

from .metrics_rouge import rouge_l

JIEBA = "jieba==0.42.1"
Metric = Callable[[str, str], float]

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NUMBER = re.compile(r"\d+")
_RANGES = (
    (0x2013, 0x2014), (0x2018, 0x2019), (0x201B, 0x201F), (0x2026, 0x2027), (0x3001, 0x3003),
    (0x300B, 0x3011), (0x3014, 0x301F), (0x3030, 0x3030), (0x303E, 0x303F), (0xFE4F, 0xFE4F),
    (0xFF01, 0xFF0D), (0xFF0F, 0xFF0F), (0xFF1A, 0xFF20), (0xFF3B, 0xFF40), (0xFF5B, 0xFF64),
)  # fmt: skip
_ASCII_PUNCTUATION = frozenset(string.punctuation)
_ALL_PUNCTUATION = _ASCII_PUNCTUATION.union(
    chain.from_iterable(map(chr, range(first, last + 1)) for first, last in _RANGES)
)
"""What Chinese answers lose: the reference's set, from which opening book brackets are absent."""
_CODE_MARKS = ("`", "#", "//")
_CHOICE = (
    re.compile(r"The correct answer is \(([A-D])\)"),
    re.compile(r"The correct answer is ([A-D])"),
)


class NotScorable(ValueError):
    """A metric lacks something it needs; the message says what to install."""


def best(metric: Metric, prediction: str, references: Sequence[str]) -> float:
    """The maximum of a metric over the references, 0.0 where there is none."""
    return max((metric(prediction, reference) for reference in references), default=0.0)


def first_line(prediction: str) -> str:
    """The first line after leading newlines: all that trec, triviaqa, samsum and lsht are judged by."""
    return prediction.lstrip("\n").split("\n")[0]


def qa_f1(prediction: str, reference: str) -> float:
    """Word F1 of lower-case text without ASCII punctuation and English articles."""
    return _f1(_english(prediction).split(), _english(reference).split())


def qa_f1_zh(prediction: str, reference: str) -> float:
    """F1 over jieba's words, each without punctuation and white space; empty words do not count.

    Raises:
        NotScorable: jieba is not installed.
    """
    cut = chinese_words()
    return _f1(*([w for w in map(_chinese, cut(text)) if w] for text in (prediction, reference)))


def rouge_zh(prediction: str, reference: str) -> float:
    """ROUGE-L over jieba's words.

    Raises:
        NotScorable: jieba is not installed.
    """
    cut = chinese_words()
    return rouge_l(" ".join(cut(prediction)), " ".join(cut(reference)))


def classification(prediction: str, reference: str, classes: Sequence[str]) -> float:
    """1 / (classes named) if the right one is among them.

    A class that is part of the right one's name does not count. The reference removes such classes from
    the list it walks over, which skips the neighbour of each removed one; published scores have that.
    """
    named = [name for name in classes if name in prediction]
    place = 0
    while place < len(named):
        if named[place] in reference and named[place] != reference:
            # `remove` takes the first equal entry, and the walk goes on one place further.
            named.remove(named[place])
        place += 1
    return 1.0 / len(named) if reference in named else 0.0


def count(prediction: str, reference: str) -> float:
    """Share of the numbers in the prediction that are the reference."""
    return _share(prediction, reference)


def retrieval(prediction: str, reference: str) -> float:
    """Share of the numbers in the prediction that are the number of the reference's paragraph.

    Raises:
        ValueError: the reference names no paragraph.
    """
    return _share(prediction, _paragraph(r"Paragraph (\d+)", reference))


def retrieval_zh(prediction: str, reference: str) -> float:
    """As `retrieval`, where paragraphs have Chinese names."""
    return _share(prediction, _paragraph(r"段落(\d+)", reference))


def code_similarity(prediction: str, reference: str) -> float:
    """Similarity of the first line without backtick, # or //, in whole hundredths; "" if there is none.

    The reference calls fuzzywuzzy, which is difflib here: python-Levenshtein would give other numbers.
    """
    lines = prediction.lstrip("\n").split("\n")
    line = next((one for one in lines if not any(mark in one for mark in _CODE_MARKS)), "")
    if line == reference:
        return 1.0
    if not line or not reference:
        return 0.0
    return round(100 * difflib.SequenceMatcher(None, line, reference).ratio()) / 100


def choice(prediction: str) -> str | None:
    """The letter that an answer to version 2 names in the form asked for, None where there is none."""
    text = prediction.strip().replace("*", "")
    found = next(filter(None, (form.search(text) for form in _CHOICE)), None)
    return found[1] if found else None


def multiple_choice(prediction: str, reference: str) -> float:
    """1.0 where `choice` is the reference; no choice is wrong."""
    return float(choice(prediction) == reference)


def chinese_words() -> Callable[[str], list[str]]:
    """jieba's cut in its default mode.

    Raises:
        NotScorable: jieba is not installed.
    """
    if not chinese_is_scorable():
        raise NotScorable(
            f"Chinese LongBench tasks are scored over jieba's words: pip install {JIEBA}"
        )
    import jieba  # type: ignore[import-untyped,unused-ignore]

    jieba.setLogLevel(logging.WARNING)  # it tells how long its dictionary takes
    return jieba.lcut


def chinese_is_scorable() -> bool:
    """Whether jieba can be imported."""
    return importlib.util.find_spec("jieba") is not None


def _english(text: str) -> str:
    kept = "".join(letter for letter in text.lower() if letter not in _ASCII_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", kept).split())


def _chinese(text: str) -> str:
    kept = "".join(letter for letter in text.lower() if letter not in _ALL_PUNCTUATION)
    return "".join(kept.split())


def _f1(prediction: list[str], reference: list[str]) -> float:
    same = sum((Counter(prediction) & Counter(reference)).values())
    if not same:
        return 0.0
    precision, recall = same / len(prediction), same / len(reference)
    return 2 * precision * recall / (precision + recall)


def _share(prediction: str, number: str) -> float:
    numbers = _NUMBER.findall(prediction)
    return sum(one == number for one in numbers) / len(numbers) if numbers else 0.0


def _paragraph(form: str, reference: str) -> str:
    found = re.search(form, reference)
    if not found:
        raise ValueError(f"the reference {reference!r} names no paragraph: expected {form!r}")
    return found[1]
