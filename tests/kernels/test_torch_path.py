"""The tiled torch path against the float64 definitions, by sampled shapes."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dense2sparse.kernels import ops, reference, tiled

SHAPES = settings(
    max_examples=30, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Tiles of 37 queries, so that short rows cross several tile bounds, raggedly."""
    monkeypatch.setattr(tiled, "TILE_QUERIES", 37)


@pytest.fixture(params=["fused", "plain"])
def tile_kernel(request, monkeypatch):
    """Tiles by torch's kernel for CPUs, and as on devices that it has none for."""
    if request.param == "plain":
        monkeypatch.setattr(tiled, "_is_fused", lambda q: False)


@st.composite
def cases(draw):
    groups, per_group = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 3, 5, 7, 16]))
    length = draw(st.sampled_from([1, 5, 31, 32, 33, 100, 129]))
    width, index_width = draw(st.sampled_from([(8, 8), (16, 32), (10, 16)]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1 << 16)))

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    batch = draw(st.integers(1, 2))
    documents = None
    if draw(st.booleans()):
        cuts = torch.rand(batch, length, generator=generator) < 0.05
        documents = cuts.cumsum(1).int()
    return dict(
        q=normal(batch, groups * per_group, length, width),
        k=normal(batch, groups, length, width),
        v=normal(batch, groups, length, width),
        index_q=normal(batch, groups, length, index_width),
        index_k=normal(batch, 1, length, index_width),
        document_ids=documents,
        block_size=draw(st.sampled_from([1, 4, 16, 32])),
        top_k=draw(st.integers(2, 9)),
        init_blocks=draw(st.integers(0, 1)),
    )


def selection(case, backend, offset=0):
    names = ("block_size", "top_k", "init_blocks", "document_ids")
    return ops.select_blocks(
        case["index_q"][:, :, offset:],
        case["index_k"],
        **{name: case[name] for name in names},
        query_offset=offset,
        backend=backend,
    )


@SHAPES
@given(cases())
def test_selection_equals_the_definition(case):
    assert torch.equal(selection(case, "torch"), selection(case, "reference"))


@SHAPES
@given(cases(), st.floats(0, 1))
def test_a_chunk_of_queries_selects_as_the_whole_row_does(case, where):
    offset = int(where * (case["q"].shape[2] - 1))
    assert torch.equal(selection(case, "torch", offset), selection(case, "torch")[:, :, offset:])


@SHAPES
@given(cases())
def test_oracle_selection_equals_the_definition(case):
    names = ("q", "k", "block_size", "top_k", "init_blocks", "document_ids")
    arguments = {name: case[name] for name in names}
    q, k = arguments.pop("q"), arguments.pop("k")
    fast, slow = (ops.select_by_mass(q, k, **arguments, backend=b) for b in ("torch", "reference"))
    assert torch.equal(fast, slow)


@SHAPES
@given(cases(), st.sampled_from(["dense", "sparse"]), st.booleans())
def test_attention_and_its_gradients_equal_the_definition(tile_kernel, case, kind, chunk):
    ids = selection(case, "reference")
    offset = case["q"].shape[2] // 3 if chunk else 0
    results = []
    for backend in ("torch", "reference"):
        q, k, v = (case[name].clone().requires_grad_() for name in "qkv")
        common = dict(document_ids=case["document_ids"], query_offset=offset, scale=0.3)
        if kind == "dense":
            out, lse = ops.dense_attention(q[:, :, offset:], k, v, **common, backend=backend)
        else:
            ids_chunk, size = ids[:, :, offset:], case["block_size"]
            out, lse = ops.sparse_attention(
                q[:, :, offset:], k, v, ids_chunk, block_size=size, **common, backend=backend
            )
        weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
        (out * weights).sum().backward()
        results.append((out, lse, q.grad, k.grad, v.grad))
    for fast, slow in zip(*results, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-9, atol=1e-9)


