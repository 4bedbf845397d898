"""Selection and sparse attention in Triton, under its interpreter, against the float64 definitions."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dense2sparse.kernels import fp8, ops, reference, triton_attend, triton_select, triton_unions
from dense2sparse.kernels.triton_support import Launch

SHAPES = settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
pytestmark = pytest.mark.usefixtures("poison")


@st.composite
def cases(draw):
    groups, repeats = draw(
        st.sampled_from([(1, 16), (2, 3), (1, 7), (3, 1), (2, 5), (1, 6), (4, 2)])
    )
    length = draw(st.sampled_from([1, 17, 33, 64, 90]))
    width, index_width = draw(st.sampled_from([(16, 16), (80, 32), (32, 48)]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1 << 16)))

    def normal(heads, width):
        # transformers hands over transposed views: tokens outside, heads inside.
        return torch.randn(batch, length, heads, width, generator=generator).transpose(1, 2)

    batch = draw(st.integers(1, 2))
    documents = None
    if draw(st.booleans()):
        documents = (torch.rand(batch, length, generator=generator) < 0.06).cumsum(1).int()
    return dict(
        q=normal(groups * repeats, width),
        k=normal(groups, width),
        v=normal(groups, width),
        index_q=normal(groups, index_width),
        index_k=normal(1, index_width),
        document_ids=documents,
        block_size=draw(st.sampled_from([16, 32])),
        top_k=draw(st.sampled_from([2, 3, 5, 9])),
        local_blocks=draw(st.integers(1, 2)),
        init_blocks=draw(st.integers(0, 1)),
        offset=draw(st.sampled_from([0, 0, length // 3])),
    )


def selection(case, backend, **changes):
    case = {**case, **changes}
    names = ("block_size", "top_k", "local_blocks", "init_blocks", "document_ids")
    budget = {name: case[name] for name in names}
    budget["top_k"] = max(case["top_k"], case["local_blocks"] + case["init_blocks"])
    return ops.select_blocks(
        case["index_q"][:, :, case["offset"] :],
        case["index_k"],
        **budget,
        query_offset=case["offset"],
        backend=backend,
    )


@SHAPES
@given(cases())
def test_selection_equals_the_definition(case):
    exact = {name: case[name].double() for name in ("index_q", "index_k")}
    assert torch.equal(selection(case, "triton"), selection(case, "reference", **exact))


@SHAPES
@given(cases())
def test_sparse_attention_equals_the_definition(case):
    ids = selection(case, "reference")
    q = case["q"][:, :, case["offset"] :]
    options = dict(
        block_size=case["block_size"],
        scale=0.3,
        document_ids=case["document_ids"],
        query_offset=case["offset"],
    )
    out, lse = ops.sparse_attention(
        q, case["k"], case["v"], ids, **options, validate=True, backend="triton"
    )
    exact = (x.double() for x in (q, case["k"], case["v"]))
    true_out, true_lse = reference.sparse_attention(*exact, ids, **options)
    torch.testing.assert_close(out.double(), true_out, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(lse.double(), true_lse, rtol=1e-5, atol=2e-6)
    assert out.stride() == torch.empty_like(q).stride()


@pytest.mark.parametrize("top_k", [1, 16, 64])
def test_every_number_of_blocks_up_to_64_is_served(top_k):
    torch.manual_seed(top_k)
    index_q, index_k = torch.randn(1, 1, 40, 16), torch.randn(1, 1, 1100, 16)
    options = dict(block_size=16, top_k=top_k, query_offset=1060)
    ids = ops.select_blocks(index_q, index_k, **options, backend="triton")
    true = reference.select_blocks(index_q.double(), index_k.double(), **options)
    assert torch.equal(ids, true)


def test_a_block_may_take_several_steps_and_the_tile_any_size():
    torch.manual_seed(0)
    index_q, index_k = torch.randn(1, 3, 150, 32), torch.randn(1, 1, 150, 32)
    q, k, v = torch.randn(1, 6, 150, 32), torch.randn(1, 3, 150, 32), torch.randn(1, 3, 150, 32)
    ids = reference.select_blocks(index_q, index_k, block_size=64, top_k=2)
    true, _ = reference.sparse_attention(q.double(), k.double(), v.double(), ids, block_size=64)
    for launch in (Launch(32, 16, 4, 1), Launch(64, 32, 4, 2), Launch(16, 64, 4, 2)):
        got = triton_select.select(index_q, index_k, None, block_size=64, top_k=2, launch=launch)
        assert torch.equal(got, ids)
        out, _, _ = triton_attend.attend(
            q, k, v, ids, None, block_size=64, scale=32**-0.5, launch=launch
        )
        torch.testing.assert_close(out.double(), true, rtol=1e-5, atol=2e-6)


def test_long_steps_and_a_scale_that_is_not_positive():
    torch.manual_seed(3)
    q, k, v = torch.randn(1, 4, 300, 16), torch.randn(1, 2, 300, 16), torch.randn(1, 2, 300, 16)
    index_q, index_k = torch.randn(1, 2, 300, 16), torch.randn(1, 1, 300, 16)
    ids = reference.select_blocks(index_q, index_k, block_size=128, top_k=2)
    launch = Launch(64, 128, 4, 2)
    got = triton_select.select(index_q, index_k, None, block_size=128, top_k=2, launch=launch)
    assert torch.equal(got, ids)
    # Rows that keep one block only, beside rows that keep two.
    ids[:, :, 150:200, 1:] = -1
    options = dict(block_size=128, scale=0.3)
    true, true_lse = reference.sparse_attention(q.double(), k.double(), v.double(), ids, **options)
    out, lse, _ = triton_attend.attend(q, k, v, ids, None, **options, launch=launch)
    torch.testing.assert_close(out.double(), true, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(lse.double(), true_lse, rtol=1e-5, atol=2e-6)
    with pytest.raises(ValueError, match="scale above 0"):
        triton_attend.attend(q, k, v, ids, None, block_size=128, scale=-1.0)


def test_forced_blocks_are_kept_and_counted_once():
    torch.manual_seed(4)
    index_q, index_k = torch.randn(1, 2, 200, 16), torch.randn(1, 1, 200, 16)
    for local, first in ((1, 0), (3, 2), (2, 4)):
        options = dict(block_size=16, top_k=6, local_blocks=local, init_blocks=first)
        ids = ops.select_blocks(index_q, index_k, **options, backend="triton")
        exact = reference.select_blocks(index_q.double(), index_k.double(), **options)
        assert torch.equal(ids, exact)


def test_ties_go_to_the_lower_block_whatever_the_order_of_arrival():
    index_q = torch.ones(1, 1, 160, 16)
    index_k = torch.ones(1, 1, 160, 16)
    index_k[:, :, 64:80] = 2.0  # block 4 is best, the others tie
    index_k[:, :, 96:112] = 2.0
    ids = ops.select_blocks(index_q, index_k, block_size=16, top_k=4, backend="triton")
    assert ids[0, 0, -1].tolist() == [0, 4, 6, 9]


@pytest.mark.parametrize("kind", ["sparse", "all equal"])
def test_error_in_float16_stays_within_twice_that_of_plain_torch(kind):
    torch.manual_seed(0)
    low = [torch.randn(1, heads, 100, 32).half() for heads in (6, 2, 2)]
    ids = reference.select_blocks(
        torch.randn(1, 2, 100, 16), torch.randn(1, 1, 100, 16), block_size=16, top_k=4
    )
    if kind == "all equal":
        low[1] = low[1][:, :, :1].expand_as(low[1])
    truth, _ = reference.sparse_attention(*(x.double() for x in low), ids, block_size=16)
    ours, _ = ops.sparse_attention(*low, ids, block_size=16, backend="triton")
    support = reference._support(100, 100, 16, ids, None, 0, truth.device)
    q, k, v = low
    scores = q.unflatten(1, (2, -1)) @ k.unsqueeze(2).mT * 32**-0.5
    plain = scores.masked_fill(~support.unsqueeze(2), -math.inf).softmax(-1) @ v.unsqueeze(2)
    bound = 2 * (plain.flatten(1, 2) - truth).abs().max() + 2 * torch.finfo(torch.float16).eps
    assert (ours - truth).abs().max() <= bound


def test_two_runs_give_the_same_bits():
    torch.manual_seed(0)
    q, k = torch.randn(1, 6, 90, 16), torch.randn(1, 2, 90, 16)
    ids = reference.select_blocks(q[:, :2], k[:, :1], block_size=16, top_k=3)
    runs = [ops.sparse_attention(q, k, k, ids, block_size=16, backend="triton") for _ in range(2)]
    assert all(torch.equal(one, two) for one, two in zip(*runs, strict=True))


def test_unions_are_the_sorted_sets_with_a_bit_a_token():
    torch.manual_seed(0)
    ids = reference.select_blocks(
        torch.randn(1, 2, 75, 16), torch.randn(1, 1, 75, 16), block_size=16, top_k=3
    )
    unions = triton_unions.tile_unions(ids, None, num_keys=75, block_size=16, tokens=7)
    for group in range(2):
        for tile in range(11):
            tokens = ids[0, group, tile * 7 : tile * 7 + 7].tolist()
            blocks = sorted({block for row in tokens for block in row if block >= 0})
            count = int(unions.counts[0, group, tile])
            first_keys = unions.first_keys[0, group, tile, :count].tolist()
            assert first_keys == [16 * block for block in blocks]
            past = [block for block in blocks if 16 * (block + 1) <= tile * 7]
            assert int(unions.past_counts[0, group, tile]) == len(past)
            for block, bits in zip(blocks, unions.members[0, group, tile].tolist(), strict=False):
                assert [bool(bits >> t & 1) for t in range(len(tokens))] == [
                    block in row for row in tokens
                ]
    sizes = unions.counts.float().mean()
    assert float(unions.mean_union()) == float(sizes) > 3


def test_fp8_selection_equals_the_definition_on_the_rounded_values():
    torch.manual_seed(0)
    index_q, index_k = torch.randn(2, 3, 90, 32) * 40, torch.randn(2, 1, 90, 32)
    index_k[:, :, 40:] *= 1e-3  # without a factor a block these would round to zero
    documents = (torch.arange(90) >= 23).int().expand(2, -1)
    options = dict(block_size=16, top_k=3, document_ids=documents, precision="fp8")
    fast, slow = (
        ops.select_blocks(index_q, index_k, **options, backend=b) for b in ("triton", "torch")
    )
    assert torch.equal(fast, slow)
    plain = ops.select_blocks(index_q, index_k, block_size=16, top_k=3, document_ids=documents)
    same = (fast == plain).all(-1).float().mean()
    assert 0.5 < same < 1.0  # rounded, so not equal everywhere, and far from arbitrary


def test_fp8_keeps_three_bits_of_every_block_whatever_its_size():
    torch.manual_seed(0)
    k = torch.randn(1, 1, 64, 16) * torch.logspace(-6, 6, 4).repeat_interleave(16)[:, None]
    _, rounded = fp8.round_index(k, k, block_size=16)
    blocks, kept = k.unflatten(2, (4, 16)), rounded.unflatten(2, (4, 16))
    error = (blocks - kept).abs().amax((-1, -2)) / blocks.abs().amax((-1, -2))
    assert (error < 2**-4).all() and (error > 0).all()


def test_elements_beyond_two_to_the_31_are_addressed(monkeypatch):
    """300,000 tokens of 64 heads of 128: memory that is never touched costs nothing, so this is cheap."""
    monkeypatch.undo()  # poison would touch all of it
    tokens, stride = 300_000, 64 * 128
    far = torch.empty(tokens * stride, dtype=torch.float16)
    assert far.numel() > 1 << 31
    rows = torch.as_strided(far, (1, 1, tokens, 16), (far.numel(), 16, stride, 1))
    near = torch.randn(1, 1, 80, 16).half()
    rows[:, :, -80:] = near
    q, offset = rows[:, :, -20:], tokens - 20
    last = (tokens - 1) // 16
    ids = (
        torch.tensor([last - 3, last - 1, last], dtype=torch.int32).expand(1, 1, 20, 3).contiguous()
    )
    ids[0, 0, :4] = torch.tensor(
        [last - 3, last - 1, -1]
    )  # the first queries lie in the block before
    out, _ = ops.sparse_attention(
        q, rows, rows, ids, block_size=16, query_offset=offset, backend="triton"
    )
    assert tokens % 16 == 0
    shifted = torch.where(ids < 0, ids, ids - (last - 4))
    true, _ = reference.sparse_attention(
        near[:, :, -20:].double(),
        near.double(),
        near.double(),
        shifted,
        block_size=16,
        query_offset=60,
    )
    torch.testing.assert_close(out.double(), true, rtol=2e-3, atol=2e-3)


def test_rows_of_a_batch_beyond_two_to_the_31_are_selected_from(monkeypatch):
    monkeypatch.undo()
    stride = (1 << 31) + 64
    far = torch.empty(stride + 64 * 16, dtype=torch.float16)
    index = torch.as_strided(far, (2, 1, 64, 16), (stride, 64 * 16, 16, 1))
    index.copy_(torch.randn(2, 1, 64, 16))
    ids = ops.select_blocks(index, index, block_size=16, top_k=2, backend="triton")
    exact = index.double()
    assert torch.equal(ids, reference.select_blocks(exact, exact, block_size=16, top_k=2))
