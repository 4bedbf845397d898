"""What the definitions promise, whichever backend computes them."""

import pytest
import torch

from dense2sparse.kernels import ops, reference
from dense2sparse.kernels.measures import measure_selection, tile_union

BACKENDS = ["reference", "torch"]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layer(length=150, groups=2, per_group=3, width=8, index_width=12, batch=1):
    return {
        "q": normal(batch, groups * per_group, length, width, seed=1),
        "k": normal(batch, groups, length, width, seed=2),
        "v": normal(batch, groups, length, width, seed=3),
        "index_q": normal(batch, groups, length, index_width, seed=4),
        "index_k": normal(batch, 1, length, index_width, seed=5),
    }


def sparse(case, backend, top_k=4, **options):
    ids = ops.select_blocks(
        case["index_q"],
        case["index_k"],
        block_size=16,
        top_k=top_k,
        backend=backend,
        **{k: v for k, v in options.items() if k == "document_ids"},
    )
    attended = ops.sparse_attention(
        case["q"], case["k"], case["v"], ids, block_size=16, backend=backend, **options
    )
    return ids, *attended


@pytest.mark.parametrize("backend", BACKENDS)
def test_selecting_every_block_equals_dense_attention(backend):
    case = layer()
    _, out, lse = sparse(case, backend, top_k=10)
    dense, dense_lse = ops.dense_attention(case["q"], case["k"], case["v"], backend=backend)
    torch.testing.assert_close(out, dense, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(lse, dense_lse, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_future_key_changes_nothing(backend):
    case = layer()
    before = sparse(case, backend)
    for name in ("k", "v", "index_k"):
        case[name] = case[name].clone()
        case[name][:, :, 100:] = 1e4
    after = sparse(case, backend)
    for old, new in zip(before, after, strict=True):
        assert torch.equal(old[:, :, :100], new[:, :, :100])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_packed_row_equals_each_document_alone(backend):
    case, bounds = layer(), [0, 1, 40, 43, 150]
    ids = torch.repeat_interleave(torch.tensor([7, 3, 9, 4]), torch.tensor(bounds).diff())[None]
    packed = sparse(case, backend, document_ids=ids.int())
    for start, end in zip(bounds, bounds[1:], strict=False):
        part = {name: value[:, :, start:end] for name, value in case.items()}
        for whole, alone in zip(packed, sparse(part, backend), strict=True):
            torch.testing.assert_close(whole[:, :, start:end], alone, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ids_are_ascending_unique_padded_and_hold_the_forced_blocks(backend):
    case = layer()
    ids = ops.select_blocks(
        case["index_q"],
        case["index_k"],
        block_size=16,
        top_k=5,
        local_blocks=2,
        init_blocks=1,
        backend=backend,
    )
    assert ids.dtype == torch.int32
    for query in range(150):
        for group in range(2):
            row = ids[0, group, query].tolist()
            kept = [block for block in row if block >= 0]
            assert row == kept + [-1] * (5 - len(kept))
            assert kept == sorted(set(kept)) and len(kept) == min(5, query // 16 + 1)
            assert {query // 16, max(0, query // 16 - 1), 0} <= set(kept)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ties_go_to_the_lower_block(backend):
    index_q, index_k = torch.ones(1, 1, 96, 4), torch.ones(1, 1, 96, 4)
    ids = ops.select_blocks(index_q, index_k, block_size=16, top_k=3, backend=backend)
    assert ids[0, 0, -1].tolist() == [0, 1, 5]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_fully_masked_block_cannot_win_with_negative_scores(backend):
    """Trap 7: masked to -inf before the maximum, never to zero."""
    index_q, index_k = -torch.ones(1, 1, 64, 4), torch.ones(1, 1, 64, 4)
    ids = ops.select_blocks(index_q, index_k, block_size=16, top_k=3, backend=backend)
    assert ids[0, 0, 20].tolist() == [0, 1, -1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_of_a_batch_do_not_mix(backend):
    case = layer(batch=3)
    turned = {name: value.flip(0) for name, value in case.items()}
    for plain, other in zip(sparse(case, backend), sparse(turned, backend), strict=True):
        torch.testing.assert_close(plain, other.flip(0), rtol=1e-12, atol=1e-12)


def kl_arguments(case, full):
    ids, _, lse = sparse(case, "reference")
    if full:
        _, lse = ops.dense_attention(case["q"], case["k"], case["v"])
        return {"lse": lse, "block_ids": None}
    return {"lse": lse, "block_ids": ids}


def kl_of(case, index_q, index_k, arguments, backend):
    return ops.index_kl(
        case["q"],
        case["k"],
        arguments["lse"],
        index_q,
        index_k,
        index_scale=0.5,
        block_ids=arguments["block_ids"],
        block_size=16,
        backend=backend,
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("full", [True, False])
def test_kl_gradient_is_student_minus_teacher(backend, full):
    """dKL/ds = (p - t) / (rows * index heads), written out from the definition of both softmaxes."""
    case = layer(length=70)
    arguments = kl_arguments(case, full)
    index_q, index_k = (case[n].clone().requires_grad_() for n in ("index_q", "index_k"))
    kl_of(case, index_q, index_k, arguments, backend).backward()

    ids = arguments["block_ids"]
    support = reference._support(70, 70, 16, ids, None, 0, index_q.device)
    minus_inf = float("-inf")
    main = case["q"].unflatten(1, (2, 3)) @ case["k"].unsqueeze(2).mT * 8**-0.5
    teacher = main.masked_fill(~support.unsqueeze(2), minus_inf).softmax(-1).mean(2)
    scores = (case["index_q"] @ case["index_k"].mT * 0.5).masked_fill(~support, minus_inf)
    by_score = (scores.softmax(-1) - teacher) / (70 * 2)
    torch.testing.assert_close(index_q.grad, by_score @ case["index_k"] * 0.5)
    expected = (by_score.mT @ case["index_q"] * 0.5).sum(1, keepdim=True)
    torch.testing.assert_close(index_k.grad, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("full", [True, False])
def test_kl_gradient_agrees_with_finite_differences(backend, full):
    case = layer(length=40, index_width=4)
    arguments = kl_arguments(case, full)
    inputs = [case[name].clone().requires_grad_() for name in ("index_q", "index_k")]
    assert torch.autograd.gradcheck(lambda q, k: kl_of(case, q, k, arguments, backend), inputs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_kl_reaches_neither_q_nor_k(backend):
    case = layer(length=40)
    arguments = kl_arguments(case, True)
    for name in ("q", "k", "index_q"):
        case[name].requires_grad_()
    kl_of(case, case["index_q"], case["index_k"], arguments, backend).backward()
    assert case["q"].grad is None and case["k"].grad is None
    assert case["index_q"].grad.abs().sum() > 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_kl_is_zero_for_a_student_that_is_the_teacher(backend):
    case = layer(per_group=1, width=8, index_width=8, groups=1)
    _, lse = ops.dense_attention(case["q"], case["k"], case["v"])
    kl = ops.index_kl(case["q"], case["k"], lse, case["q"], case["k"], backend=backend)
    assert abs(kl.item()) < 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
def test_tiled_and_definition_have_gradients_by_finite_differences(backend):
    case = layer(length=20, width=4)
    ids = ops.select_blocks(case["index_q"], case["index_k"], block_size=4, top_k=2)
    inputs = [case[name].clone().requires_grad_() for name in "qkv"]

    def out(q, k, v):
        return ops.sparse_attention(q, k, v, ids, block_size=4, backend=backend)[0]

    assert torch.autograd.gradcheck(out, inputs)


def test_learned_coverage_is_one_for_the_oracle_and_about_zero_for_the_worst_choice():
    case = layer(length=256)
    common = {"block_size": 16, "top_k": 4}
    best = ops.select_by_mass(case["q"], case["k"], **common)
    measured = measure_selection(case["q"], case["k"], best, block_size=16)
    assert measured.learned_coverage == pytest.approx(1.0)
    assert measured.block_recall == measured.score_recall == pytest.approx(1.0)
    assert measured.coverage == pytest.approx(measured.oracle_coverage)
    assert 4 <= measured.tile_union <= 16

    only_local = torch.full_like(best, -1)
    only_local[..., 0] = torch.arange(256) // 16
    measured = measure_selection(case["q"], case["k"], only_local, block_size=16)
    assert measured.learned_coverage == pytest.approx(0.0, abs=1e-9)
    assert 0 < measured.coverage < measured.oracle_coverage


def test_measures_by_hand():
    """Two heads that share a group; four blocks of one token; masses written down."""
    probabilities = torch.tensor([[0.5, 0.1, 0.2, 0.2], [0.1, 0.1, 0.6, 0.2]], dtype=torch.float64)
    q = torch.zeros(1, 2, 4, 4, dtype=torch.float64)
    q[0, :, 3] = probabilities.log()
    k = torch.eye(4, dtype=torch.float64)[None, None]
    ids = torch.tensor([[0, -1], [0, 1], [1, 2], [0, 3]], dtype=torch.int32)[None, None]
    measured = measure_selection(q, k, ids, block_size=1, scale=1.0)
    # Query 2 sees three equal blocks: any choice is the best. Query 3: mass .3 .1 .4 .2, best {2, 3}.
    third = 1 / 3
    assert measured.coverage == pytest.approx((2 * third + 0.5) / 2)
    assert measured.oracle_coverage == pytest.approx((2 * third + 0.6) / 2)
    gained, possible = (third + 0.3), (third + 0.4)
    assert measured.learned_coverage == pytest.approx(gained / possible)
    assert measured.block_recall == pytest.approx((1 + 1) / 4)


def test_no_choice_no_measure():
    case = layer(length=30)
    ids = ops.select_blocks(case["index_q"], case["index_k"], block_size=16, top_k=2)
    assert measure_selection(case["q"], case["k"], ids, block_size=16) is None


def test_union_of_equal_and_of_disjoint_neighbours():
    ids = torch.zeros(1, 1, 32, 1, dtype=torch.int32)
    assert tile_union(ids) == 1
    ids[0, 0, :, 0] = torch.arange(32)
    assert tile_union(ids) == 16


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"backend": "flash"}, "backend='flash' is not one of auto, reference, torch, triton"),
        ({"precision": "int8"}, "precision='int8' is neither"),
        ({"top_k": 1, "local_blocks": 2}, "top_k=1 cannot hold 2 local"),
        ({"block_size": 0}, "block_size=0"),
        ({"query_offset": 1}, "query_offset=1: 20 queries from there on are more than the 20 keys"),
        ({"document_ids": torch.zeros(1, 3, dtype=torch.int32)}, "document_ids has shape"),
    ],
)
def test_wrong_arguments_are_named(change, words):
    case = layer(length=20)
    arguments = {"block_size": 16, "top_k": 2, **change}
    with pytest.raises(ValueError, match=words.replace("(", r"\(")):
        ops.select_blocks(case["index_q"], case["index_k"], **arguments)


def test_kl_of_a_part_of_a_row_is_refused():
    case = layer(length=20)
    _, lse = ops.dense_attention(case["q"], case["k"], case["v"])
    with pytest.raises(ValueError, match="5 queries and 20 keys: the KL is of whole rows"):
        ops.index_kl(
            case["q"][:, :, -5:],
            case["k"],
            lse[:, :, -5:],
            case["index_q"][:, :, -5:],
            case["index_k"],
        )


def test_an_index_head_per_group_is_asked_for():
    case = layer(length=20)
    one = {name: case[name][:, :, -1:] for name in ("q", "index_q")}
    with pytest.raises(ValueError, match="index_q has 1 heads and k has 2"):
        ops.sparse_decode(
            one["q"],
            case["k"],
            case["v"],
            one["index_q"][:, :1],
            case["index_k"],
            block_size=4,
            top_k=2,
        )


def test_union_is_counted_document_by_document():
    case = layer(length=64)
    ids = torch.zeros(1, 2, 64, 1, dtype=torch.int32)
    documents = (torch.arange(64) // 32).int()[None]
    measured = measure_selection(case["q"], case["k"], ids, block_size=16, document_ids=documents)
    assert measured.tile_union == 1
