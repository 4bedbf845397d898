"""Library attention: who serves what, documents and chunks by any library, and the operators' signatures.

No GPU is needed: torch's CPU kernel stands in for a library, and the CUDA operators are called on the meta
device, which checks their arguments, dtypes and shapes.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dense2sparse.kernels import library_dense, library_merge, reference
from dense2sparse.kernels.library_dense import Library, attend_with, candidates, packed_documents

EVERY = ("fa4", "fa3", "cudnn", "flash")
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize(
    ("capability", "dtype", "width", "expected"),
    [
        ((10, 0), torch.bfloat16, 128, ("fa4", "cudnn", "flash")),
        ((10, 0), torch.bfloat16, 80, ("cudnn", "flash")),
        ((10, 0), torch.bfloat16, 192, ("flash",)),
        ((9, 0), torch.float16, 256, ("fa3", "cudnn", "flash")),
        ((8, 0), torch.bfloat16, 128, ("flash",)),
        ((7, 5), torch.float16, 64, ()),
        ((9, 0), torch.float32, 128, ()),
        ((9, 0), torch.bfloat16, 100, ()),
        ((9, 0), torch.bfloat16, 320, ()),
    ],
)
def test_each_library_is_named_only_where_it_serves(capability, dtype, width, expected):
    assert candidates(capability, dtype, width, EVERY) == expected


def test_what_is_not_installed_is_not_named():
    assert candidates((9, 0), torch.bfloat16, 128, ("flash",)) == ("flash",)
    assert library_dense.installed() <= set(EVERY)


def cpu_forward(q, k, v, scale, causal):
    """torch's fused CPU kernel as a library's; it takes no groups."""
    repeats = q.shape[1] // k.shape[1]
    wide = [x.repeat_interleave(repeats, dim=1) for x in (k, v)]
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, *wide, 0.0, causal, scale=scale
    )
    return out, lse, None


def cpu_backward(grad, q, k, v, out, lse, state, scale, causal):
    repeats = q.shape[1] // k.shape[1]
    wide = [x.repeat_interleave(repeats, dim=1) for x in (k, v)]
    dq, *rest = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, q, *wide, out, lse, 0.0, causal, scale=scale
    )
    return dq, *(x.unflatten(1, (-1, repeats)).sum(2) for x in rest)


CPU = library_merge.Kernel(cpu_forward, cpu_backward)


def cpu_causal(q, k, v, scale):
    return library_merge.piecewise_attention(q, k, v, scale, CPU)


def cpu_packed(q, k, v, query_bounds, key_bounds, max_queries, max_keys, scale):
    """Document by document, each aligned at its last key, as variable-length kernels do."""
    outs, lses = [], []
    bounds = zip(query_bounds.diff().tolist(), key_bounds.diff().tolist(), strict=True)
    lengths = list(bounds)
    assert max_queries == max(n for n, _ in lengths) and max_keys == max(n for _, n in lengths)
    queries = q.split([n for n, _ in lengths])
    keys, values = (x.split([n for _, n in lengths]) for x in (k, v))
    for parts in zip(queries, keys, values, strict=True):
        out, lse = cpu_causal(*(x.transpose(0, 1)[None] for x in parts), scale)
        outs.append(out[0].transpose(0, 1))
        lses.append(lse[0])
    return torch.cat(outs), torch.cat(lses, dim=1)


ON_CPU = Library("cpu", cpu_causal, cpu_packed)


@st.composite
def cases(draw):
    batch, groups, repeats = (
        draw(st.integers(1, 2)),
        draw(st.integers(1, 3)),
        draw(st.integers(1, 4)),
    )
    num_keys = draw(st.integers(1, 60))
    offset = draw(st.integers(0, num_keys - 1))
    num_queries = draw(st.integers(1, num_keys - offset))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    shapes = ((groups * repeats, num_queries), (groups, num_keys), (groups, num_keys))
    tensors = [
        torch.randn(
            batch, heads, length, 16, generator=generator, dtype=torch.float64
        ).requires_grad_()
        for heads, length in shapes
    ]
    documents = None
    if draw(st.booleans()):
        starts = torch.rand(batch, num_keys, generator=generator) < 0.15
        documents = starts.cumsum(1, dtype=torch.int32)
    return tensors, documents, offset


@settings(max_examples=40, deadline=None, derandomize=True)
@given(cases())
def test_documents_and_chunks_of_a_library_equal_the_definition_and_its_gradients(case):
    tensors, documents, offset = case
    options = {"scale": 0.3, "document_ids": documents, "query_offset": offset}
    wanted, wanted_lse = reference.dense_attention(*tensors, **options)
    packed = packed_documents(tensors[0], documents, offset)
    out, lse = attend_with(ON_CPU, *tensors, 0.3, packed, offset)
    torch.testing.assert_close(out, wanted)
    torch.testing.assert_close(lse, wanted_lse, check_dtype=False)
    assert not lse.requires_grad
    grad = torch.randn_like(out)
    expected = torch.autograd.grad(wanted, tensors, grad)
    # Keys before a row's first document, or after its last query, get no gradient from a library at all.
    found = torch.autograd.grad(out, tensors, grad, materialize_grads=True)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("num_queries", "num_keys"), [(1, 1), (5, 5), (5, 15), (5, 17), (5, 7), (1, 4)]
)
def test_pieces_cover_every_key_once_and_all_but_the_first_have_one_shape(num_queries, num_keys):
    ranges = library_merge.cut(num_queries, num_keys)
    assert [x for start, stop, _ in ranges for x in range(start, stop)] == list(range(num_keys))
    assert [causal for *_, causal in ranges] == [False] * (len(ranges) - 1) + [True]
    assert {stop - start for start, stop, _ in ranges[1:]} <= {num_queries}


def test_rows_of_one_document_are_not_packed():
    """Training always passes ids; cuDNN, which serves no documents, must not be lost to that."""
    q = torch.empty(2, 1, 6, 16)
    one = torch.tensor([[3] * 10, [5] * 10])
    assert packed_documents(q, one, 4) is None and packed_documents(q, None, 4) is None
    padded = torch.tensor([[0] * 2 + [1] * 8, [1] * 10])
    found = packed_documents(q, padded, 4)
    assert found is not None and [part.keys.start for part in found.pieces] == [2, 0]


@pytest.mark.parametrize("strided", [False, True])
def test_documents_of_one_length_are_rows_of_a_batch_for_any_library(strided):
    """cuDNN has no packed form. In the layout that models use nothing is copied on the way in."""
    generator = torch.Generator().manual_seed(0)
    tensors = []
    for heads in (4, 2, 2):
        shape = (2, 36, heads, 16) if strided else (2, heads, 36, 16)
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        tensors.append((x.transpose(1, 2) if strided else x).requires_grad_())
    ids = torch.tensor([[0] * 12 + [1] * 12 + [2] * 12, [5] * 12 + [4] * 12 + [3] * 12])
    seen = []

    def causal(q, k, v, scale):
        seen.append((q.shape, q.untyped_storage().data_ptr()))
        return cpu_causal(q, k, v, scale)

    packed = packed_documents(tensors[0], ids, 0)
    out, lse = attend_with(Library("no packed form", causal, None), *tensors, 0.3, packed, 0)
    assert [shape for shape, _ in seen] == [(6, 4, 12, 16)]
    assert (seen[0][1] == tensors[0].untyped_storage().data_ptr()) == strided
    wanted, wanted_lse = reference.dense_attention(*tensors, scale=0.3, document_ids=ids)
    torch.testing.assert_close(out, wanted)
    torch.testing.assert_close(lse, wanted_lse, check_dtype=False)
    grad = torch.randn_like(out)
    expected = torch.autograd.grad(wanted, tensors, grad)
    torch.testing.assert_close(torch.autograd.grad(out, tensors, grad), expected)


@pytest.mark.parametrize(
    ("documents", "offset", "served_by"),
    [
        (None, 0, "cudnn"),
        ([[0] * 12 + [1] * 12], 0, "cudnn"),
        ([[3] * 24], 0, "cudnn"),
        ([[0] * 11 + [1] * 13], 0, "flash"),
        ([[0] * 12 + [1] * 12], 12, "flash"),
        (None, 12, "flash"),
    ],
)
def test_cudnn_serves_rows_of_whole_or_equal_documents(monkeypatch, documents, offset, served_by):
    served = []

    def library(name, packed):
        def causal(*inputs):
            served.append(name)
            return cpu_causal(*inputs)

        def of_documents(*inputs):
            served.append(name)
            return cpu_packed(*inputs)

        return Library(name, causal, of_documents if packed else None)

    both = {"cudnn": library("cudnn", False), "flash": library("flash", True)}
    monkeypatch.setattr(library_dense, "LIBRARIES", both)
    monkeypatch.setattr(library_dense, "_candidates_for", lambda q: tuple(both))
    ids = None if documents is None else torch.tensor(documents)
    q, k = torch.randn(1, 4, 24 - offset, 16), torch.randn(1, 2, 24, 16)
    options = {"document_ids": ids, "query_offset": offset}
    out, _ = library_dense.dense_attention(q, k, k, **options)
    torch.testing.assert_close(out, reference.dense_attention(q, k, k, **options)[0])
    assert served == [served_by]


def meta(*shape):
    return torch.empty(shape, device="meta", dtype=torch.bfloat16, requires_grad=True)


@pytest.mark.parametrize("name", ["cudnn", "flash"])
@pytest.mark.parametrize("num_keys", [40, 72])
def test_operators_take_what_we_pass_and_share_keys_between_heads(name, num_keys):
    q, k, v = meta(2, 8, 40, 64), meta(2, 2, num_keys, 64), meta(2, 2, num_keys, 64)
    out, lse = attend_with(library_dense.LIBRARIES[name], q, k, v, 0.1, None, num_keys - 40)
    assert out.shape == q.shape and out.dtype == q.dtype
    assert lse.shape == q.shape[:3] and lse.dtype == torch.float32
    out.sum().backward()
    assert [x.grad.shape for x in (q, k, v)] == [x.shape for x in (q, k, v)]


def test_the_packed_operator_takes_what_we_pass():
    q, k, v = meta(80, 8, 64), meta(100, 2, 64), meta(100, 2, 64)
    bounds = torch.empty(4, dtype=torch.int32, device="meta")
    packed = library_dense.LIBRARIES["flash"].packed
    out, lse = packed(q, k, v, bounds, bounds, 30, 40, 0.1)
    assert out.shape == q.shape and lse.shape == (8, 80) and lse.dtype == torch.float32
    out.sum().backward()
    assert k.grad.shape == k.shape


ARGUMENTS = {
    "_scaled_dot_product_flash_attention": "query key value dropout_p is_causal return_debug_mask",
    "_scaled_dot_product_cudnn_attention": (
        "query key value attn_bias compute_log_sumexp dropout_p is_causal return_debug_mask"
    ),
    "_scaled_dot_product_cudnn_attention_backward": (
        "grad_out query key value out logsumexp philox_seed philox_offset attn_bias cum_seq_q cum_seq_k "
        "max_q max_k dropout_p is_causal"
    ),
    "_flash_attention_forward": (
        "query key value cum_seq_q cum_seq_k max_q max_k dropout_p is_causal return_debug_mask"
    ),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_operators_have_the_arguments_in_the_order_that_we_pass(name):
    """Private operators of torch: a new version that moves one must fail here, not on a GPU."""
    schema = getattr(torch.ops.aten, name).default._schema
    by_place = [one.name for one in schema.arguments if not one.kwarg_only]
    assert by_place == ARGUMENTS[name].split()
    assert "scale" in [one.name for one in schema.arguments if one.kwarg_only]
    if not name.endswith("backward"):
        assert [one.name for one in schema.returns][1] in ("logsumexp", "softmax_logsumexp")


@pytest.mark.parametrize("keyword", ["return_lse", "return_attn_probs", None])
def test_flash_attention_is_asked_for_the_log_sum_exp_in_its_own_words(monkeypatch, keyword):
    """Versions differ in the keyword; the oldest return it unasked."""

    def fake(q, k, v, softmax_scale=None, causal=False, **asked):
        assert causal and asked == ({keyword: True} if keyword else {})
        out, lse = cpu_causal(*(x.transpose(1, 2) for x in (q, k, v)), softmax_scale)
        return out.transpose(1, 2), lse

    def with_return_lse(q, k, v, softmax_scale=None, causal=False, return_lse=False):
        return fake(q, k, v, softmax_scale, causal, return_lse=return_lse)

    def with_return_attn_probs(q, k, v, softmax_scale=None, causal=False, return_attn_probs=False):
        return fake(q, k, v, softmax_scale, causal, return_attn_probs=return_attn_probs)

    def unasked(q, k, v, softmax_scale=None, causal=False):
        return fake(q, k, v, softmax_scale, causal)

    forms = {"return_lse": with_return_lse, "return_attn_probs": with_return_attn_probs}

    class Module:
        flash_attn_func = staticmethod(forms.get(keyword, unasked))

    monkeypatch.setattr(library_dense.importlib, "import_module", lambda name: Module)
    q, k = torch.randn(1, 4, 6, 16), torch.randn(1, 2, 10, 16)
    out, lse = attend_with(library_dense.LIBRARIES["fa3"], q, k, k, 0.2, None, 4)
    wanted, wanted_lse = reference.dense_attention(q, k, k, scale=0.2, query_offset=4)
    torch.testing.assert_close(out, wanted)
    torch.testing.assert_close(lse, wanted_lse)


def test_what_no_library_serves_runs_in_tiles():
    q, k = torch.randn(1, 4, 6, 20), torch.randn(1, 2, 10, 20)
    out, lse = library_dense.dense_attention(q, k, k, query_offset=4)
    wanted, wanted_lse = reference.dense_attention(q, k, k, query_offset=4)
    torch.testing.assert_close(out, wanted)
    torch.testing.assert_close(lse, wanted_lse)


@GPU
@pytest.mark.gpu
@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("offset", [0, 100, 640])
@pytest.mark.parametrize("width", [64, 128])
def test_on_the_device_each_library_equals_the_definition(name, documents, offset, width):
    capability = torch.cuda.get_device_capability()
    dtype = torch.bfloat16
    if name not in candidates(capability, dtype, width, library_dense.installed()):
        pytest.skip(f"{name} is not here, or not for this device and width")
    library = library_dense.LIBRARIES[name]
    if documents and library.packed is None:
        pytest.skip(f"{name} serves no documents")
    generator = torch.Generator().manual_seed(0)
    shapes = ((8, 320), (2, offset + 320), (2, offset + 320))
    tensors = [
        torch.randn(2, heads, length, width, generator=generator).to("cuda", dtype).requires_grad_()
        for heads, length in shapes
    ]
    ids = None
    if documents:
        starts = torch.rand(2, offset + 320, generator=generator) < 0.02
        ids = starts.cumsum(1, dtype=torch.int32).cuda()
    grad = torch.randn(2, 8, 320, width, generator=generator).to("cuda", dtype)
    exact = [x.detach().double().requires_grad_() for x in tensors]
    wanted, wanted_lse = reference.dense_attention(*exact, document_ids=ids, query_offset=offset)
    plain = [x.detach().clone().requires_grad_() for x in tensors]
    eager = plain_attention(*plain, ids, offset)
    packed = packed_documents(tensors[0], ids, offset)
    out, lse = attend_with(library, *tensors, width**-0.5, packed, offset)
    torch.testing.assert_close(lse.double(), wanted_lse, atol=1e-2, rtol=1e-2)
    error = (out.double() - wanted).abs().max()
    assert error <= 2 * (eager.double() - wanted).abs().max() + 2 * torch.finfo(dtype).eps
    expected = torch.autograd.grad(wanted, exact, grad.double())
    rough = torch.autograd.grad(eager, plain, grad)
    found = torch.autograd.grad(out, tensors, grad)
    for one, two, true in zip(found, rough, expected, strict=True):
        bound = 3 * (two.double() - true).abs().max() + 2 * torch.finfo(dtype).eps
        assert (one.double() - true).abs().max() <= bound


def plain_attention(q, k, v, ids, offset):
    """Textbook attention in the tensors' own precision."""
    seen = reference.visibility(q.shape[2], k.shape[2], offset, ids, q.device)[:, None]
    wide = [x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v)]
    scores = (q @ wide[0].transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(~seen, -torch.inf)
    return scores.softmax(-1) @ wide[1]
