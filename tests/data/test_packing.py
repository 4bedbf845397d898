"""Packing and mixture as properties: no token lost or doubled, bounds right, shares kept."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dense2sparse.data.mixture import Mixture
from dense2sparse.data.packing import IGNORED, pack_row, positions, targets


class Numbered:
    """Documents of given lengths, over and over; every token is its own number in the stream."""

    def __init__(self, name, lengths, splits=True):
        self.name, self.splits = name, splits
        self._lengths, self._document, self._rest, self._next = lengths, 0, lengths[0], 0

    def take(self, room):
        count = min(room, self._rest)
        assert self.splits or count == self._rest, "a whole document was cut"
        tokens = np.arange(self._next, self._next + count, dtype=np.int32)
        self._next += count
        self._rest -= count
        if not self._rest:
            self._document = (self._document + 1) % len(self._lengths)
            self._rest = self._lengths[self._document]
        return tokens

    def state_dict(self):
        return {"at": [self._document, self._rest, self._next]}

    def load_state_dict(self, state):
        self._document, self._rest, self._next = state["at"]


LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=8)


@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS, row_len=st.integers(1, 33), rows=st.integers(1, 6))
def test_rows_hold_the_stream_token_by_token(lengths, row_len, rows):
    stream = Numbered("a", lengths)
    packed = [pack_row(stream.take, row_len) for _ in range(rows)]
    assert np.array_equal(np.concatenate([row.tokens for row in packed]), np.arange(rows * row_len))
    ends = set(np.cumsum(lengths * (rows * row_len // sum(lengths) + 1)))
    for number, row in enumerate(packed):
        for i in range(1, row_len):
            is_bound = number * row_len + i in ends
            assert (row.document_ids[i] != row.document_ids[i - 1]) == is_bound


@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS, row_len=st.integers(1, 33))
def test_positions_restart_and_targets_never_cross_a_document(lengths, row_len):
    row = pack_row(Numbered("a", lengths).take, row_len)
    place, following = positions(row.document_ids), targets(row.tokens, row.document_ids)
    assert row.document_ids[0] == 0 and place[0] == 0 and following[-1] == IGNORED
    for i in range(row_len - 1):
        if row.document_ids[i] == row.document_ids[i + 1]:
            assert following[i] == row.tokens[i + 1] and place[i + 1] == place[i] + 1
        else:
            assert following[i] == IGNORED and place[i + 1] == 0


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(LENGTHS, min_size=2, max_size=3),
    weights=st.lists(st.floats(0.1, 10), min_size=3, max_size=3),
    row_len=st.integers(4, 48),
)
def test_shares_of_the_tokens_follow_the_weights_at_every_row(lengths, weights, row_len):
    streams = [Numbered(str(n), group) for n, group in enumerate(lengths)]
    weights = weights[: len(streams)]
    mixture = Mixture(streams, weights, row_len)
    for rows in range(1, 30):
        pack_row(mixture.draw, row_len)
        for share, drawn in zip(weights, mixture.tokens_drawn.values(), strict=True):
            assert abs(drawn - rows * row_len * share / sum(weights)) <= len(streams) * row_len


@settings(max_examples=40, deadline=None)
@given(
    whole=st.lists(st.integers(1, 24), min_size=1, max_size=5),
    cut=LENGTHS,
    stop=st.integers(0, 12),
)
def test_whole_documents_start_rows_and_a_state_repeats_what_follows(whole, cut, stop):
    def fresh():
        return Mixture([Numbered("whole", whole, splits=False), Numbered("cut", cut)], [1, 2], 24)

    straight = fresh()
    rows = [pack_row(straight.draw, 24) for _ in range(16)]
    first = fresh()
    for _ in range(stop):
        pack_row(first.draw, 24)
    resumed = fresh()
    resumed.load_state_dict(first.state_dict())
    for row in rows[stop:]:
        again = pack_row(resumed.draw, 24)
        assert np.array_equal(row.tokens, again.tokens)
        assert np.array_equal(row.document_ids, again.document_ids)


def test_a_mixture_without_prose_and_a_state_of_other_sources_are_refused():
    with pytest.raises(ValueError, match="no source of prose"):
        Mixture([Numbered("made", [4], splits=False)], [1.0], 8)
    state = Mixture([Numbered("a", [4])], [1.0], 8).state_dict()
    with pytest.raises(ValueError, match=r"of the sources \['a'\], the recipe names \['b'\]"):
        Mixture([Numbered("b", [4])], [1.0], 8).load_state_dict(state)
