"""ROUGE-L over whole summaries, equal to the package `rouge` 1.0.1, without recursion.

LongBench is scored with `rouge` (not `rouge_score`): the F of its summary-level ROUGE-L with sets of words.
Sentences end at every full stop. For each reference sentence and each predicted one a longest common
subsequence is read back; the words of all of these, as one set U, give

    recall = |U| / |words of the reference|, precision = |U| / |words of the prediction|,
    F = 2 P R / (P + R + 1e-8),

words counted once. Which subsequence is read back matters, as only U is counted; ties go as the package's.
The package recurses while it reads back and gives up (LongBench: 0) near 1,000 words in a pair of
sentences; this form goes on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

_TINY = 1e-8


def rouge_l(prediction: str, reference: str) -> float:
    """F of ROUGE-L, 0 to 1; 0.0 where either text has no sentence, as the reference's caught error."""
    predicted, wanted = _sentences(prediction), _sentences(reference)
    if not predicted or not wanted:
        return 0.0
    union: set[str] = set()
    for one in wanted:
        for other in predicted:
            union.update(_common(one, other))
    precision = len(union) / len(set().union(*predicted))
    recall = len(union) / len(set().union(*wanted))
    return 2.0 * (precision * recall) / (precision + recall + _TINY)


def _sentences(text: str) -> list[list[str]]:
    """Words by sentence; a sentence of nothing but spaces is one empty word, as in the package."""
    return [" ".join(part.split()).split(" ") for part in text.split(".") if part]


def _common(one: Sequence[str], other: Sequence[str]) -> Iterator[str]:
    """The words of one longest common subsequence, last first; among equals the package's."""
    if set(one).isdisjoint(other):
        return
    rows = [[0] * (len(other) + 1)]
    for word in one:
        above, row = rows[-1], [0]
        for column, against in enumerate(other):
            # One comparison instead of max(): this line runs once for every pair of words.
            left, up = row[column], above[column + 1]
            row.append(above[column] + 1 if word == against else (up if up > left else left))
        rows.append(row)
    i, j = len(one), len(other)
    while i and j:
        if one[i - 1] == other[j - 1]:
            yield one[i - 1]
            i, j = i - 1, j - 1
        elif rows[i - 1][j] > rows[i][j - 1]:
            i -= 1
        else:
            j -= 1
