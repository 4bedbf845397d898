"""LongBench's metrics against values of the reference, and against the packages that it calls.

The tables were computed with THUDM/LongBench `2e00731`, LongBench/metrics.py, rouge 1.0.1, fuzzywuzzy
0.18.0 without python-Levenshtein and jieba 0.42.1: `python -c "import metrics; metrics.<name>(p, r)"`.
"""

from __future__ import annotations

import importlib
import random
import string
import sys
import tarfile
import types
import warnings
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dense2sparse.data.fetch import FetchError, lock, pip_download
from dense2sparse.eval import metrics
from dense2sparse.eval.metrics_rouge import rouge_l

CACHE = Path(__file__).parents[2] / ".cache" / "dense2sparse" / "wheels"
JIEBA_SHA256 = "055ca12f62674fafed09427f176506079bc135638a14e23e25be909131928db2"
KINDS = ["Number of something", "Number", "Date", "Individual", "Other number", "Abbreviation"]
NESTED = ["ab", "b", "a", "abc"]
TABLES = {
    metrics.qa_f1: [
        ("The cat sat.", "a cat sat", 1.0),
        ("It was Dr. Smith, in 1999.", "Smith", 0.2857142857142857),
        ("no", "yes", 0.0),
        ("", "yes", 0.0),
        ("the", "a", 0.0),
        ("New York, New York", "New York City", 0.5714285714285715),
        ("state-of-the-art", "state of the art", 0.0),
    ],
    rouge_l: [
        (
            "The cat sat on the mat. It slept.",
            "A cat slept on the mat. Then it left.",
            0.5882352891349482,
        ),
        ("x y z", "x y z", 0.999999995),
        ("..", "a b", 0.0),
        ("", "a", 0.0),
        (" ", "a b", 0.0),
        ("b a", "a b", 0.4999999950000001),
        ("a b a b. c", "b a. c a", 0.999999995),
        ("no full stop here", "here stop full no", 0.24999999500000009),
        ("one. two. three", "three. two. one", 0.999999995),
        ("U.S. trade fell", "trade in the U.S. fell", 0.7999999952000001),
    ],
    metrics.code_similarity: [
        ("    return x + 1\n    y", "    return x + 1", 1.0),
        ("# comment\nreturn x", "return y", 0.88),
        ("```python\nfoo(bar)\n```", "foo(baz)", 0.88),
        ("// a\n/* b */ c", "c;", 0.18),
        ("", "x", 0.0),
        ("\n\n  self.run()", "self.run()", 0.91),
        ("# only\n`x`", "x", 0.0),
        ("", "", 1.0),
        ("int value = map.get(key);", "int value = this.map.get(name);", 0.82),
        ("abcdefgh", "abcdefg", 0.93),
    ],
    metrics.count: [
        ("12", "12", 1.0),
        ("12 or 13", "12", 0.5),
        ("about 12 of 12", "12", 1.0),
        ("none", "3", 0.0),
        ("012", "12", 0.0),
        ("1 2 3 3", "3", 0.5),
    ],
    metrics.retrieval: [
        ("Paragraph 7", "Paragraph 7", 1.0),
        ("7", "Paragraph 7", 1.0),
        ("Paragraph 17", "Paragraph 7", 0.0),
        ("Paragraphs 7 and 8", "Paragraph 7", 0.5),
        ("", "Paragraph 7", 0.0),
    ],
    metrics.retrieval_zh: [
        ("段落7", "段落7", 1.0),
        ("第7段", "段落7", 1.0),
        ("段落3,段落7", "段落7", 0.5),
        ("没有", "段落7", 0.0),
    ],
}
ROWS = [(metric, *row) for metric, rows in TABLES.items() for row in rows]
CHINESE = [
    ("我爱北京天安门。", "我爱北京", 0.8571428571428571, 0.7499999953125),
    ("《红楼梦》是小说", "红楼梦", 0.4, 0.33333333055555564),
    ("今天天气很好", "昨天天气不好", 0.0, 0.0),
    ("", "好", 0.0, 0.0),
    ("。，", "好", 0.0, 0.0),
    ("使用Python编程", "用Python编写程序", 0.3333333333333333, 0.3333333283333334),
]


@pytest.mark.parametrize(("metric", "prediction", "reference", "expected"), ROWS)
def test_metric_equals_the_references_value(metric, prediction, reference, expected):
    assert metric(prediction, reference) == expected


@pytest.mark.parametrize(
    ("prediction", "reference", "classes", "expected"),
    [
        ("Date", "Date", KINDS, 1.0),
        ("Number of something", "Number of something", KINDS, 1.0),
        ("Number", "Number of something", KINDS, 0.0),
        ("Date or Individual", "Date", KINDS, 0.5),
        ("nothing", "Date", KINDS, 0.0),
        ("date", "Date", KINDS, 0.0),
        ("abc", "abc", NESTED, 0.5),  # `b` stays: it stood behind `ab` when that was removed
        ("abc", "ab", NESTED, 1 / 3),
        ("ab", "abc", NESTED, 0.0),
        ("ab b a abc", "abc", ["a", "b", "ab", "abc"], 0.5),
    ],
)
def test_classification_keeps_the_removal_quirk(prediction, reference, classes, expected):
    before = list(classes)
    assert metrics.classification(prediction, reference, classes) == expected
    assert classes == before


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("The correct answer is (B).", "B"),
        ("**The correct answer is (C)**", "C"),
        ("I think the correct answer is (C)", None),
        ("The correct answer is D, not (A)", "D"),
        ("The correct answer is E. The correct answer is (A)", "A"),
        ("The correct answer is B; no: The correct answer is (A)", "A"),
        ("The correct answer is (*D*)", "D"),
        ("B", None),
        ("", None),
    ],
)
def test_choice_is_read_by_the_references_two_forms(answer, letter):
    assert metrics.choice(answer) == letter
    assert metrics.multiple_choice(answer, letter or "A") == float(letter is not None)


