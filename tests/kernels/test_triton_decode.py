"""Triton decoding under the interpreter against float64 definitions; beyond a row the cache holds NaN."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dense2sparse.kernels import reference, tiled, triton_decode, triton_decode_select
from dense2sparse.kernels.triton_decode import DecodeLaunch
from dense2sparse.kernels.triton_decode_select import SelectLaunch
from dense2sparse.kernels.triton_support import Launch

SHAPES = settings(
    max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
NAMES = ("q", "k", "v", "index_q", "index_k")
SMALL = SelectLaunch(programs=6, keys=32, chunk=4, num_warps=4, num_stages=1)
"""Several tiles, splits and top-k levels in short rows."""
OWN_LAUNCH = 0
"""`repeated` for a last top-k in a launch of its own."""
TILES = DecodeLaunch(SMALL, Launch(rows=32, keys=32, num_warps=4, num_stages=1), piece=64)

pytestmark = pytest.mark.usefixtures("poison")


def make_case(
    *,
    length,
    batch=1,
    groups=2,
    repeats=2,
    width=16,
    index_width=16,
    seed=0,
    documents=False,
    ragged=False,
    dtype=torch.float32,
    **budget,
):
    """Inputs in `dtype`; ragged rows hold NaN from their length on."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    case = dict(
        q=normal(batch, 1, groups * repeats, width).transpose(1, 2),
        k=normal(batch, groups, length, width),
        v=normal(batch, length, groups, width).transpose(1, 2),
        index_q=normal(batch, groups, 1, index_width),
        index_k=normal(batch, 1, length, index_width),
        **budget,
    )
    if documents:
        cuts = torch.rand(batch, length, generator=generator) < 3 / length
        case["document_ids"] = cuts.cumsum(1).int()
    if ragged:
        lengths = torch.randint(1, length + 1, (batch,), generator=generator, dtype=torch.int32)
        case["lengths"] = lengths
        for row, kept in enumerate(lengths.tolist()):
            for name in ("k", "v", "index_k"):
                case[name][row, :, kept:] = math.nan
    return case


@st.composite
def cases(draw):
    local, init = draw(st.integers(1, 2)), draw(st.integers(0, 1))
    return make_case(
        length=draw(st.sampled_from([1, 17, 64, 100, 150])),
        batch=draw(st.integers(1, 2)),
        groups=draw(st.integers(1, 3)),
        repeats=draw(st.sampled_from([1, 3, 7, 16, 20])),
        width=draw(st.sampled_from([16, 48, 64])),
        index_width=draw(st.sampled_from([16, 80])),
        seed=draw(st.integers(0, 1 << 16)),
        documents=draw(st.booleans()),
        ragged=draw(st.booleans()),
        block_size=draw(st.sampled_from([16, 32, 64])),
        top_k=draw(st.integers(local + init, 7)),
        local_blocks=local,
        init_blocks=init,
    )


def triton(case, launch=TILES):
    """`triton_decode.sparse_decode` with small tiles."""
    options = {name: value for name, value in case.items() if name not in (*NAMES, "document_ids")}
    starts, lengths = starts_of(case), options.pop("lengths", None)
    defaults = dict(local_blocks=1, init_blocks=0, scale=case["q"].shape[-1] ** -0.5)
    return triton_decode.decode(
        *(case[name] for name in NAMES),
        starts,
        lengths,
        **{**defaults, **options},
        launch=launch,
    )


def starts_of(case):
    documents = case.get("document_ids")
    if documents is None:
        return None
    return triton_decode_select.last_starts(documents, case.get("lengths"))


def define(case, **changes):
    """The definition, in float64."""
    return reference.sparse_decode(
        **{n: x.double() if n in NAMES else x for n, x in {**case, **changes}.items()}
    )


def chosen(case, launch=SMALL):
    """(ids of the kernels, ids of the definition), each (B, G, K)."""
    names = ("block_size", "top_k", "local_blocks", "init_blocks")
    budget = {name: case[name] for name in names if name in case}
    lengths, documents = case.get("lengths"), case.get("document_ids")
    ids = triton_decode_select.select(
        case["index_q"], case["index_k"], starts_of(case), lengths, **budget, launch=launch
    )
    rows = []
    for row in range(ids.shape[0]):
        kept = case["index_k"].shape[2] if lengths is None else int(lengths[row])
        rows.append(
            reference.select_blocks(
                case["index_q"][row : row + 1].double(),
                case["index_k"][row : row + 1, :, :kept].double(),
                **budget,
                document_ids=None if documents is None else documents[row : row + 1, :kept],
                query_offset=kept - 1,
            )
        )
    return ids, torch.cat(rows)[:, :, 0]


