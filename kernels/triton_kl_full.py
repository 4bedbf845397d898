"""KL over full rows (warm-up): value and both gradients, some tiles of query tokens at a time.

    _student     index scores only: the student's log-sum-exp
    _difference  per tile of tokens and keys: teacher, KL, and ds = p - t into a scratch of bounded size
    then dq_idx and dk_idx from the scratch, see triton_kl_gradients.py

Four warps are a program of the first two, so that several share a multiprocessor: where one waits for its
exponentials, another has the tensor cores. ds through a scratch, and not both products where ds is made:
there the accumulators leave registers for one program only, and dk_idx needs atomics. There are none here:
two runs give the same bits.

Called by triton_kl.py. Shapes: B batch, H query heads, G groups (= index heads), R = H / G, T = S tokens, L
tiles of query tokens, M of them taken. Equations: triton_kl_tile.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_kl_gradients import (
    key_gradient_kernel,
    query_bounds,
    query_gradient_kernel,
    tile_bounds,
)
from .triton_kl_tile import LEAST, fast_log2, load_keys, load_rows, teacher_tile
from .triton_support import (
    Launch,
    float32_launch,
    interpreting,
    padded_width,
    spills_less,
    target_arch,
)

SCRATCH_BYTES = 512 << 20
"""Size that the scratch aims at; one tile of all groups is the least."""
PIECE_TOKENS = 4096
"""Keys that one program of dq_idx sums over."""
PROGRAMS = 512
"""Of dk_idx, if there are few keys: then several programs share the groups."""
LOWEST = tl.constexpr(-1.0e30)
"""Stands for log 0: exp2 of it is 0, and 0 times it is 0."""


@dataclass(frozen=True)
class FullLaunch:
    """How the kernels of full rows are cut; the numbers never change a result beyond rounding."""

    tile: int
    """Query tokens that are sampled together; a multiple of each `rows`."""
    student: Launch
    difference: Launch
    query: Launch
    key: Launch
    """Those of the gradients have `keys` that divide those of `difference`: what it leaves unwritten, they
    do not read.
    """


@triton.jit
def _support(
    starts, batch, first_query, first, num_tokens,
    ROWS: tl.constexpr, KEYS: tl.constexpr, DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """[ROWS, KEYS] from `first_query` and key `first` on: causal, one document, and a row that exists."""
    slot = tl.arange(0, ROWS)
    key = first - first_query + tl.arange(0, KEYS)
    valid = slot < num_tokens - first_query
    support = (key[None, :] <= slot[:, None]) & valid[:, None]
    if DOCUMENTS:
        start = tl.load(starts + batch * num_tokens + first_query + slot, mask=valid, other=0)
        support = support & (key[None, :] >= (start - first_query)[:, None])
    return support


@triton.jit
def _all_past(starts, batch, first_query, num_tokens, ROWS: tl.constexpr, DOCUMENTS: tl.constexpr):
    """Bounds of the keys that every one of ROWS queries sees: none if some of the rows do not exist."""
    begin, end = 0, first_query + 1
    if first_query + ROWS > num_tokens:
        end = 0
    if DOCUMENTS:
        # Starts ascend.
        last = tl.minimum(first_query + (ROWS - 1), num_tokens - 1)
        begin = tl.load(starts + batch * num_tokens + last)
    return begin, end


@triton.jit(do_not_specialize=["stride_tiles", "groups", "num_tokens"])
def _student(
    index_queries, index_keys, index_lse, starts, tiles,
    stride_iqb, stride_iqg, stride_iqt, stride_ikb, stride_ik, stride_tiles,
    groups, num_tokens, scale,
    TILE: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    INDEX: tl.constexpr, INDEX_P: tl.constexpr, DOCUMENTS: tl.constexpr,
):  # fmt: skip
    PARTS: tl.constexpr = TILE // ROWS
    # The last tiles meet the most keys: they go first.
    part = tl.num_programs(0) - 1 - tl.program_id(0)
    plane = tl.program_id(1).to(tl.int64)
    batch, group = plane // groups, plane % groups
    first_query = tl.load(tiles + batch * stride_tiles + part // PARTS) * TILE
    first_query += (part % PARTS) * ROWS
    slot = tl.arange(0, ROWS)
    # Rows past the end are read as the last row, and never stored.
    row = tl.minimum(slot, num_tokens - 1 - first_query)
    valid = first_query + slot < num_tokens
    index_queries += batch * stride_iqb + group * stride_iqg + first_query.to(tl.int64) * stride_iqt
    index_q = load_rows(index_queries, row, stride_iqt, INDEX, INDEX_P)
    index_keys += batch * stride_ikb
    row_max = tl.full([ROWS], LOWEST, tl.float32)
    row_sum = tl.zeros([ROWS], tl.float32)
    begin, end = tile_bounds(starts, batch, first_query, num_tokens, ROWS, DOCUMENTS)
    past_begin, past_end = _all_past(starts, batch, first_query, num_tokens, ROWS, DOCUMENTS)
    for step in range(begin // KEYS, tl.cdiv(end, KEYS)):
        first = step * KEYS
        index_k = load_keys(index_keys, first, stride_ik, num_tokens, KEYS, INDEX, INDEX_P)
        scores = tl.dot(index_q, tl.trans(index_k), input_precision="ieee")
        if (first < past_begin) | (first + KEYS > past_end):
            support = _support(starts, batch, first_query, first, num_tokens, ROWS, KEYS, DOCUMENTS)
            scores = tl.where(support, scores, float("-inf"))
        # The scale is not negative.
        new_max = tl.maximum(row_max, tl.max(scores, axis=1) * scale)
        row_sum *= tl.math.exp2(row_max - new_max)
        row_sum += tl.sum(tl.math.exp2(scores * scale - new_max[:, None]), axis=1)
        row_max = new_max
    to = index_lse + plane * num_tokens + first_query + slot
    tl.store(to, row_max + tl.math.log2(tl.maximum(row_sum, LEAST)), mask=valid)


@triton.jit(do_not_specialize=["stride_tiles", "first_place", "groups", "num_tokens", "repeats"])
def _difference(
    queries, keys, lse, index_queries, index_keys, index_lse, starts, tiles, divergences, scratch,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kg, stride_k,
    stride_iqb, stride_iqg, stride_iqt, stride_ikb, stride_ik, stride_tiles, stride_sp, stride_st,
    first_place, groups, num_tokens, repeats, scale, index_scale,
    TILE: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    WIDTH: tl.constexpr, WIDTH_P: tl.constexpr, INDEX: tl.constexpr, INDEX_P: tl.constexpr,
    GRAD: tl.constexpr, DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """KL of ROWS tokens over KEYS keys, and p - t: (B * G, chunk's tokens, S) in the inputs' dtype."""
    PARTS: tl.constexpr = TILE // ROWS
    # Neighbouring programs share the keys, and those that run together the heads' queries.
    part, first = tl.program_id(0), tl.program_id(1) * KEYS
    # 32 bits: what is needed after the loop of heads stays in registers.
    plane = tl.program_id(2)
    batch, group = plane // groups, plane % groups
    first_query = (
        tl.load(tiles + batch.to(tl.int64) * stride_tiles + first_place + part // PARTS) * TILE
    )
    begin, end = tile_bounds(starts, batch, first_query, num_tokens, TILE, DOCUMENTS)
    first_query += (part % PARTS) * ROWS
    total = 0.0
    # The readers of the scratch leave out the same tiles.
    if (first < end) & (first + KEYS > begin):
        slot = tl.arange(0, ROWS)
        # A part of a tile may begin past the last token.
        row = tl.minimum(slot, num_tokens - 1 - first_query)
        base = first_query.to(tl.uint32).to(tl.int64)  # a known upper half needs no register
        keys += batch.to(tl.int64) * stride_kb + group.to(tl.int64) * stride_kg
        k = tl.trans(load_keys(keys, first, stride_k, num_tokens, KEYS, WIDTH, WIDTH_P))
        teacher = teacher_tile(
            k, queries + batch.to(tl.int64) * stride_qb + base * stride_qt,
            lse + (batch * groups * repeats).to(tl.int64) * num_tokens + base,
            row, (group * repeats).to(tl.int64), repeats, stride_qh, stride_qt, num_tokens, scale,
            WIDTH, WIDTH_P,
        )  # fmt: skip
        # Bounds of their own: the same ones would be kept in registers over the loop of heads.
        row = tl.minimum(slot, tl.minimum(num_tokens - first_query, ROWS) - 1)
        index_queries += batch.to(tl.int64) * stride_iqb + group.to(tl.int64) * stride_iqg
        index_queries += base * stride_iqt
        index_q = load_rows(index_queries, row, stride_iqt, INDEX, INDEX_P)
        index_keys += batch.to(tl.int64) * stride_ikb
        bound = tl.minimum(num_tokens, first + KEYS)
        index_k = load_keys(index_keys, first, stride_ik, bound, KEYS, INDEX, INDEX_P)
        log_student = tl.dot(index_q, tl.trans(index_k), input_precision="ieee") * index_scale
        log_student -= tl.load(index_lse + plane.to(tl.int64) * num_tokens + base + row)[:, None]
        past_begin, past_end = _all_past(starts, batch, first_query, num_tokens, ROWS, DOCUMENTS)
        if (first < past_begin) | (first + KEYS > past_end):
            support = _support(starts, batch, first_query, first, num_tokens, ROWS, KEYS, DOCUMENTS)
            # Outside the support the teacher may be infinite.
            teacher = tl.where(support, teacher, 0.0)
            log_student = tl.where(support, log_student, LOWEST)
        # t log t is 0 at t = 0.
        log_teacher = fast_log2(tl.maximum(teacher, LEAST))
        total = tl.sum(teacher * (log_teacher - log_student))
        if GRAD:
            difference = tl.math.exp2(log_student) - teacher
            to = scratch + plane.to(tl.int64) * stride_sp + (part * ROWS).to(tl.int64) * stride_st
            to += slot[:, None] * stride_st + (first + tl.arange(0, KEYS))[None, :]
            tl.store(to, difference.to(scratch.dtype.element_ty))
    at = (plane.to(tl.int64) * tl.num_programs(1) + first // KEYS) * tl.num_programs(0) + part
    tl.store(divergences + at, total)


def default_launch(width: int, index_width: int, dtype: torch.dtype) -> FullLaunch:
    """Tile sizes that compile without spills (benchmarks/codegen.py)."""
    if dtype == torch.float32 and interpreting():
        large = replace(float32_launch(), rows=32)
        return FullLaunch(tile=32, student=large, difference=large, query=large, key=large)
    if dtype == torch.float32:
        small = Launch(rows=16, keys=16, num_warps=8, num_stages=1)
        return FullLaunch(
            tile=32,
            student=Launch(rows=32, keys=16, num_warps=4, num_stages=1),
            difference=Launch(rows=32, keys=32, num_warps=4, num_stages=1),
            query=small,
            key=small,
        )
    # Of the queries of one head and the keys, `keys` decides how much is read for a product.
    # Three programs a multiprocessor take a tenth less time on an H100 (h100-sweep-5808e4d.json), where the
    # compiler fits them: Triton 3.9 spills some bytes outside the loop of heads.
    three = 3 if target_arch() == 90 and spills_less() and width == 128 else None
    difference = Launch(rows=64, keys=128, num_warps=4, num_stages=2, programs=three)
    if padded_width(width) > 128:
        difference = Launch(rows=64, keys=64, num_warps=4, num_stages=2)
    return FullLaunch(
        tile=128,
        student=Launch(rows=128, keys=64, num_warps=4, num_stages=2),
        difference=difference,
        # The gradients wait for memory: large tiles read index q and k less often.
        query=Launch(rows=128, keys=64, num_warps=8, num_stages=3),
        key=Launch(rows=64, keys=min(128, difference.keys), num_warps=8, num_stages=3),
    )


@dataclass(frozen=True)
class FullRows:
    """Inputs of full_kl, ready for the kernels."""

    q: Tensor
    k: Tensor
    lse: Tensor
    index_q: Tensor
    index_k: Tensor
    starts: Tensor | None
    tiles: Tensor
    launch: FullLaunch

    def run(
        self, scale: float, index_scale: float, need_grad: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Sum of the KL in log2 units; dq_idx (B, G, M, tile * D_idx) and dk_idx (B, 1, S, D_idx)."""
        batch, groups, num_tokens, index_width = self.index_q.shape
        launch, num_taken = self.launch, self.tiles.shape[1]
        new: dict[str, Any] = {"dtype": torch.float32, "device": self.q.device}
        index_lse = self._student_lse(index_scale)
        chunks = list(self._chunks())
        rows = batch * groups * launch.tile
        largest = max(rows * (last - first) * wide for first, last, wide in chunks)
        buffer = self.q.new_empty(largest if need_grad else 1)
        total = torch.zeros((), dtype=torch.float64, device=self.q.device)
        grad_q = grad_k = bounds = None
        if need_grad:
            grad_q = torch.empty(batch, groups, num_taken, launch.tile * index_width, **new)
            splits = self._splits()
            grad_k = torch.zeros(splits, batch, 1, num_tokens, index_width, **new)
            bounds = query_bounds(self.tiles, self.starts, num_tokens, launch.tile, launch.key.keys)
        for first, last, wide in chunks:
            scratch = buffer
            if need_grad:
                scratch = buffer[: rows * (last - first) * wide].view(batch * groups, -1, wide)
            total += self._differences(
                first, last, wide, index_lse, scratch, scale, index_scale, need_grad
            )
            if grad_q is not None and grad_k is not None and bounds is not None:
                partial = self._query_gradients(first, last, wide, scratch)
                torch.sum(partial, dim=0, out=grad_q[:, :, first:last])
                self._key_gradients(first, last, wide, scratch, grad_k, *bounds)
        return total, grad_q, None if grad_k is None else grad_k.sum(dim=0)

    def _chunks(self) -> Iterator[tuple[int, int, int]]:
        """First place, past the last, and the keys that they see, in whole steps of every kernel."""
        batch, groups, num_tokens, _ = self.index_q.shape
        launch, num_taken = self.launch, self.tiles.shape[1]
        num_tiles = triton.cdiv(num_tokens, launch.tile)
        step = max(launch.difference.keys, launch.query.keys, launch.key.keys)

        def wide(last: int) -> int:
            # Tiles ascend, so place i holds at most tile num_tiles - num_taken + i.
            end = min(num_tokens, (num_tiles - num_taken + last) * launch.tile)
            return triton.cdiv(end, step) * step

        first, row_bytes = 0, batch * groups * launch.tile * self.q.element_size()
        for last in range(1, num_taken + 1):
            if (last == num_taken) or (
                (last + 1 - first) * row_bytes * wide(last + 1) > SCRATCH_BYTES
            ):
                yield first, last, wide(last)
                first = last

    def _splits(self) -> int:
        """Programs that share the groups of one tile of keys: as many as a divisor of the groups allows."""
        batch, groups, num_tokens, _ = self.index_q.shape
        programs = batch * triton.cdiv(num_tokens, self.launch.key.keys)
        fitting = (n for n in range(1, groups + 1) if groups % n == 0 and n * programs <= PROGRAMS)
        return max(fitting, default=1)

    def _student_lse(self, index_scale: float) -> Tensor:
        """(B, G, T) float32 in log2 units; tiles that are not taken are not set."""
        launch, tile = self.launch.student, self.launch.tile
        batch, groups, num_tokens, index_width = self.index_q.shape
        index_lse = torch.empty(
            batch, groups, num_tokens, dtype=torch.float32, device=self.q.device
        )
        _student[(self.tiles.shape[1] * (tile // launch.rows), batch * groups)](
            self.index_q, self.index_k, index_lse, self.starts, self.tiles,
            *self.index_q.stride()[:3], self.index_k.stride(0), self.index_k.stride(2),
            self.tiles.stride(0), groups, num_tokens, index_scale,
            TILE=tile, ROWS=launch.rows, KEYS=launch.keys,
            INDEX=index_width, INDEX_P=padded_width(index_width), DOCUMENTS=self.starts is not None,
            **launch.options,
        )  # fmt: skip
        return index_lse

    def _differences(
        self, first: int, last: int, wide: int, index_lse: Tensor, scratch: Tensor,
        scale: float, index_scale: float, need_grad: bool,
    ) -> Tensor:  # fmt: skip
        launch, tile = self.launch.difference, self.launch.tile
        batch, groups, num_tokens, index_width = self.index_q.shape
        heads, width = self.q.shape[1], self.q.shape[3]
        grid = (
            (last - first) * (tile // launch.rows),
            triton.cdiv(wide, launch.keys),
            batch * groups,
        )
        divergences = torch.empty(grid, dtype=torch.float32, device=self.q.device)
        strides = scratch.stride()[:2] if need_grad else (0, 0)
        _difference[grid](
            self.q, self.k, self.lse, self.index_q, self.index_k, index_lse, self.starts, self.tiles,
            divergences, scratch,
            *self.q.stride()[:3], *self.k.stride()[:3], *self.index_q.stride()[:3],
            self.index_k.stride(0), self.index_k.stride(2), self.tiles.stride(0), *strides,
            first, groups, num_tokens, heads // groups, scale, index_scale,
            TILE=tile, ROWS=launch.rows, KEYS=launch.keys,
            WIDTH=width, WIDTH_P=padded_width(width), INDEX=index_width, INDEX_P=padded_width(index_width),
            GRAD=need_grad, DOCUMENTS=self.starts is not None, **launch.options,
        )  # fmt: skip
        return divergences.sum(dtype=torch.float64)

    def _query_gradients(self, first: int, last: int, wide: int, scratch: Tensor) -> Tensor:
        """Of each piece of keys: (pieces, B, G, last - first, tile * D_idx) float32, not scaled."""
        launch, tile = self.launch.query, self.launch.tile
        batch, groups, num_tokens, index_width = self.index_q.shape
        grid = (
            (last - first) * (tile // launch.rows),
            triton.cdiv(wide, PIECE_TOKENS),
            batch * groups,
        )
        partial = torch.empty(
            grid[1], batch, groups, last - first, tile * index_width,
            dtype=torch.float32, device=self.q.device,
        )  # fmt: skip
        query_gradient_kernel[grid](
            scratch, self.index_k, self.starts, self.tiles, partial,
            self.index_k.stride(0), self.index_k.stride(2), self.tiles.stride(0), *scratch.stride()[:2],
            first, groups, num_tokens,
            TILE=tile, ROWS=launch.rows, KEYS=launch.keys, PIECE=PIECE_TOKENS,
            INDEX=index_width, INDEX_P=padded_width(index_width), DOCUMENTS=self.starts is not None,
            **launch.options,
        )  # fmt: skip
        return partial

    def _key_gradients(
        self, first: int, last: int, wide: int, scratch: Tensor,
        grad_k: Tensor, begins: Tensor, ends: Tensor,
    ) -> None:  # fmt: skip
        launch, splits = self.launch.key, grad_k.shape[0]
        batch, groups, num_tokens, index_width = self.index_q.shape
        # The scratch may be a step wider than the keys, of which `begins` knows no more.
        grid = (triton.cdiv(min(wide, num_tokens), launch.keys), batch, splits)
        key_gradient_kernel[grid](
            scratch, self.index_q, self.tiles, begins, ends, grad_k,
            *self.index_q.stride()[:3], self.tiles.stride(0), begins.stride(0), *scratch.stride()[:2],
            *grad_k.stride()[:2], first, last, groups, num_tokens, groups // splits,
            TILE=self.launch.tile, ROWS=launch.rows, KEYS=launch.keys,
            INDEX=index_width, INDEX_P=padded_width(index_width),
            **launch.options,
        )  # fmt: skip