def test_best_takes_the_maximum_over_references():
    assert metrics.best(metrics.count, "3 4", ["5", "4"]) == 0.5
    assert metrics.best(metrics.count, "3", []) == 0.0


def test_first_line_stands_behind_leading_newlines():
    assert metrics.first_line("\n\nblue\nred") == "blue"
    assert metrics.first_line(" \nblue") == " "
    assert metrics.first_line("") == ""


def test_a_reference_without_its_paragraph_is_refused():
    with pytest.raises(ValueError, match="names no paragraph"):
        metrics.retrieval("7", "7")


def test_chinese_metrics_refuse_to_score_without_jieba(monkeypatch):
    monkeypatch.setattr(metrics, "chinese_is_scorable", lambda: False)
    for metric in (metrics.qa_f1_zh, metrics.rouge_zh):
        with pytest.raises(metrics.NotScorable, match="pip install jieba==0.42.1"):
            metric("好", "好")


def test_a_thousand_words_without_a_full_stop_have_a_score():
    rng = random.Random(0)
    one, other = (" ".join(str(rng.randrange(300)) for _ in range(1200)) for _ in range(2))
    assert 0 < rouge_l(one, other) < 1
    assert rouge_l(one, one) == pytest.approx(1.0, abs=1e-8)


WORDS = st.lists(st.sampled_from(["a", "b", "c", "d.", ".", "e", "\n"]), max_size=30).map(" ".join)


@pytest.fixture(scope="module")
def reference_rouge():
    """`rouge` 1.0.1 as LongBench calls it, from its wheel; of `six` it needs one name."""
    with _importable("rouge==1.0.1"):
        held = sys.modules.setdefault("six", types.SimpleNamespace(string_types=(str,)))  # type: ignore[arg-type]
        rouge = importlib.import_module("rouge").Rouge()
        if isinstance(held, types.SimpleNamespace):
            del sys.modules["six"]

        def call(prediction: str, reference: str) -> float:
            try:
                return rouge.get_scores([prediction], [reference], avg=True)["rouge-l"]["f"]
            except ValueError:
                return 0.0

        yield call


def test_rouge_equals_the_package_where_that_does_not_recurse_too_deep(reference_rouge):
    @settings(max_examples=150, deadline=None)
    @given(WORDS, WORDS)
    def compare(prediction, reference):
        assert rouge_l(prediction, reference) == reference_rouge(prediction, reference)

    compare()


def test_code_similarity_equals_fuzzywuzzy_without_levenshtein():
    rng = random.Random(0)
    lines = Path(metrics.__file__).read_text(encoding="utf-8").split("\n")
    with _importable("fuzzywuzzy==0.18.0"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if importlib.util.find_spec("Levenshtein"):
            pytest.skip("python-Levenshtein is installed: fuzzywuzzy would use it")
        fuzz = importlib.import_module("fuzzywuzzy.fuzz")
        for _ in range(200):
            one, other = rng.choice(lines), rng.choice(lines)
            if not any(mark in one for mark in ("`", "#", "//")):
                assert metrics.code_similarity(one, other) == fuzz.ratio(one, other) / 100


@pytest.mark.parametrize("prediction", ["0", "12", " ٣", "seven"])
@given(reference=st.text(string.printable, max_size=20))
@settings(max_examples=30, deadline=None)
def test_scores_lie_between_0_and_1(prediction, reference):
    for metric in (metrics.qa_f1, rouge_l, metrics.code_similarity, metrics.count):
        assert 0.0 <= metric(prediction, reference) <= 1.0


def test_chinese_metrics_equal_the_references_values():
    with _importable("jieba==0.42.1", sha256=JIEBA_SHA256):
        assert metrics.chinese_is_scorable()
        for prediction, reference, f1, rouge in CHINESE:
            assert metrics.qa_f1_zh(prediction, reference) == f1
            assert metrics.rouge_zh(prediction, reference) == rouge


class _importable:
    """Makes a package of PyPI importable for a while, not installed; skips where it cannot be had."""

    def __init__(self, requirement: str, sha256: str | None = None) -> None:
        self.name = requirement.split("==")[0]
        with lock(CACHE):
            found = list(CACHE.glob(requirement.replace("==", "-") + "[-.]*"))
            archives = [path for path in found if path.suffix in (".whl", ".gz")]
            try:
                path = archives[0] if archives else pip_download(requirement, CACHE, sha256=sha256)
            except FetchError as error:
                pytest.skip(f"{requirement} cannot be had: {error}")
            if path.suffix == ".gz":
                unpacked = path.with_name(path.name.removesuffix(".tar.gz"))
                if not unpacked.is_dir():
                    with tarfile.open(path) as archive:
                        archive.extractall(CACHE, filter="data")
                path = unpacked
        self.path = str(path)

    def __enter__(self) -> None:
        sys.path.insert(0, self.path)
        importlib.invalidate_caches()

    def __exit__(self, *error: object) -> None:
        sys.path.remove(self.path)
        for name in [one for one in sys.modules if one.split(".")[0] == self.name]:
            del sys.modules[name]