@SHAPES
@given(cases(), st.sampled_from([OWN_LAUNCH, 1 << 30]), st.sampled_from([4, 64]))
def test_decode_equals_the_definition(case, repeated, chunk):
    launch = replace(TILES, repeated=repeated, select=replace(SMALL, chunk=chunk))
    torch.testing.assert_close(triton(case, launch).double(), define(case), rtol=0, atol=2e-6)


@SHAPES
@given(cases())
def test_the_kernels_choose_the_blocks_of_the_definition(case):
    ids, expected = chosen(case)
    assert torch.equal(ids, expected)


@SHAPES
@given(cases())
def test_tiled_decode_of_ragged_rows_equals_the_definition(case):
    torch.testing.assert_close(
        tiled.sparse_decode(**case).double(), define(case), rtol=0, atol=2e-6
    )


@pytest.mark.parametrize("chunk", [4, 64])
@pytest.mark.parametrize("block_size", [16, 64])
def test_ties_go_to_the_lower_id(chunk, block_size):
    """Small integers: few distinct scores, exact in float32, zero of both signs among them."""
    case = make_case(length=450, groups=3, block_size=block_size, top_k=5)
    case["index_q"] = torch.tensor([0.0, -0.0, 1.0]).view(1, 3, 1, 1).expand(1, 3, 1, 16)
    case["index_k"] = (case["index_k"] * 0.5).round()
    launch = SelectLaunch(programs=6, keys=32, chunk=chunk, num_warps=4, num_stages=1)
    ids, expected = chosen(case, launch)
    assert torch.equal(ids, expected)
    last = 449 // block_size
    assert ids[0, 0].tolist() == [0, 1, 2, 3, last]


def test_negative_scores_rank_and_missing_keys_do_not():
    """Without forced blocks, a masked key that counted as zero would win every ranking."""
    case = make_case(length=150, batch=2, block_size=16, top_k=3, local_blocks=0)
    case["lengths"] = torch.tensor([149, 99], dtype=torch.int32)
    case["index_q"] = case["index_q"].abs()
    case["index_k"] = -case["index_k"].abs()
    ids, expected = chosen(case)
    assert torch.equal(ids, expected)


@pytest.mark.parametrize("top_k", [1, 3, 40, 64])
@pytest.mark.parametrize("documents", [False, True])
def test_any_budget_gives_the_blocks_of_the_definition(top_k, documents):
    case = make_case(
        length=600, batch=2, documents=documents, ragged=True, block_size=16, top_k=top_k, seed=1
    )
    ids, expected = chosen(case)
    assert torch.equal(ids, expected)


def test_forced_blocks_fill_the_budget():
    case = make_case(
        length=150, ragged=True, batch=3, block_size=16, top_k=5, local_blocks=3, init_blocks=2
    )
    ids, expected = chosen(case)
    assert torch.equal(ids, expected)


def test_selecting_every_block_equals_dense_attention():
    case = make_case(length=100, documents=True, block_size=32, top_k=7)
    names = ("q", "k", "v")
    expected, _ = reference.dense_attention(
        *(case[name].double() for name in names),
        document_ids=case["document_ids"],
        query_offset=99,
    )
    torch.testing.assert_close(triton(case).double(), expected, rtol=0, atol=2e-6)


def test_left_padding_never_changes_the_output():
    case = make_case(length=90, block_size=16, top_k=3)
    padded = dict(case, document_ids=(torch.arange(113) >= 23).int()[None])
    for name in ("k", "v", "index_k"):
        filler = torch.full((1, case[name].shape[1], 23, case[name].shape[3]), 9.0)
        padded[name] = torch.cat([filler, case[name]], dim=2)
    torch.testing.assert_close(triton(padded), triton(case), rtol=0, atol=1e-6)