@SHAPES
@given(cases(), st.booleans())
def test_kl_and_its_gradients_equal_the_definition(case, full):
    ids = None if full else selection(case, "reference")
    documents, size = case["document_ids"], case["block_size"]
    _, lse = reference.sparse_attention(
        case["q"], case["k"], case["v"], ids, block_size=size, scale=0.3, document_ids=documents
    )
    results = []
    for backend in ("torch", "reference"):
        index_q, index_k = (case[n].clone().requires_grad_() for n in ("index_q", "index_k"))
        settings_ = dict(scale=0.3, index_scale=0.4, block_ids=ids, block_size=size)
        kl = ops.index_kl(
            case["q"],
            case["k"],
            lse,
            index_q,
            index_k,
            **settings_,
            document_ids=documents,
            backend=backend,
        )
        (3 * kl).backward()
        results.append((kl.detach(), index_q.grad, index_k.grad))
    for fast, slow in zip(*results, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("documents", [False, True])
def test_a_sampled_kl_is_unbiased_in_value_and_gradients(documents):
    """Seeds draw an offset among the tiles; the mean over all offsets is the whole."""
    torch.manual_seed(0)
    q, k = torch.randn(1, 4, 150, 8).double(), torch.randn(1, 2, 150, 8).double()
    index_q, index_k = torch.randn(1, 2, 150, 8).double(), torch.randn(1, 1, 150, 8).double()
    ids = (torch.arange(150)[None] >= 60).int() if documents else None
    _, lse = ops.dense_attention(q, k, k, document_ids=ids)

    def kl(**options):
        inputs = [x.clone().requires_grad_() for x in (index_q, index_k)]
        value = ops.index_kl(q, k, lse, *inputs, document_ids=ids, **options)
        value.backward()
        return torch.cat([value.detach()[None], *(x.grad.flatten() for x in inputs)])

    whole = kl()
    draws = {}
    for seed in range(40):
        found = kl(fraction=0.4, seed=seed)
        draws[round(float(found[0]), 9)] = found
    assert len(draws) == 5, "five tiles of 37 queries (four and one, two and three with documents)"
    assert min(abs(float(d[0] - whole[0])) for d in draws.values()) > 1e-6
    torch.testing.assert_close(torch.stack(list(draws.values())).mean(0), whole)


def test_only_full_rows_are_sampled():
    x = torch.randn(1, 1, 20, 8)
    ids = torch.zeros(1, 1, 20, 1, dtype=torch.int32)
    for options in ({"fraction": 0.0}, {"fraction": 0.5, "block_ids": ids, "block_size": 32}):
        with pytest.raises(ValueError, match="a share of query tiles above 0"):
            ops.index_kl(x, x, x[..., 0], x, x, **options)


@SHAPES
@given(cases())
def test_decode_equals_the_last_row_of_the_whole(case):
    ids = selection(case, "reference")
    common = dict(document_ids=case["document_ids"], scale=0.3)
    q, k, v, index_q, index_k = (case[n] for n in ("q", "k", "v", "index_q", "index_k"))
    whole, _ = reference.sparse_attention(q, k, v, ids, block_size=case["block_size"], **common)
    for backend in ("torch", "reference"):
        names = ("block_size", "top_k", "init_blocks")
        last = ops.sparse_decode(
            q[:, :, -1:],
            k,
            v,
            index_q[:, :, -1:],
            index_k,
            **{name: case[name] for name in names},
            **common,
            backend=backend,
        )
        torch.testing.assert_close(last, whole[:, :, -1:], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_error_in_low_precision_stays_within_twice_that_of_plain_torch(dtype, kind):
    torch.manual_seed(0)
    low = [torch.randn(1, heads, 200, 32).to(dtype) for heads in (6, 2, 2)]
    upstream = torch.randn(1, 6, 200, 32).to(dtype)
    ids = None
    if kind == "sparse":
        index = torch.randn(1, 3, 200, 16)
        ids = ops.select_blocks(index[:, :2], index[:, 2:], block_size=16, top_k=4)
    support = reference._support(200, 200, 16, ids, None, 0, upstream.device)

    def plain(q, k, v):
        scores = (q.unflatten(1, (2, -1)) @ k.unsqueeze(2).transpose(-1, -2) * 32**-0.5).to(dtype)
        weights = scores.masked_fill(~support.unsqueeze(2), -math.inf).softmax(-1)
        return (weights @ v.unsqueeze(2)).flatten(1, 2)

    def ours(q, k, v):
        if ids is None:
            return ops.dense_attention(q, k, v)[0]
        return ops.sparse_attention(q, k, v, ids, block_size=16)[0]

    def with_gradients(attend, inputs):
        inputs = [tensor.clone().requires_grad_() for tensor in inputs]
        out = attend(*inputs)
        return [out.detach(), *torch.autograd.grad(out, inputs, upstream.to(out.dtype))]

    truth = with_gradients(
        lambda *inputs: reference.sparse_attention(*inputs, ids, block_size=16)[0],
        [tensor.double() for tensor in low],
    )
    found, usual = with_gradients(ours, low), with_gradients(plain, low)
    for exact, one, other in zip(truth, found, usual, strict=True):
        rounding = 4 * torch.finfo(dtype).eps * max(1.0, float(exact.abs().max()))
        bound = 2 * (other - exact).abs().max() + rounding
        assert (one - exact).abs().max() <= bound


@pytest.mark.parametrize("kind", ["dense", "sparse"])
@pytest.mark.parametrize("strided", ["q", "k", "v", "all"])
def test_inputs_of_any_strides_give_the_definition(kind, strided):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, 50, 8) for heads in (4, 2, 2))
    ids = None
    if kind == "sparse":
        index = torch.randn(2, 3, 50, 8)
        ids = ops.select_blocks(index[:, :2], index[:, 2:], block_size=4, top_k=3)
    inputs = [
        x.mT.contiguous().mT if strided in (name, "all") else x
        for name, x in zip("qkv", (q, k, v), strict=True)
    ]
    found, gradients = [], []
    for backend in ("torch", "reference"):
        ones = [x.detach().requires_grad_() for x in inputs]
        if ids is None:
            out, lse = ops.dense_attention(*ones, backend=backend)
        else:
            out, lse = ops.sparse_attention(*ones, ids, block_size=4, backend=backend)
        found.append((out.detach(), lse.detach()))
        upstream = torch.linspace(-1, 1, out.numel()).view(2, 4, 8, 50).mT
        gradients.append(torch.autograd.grad(out, ones, upstream))
    for one, other in zip(found[0] + gradients[0], found[1] + gradients[1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_nothing_as_large_as_queries_by_keys_is_kept():
    """Of 4096 x 4096 scores (64 MiB a head), training memory beyond the inputs stays below a tile."""
    torch.manual_seed(0)
    length = 4096
    q, k, v = (torch.randn(1, h, length, 8, requires_grad=True) for h in (2, 1, 1))
    index = torch.randn(1, 2, length, 8, requires_grad=True)
    saved = []

    def remember(tensor):
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        ids = ops.select_blocks(index[:, :1], index[:, 1:], block_size=64, top_k=4)
        out, lse = ops.sparse_attention(q, k, v, ids, block_size=64)
        kl = ops.index_kl(q, k, lse, index[:, :1], index[:, 1:], block_ids=ids, block_size=64)
    assert saved and max(saved) <= length * 16
    (out.sum() + kl).backward()
    assert q.grad is not None and index.grad is not None
