"""Documents of packed rows: what is made of the ids once serves every operation like the ids themselves."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dense2sparse.kernels import ops, reference
from dense2sparse.kernels.documents import Documents, key_starts, pieces

LENGTH = 50
ROWS = {
    "packed": torch.tensor([[0] * 13 + [1] * 37, [4] * 20 + [5] * 1 + [9] * 29], dtype=torch.int32),
    "one whole, one packed": torch.tensor([[0] * 50, [0] * 32 + [1] * 18], dtype=torch.int32),
    "whole": torch.tensor([[0] * 50, [7] * 50], dtype=torch.int32),
    "equal": torch.tensor([[0] * 25 + [1] * 25, [3] * 25 + [2] * 25], dtype=torch.int32),
}
BUDGET = {"block_size": 16, "top_k": 2}


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    starts=st.lists(st.lists(st.booleans(), min_size=12, max_size=12), min_size=1, max_size=3),
    offset=st.integers(0, 11),
    data=st.data(),
)
def test_bounds_starts_and_pieces_are_those_of_the_ids(starts, offset, data):
    ids = torch.tensor(starts).cumsum(1, dtype=torch.int32)
    made = Documents.of(ids)
    first = reference.document_starts(ids)
    for row, bounds in enumerate(made.bounds):
        assert list(bounds) == [*sorted(set(first[row].tolist())), 12]
    assert made.whole == bool((first == 0).all())
    if made.starts is not None:
        assert torch.equal(made.starts, key_starts(ids)) and made.starts.dtype == torch.int32
    num_queries = data.draw(st.integers(1, 12 - offset))
    found = list(made.pieces(num_queries, offset))
    assert found == list(pieces(num_queries, 12, ids, offset))
    for piece in found:  # each is a document, or what of it lies before the last query
        row, keys = piece.rows.start, piece.keys
        assert (first[row, keys] == keys.start).all() and ids[row, keys].unique().numel() == 1
        assert piece.queries.start + offset - keys.start == piece.offset
    covered = [(p.rows.start, t) for p in found for t in range(p.queries.start, p.queries.stop)]
    assert covered == [(row, t) for row in range(len(ids)) for t in range(num_queries)]


def test_what_is_packed_is_made_once_for_a_range_of_queries():
    made = Documents.of(ROWS["packed"])
    packed = made.packed(30, 10)
    assert packed is made.packed(30, 10) and packed is not made.packed(50, 0)
    assert packed.query_bounds.tolist() == [0, 3, 30, 40, 41, 60]
    assert packed.key_bounds.tolist() == [0, 13, 40, 60, 61, 80]
    assert (packed.max_queries, packed.max_keys, packed.equal) == (27, 27, False)
    assert packed.query_bounds.dtype == packed.key_bounds.dtype == torch.int32
    assert Documents.of(ROWS["whole"]).packed(50, 0) is None
    equal = Documents.of(ROWS["equal"])
    assert equal.packed(50, 0).equal
    # A chunk of queries after cached keys is no batch of whole documents, even of equal lengths.
    assert not equal.packed(25, 25).equal and not equal.packed(40, 0).equal
    assert made.starts is made.starts


def test_ids_of_the_cpu_are_read_there_and_moved():
    """Where nothing is read from the device, nobody waits for it: meta tensors hold nothing to read."""
    made = Documents.of(ROWS["packed"], torch.device("meta"))
    assert made.ids.is_meta and made.bounds == ((0, 13, 50), (0, 20, 21, 50))
    assert made.packed(50, 0).query_bounds.is_meta and made.starts.is_meta


def tensors():
    generator = torch.Generator().manual_seed(0)
    shapes = ((4, 16), (2, 16), (2, 16), (2, 16), (1, 16))
    return [
        torch.randn(2, heads, LENGTH, width, generator=generator).requires_grad_()
        for heads, width in shapes
    ]


def results(backend, documents):
    """What every operation says, and its gradients."""
    q, k, v, index_q, index_k = tensors()
    where = {"backend": backend, "document_ids": documents}
    ids = ops.select_blocks(index_q, index_k, **BUDGET, **where)
    fp8 = ops.select_blocks(index_q, index_k, **BUDGET, **where, precision="fp8")
    oracle = ops.select_by_mass(q, k, **BUDGET, **where)
    dense, dense_lse = ops.dense_attention(q, k, v, **where)
    options = {"block_size": 16, **where}
    out, lse = ops.sparse_attention(q, k, v, ids, **options, validate=True)
    full = ops.index_kl(q, k, dense_lse.detach(), index_q, index_k, **where)
    sparse = ops.index_kl(q, k, lse.detach(), index_q, index_k, block_ids=ids, **options)
    (out.sum() + dense.square().sum()).backward()
    (full + 2 * sparse).backward()
    with torch.no_grad():
        step = ops.sparse_decode(q[:, :, -1:], k, v, index_q[:, :, -1:], index_k, **BUDGET, **where)
    grads = [x.grad for x in (q, k, v, index_q, index_k)]
    return [ids, fp8, oracle, dense, dense_lse, out, lse, full, sparse, step, *grads]


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
def test_every_operation_takes_documents_for_ids(backend, rows):
    """To the bit, but where the kernels are told that each row is one document: they then mask nothing."""
    ids = ROWS[rows]
    for ours, theirs in zip(
        results(backend, Documents.of(ids)), results(backend, ids), strict=True
    ):
        if rows == "whole" and ours.is_floating_point():
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        elif backend == "triton" and ours.is_floating_point():
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)  # atomics
        else:
            assert torch.equal(ours, theirs)


def test_documents_of_another_length_are_refused():
    q, k, v, *_ = tensors()
    made = Documents.of(ROWS["packed"][:, :40])
    with pytest.raises(ValueError, match=r"document_ids has shape \(2, 40\), the keys \(2, 50\)"):
        ops.dense_attention(q, k, v, document_ids=made)
