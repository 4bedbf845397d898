"""Stored prompts: made once, in pieces and by processes, resumed after a kill, checked on use."""

from __future__ import annotations

import errno
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from dense2sparse.eval import prepare as prepare_module
from dense2sparse.eval import prepare_pieces, records
from dense2sparse.eval.prepare import load, prepare
from dense2sparse.eval.prepare_pieces import pieces_of

TASKS = ["niah_single_1", "niah_multikey_1", "qa_1"]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory, ruler_corpus, tokenizer):
    return make(tmp_path_factory.mktemp("prompts"), ruler_corpus, tokenizer)


def make(folder, corpus, tokenizer, **changes):
    given = {"tasks": TASKS, "lengths": [512], "samples": 3, "seed": 1, **changes}
    return prepare(folder, tokenizer=tokenizer, corpus=corpus, **given)


def contents(folder):
    return {
        path.relative_to(folder): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def cell(prompts, name):
    manifest = json.loads((prompts.folder / "manifest.json").read_text(encoding="utf-8"))
    return prompts.folder.parent / manifest["cells"] / "512" / name


def test_preparing_again_changes_no_byte_and_makes_nothing(
    prompts, ruler_corpus, tokenizer, monkeypatch
):
    before = contents(prompts.folder.parent)
    monkeypatch.setattr(prepare_pieces, "Generator", None)
    assert make(prompts.folder.parent, ruler_corpus, tokenizer) == prompts
    assert contents(prompts.folder.parent) == before


def test_samples_are_stored_with_prompt_references_and_spans(prompts):
    lines = cell(prompts, "niah_multikey_1.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["id"] for record in records] == [
        f"niah_multikey_1/512/0000{n}" for n in (0, 1, 2)
    ]
    assert all(len(record["spans"]) == 1 and len(record["decoys"]) == 3 for record in records)


def test_few_samples_are_part_of_many_and_share_their_digest(
    tmp_path, prompts, ruler_corpus, tokenizer
):
    many = make(tmp_path, ruler_corpus, tokenizer, samples=5)
    few = make(tmp_path, ruler_corpus, tokenizer, samples=2)
    also = make(tmp_path, ruler_corpus, tokenizer, tasks=TASKS[:1], samples=4, lengths=[512, 600])
    assert many.digest == few.digest == also.digest == prompts.digest
    assert len({many.folder, few.folder, also.folder}) == 3
    by_id = {sample.id: sample for sample in many.samples}
    for made in (prompts, few):
        assert all(by_id[sample.id] == sample for sample in made.samples)
    assert len(also.samples) == 8
    assert load(many.folder, tokenizer) == many


def test_more_samples_keep_the_ones_that_were_there(tmp_path, prompts, ruler_corpus, tokenizer):
    few = make(tmp_path, ruler_corpus, tokenizer, samples=2)
    assert make(tmp_path, ruler_corpus, tokenizer, samples=3).samples == prompts.samples
    assert load(few.folder, tokenizer).samples == few.samples


@pytest.mark.parametrize(
    "change",
    [{"seed": 2}, {"mode": "base", "reasoning_tokens": 9}, {"parity": "native", "seed": 3}],
)
def test_what_decides_a_prompt_decides_the_digest(
    tmp_path, prompts, ruler_corpus, tokenizer, change
):
    few = {"tasks": TASKS[:1], "samples": 1, **change}
    assert make(tmp_path, ruler_corpus, tokenizer, **few).digest != prompts.digest


def test_other_text_and_other_mode_make_other_prompts(
    tmp_path, prompts, ruler_corpus, tokenizer, chat_tokenizer
):
    few = {"tasks": TASKS[:1], "samples": 1}
    text = {"made-up": ruler_corpus.works["made-up"] + " More."}
    other = make(tmp_path, replace(ruler_corpus, works=text), tokenizer, **few)
    chat = make(tmp_path, ruler_corpus, chat_tokenizer, **few)
    plain = make(tmp_path, ruler_corpus, chat_tokenizer, mode="base", **few)
    assert len({one.digest for one in (prompts, other, chat, plain)}) == 4
    assert (chat.samples[0].mode, plain.samples[0].mode) == ("chat", "base")


def test_scores_on_public_domain_text_carry_its_label(tmp_path, ruler_corpus, tokenizer):
    plain = replace(ruler_corpus, name="ruler-pd", questions={})
    made = make(tmp_path, plain, tokenizer, tasks=["vt"], lengths=[1024], samples=1)
    assert made.label == "ruler-pd, not comparable with published scores"
    assert "NVIDIA's data" in make(tmp_path, ruler_corpus, tokenizer, samples=1).label


def test_changed_code_makes_other_prompts(tmp_path, monkeypatch, prompts, ruler_corpus, tokenizer):
    sources = tmp_path / "sources"
    shutil.copytree(Path(prepare_module.__file__).parent, sources)
    same = prepare_module.code_digest(sources)
    manifest = json.loads((prompts.folder / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["code"] == same
    for name in ("ruler.py", "ruler_tasks.py", "ruler_sizing.py"):
        before = prepare_module.code_digest(sources)
        with open(sources / name, "a", encoding="utf-8") as file:
            file.write("CHANGED = True\n")
        assert prepare_module.code_digest(sources) != before
    before = prepare_module.code_digest(sources)
    with open(sources / "ruler_score.py", "a", encoding="utf-8") as file:
        file.write("CHANGED = True\n")  # scores are made anew at any time
    assert prepare_module.code_digest(sources) == before != same
    monkeypatch.setattr(prepare_module, "code_digest", lambda folder: "other")
    few = {"tasks": TASKS[:1], "samples": 1}
    other = make(tmp_path, ruler_corpus, tokenizer, **few)
    assert other.digest != prompts.digest and other.samples == prompts.samples[3:4]


def test_processes_make_the_same_prompts(tmp_path, monkeypatch, ruler_corpus, tokenizer):
    monkeypatch.setattr(prepare_pieces, "_PIECE_TOKENS", 1)
    monkeypatch.setattr(prepare_pieces, "_PIECE_SAMPLES", 2)
    wanted = {"lengths": [512, 1024], "samples": 5, "tasks": ["vt", "fwe", "qa_2"]}
    alone = make(tmp_path / "alone", ruler_corpus, tokenizer, workers=1, **wanted)
    together = make(tmp_path / "together", ruler_corpus, tokenizer, workers=2, **wanted)
    assert together.samples == alone.samples and together.skipped == alone.skipped
    assert contents(tmp_path / "alone") == contents(tmp_path / "together")


def test_preparation_that_was_killed_goes_on_with_the_pieces_that_were_not_there(
    tmp_path, monkeypatch, prompts, ruler_corpus, tokenizer
):
    monkeypatch.setattr(prepare_pieces, "_PIECE_TOKENS", 1)
    monkeypatch.setattr(prepare_pieces, "_PIECE_SAMPLES", 1)
    made = []
    real = prepare_pieces.make_one

    def watched(cells, piece, generator):
        if len(made) == 4:
            raise KeyboardInterrupt
        made.append(piece)
        real(cells, piece, generator)

    monkeypatch.setattr(prepare_pieces, "make_one", watched)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, ruler_corpus, tokenizer)
    assert not list(tmp_path.glob("prompts-*"))
    again = []
    monkeypatch.setattr(
        prepare_pieces,
        "make_one",
        lambda cells, piece, generator: (again.append(piece), real(cells, piece, generator)),
    )
    assert make(tmp_path, ruler_corpus, tokenizer).samples == prompts.samples
    assert not set(made) & set(again) and len(made) + len(again) == 9
    assert contents(tmp_path) == contents(prompts.folder.parent)


@pytest.mark.parametrize("workers", [1, 2])
def test_full_disk_is_one_sentence_and_the_next_run_goes_on(
    tmp_path, monkeypatch, prompts, ruler_corpus, tokenizer, workers
):
    """With two processes the first one runs out of room, where it puts a cell together."""
    module, name = (
        (prepare_pieces, "write_json") if workers == 1 else (prepare_module, "write_text")
    )
    written = []

    def full(path, content):
        if written:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(path)
        getattr(records, name)(path, content)

    with monkeypatch.context() as patched:
        patched.setattr(module, name, full)
        with pytest.raises(ValueError, match="no room for the prompts in .* goes on") as refused:
            make(tmp_path, ruler_corpus, tokenizer, workers=workers)
    assert "up to 4,608 tokens" in str(refused.value) and "\n" not in str(refused.value)
    assert written and not list(tmp_path.glob("prompts-*"))
    assert make(tmp_path, ruler_corpus, tokenizer).samples == prompts.samples
    assert contents(tmp_path) == contents(prompts.folder.parent)


def test_task_that_does_not_fit_is_kept_with_its_reason(tmp_path, ruler_corpus, tokenizer):
    made = make(tmp_path, ruler_corpus, tokenizer, tasks=["cwe", "niah_single_1"])
    assert [(skip["task"], skip["length"]) for skip in made.skipped] == [("cwe", 512)]
    assert "smallest form" in made.skipped[0]["reason"]
    assert {sample.task for sample in made.samples} == {"niah_single_1"}


def test_corpus_without_questions_skips_them_and_another_corpus_does_not(
    tmp_path, ruler_corpus, tokenizer
):
    plain = replace(ruler_corpus, name="ruler-pd", questions={})
    made = make(tmp_path, plain, tokenizer)
    assert [skip["task"] for skip in made.skipped] == ["qa_1"]
    assert "set `corpus: nvidia`" in made.skipped[0]["reason"]
    assert make(tmp_path, ruler_corpus, tokenizer).skipped == []


@pytest.mark.parametrize("damage", ["changed", "cut", "gone"])
def test_damaged_prompt_file_is_refused(tmp_path, ruler_corpus, tokenizer, damage):
    made = make(tmp_path, ruler_corpus, tokenizer)
    path = cell(made, "niah_single_1.jsonl")
    content = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(
            content[:-9] if damage == "cut" else content.replace(b"secret", b"sacred", 1)
        )
    with pytest.raises(ValueError, match="niah_single_1.jsonl is not the file that was prepared"):
        load(made.folder, tokenizer)
    with pytest.raises(ValueError, match="niah_single_1.jsonl is not the file that was prepared"):
        make(tmp_path, ruler_corpus, tokenizer)


def test_cell_without_its_record_is_refused_by_load_and_made_again_by_prepare(
    tmp_path, prompts, ruler_corpus, tokenizer
):
    made = make(tmp_path, ruler_corpus, tokenizer)
    cell(made, "qa_1.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match=r"qa_1.json is missing or damaged"):
        load(made.folder, tokenizer)
    assert make(tmp_path, ruler_corpus, tokenizer).samples == prompts.samples


def test_prompts_of_another_tokenizer_are_refused(prompts, chat_tokenizer):
    with pytest.raises(ValueError, match="made for another tokenizer"):
        load(prompts.folder, chat_tokenizer)


def test_folder_without_prompts_is_refused(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="holds no prepared prompts"):
        load(tmp_path, tokenizer)


def test_pieces_cover_a_cell_once():
    for samples, length in ((1, 512), (50, 512), (500, 131072), (17, 1 << 20)):
        pieces = pieces_of("vt", length, 1, samples, whole=False)
        assert [piece.first for piece in pieces] == [0, *(piece.last for piece in pieces[:-1])]
        assert pieces[-1].last == samples
        assert pieces_of("vt", length, 1, samples, whole=True)[0].last == samples


def test_progress_says_how_far_and_how_long(tmp_path, ruler_corpus, tokenizer):
    said = []
    make(tmp_path, ruler_corpus, tokenizer, progress=said.append)
    assert said[0] == "prompts: 9 to make, 4,608 tokens at most"
    assert said[-1] == f"prompts: [{'#' * 20}] 9/9, 0 s left"