def test_the_same_launches_serve_other_lengths(monkeypatch):
    """What a CUDA graph replays: equal grids, scalars and buffers, with `lengths` changed in place."""
    case = make_case(length=150, batch=2, documents=True, block_size=16, top_k=4)
    case["lengths"] = torch.tensor([3, 150], dtype=torch.int32)
    kernels = [
        (module, name)
        for module, names in (
            (triton_decode, ("_attend_piece", "_merge_pieces")),
            (triton_decode_select, ("_last_starts", "_block_scores", "_keep_best")),
        )
        for name in names
    ]
    launches = []

    class Recorded:
        def __init__(self, kernel, name):
            self.kernel, self.name = kernel, name

        def __getitem__(self, grid):
            def launch(*args, **options):
                shapes = [x.shape if isinstance(x, torch.Tensor) else x for x in args]
                launches.append((self.name, grid, shapes, options))
                self.kernel[grid](*args, **options)

            return launch

    for module, name in kernels:
        monkeypatch.setattr(module, name, Recorded(getattr(module, name), name))
    first = triton(case)
    torch.testing.assert_close(first.double(), define(case), rtol=0, atol=2e-6)
    before = launches.copy()
    launches.clear()
    case["lengths"].copy_(torch.tensor([101, 48]))
    second = triton(case)
    torch.testing.assert_close(second.double(), define(case), rtol=0, atol=2e-6)
    assert launches == before


@pytest.mark.parametrize("dtype, launches", [(torch.float16, 4), (torch.float32, 5)])
def test_nothing_asks_the_device_for_a_value(dtype, launches, monkeypatch):
    case = make_case(
        length=40, batch=2, documents=True, ragged=True, block_size=16, top_k=2, dtype=dtype
    )
    moved = {n: x.to("meta") if isinstance(x, torch.Tensor) else x for n, x in case.items()}
    grids = []

    class Grid:
        def __getitem__(self, grid):
            return lambda *args, **options: grids.append(grid)

    for module, name in (
        (triton_decode, "_attend_piece"),
        (triton_decode, "_merge_pieces"),
        (triton_decode_select, "_last_starts"),
        (triton_decode_select, "_block_scores"),
        (triton_decode_select, "_keep_best"),
    ):
        monkeypatch.setattr(module, name, Grid())
    # A tensor without memory has no value to give: .item(), .tolist() and a branch on it raise.
    assert triton_decode.sparse_decode(**moved).shape == case["q"].shape
    assert len(grids) == launches


def counted(monkeypatch):
    """A list that grows by the name of each kernel that is launched."""
    names = []

    class Counted:
        def __init__(self, kernel, name):
            self.kernel, self.name = kernel, name

        def __getitem__(self, grid):
            names.append(self.name)
            return self.kernel[grid]

    for module, kernels in (
        (triton_decode, ("_attend_piece", "_merge_pieces")),
        (triton_decode_select, ("_last_starts", "_block_scores", "_keep_best")),
    ):
        for name in kernels:
            monkeypatch.setattr(module, name, Counted(getattr(module, name), name))
    return names


THREE = ["_block_scores", "_attend_piece", "_merge_pieces"]


@pytest.mark.parametrize("num_blocks", [1024, 8192])
def test_three_launches_at_128k_and_1m_tokens(num_blocks, monkeypatch):
    """As many blocks as 128K and 1M tokens have in blocks of 128, at the default limits."""
    case = make_case(length=num_blocks * 16 - 5, groups=1, block_size=16, top_k=3, seed=3)
    names = counted(monkeypatch)
    # Of 8192 blocks the leaders of 256 shares come first; large tiles make few steps.
    select = SelectLaunch(programs=256, keys=512, chunk=1024, num_warps=4, num_stages=1)
    launch = replace(TILES, select=select)
    assert uses_leaders(case, select) == (num_blocks > 1024)
    names.clear()
    out = triton(case, launch)
    assert names == THREE
    torch.testing.assert_close(out.double(), define(case), rtol=0, atol=2e-6)


@pytest.mark.parametrize("top_k, documents", [(1, False), (3, True), (8, False)])
def test_the_best_blocks_lie_in_the_shares_that_lead(top_k, documents):
    """Ties everywhere, short rows whose shares are empty, blocks of several tiles and several in one."""
    for block_size, keys in ((16, 64), (32, 16)):
        case = make_case(
            length=1300, batch=3, groups=2, documents=documents, ragged=True,
            block_size=block_size, top_k=top_k, seed=top_k,
        )  # fmt: skip
        case["lengths"][0], case["lengths"][1] = 1, block_size + 1
        case["index_q"] = (case["index_q"] * 0.5).round()
        case["index_k"] = (case["index_k"] * 0.5).round()
        launch = SelectLaunch(programs=48, keys=keys, chunk=16, num_warps=4, num_stages=1)
        launch = replace(launch, chunk=16 if block_size == 32 else 64)
        assert uses_leaders(case, launch) == (block_size == 16 or top_k < 8)
        ids, expected = chosen(case, launch)
        assert torch.equal(ids, expected)


