"""KL of the index branch in Triton, under its interpreter, against the float64 definition."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dense2sparse.kernels import reference, triton_kl, triton_kl_full, triton_sparse_kl
from dense2sparse.kernels.documents import key_starts
from dense2sparse.kernels.triton_support import Launch

SHAPES = settings(
    max_examples=10,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
pytestmark = pytest.mark.usefixtures("poison")


def tensors(batch, groups, repeats, length, width, index_width, seed=0):
    """q, k, index q, index k as transformers hands them over: tokens outside, heads inside."""
    generator = torch.Generator().manual_seed(seed)
    sizes = (groups * repeats, width), (groups, width), (groups, index_width), (1, index_width)
    return tuple(
        torch.randn(batch, length, *size, generator=generator).transpose(1, 2) for size in sizes
    )


def documents(batch, length, seed):
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(batch, length, generator=generator) < 0.06).cumsum(1).int()


def main_lse(q, k, ids, block_size, document_ids):
    q, k = q.double(), k.double()
    options = {"block_size": block_size or 1, "document_ids": document_ids}
    return reference.sparse_attention(q, k, k, ids, **options)[1]


def exact(q, k, index_q, index_k, ids=None, block_size=None, document_ids=None):
    """Value and gradients of index q and k by the definition, float64."""
    index_q, index_k = (x.detach().double().requires_grad_() for x in (index_q, index_k))
    kl = reference.index_kl(
        q.double(),
        k.double(),
        torch.empty(q.shape[:3]),
        index_q,
        index_k,
        block_ids=ids,
        block_size=block_size,
        document_ids=document_ids,
    )
    return kl.detach(), *torch.autograd.grad(kl, (index_q, index_k))


def fast(q, k, index_q, index_k, ids=None, block_size=None, document_ids=None, **options):
    """The same in Triton, through autograd."""
    lse = main_lse(q, k, ids, block_size, document_ids)
    index_q, index_k = (x.detach().requires_grad_() for x in (index_q, index_k))
    kl = triton_kl.index_kl(
        q,
        k,
        lse,
        index_q,
        index_k,
        block_ids=ids,
        block_size=block_size,
        document_ids=document_ids,
        **options,
    )
    return kl.detach(), *torch.autograd.grad(kl, (index_q, index_k))


def assert_equal(found, expected, tolerance=2e-5):
    """Errors relative to the largest entry, or to what one float32 rounding of a probability makes."""
    floor = 0.5 / expected[1].shape[:3].numel()
    for name, one, other, least in zip(
        ("kl", "grad_q", "grad_k"), found, expected, (0.05, floor, floor), strict=True
    ):
        scale = max(other.abs().max().item(), least)
        assert torch.isfinite(one).all(), name
        assert (one.double() - other).abs().max().item() <= tolerance * scale, name


@st.composite
def cases(draw):
    groups, repeats = draw(
        st.sampled_from([(1, 16), (2, 3), (1, 7), (3, 1), (2, 5), (1, 2), (2, 2)])
    )
    length = draw(st.sampled_from([1, 17, 33, 64, 90]))
    widths = draw(st.sampled_from([(16, 16), (80, 32), (32, 48)]))
    batch, seed = draw(st.integers(1, 2)), draw(st.integers(0, 1 << 16))
    packed = documents(batch, length, seed) if draw(st.booleans()) else None
    return tensors(batch, groups, repeats, length, *widths, seed), packed


@SHAPES
@given(cases())
def test_full_rows_equal_the_definition(case):
    inputs, packed = case
    expected = exact(*inputs, document_ids=packed)
    assert_equal(fast(*inputs, document_ids=packed), expected)


@SHAPES
@given(cases(), st.sampled_from([16, 32]), st.sampled_from([1, 2, 5]))
def test_selected_blocks_equal_the_definition(case, block_size, top_k):
    inputs, packed = case
    # Blocks that the index branch itself does not favour.
    probe = torch.randn_like(inputs[2]), torch.randn_like(inputs[3])
    budget = {"block_size": block_size, "top_k": top_k, "document_ids": packed}
    support = reference.select_blocks(*probe, **budget), block_size, packed
    expected = exact(*inputs, *support)
    assert_equal(fast(*inputs, *support), expected)


@pytest.mark.parametrize("packed", [False, True])
def test_windows_of_one_tile_equal_the_definition_and_repeat_bitwise(monkeypatch, packed):
    inputs = tensors(2, 2, 3, 90, 32, 32)
    packed = documents(2, 90, 4) if packed else None
    support = (
        reference.select_blocks(*inputs[2:], block_size=16, top_k=3, document_ids=packed),
        16,
        packed,
    )
    whole = fast(*inputs, *support)
    monkeypatch.setattr(triton_sparse_kl, "SCRATCH_BYTES", 1)
    first, second = (fast(*inputs, *support) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    # Windows change no value and no query's gradient, only the order in which a key's is summed.
    assert torch.equal(first[0], whole[0]) and torch.equal(first[1], whole[1])
    assert_equal(first, [x.double() for x in whole], 1e-6)
    assert_equal(first, exact(*inputs, *support))


@pytest.mark.parametrize("repeats", [1, 3, 4, 70])
def test_steps_of_part_of_a_block_equal_the_definition(monkeypatch, repeats):
    inputs, packed = tensors(1, 2, repeats, 75, 16, 16), documents(1, 75, 5)
    launch = triton_sparse_kl.SparseLaunch(
        student=Launch(16, 16, 4, 1),
        difference=Launch(32, 16, 4, 1),
        gradient=Launch(16, 16, 4, 1),
    )
    monkeypatch.setattr(triton_sparse_kl, "default_launch", lambda *_: launch)
    ids = reference.select_blocks(*inputs[2:], block_size=32, top_k=2, document_ids=packed)
    assert_equal(fast(*inputs, ids, 32, packed), exact(*inputs, ids, 32, packed))


# One tile a chunk; one to three tiles.
@pytest.mark.parametrize("scratch_bytes", [1, 100_000])
def test_a_small_scratch_changes_no_value(monkeypatch, scratch_bytes):
    inputs = tensors(2, 2, 2, 150, 16, 32)
    packed = documents(2, 150, 3)
    whole = fast(*inputs, document_ids=packed)
    monkeypatch.setattr(triton_kl_full, "SCRATCH_BYTES", scratch_bytes)
    monkeypatch.setattr(triton_kl_full, "PIECE_TOKENS", 64)
    monkeypatch.setattr(triton_kl_full, "PROGRAMS", 1)
    assert_equal(fast(*inputs, document_ids=packed), [x.double() for x in whole], 1e-6)


def test_tiles_of_several_parts_equal_the_definition(monkeypatch):
    inputs, packed = tensors(1, 2, 3, 75, 16, 16), documents(1, 75, 5)
    launch = triton_kl_full.FullLaunch(
        tile=64,
        student=Launch(64, 16, 4, 1),
        difference=Launch(16, 64, 4, 1),
        query=Launch(16, 32, 4, 1),
        key=Launch(32, 16, 4, 1),
    )
    monkeypatch.setattr(triton_kl, "default_launch", lambda *_: launch)
    expected = exact(*inputs, document_ids=packed)
    assert_equal(fast(*inputs, document_ids=packed), expected)


def selections(length, block_size):
    """Everybody on the first block; neighbours without a common block; tokens without any block."""
    blocks = torch.arange(length) // block_size
    sink = torch.stack([torch.zeros_like(blocks), blocks], -1)
    sink[blocks == 0, 1] = -1
    apart = torch.stack([torch.arange(length) % (blocks + 1), torch.full_like(blocks, -1)], -1)
    some = torch.where((torch.arange(length) % 3 == 0)[:, None], sink, -1)
    return {"sink": sink, "disjoint": apart, "none": some}


@pytest.mark.parametrize("kind", ["sink", "disjoint", "none"])
@pytest.mark.parametrize("windows", [False, True])
def test_odd_selections_equal_the_definition_in_many_chunks(kind, windows, monkeypatch):
    if windows:  # of 64 tokens
        monkeypatch.setattr(triton_sparse_kl, "SCRATCH_BYTES", 64 * 2 * 2 * 16 * 4)
    length, block_size = 100, 16
    q, k, index_q, index_k = tensors(1, 2, 3, length, 16, 16, seed=1)
    ids = selections(length, block_size)[kind].int().expand(1, 2, -1, -1)
    rows = ids[0, 0, :, 0] >= 0
    lse = main_lse(q, k, ids, block_size, None)
    found = triton_sparse_kl.sparse_kl(
        q,
        k,
        lse.nan_to_num(neginf=0.0),
        index_q,
        index_k,
        ids,
        None,
        block_size=block_size,
        scale=0.25,
        index_scale=0.25,
        need_grad=True,
        chunk=8,
    )
    expected = by_rows(q, k, index_q, index_k, ids, block_size, rows)
    assert_equal(found, expected)


def by_rows(q, k, index_q, index_k, ids, block_size, rows):
    """The definition with scale 1/4; rows without a support, which it has no softmax for, count as 0."""
    index_q, index_k = (x.double().requires_grad_() for x in (index_q, index_k))
    support = reference._support(q.shape[2], k.shape[2], block_size, ids, None, 0, q.device)[
        :, :, rows
    ]
    scores = q.double().unflatten(1, (2, 3))[:, :, :, rows] @ k.double()[:, :, None].mT / 4
    teacher = scores.masked_fill(~support[:, :, None], -torch.inf).softmax(-1).mean(2)
    student = index_q[:, :, rows] @ index_k.mT / 4
    student = student.masked_fill(~support, -torch.inf).log_softmax(-1).masked_fill(~support, 0.0)
    kl = (torch.xlogy(teacher, teacher) - teacher * student).sum() / (2 * q.shape[2])
    return kl.detach(), *torch.autograd.grad(kl, (index_q, index_k))


@pytest.mark.parametrize("sparse", [False, True])
def test_gradients_are_those_of_the_value(sparse):
    q, k, index_q, index_k = tensors(1, 2, 2, 40, 16, 16)
    ids = reference.select_blocks(index_q, index_k, block_size=16, top_k=2) if sparse else None
    support = ids, 16
    _, grad_q, grad_k = fast(q, k, index_q, index_k, *support)
    length = (grad_q.square().sum() + grad_k.square().sum()).sqrt()
    step = 0.05 / length
    ahead, behind = (
        fast(q, k, index_q + sign * step * grad_q, index_k + sign * step * grad_k, *support)[0]
        for sign in (1, -1)
    )
    # 0.1 apart along the unit gradient: float32 gives the quotient to about 1e-6, the third derivative
    # of a softmax changes it by the square of the step.
    assert (ahead - behind).item() / 0.1 == pytest.approx(length.item(), rel=0.01)


@pytest.mark.parametrize("sparse", [False, True])
def test_score_gradients_of_a_row_sum_to_zero(sparse):
    q, k, index_q, index_k = tensors(2, 2, 3, 50, 16, 32)
    ids = reference.select_blocks(index_q, index_k, block_size=16, top_k=2) if sparse else None
    # sum over keys of dk_idx is the sum over rows of (sum of ds) q_idx; with equal keys, dq_idx is
    # (sum of ds) k_idx.
    _, _, grad_k = fast(q, k, index_q, index_k, ids, 16)
    assert grad_k.sum(2).abs().max() < 1e-6
    _, grad_q, _ = fast(q, k, index_q, index_k[:, :, :1].expand_as(index_k), ids, 16)
    assert grad_q.abs().max() < 1e-6


@pytest.mark.parametrize("sparse", [False, True])
def test_a_student_that_equals_its_teacher_has_no_divergence_and_no_gradient(sparse):
    q, k, _, _ = tensors(2, 1, 1, 60, 32, 32)
    ids = reference.select_blocks(q, k, block_size=16, top_k=2) if sparse else None
    kl, grad_q, grad_k = fast(q, k, q, k, ids, 16)
    assert abs(kl.item()) < 1e-6
    assert max(grad_q.abs().max(), grad_k.abs().max()) < 1e-7


@pytest.mark.parametrize("sparse", [False, True])
def test_runs_repeat_bitwise(sparse):
    inputs = tensors(1, 2, 3, 70, 16, 16)
    ids = reference.select_blocks(*inputs[2:], block_size=16, top_k=3) if sparse else None
    first, second = (fast(*inputs, ids, 16) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def full(inputs, packed, **options):
    q, k, index_q, index_k = inputs
    lse = main_lse(q, k, None, None, packed)
    starts = key_starts(packed)
    return triton_kl.full_kl(
        q, k, lse, index_q, index_k, starts, scale=0.25, index_scale=0.25, need_grad=True, **options
    )


def test_the_mean_over_all_draws_of_tiles_is_the_full_value_and_gradient():
    inputs, packed = tensors(2, 1, 2, 150, 16, 16), documents(2, 150, 2)
    whole = full(inputs, packed)
    # 5 tiles of 32 tokens, the last one ragged; 2 are taken.
    draws = [
        full(inputs, packed, tiles=triton_kl.tiles_at(torch.full((2,), offset), 5, 2))
        for offset in range(5)
    ]
    means = [torch.stack(parts).double().mean(0) for parts in zip(*draws, strict=True)]
    assert_equal(whole, means, 1e-5)
    assert all((draw[1] == 0).any() for draw in draws)


def test_a_fraction_takes_its_share_of_tiles_and_every_tile_equally_often():
    seen = torch.zeros(2, 7)
    for seed in range(700):
        tiles = triton_kl.taken_tiles(7, 2, 0.4, seed, torch.device("cpu"))
        assert tiles.shape == (2, 3) and (tiles.diff() > 0).all()
        seen.scatter_add_(1, tiles.long(), torch.ones(2, 3))
    # 300 of 700 expected with a deviation of 13.
    assert (seen - 300).abs().max() < 60


def test_seed_decides_which_tiles_a_fraction_takes():
    inputs = tensors(1, 1, 1, 150, 16, 16)
    values = [fast(*inputs, fraction=0.2, seed=seed) for seed in (0, 0, 1, 2, 3)]
    assert torch.equal(values[0][1], values[1][1])
    assert len({value[0].item() for value in values}) > 1


def test_without_gradients_only_the_value_is_made():
    inputs = tensors(1, 2, 2, 50, 16, 16)
    ids = reference.select_blocks(*inputs[2:], block_size=16, top_k=2)
    for support in ((None, None), (ids, 16)):
        q, k, index_q, index_k = inputs
        lse = main_lse(q, k, *support, None)
        kl = triton_kl.index_kl(
            q, k, lse, index_q, index_k, block_ids=support[0], block_size=support[1]
        )
        assert not kl.requires_grad
        assert torch.equal(kl, fast(*inputs, *support)[0])


def plain(q, k, index_q, index_k, ids, block_size):
    """KL and gradients in torch with every product and softmax in the inputs' dtype."""
    groups, length = k.shape[1], q.shape[2]
    index_q, index_k = (x.detach().requires_grad_() for x in (index_q, index_k))
    support = reference._support(length, length, block_size or 1, ids, None, 0, q.device)
    scores = q.unflatten(1, (groups, -1)) @ k.unsqueeze(2).mT * q.shape[3] ** -0.5
    teacher = scores.masked_fill(~support.unsqueeze(2), -torch.inf).softmax(-1).mean(2)
    student = index_q @ index_k.mT * index_q.shape[3] ** -0.5
    student = student.masked_fill(~support, -torch.inf).log_softmax(-1).masked_fill(~support, 0.0)
    kl = (torch.xlogy(teacher, teacher) - teacher * student).sum(-1).mean()
    return kl.detach(), *torch.autograd.grad(kl, (index_q, index_k))


@pytest.mark.parametrize("kind", ["full", "sparse"])
def test_float16_errs_at_most_twice_as_much_as_plain_float16(kind):
    inputs = tuple(x.half() for x in tensors(1, 2, 3, 80, 32, 32))
    ids = None
    if kind != "full":
        ids = reference.select_blocks(*(x.float() for x in inputs[2:]), block_size=16, top_k=3)
    expected = exact(*inputs, ids, 16)
    found = fast(*inputs, ids, 16)
    simple = plain(*inputs, ids, 16)
    for one, other, truth, factor in zip(found, simple, expected, (2, 3, 3), strict=True):
        ulp = truth.abs().max() * torch.finfo(torch.float16).eps
        error, allowed = ((x.double() - truth).abs().max() for x in (one, other))
        assert error <= factor * allowed + 2 * ulp
