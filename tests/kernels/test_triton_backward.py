"""Gradients of sparse attention in Triton, under its interpreter, against float64 and autograd."""

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from dense2sparse.kernels import (
    reference,
    triton_attend,
    triton_attend_backward,
    triton_attend_dkv,
    triton_lists,
)
from dense2sparse.kernels.documents import key_starts
from dense2sparse.kernels.triton_attend_backward import BackwardLaunch
from dense2sparse.kernels.triton_support import Launch

SMALL = BackwardLaunch(by_key=Launch(16, 16, 4, 1), by_query=Launch(16, 16, 4, 1))
"""Several steps of everything even in short rows."""
pytestmark = pytest.mark.usefixtures("poison")


def random_case(
    batch, groups, repeats, length, width, block_size, top_k, cut=0.0, offset=0, seed=0
):
    generator = torch.Generator().manual_seed(seed)

    def normal(heads, width):
        # transformers hands over transposed views: tokens outside, heads inside.
        return torch.randn(batch, length, heads, width, generator=generator).transpose(1, 2)

    documents = None
    if cut:
        documents = (torch.rand(batch, length, generator=generator) < cut).cumsum(1).int()
    ids = reference.select_blocks(
        normal(groups, 16),
        normal(1, 16),
        block_size=block_size,
        top_k=top_k,
        document_ids=documents,
    )
    q, grad = (normal(groups * repeats, width)[:, :, offset:] for _ in range(2))
    return dict(
        q=q,
        k=normal(groups, width),
        v=normal(groups, width),
        grad_out=grad,
        block_ids=ids[:, :, offset:],
        document_ids=documents,
        block_size=block_size,
        offset=offset,
    )


