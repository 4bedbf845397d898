"""Operations of attention by formula: the published ratios, and a mean by hand."""

from __future__ import annotations

import pytest

from dense2sparse.eval.report_arithmetic import dense_per_token, mean_keys, sparse_per_token


def test_operations_are_those_of_the_published_ratios():
    """64 query heads of width 128, 4 index heads, 16 blocks of 128: 6.4 times fewer at 32K, 16 at 128K."""
    shape = {"layers": 1, "sparse_layers": 1, "query_heads": 64, "head_width": 128}
    shape |= {"index_heads": 4, "index_width": 128, "block_size": 128}
    for length, ratio in ((32768, 6.4), (131072, 16.0)):
        found = dense_per_token(shape, length) / sparse_per_token(shape, length, 16)
        assert found == pytest.approx(ratio, rel=0.03)
    assert sparse_per_token(shape, 2048, 16) == dense_per_token(shape, 2048), "nothing to choose"


@pytest.mark.parametrize(("length", "budget"), [(1, 4), (4, 4), (9, 4), (50, 16)])
def test_mean_keys_is_the_mean_over_positions(length, budget):
    expected = sum(min(position + 1, budget) for position in range(length)) / length
    assert mean_keys(length, budget) == pytest.approx(expected)
