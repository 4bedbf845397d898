"""Documents: every kind, order, restart, refusals."""

from __future__ import annotations

import json

import pyarrow
import pyarrow.parquet
import pytest

from dense2sparse.data import documents
from dense2sparse.data.documents import open_documents

TEXTS = [f"document number {n} " + "word " * (n % 7) for n in range(60)]


@pytest.fixture(params=["text", "jsonl", "parquet", "hub"])
def stored(request, tmp_path, source, monkeypatch):
    """60 documents as a source of each kind; JSONL slices are tiny, so that their bounds matter."""
    monkeypatch.setattr(documents, "SLICE_BYTES", 50)
    if request.param == "text":
        for number, text in enumerate(TEXTS):
            (tmp_path / f"{number:03}.txt").write_text(text)
    elif request.param == "jsonl":
        lines = [json.dumps({"id": n, "text": text}) for n, text in enumerate(TEXTS)]
        (tmp_path / "a.jsonl").write_text("\n".join(lines[:31]) + "\n\n")
        (tmp_path / "b.jsonl").write_text("\r\n".join(lines[31:]))
    elif request.param == "parquet":
        table = pyarrow.table({"text": TEXTS, "id": list(range(60))})
        pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=7)
    else:
        lines = [json.dumps({"text": text}) for text in TEXTS]
        (tmp_path / "train.jsonl").write_text("\n".join(lines))
        return open_documents(source(kind="hub", hub=str(tmp_path)), tmp_path)
    return open_documents(source(kind=request.param, path=str(tmp_path)), tmp_path)


def test_an_epoch_holds_every_document_once_and_the_next_has_another_order(stored):
    first = [text for _, text in stored.read(5, 0)]
    second = [text for _, text in stored.read(5, 1)]
    assert sorted(first) == sorted(second) == sorted(TEXTS)
    assert first != second
    assert first == [text for _, text in stored.read(5, 0)]
    assert [text for _, text in stored.read(0, None)] == TEXTS


def test_reading_starts_again_at_any_position(stored):
    whole = list(stored.read(7, 2))
    for at in (0, 1, 17, 59):
        assert list(stored.read(7, 2, whole[at][0])) == whole[at:]


def test_a_long_text_file_is_cut_at_line_ends_without_loss(tmp_path, source, monkeypatch):
    monkeypatch.setattr(documents, "LARGEST_TEXT_BYTES", 100)
    lines = "".join(f"line {n} of a file with an \u00e9\n" for n in range(200))
    (tmp_path / "a.txt").write_text(lines)
    read = [t for _, t in open_documents(source(path=str(tmp_path)), tmp_path).read(0, None)]
    assert len(read) > 20
    assert "".join(read) == lines


def test_globs_and_lists_name_files(tmp_path, source):
    for name in ("x1", "x2", "y"):
        (tmp_path / f"{name}.txt").write_text(name)
    opened = open_documents(
        source(path=[str(tmp_path / "x*.txt"), str(tmp_path / "y.txt")]), tmp_path
    )
    assert [text for _, text in opened.read(0, None)] == ["x1", "x2", "y"]


@pytest.mark.parametrize(
    ("kind", "name", "content", "fields", "message"),
    [
        ("text", "a.txt", b"caf\xe9", {}, r"a\.txt is not UTF-8 \(byte 3\): convert it"),
        (
            "jsonl",
            "a.jsonl",
            b'{"txt": "x"}',
            {"field": "text"},
            r"no field 'text'; did you mean 'txt'",
        ),
        ("jsonl", "a.jsonl", b'{"a": "x"}', {"field": "text"}, r"no field 'text'; it has 'a'"),
        ("jsonl", "a.jsonl", b'{"text": 3}', {}, r"field='text' holds int, not text"),
        ("jsonl", "a.jsonl", b'["text"]', {}, r"a record is list, not an object"),
        ("jsonl", "a.jsonl", b"{text}", {}, r"a\.jsonl is not JSONL: the line '\{text\}'"),
        ("parquet", "a.parquet", b"nothing", {}, r"a\.parquet is no parquet file"),
    ],
)
def test_bad_files_are_refused_by_name(tmp_path, source, kind, name, content, fields, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        opened = open_documents(source(kind=kind, path=str(tmp_path / name), **fields), tmp_path)
        list(opened.read(0, 0))


def test_a_parquet_column_is_checked_before_any_row_is_read(tmp_path, source):
    pyarrow.parquet.write_table(pyarrow.table({"content": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="no field 'text'"):
        open_documents(source(kind="parquet", path=str(tmp_path / "a.parquet")), tmp_path)


def test_a_missing_path_and_an_empty_folder_are_refused(tmp_path, source):
    with pytest.raises(ValueError, match="source 'prose': path='.*gone' is no file, folder"):
        open_documents(source(path=str(tmp_path / "gone")), tmp_path)
    with pytest.raises(ValueError, match=r"the folder '.*' holds no \.jsonl file"):
        open_documents(source(kind="jsonl", path=str(tmp_path)), tmp_path)


def test_a_hub_id_that_cannot_be_opened_is_refused(tmp_path, source, monkeypatch):
    import datasets

    def unreachable(*args, **kwargs):
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    opened = open_documents(source(kind="hub", hub="some/data"), tmp_path)
    with pytest.raises(ValueError, match=r"hub='some/data'.*no route to the hub.*check the id"):
        next(opened.read(0, 0))