@st.composite
def cases(draw):
    groups, repeats = draw(
        st.sampled_from([(1, 16), (2, 3), (1, 7), (3, 1), (2, 5), (2, 2), (1, 6)])
    )
    length = draw(st.sampled_from([1, 17, 48, 80]))
    return random_case(
        batch=draw(st.integers(1, 2)),
        groups=groups,
        repeats=repeats,
        length=length,
        width=draw(st.sampled_from([16, 32, 80])),
        block_size=draw(st.sampled_from([16, 32])),
        top_k=draw(st.sampled_from([1, 2, 3, 5])),
        cut=draw(st.sampled_from([0.0, 0.06])),
        offset=draw(st.sampled_from([0, length // 3])),
        seed=draw(st.integers(0, 1 << 16)),
    )


def true_gradients(case):
    leaves = [case[name].double().requires_grad_() for name in "qkv"]
    out, _ = reference.sparse_attention(
        *leaves,
        case["block_ids"],
        block_size=case["block_size"],
        scale=0.3,
        document_ids=case["document_ids"],
        query_offset=case["offset"],
    )
    return torch.autograd.grad(out, leaves, case["grad_out"].double())


def gradients(case, **options):
    q, k, v, ids = (case[name] for name in ("q", "k", "v", "block_ids"))
    starts = key_starts(case["document_ids"])
    sizes = dict(block_size=case["block_size"], scale=0.3, query_offset=case["offset"])
    out, lse, unions = triton_attend.attend(q, k, v, ids, starts, **sizes)
    return triton_attend_backward.attend_backward(
        q, k, v, ids, starts, out, lse, case["grad_out"], **sizes, unions=unions, **options
    )


def assert_right(case, **options):
    found = gradients(case, **options)
    for name, ours, true in zip("qkv", found, true_gradients(case), strict=True):
        assert ours.dtype == case[name].dtype
        torch.testing.assert_close(ours.double(), true, rtol=2e-5, atol=2e-5, msg=f"d{name}")


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(cases(), st.booleans(), st.sampled_from([None, SMALL]))
def test_gradients_equal_the_definition(case, deterministic, launch):
    assert_right(case, deterministic=deterministic, launch=launch)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("cut", [0.0, 0.04])
def test_lists_cut_into_chunks_give_the_same_gradients(cut, deterministic):
    case = random_case(2, 2, 2, 90, 16, 32, 2, cut=cut)
    launch = replace(SMALL, chunk=24)
    assert_right(case, deterministic=deterministic, launch=launch)


def test_documents_shorter_than_a_block_take_the_second_launch(monkeypatch):
    monkeypatch.setattr(triton_attend_dkv, "TAIL_PROGRAMS", 3)
    case = random_case(1, 2, 1, 70, 16, 16, 2, cut=0.6)
    lists = triton_lists.query_lists(
        case["block_ids"], key_starts(case["document_ids"]), num_keys=70, block_size=16
    )
    assert int(lists.count) > lists.programs + 3
    assert_right(case)


@pytest.mark.parametrize("deterministic", [False, True])
def test_error_in_float16_stays_within_three_times_that_of_plain_torch(deterministic):
    case = random_case(1, 2, 3, 100, 32, 32, 2)
    case |= {name: case[name].half() for name in ("q", "k", "v", "grad_out")}
    leaves = [case[name].clone().requires_grad_() for name in "qkv"]
    chosen = reference._support(100, 100, 32, case["block_ids"], None, 0, torch.device("cpu"))
    keys, values = (x.repeat_interleave(3, dim=1) for x in leaves[1:])
    scores = (leaves[0] @ keys.transpose(-1, -2) * 0.3).masked_fill(
        ~chosen.repeat_interleave(3, dim=1), float("-inf")
    )
    plain = torch.autograd.grad(scores.softmax(-1) @ values, leaves, case["grad_out"])
    ours = gradients(case, deterministic=deterministic)
    for found, other, true in zip(ours, plain, true_gradients(case), strict=True):
        ulp = torch.finfo(torch.float16).eps * true.abs().max()
        assert (found - true).abs().max() <= 3 * (other - true).abs().max() + 2 * ulp


@pytest.mark.parametrize("deterministic", [False, True])
def test_keys_that_nobody_selected_have_no_gradient(deterministic):
    case = random_case(1, 1, 2, 80, 16, 16, 2)
    own = torch.arange(80) // 16
    # Everybody reads the own block and block 0; from block 4 on nobody reads 1 to 3.
    case["block_ids"] = torch.stack([torch.zeros(80), own], -1).int()[None, None, 64:]
    case |= {name: case[name][:, :, 64:] for name in ("q", "grad_out")} | {"offset": 64}
    _, grad_k, grad_v = gradients(case, deterministic=deterministic)
    for grad in (grad_k, grad_v):
        assert (grad[:, :, 16:64] == 0).all() and (grad[:, :, :16] != 0).all()
    assert_right(case, deterministic=deterministic)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("launch", [None, SMALL])
def test_nan_in_the_gradient_of_one_query_reaches_its_own_blocks_only(launch, deterministic):
    case = random_case(1, 2, 6, 80, 16, 16, 2)
    # The first of the list of its own block: the list before it ends in the middle of a step.
    query = 64
    case["grad_out"][:, :, query] = float("nan")
    grad_q, *grads = gradients(case, deterministic=deterministic, launch=launch)
    assert grad_q[:, :, query].isnan().all()
    assert grad_q[:, :, torch.arange(80) != query].isfinite().all()
    for group, blocks in enumerate(case["block_ids"][0, :, query].tolist()):
        others = torch.tensor([key // 16 not in blocks for key in range(80)])
        for grad in grads:
            assert grad[0, group, others].isfinite().all()
            assert grad[0, group, ~others].isnan().any()


@pytest.mark.parametrize("kind", ["sink", "disjoint"])
def test_hot_and_disjoint_blocks(kind):
    case = random_case(1, 1, 2, 120, 16, 16, 2)
    own = torch.arange(120, dtype=torch.int32) // 16
    ids = torch.stack([own, torch.full_like(own, -1)], -1)
    if kind == "sink":
        ids[16:] = torch.stack([torch.zeros_like(own), own], -1)[16:]
    case["block_ids"] = ids[None, None]
    for deterministic in (False, True):
        assert_right(case, deterministic=deterministic, launch=replace(SMALL, chunk=32))


def test_two_runs_give_the_same_bits():
    case = random_case(2, 2, 3, 70, 16, 16, 3, cut=0.05)
    launch = replace(SMALL, chunk=16)
    first = gradients(case, deterministic=True, launch=launch)
    second = gradients(case, deterministic=True, launch=launch)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    # Keys and values have no atomics in either mode.
    assert torch.equal(gradients(case, launch=launch)[1], first[1])


class _LargestFloat32(TorchDispatchMode):
    """Elements of the largest float32 tensor that was made inside."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and made.dtype == torch.float32:
            self.elements = max(self.elements, made.numel())
        return made


def test_a_buffer_for_atomics_beyond_its_bound_is_not_made(monkeypatch):
    case = random_case(1, 2, 3, 48, 32, 16, 2)
    case |= {name: case[name].half() for name in ("q", "k", "v", "grad_out")}
    size = case["q"].numel()
    with _LargestFloat32() as within:
        gradients(case)
    monkeypatch.setattr(triton_attend_backward, "SUMS_BYTES", 4 * size - 1)
    with _LargestFloat32() as beyond:
        found = gradients(case)
    assert within.elements >= size > beyond.elements
    expected = gradients(case, deterministic=True)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_gradient_without_strides_is_served():
    case = random_case(1, 2, 2, 40, 16, 16, 2)
    case["grad_out"] = torch.ones(()).expand_as(case["q"])
    assert_right(case)


@pytest.mark.parametrize("cut", [0.0, 0.1])
@pytest.mark.parametrize("edges", [1, 1 << 25])
def test_lists_hold_every_edge_once_in_ascending_order(cut, edges, monkeypatch):
    monkeypatch.setattr(triton_lists, "EDGES_AT_ONCE", edges)
    case = random_case(2, 2, 1, 75, 16, 16, 3, cut=cut, offset=20)
    ids, starts = case["block_ids"], key_starts(case["document_ids"])
    lists = triton_lists.query_lists(
        ids, starts, num_keys=75, block_size=16, query_offset=20, chunk=8
    )
    expected = {}
    for batch, group, query, rank in (ids >= 0).nonzero().tolist():
        first = int(ids[batch, group, query, rank]) * 16
        first += 0 if starts is None else int(starts[batch, 20 + query])
        expected.setdefault((batch * 2 + group, first), []).append(query)
    found, chunks = {}, []
    for plane, offsets in enumerate(lists.offsets.tolist()):
        for slot in range(lists.num_slots):
            queries = lists.queries[plane, offsets[slot] : offsets[slot + 1]].tolist()
            if queries:
                found[plane, slot * lists.slot_keys] = queries
                chunks += [plane * lists.num_slots + slot] * -(-len(queries) // 8)
    assert found == expected
    assert lists.owners.tolist()[: int(lists.count)] == chunks
    split = [owner for owner in dict.fromkeys(chunks) if chunks.count(owner) > 1]
    assert lists.split_owners.tolist()[: len(split)] == split
    assert sum(chunks.count(owner) for owner in split) <= lists.max_partials
    assert (lists.owners[len(chunks) :] == 4 * lists.num_slots).all()
