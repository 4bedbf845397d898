"""Streams and loader: nothing lost, exact resume, independence of the ranks, refusals."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from dense2sparse.data import loader as loader_module
from dense2sparse.data import stream as stream_module
from dense2sparse.data.documents import open_documents
from dense2sparse.data.loader import RowLoader, heldout_rows
from dense2sparse.data.stream import Tokenizer, TokenStream

ROW = 64


@pytest.fixture
def sources(tmp_path, source, write_prose):
    """Two sources of prose of unlike size, and made recall documents."""
    long, short = tmp_path / "long", tmp_path / "short"
    long.mkdir()
    short.mkdir()
    for number in range(3):
        (long / f"{number}.txt").write_text(write_prose(12, seed=number))
    lines = [json.dumps({"text": write_prose(1, seed=50 + n)}) for n in range(30)]
    (short / "a.jsonl").write_text("\n".join(lines))
    return [
        source(name="long", path=str(long), weight=2.0),
        source(name="short", kind="jsonl", path=str(short)),
    ]


def loader(sources, tokenizer, tmp_path, **changes):
    options = {"row_len": ROW, "micro_batch_size": 1, "seed": 3, "rank": 0, "world_size": 1}
    return RowLoader(sources, tokenizer, cache_dir=tmp_path, **(options | changes))


def rows_of(batches):
    return [row for batch in batches for row in batch.input_ids.tolist()]


def test_batches_have_the_promised_shapes_types_and_bounds(sources, tokenizer, tmp_path):
    batch = next(loader(sources, tokenizer, tmp_path, micro_batch_size=5))
    assert batch.input_ids.shape == (5, ROW) and batch.input_ids.dtype == torch.int64
    assert batch.position_ids.dtype == batch.targets.dtype == torch.int64
    assert batch.document_ids.dtype == torch.int32
    same = batch.document_ids[:, 1:] == batch.document_ids[:, :-1]
    expected = torch.where(same, batch.input_ids[:, 1:], -100)
    assert torch.equal(batch.targets[:, :-1], expected)
    assert torch.equal(batch.position_ids[:, 1:] == 0, ~same)


def test_an_epoch_of_a_stream_hands_out_every_token_once(sources, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(stream_module, "PART_CHARS", 300)
    documents = open_documents(sources[0], tmp_path)
    wrapped = Tokenizer(tokenizer)
    texts = [text for _, text in documents.read(0, None)]
    made = TokenStream(documents, wrapped, seed=1)
    for _ in range(2):  # two epochs, in another order each
        total = sum(len(part) for text in texts for part in wrapped.document(text))
        pieces, count = [], 0
        while count < total:
            pieces.append(made.take(37))
            count += len(pieces[-1])
        assert count == total, "an epoch ended within a piece"
        got = np.sort(np.concatenate(pieces))
        every = np.concatenate([part for text in texts for part in wrapped.document(text)])
        assert np.array_equal(got, np.sort(every))
        assert sum(int(piece[-1]) == tokenizer.eos_token_id for piece in pieces) == len(texts)


def test_a_long_text_tokenised_in_parts_is_the_same_text(tokenizer, write_prose, monkeypatch):
    monkeypatch.setattr(stream_module, "PART_CHARS", 100)
    wrapped, text = Tokenizer(tokenizer), write_prose(20)
    parts = list(wrapped.document(text))
    assert len(parts) > 10
    ids = np.concatenate(parts).tolist()
    assert ids[-1] == tokenizer.eos_token_id and ids.count(tokenizer.eos_token_id) == 1
    assert tokenizer.decode(ids[:-1]) == text


def test_bos_is_put_only_where_the_tokenizer_does_so(tokenizer):
    class WithBos:
        bos_token_id, eos_token_id, chat_template = 1, 0, None

        def __call__(self, text, add_special_tokens=True, verbose=True):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            return {"input_ids": [1, *ids] if add_special_tokens else ids}

    def ids(which, text):
        return np.concatenate(list(Tokenizer(which).document(text))).tolist()

    plain = tokenizer("a letter", add_special_tokens=False)["input_ids"]
    assert ids(tokenizer, "a letter") == [*plain, 0]
    assert ids(WithBos(), "a letter") == [1, *plain, 0]
    assert ids(WithBos(), "<|bos|>a letter<|eos|>") == [1, *plain, 0]


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_together_see_the_order_of_one_rank(sources, tokenizer, tmp_path, world_size):
    alone = loader(sources, tokenizer, tmp_path)
    expected = rows_of(next(alone) for _ in range(12 * world_size))
    ranks = [
        loader(sources, tokenizer, tmp_path, rank=r, world_size=world_size, micro_batch_size=2)
        for r in range(world_size)
    ]
    seen = []
    for _ in range(6):
        batches = [next(rank) for rank in ranks]
        seen += [b.input_ids[i].tolist() for i in range(2) for b in batches]
    assert seen == expected
    states = [json.dumps(rank.state_dict()) for rank in ranks]
    assert len(set(states)) == 1


def test_resume_is_exact_to_the_token_at_every_batch_and_over_epochs(sources, tokenizer, tmp_path):
    straight = loader(sources, tokenizer, tmp_path)
    states, rows = [], []
    for _ in range(90):
        states.append(json.dumps(straight.state_dict()))
        rows += rows_of([next(straight)])
    epochs = json.loads(states[-1])["mixture"]["streams"]
    assert epochs["long"]["epoch"] >= 1 and epochs["short"]["epoch"] >= 1
    for at in range(0, 90, 7):
        resumed = loader(sources, tokenizer, tmp_path)
        resumed.load_state_dict(json.loads(states[at]))
        assert json.dumps(resumed.state_dict()) == states[at]
        assert rows_of(next(resumed) for _ in range(min(5, 90 - at))) == rows[at : at + 5]


def test_a_running_loader_goes_back_to_a_state_and_closes(sources, tokenizer, tmp_path):
    made = loader(sources, tokenizer, tmp_path)
    next(made)
    state, drawn = made.state_dict(), made.tokens_drawn
    assert sum(drawn.values()) == ROW, "the batch made ahead was counted"
    rows = rows_of(next(made) for _ in range(4))
    made.load_state_dict(state)
    assert made.state_dict() == state and made.tokens_drawn == drawn
    assert rows_of(next(made) for _ in range(4)) == rows
    made.close()
    with pytest.raises(RuntimeError):
        next(made)


def test_another_seed_is_another_order_and_the_same_seed_the_same(sources, tokenizer, tmp_path):
    first, again, other = (
        rows_of(next(made) for _ in range(8))
        for made in (loader(sources, tokenizer, tmp_path, seed=s) for s in (3, 3, 4))
    )
    made = loader(sources, tokenizer, tmp_path)
    assert first == again != other
    assert next(iter(made)).input_ids.tolist() == first[:1]
    made.close()


def test_the_weights_are_shares_of_tokens(sources, tokenizer, tmp_path):
    made = loader(sources, tokenizer, tmp_path)
    for _ in range(60):
        next(made)
    drawn = made.tokens_drawn
    assert sum(drawn.values()) == 60 * ROW
    assert abs(drawn["long"] / sum(drawn.values()) - 2 / 3) < 0.03


def test_recall_documents_begin_rows_and_resume(sources, source, tokenizer, tmp_path):
    mixed = [*sources, source(name="made", kind="recall", weight=3.0)]
    made = loader(mixed, tokenizer, tmp_path, row_len=512)
    for _ in range(6):
        next(made)
    state, rows = made.state_dict(), rows_of(next(made) for _ in range(6))
    again = loader(mixed, tokenizer, tmp_path, row_len=512)
    again.load_state_dict(state)
    assert rows_of(next(again) for _ in range(6)) == rows
    drawn = made.tokens_drawn
    assert abs(drawn["made"] / sum(drawn.values()) - 0.5) < 0.1


def test_held_out_rows_are_whole_documents_and_always_the_same(sources, tokenizer, tmp_path):
    rows = heldout_rows(sources[:1], tokenizer, row_len=ROW, count=7, cache_dir=tmp_path)
    again = heldout_rows(sources[:1], tokenizer, row_len=ROW, count=7, cache_dir=tmp_path)
    assert [b.input_ids.tolist() for b in rows] == [b.input_ids.tolist() for b in again]
    assert len(rows) == 7 and all(b.input_ids.shape == (1, ROW) for b in rows)
    assert all(int(b.document_ids.max()) == 0 for b in rows)
    assert len({str(b.input_ids.tolist()) for b in rows}) == 7


def test_held_out_rows_of_short_documents_are_packed(sources, tokenizer, tmp_path):
    rows = heldout_rows(sources[1:], tokenizer, row_len=256, count=4, cache_dir=tmp_path)
    assert all(int(b.document_ids.max()) > 0 for b in rows)
    with pytest.raises(ValueError, match=r"data\.heldout holds \d+ tokens, and 400 rows of 256"):
        heldout_rows(sources[1:], tokenizer, row_len=256, count=400, cache_dir=tmp_path)


def test_search_for_long_held_out_documents_ends(
    source, tokenizer, write_prose, tmp_path, monkeypatch
):
    class Endless:
        name, num_open, num_read = "endless", 1, 0

        def read(self, seed, epoch, start=(0, 0)):
            for number in range(1_000_000):
                self.num_read += 1
                yield (0, number), "harbour winter letter"

    endless = Endless()
    (tmp_path / "long.txt").write_text(write_prose(12))
    long = source(name="long", path=str(tmp_path / "long.txt"))
    monkeypatch.setattr(
        loader_module,
        "open_documents",
        lambda given, cache: endless if given.name == "endless" else open_documents(given, cache),
    )
    options = {"row_len": ROW, "count": 1, "cache_dir": tmp_path}
    (packed,) = heldout_rows([source(name="endless")], tokenizer, **options)
    assert int(packed.document_ids.max()) > 0 and endless.num_read < 3000
    # A long document of the next source is found all the same.
    (whole,) = heldout_rows([source(name="endless"), long], tokenizer, **options)
    assert int(whole.document_ids.max()) == 0


def test_held_out_recall_has_its_share_of_rows(sources, source, tokenizer, tmp_path):
    mixed = [*sources[:1], source(name="made", kind="recall", weight=2.0)]
    rows = heldout_rows(mixed, tokenizer, row_len=512, count=4, cache_dir=tmp_path)
    made = [b for b in rows if any(d in tokenizer.decode(b.input_ids[0]) for d in "0123456789?")]
    assert len(rows) == 4 and len(made) == 2


def test_an_empty_corpus_is_refused(source, tokenizer, tmp_path):
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(ValueError, match="source 'prose' holds no text: the corpus is empty"):
        loader([source(path=str(tmp_path / "empty.txt"))], tokenizer, tmp_path)


def test_an_empty_source_beside_a_full_one_is_refused(sources, source, tokenizer, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    extra = source(name="void", path=str(tmp_path / "empty.txt"))
    with pytest.raises(ValueError, match="source 'void' holds no text"):
        loader([*sources, extra], tokenizer, tmp_path)
    with pytest.raises(ValueError, match="source 'void' holds no text"):
        heldout_rows([*sources, extra], tokenizer, row_len=ROW, count=1, cache_dir=tmp_path)


def test_a_corpus_smaller_than_one_batch_is_refused_with_both_counts(sources, tokenizer, tmp_path):
    with pytest.raises(ValueError) as refusal:
        loader(sources, tokenizer, tmp_path, micro_batch_size=40, world_size=4)
    message = str(refusal.value)
    assert "smaller than one batch" in message and f"160 rows of {ROW} tokens need 10240" in message
    held = int(message.split("hold ")[1].split()[0])
    wrapped = Tokenizer(tokenizer)
    texts = [t for s in sources for _, t in open_documents(s, tmp_path).read(0, None)]
    assert held == sum(len(part) for text in texts for part in wrapped.document(text))


def test_rows_too_short_and_recall_alone_are_refused(sources, source, tokenizer, tmp_path):
    recall = source(name="made", kind="recall")
    with pytest.raises(ValueError, match="row_len=1 leaves no token to predict"):
        loader(sources, tokenizer, tmp_path, row_len=1)
    with pytest.raises(ValueError, match="row_len=128 is too short for source 'made'"):
        loader([*sources, recall], tokenizer, tmp_path, row_len=128)
    with pytest.raises(ValueError, match="kind=recall takes its filler from the other sources"):
        loader([recall], tokenizer, tmp_path, row_len=512)


def test_a_position_whose_document_is_gone_is_refused(source, tokenizer, tmp_path, write_prose):
    (tmp_path / "a.txt").write_text(write_prose(20))
    made = loader([source(path=str(tmp_path / "a.txt"))], tokenizer, tmp_path)
    next(made)
    state = made.state_dict()
    changed = loader([source(path=str(tmp_path / "a.txt"))], tokenizer, tmp_path)
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(ValueError, match="source 'prose' changed since the checkpoint.* is gone"):
        changed.load_state_dict(state)


@pytest.mark.parametrize("change", [lambda text: text[:-1] + "!", lambda text: text[:900]])
def test_a_position_in_a_document_with_another_text_is_refused(
    source, tokenizer, tmp_path, write_prose, change
):
    file = tmp_path / "a.txt"
    file.write_text(write_prose(20))
    made = loader([source(path=str(file))], tokenizer, tmp_path)
    next(made)
    state = json.loads(json.dumps(made.state_dict()))
    loader([source(path=str(file))], tokenizer, tmp_path).load_state_dict(state)
    file.write_text(change(file.read_text()))
    with pytest.raises(ValueError, match="changed since .* document 0 of unit 0 has another text"):
        loader([source(path=str(file))], tokenizer, tmp_path).load_state_dict(state)


def test_a_position_behind_a_documents_end_is_refused(source, tokenizer, tmp_path, write_prose):
    (tmp_path / "a.txt").write_text(write_prose(20))
    made = loader([source(path=str(tmp_path / "a.txt"))], tokenizer, tmp_path)
    next(made)
    state = json.loads(json.dumps(made.state_dict()))
    state["mixture"]["streams"]["prose"]["open"][0][3] = 10_000_000  # as of another tokenizer
    with pytest.raises(ValueError, match="has no token left after 10000000"):
        made.load_state_dict(state)