def uses_leaders(case, launch):
    ranked = triton_decode_select.rank(
        case["index_q"], case["index_k"].nan_to_num(), None, None,
        block_size=case["block_size"], top_k=case["top_k"], launch=launch,
    )  # fmt: skip
    return ranked.shape["SHARES"] > 0


def test_two_runs_give_the_same_bits():
    case = make_case(length=400, batch=2, documents=True, ragged=True, block_size=16, top_k=5)
    for repeated in (OWN_LAUNCH, 1 << 30):
        launch = replace(TILES, repeated=repeated, select=replace(SMALL, chunk=64))
        assert torch.equal(triton(case, launch), triton(case, launch))


def test_pieces_of_blocks_never_change_the_result():
    case = make_case(length=900, repeats=3, block_size=256, top_k=2, seed=5)
    expected = define(case)
    for keys in (16, 128):
        launch = Launch(rows=16, keys=keys, num_warps=4, num_stages=1)
        small = SelectLaunch(programs=2, keys=keys, chunk=4, num_warps=4, num_stages=1)
        out = triton(case, DecodeLaunch(small, launch, piece=128))
        torch.testing.assert_close(out.double(), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("width, repeats", [(128, 16), (256, 64), (96, 5)])
def test_default_launches_equal_the_definition(width, repeats):
    case = make_case(
        length=300,
        groups=1,
        repeats=repeats,
        width=width,
        index_width=128,
        block_size=128,
        top_k=2,
    )
    out = triton(case, None)
    torch.testing.assert_close(out.double(), define(case), rtol=0, atol=2e-6)


def test_offsets_beyond_32_bits_are_right(tmp_path):
    """Keys 2^22 elements apart in a sparse file: the last of them lies past element 2^31."""
    length, width, apart = 560, 16, 1 << 22
    case = make_case(length=length, groups=1, block_size=16, top_k=3, dtype=torch.float16)
    # The newest blocks and the best ones lie far: high scores for keys 530 to 535.
    case["index_k"][:, :, 530:536] = case["index_q"] * 4
    for name in ("k", "v", "index_k"):
        path = str(tmp_path / name)
        memory = torch.from_file(path, shared=True, size=length * apart, dtype=torch.float16)
        far = memory.as_strided((1, 1, length, width), (0, 0, apart, 1))
        far.copy_(case[name])
        case[name] = far
    assert case["k"].stride(2) * (length - 1) > 2**31
    torch.testing.assert_close(triton(case).double(), define(case), rtol=0, atol=2e-3)


def test_float16_is_as_good_as_torch_in_float16():
    case = make_case(
        length=150, batch=2, repeats=4, width=64, ragged=True, block_size=16, top_k=4,
        dtype=torch.float16,
    )  # fmt: skip
    exact = define(case)
    plain = tiled_in_half(case)
    ulp = torch.finfo(torch.float16).eps * exact.abs().max()
    error = (triton(case).double() - exact).abs().max()
    assert error <= 2 * (plain.double() - exact).abs().max() + 2 * ulp


def tiled_in_half(case):
    """Plain torch in float16 over the blocks of the definition: (B, H, 1, D)."""
    _, ids = chosen(case)
    out = torch.zeros_like(case["q"])
    repeats = case["q"].shape[1] // ids.shape[1]
    for row, kept in enumerate(case["lengths"].tolist()):
        for head in range(case["q"].shape[1]):
            group = head // repeats
            block = torch.arange(kept) // case["block_size"]
            support = torch.isin(block, ids[row, group])
            k, v = (case[name][row, group, :kept][support] for name in ("k", "v"))
            scores = case["q"][row, head] @ k.T * case["q"].shape[-1] ** -0.5
            out[row, head] = scores.softmax(-1) @ v
    return out


def test_documents_start_where_the_last_one_begins():
    ids = torch.tensor(
        [[7, 7, 3, 3, 7, 7], [1, 1, 1, 1, 1, 1], [0, 1, 2, 3, 4, 4]], dtype=torch.int32
    )
    starts = triton_decode_select.last_starts(ids, None)
    assert starts.tolist() == [4, 0, 4]
    lengths = torch.tensor([4, 6, 3], dtype=torch.int32)
    assert triton_decode_select.last_starts(ids, lengths).tolist() == [2, 0, 2]
