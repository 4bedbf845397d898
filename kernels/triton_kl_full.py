"""KL over full rows (warm-up): value and both gradients, some tiles of query tokens at a time.

    _student         index scores only: the student's log-sum-exp
    _difference      per tile of tokens and keys: teacher, KL, and ds = p - t into a scratch of bounded size
    _query_gradient  dq_idx = ds k_idx, from the scratch
    _key_gradient    dk_idx += ds^T q_idx, from the scratch, summed over groups

ds through a scratch, and not both products where ds is made: there the two accumulators leave registers for
steps of 32 keys only, which read the heads' queries from the cache too often, and dk_idx needs atomics.
There are no atomics here: two runs give the same bits.

Called by triton_kl.py. Shapes: B batch, H query heads, G groups (= index heads), R = H / G, T = S tokens, L
tiles of query tokens, M of them taken. Equations: triton_kl_tile.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_kl_tile import (
    divergence_and_difference,
    load_keys,
    load_rows,
    student_lse,
    student_step,
    teacher_tile,
)
from .triton_support import Launch, float32_launch, interpreting, padded_width, shared_by

SCRATCH_BYTES = 512 << 20
"""Size that the scratch aims at; one tile of all groups is the least."""
PIECE_TOKENS = 4096
"""Keys that one program of dq_idx sums over."""


@dataclass(frozen=True)
class FullLaunch:
    """How the kernels of full rows are cut; the numbers never change a result beyond rounding."""

    tile: int
    """Query tokens that are sampled and kept in the scratch together; a multiple of each `rows`."""
    student: Launch
    difference: Launch
    gradient: Launch
    """`keys` divide those of `difference`: what one tile leaves unwritten, no other reads."""


@triton.jit
def _tile_bounds(
    starts, batch, first_query, num_tokens, TILE: tl.constexpr, DOCUMENTS: tl.constexpr
):
    """First and past-the-last key that a tile of TILE queries may see."""
    begin = 0
    if DOCUMENTS:
        begin = tl.load(starts + batch * num_tokens + first_query)
    return begin, tl.minimum(first_query + TILE, num_tokens)


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


@triton.jit(do_not_specialize=["num_tokens"])
def _student(
    index_queries, index_keys, index_lse, starts, tiles,
    stride_iqb, stride_iqg, stride_iqt, stride_ikb, stride_ik, stride_tiles,
    groups, num_tokens, scale,
    ROWS: tl.constexpr, KEYS: tl.constexpr, INDEX: tl.constexpr, INDEX_P: tl.constexpr,
    DOCUMENTS: tl.constexpr,
):  # fmt: skip
    # The last tiles meet the most keys: they go first.
    place = tl.num_programs(0) - 1 - tl.program_id(0)
    plane = tl.program_id(1).to(tl.int64)
    batch, group = plane // groups, plane % groups
    first_query = tl.load(tiles + batch * stride_tiles + place) * ROWS
    slot = tl.arange(0, ROWS)
    # Rows past the end are read as the last row, and never stored.
    row = tl.minimum(slot, num_tokens - 1 - first_query)
    valid = first_query + slot < num_tokens
    index_queries += batch * stride_iqb + group * stride_iqg + first_query.to(tl.int64) * stride_iqt
    index_q = load_rows(index_queries, row, stride_iqt, INDEX, INDEX_P)
    index_keys += batch * stride_ikb
    row_max = tl.full([ROWS], float("-inf"), tl.float32)
    row_sum = tl.zeros([ROWS], tl.float32)
    begin, end = _tile_bounds(starts, batch, first_query, num_tokens, ROWS, DOCUMENTS)
    for step in range(begin // KEYS, tl.cdiv(end, KEYS)):
        first = step * KEYS
        index_k = load_keys(index_keys, first, stride_ik, num_tokens, KEYS, INDEX, INDEX_P)
        support = _support(starts, batch, first_query, first, num_tokens, ROWS, KEYS, DOCUMENTS)
        row_max, row_sum = student_step(row_max, row_sum, index_q, index_k, support, scale)
    to = index_lse + plane * num_tokens + first_query + slot
    tl.store(to, student_lse(row_max, row_sum), mask=valid)


@triton.jit(do_not_specialize=["first_place", "num_tokens"])
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
    # Neighbouring programs share the heads' queries.
    first = tl.program_id(0) * KEYS
    plane = tl.program_id(2).to(tl.int64)
    batch, group = plane // groups, plane % groups
    place = tl.program_id(1) // PARTS
    first_query = tl.load(tiles + batch * stride_tiles + first_place + place) * TILE
    begin, end = _tile_bounds(starts, batch, first_query, num_tokens, TILE, DOCUMENTS)
    first_query += (tl.program_id(1) % PARTS) * ROWS
    total = 0.0
    # The readers of the scratch leave out the same tiles.
    if (first < end) & (first + KEYS > begin):
        slot = tl.arange(0, ROWS)
        # A part of a tile may begin past the last token.
        row = tl.minimum(slot, num_tokens - 1 - first_query)
        base = first_query.to(tl.int64)
        keys += batch * stride_kb + group * stride_kg
        k = tl.trans(load_keys(keys, first, stride_k, num_tokens, KEYS, WIDTH, WIDTH_P))
        teacher = teacher_tile(
            k, queries + batch * stride_qb + base * stride_qt,
            lse + batch * groups * repeats * num_tokens + base,
            row, group * repeats, repeats, stride_qh, stride_qt, num_tokens, scale, WIDTH, WIDTH_P,
        )  # fmt: skip
        index_queries += batch * stride_iqb + group * stride_iqg + base * stride_iqt
        index_q = load_rows(index_queries, row, stride_iqt, INDEX, INDEX_P)
        index_keys += batch * stride_ikb
        index_k = load_keys(index_keys, first, stride_ik, num_tokens, KEYS, INDEX, INDEX_P)
        log_student = tl.dot(index_q, tl.trans(index_k), input_precision="ieee") * index_scale
        log_student -= tl.load(index_lse + plane * num_tokens + base + row)[:, None]
        support = _support(starts, batch, first_query, first, num_tokens, ROWS, KEYS, DOCUMENTS)
        divergence, difference = divergence_and_difference(teacher, log_student, support)
        total = tl.sum(divergence)
        if GRAD:
            to = scratch + plane * stride_sp + (tl.program_id(1) * ROWS).to(tl.int64) * stride_st
            to += slot[:, None] * stride_st + (first + tl.arange(0, KEYS))[None, :]
            tl.store(to, difference.to(scratch.dtype.element_ty))
    programs = tl.num_programs(0)
    at = (plane * tl.num_programs(1) + tl.program_id(1)) * programs + tl.program_id(0)
    tl.store(divergences + at, total)


@triton.jit(do_not_specialize=["first_place", "num_tokens"])
def _query_gradient(
    scratch, index_keys, starts, tiles, partial,
    stride_ikb, stride_ik, stride_tiles, stride_sp, stride_st,
    first_place, groups, num_tokens,
    ROWS: tl.constexpr, KEYS: tl.constexpr, PIECE: tl.constexpr,
    INDEX: tl.constexpr, INDEX_P: tl.constexpr, DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """ds k_idx over PIECE keys: (pieces, B * G, chunk's tokens, INDEX) float32; zero if none is seen."""
    piece, place = tl.program_id(0), tl.program_id(1)
    plane = tl.program_id(2).to(tl.int64)
    batch = plane // groups
    first_query = tl.load(tiles + batch * stride_tiles + first_place + place) * ROWS
    begin, end = _tile_bounds(starts, batch, first_query, num_tokens, ROWS, DOCUMENTS)
    begin = tl.maximum(begin, piece * PIECE) // KEYS
    end = tl.cdiv(tl.minimum(end, piece * PIECE + PIECE), KEYS)
    slot = tl.arange(0, ROWS)
    scratch += plane * stride_sp + (place * ROWS).to(tl.int64) * stride_st
    index_keys += batch * stride_ikb
    acc = tl.zeros([ROWS, INDEX_P], tl.float32)
    for step in range(begin, end):
        first = step * KEYS
        position = first + tl.arange(0, KEYS)
        difference = tl.load(scratch + (slot[:, None] * stride_st + position[None, :]))
        index_k = load_keys(index_keys, first, stride_ik, num_tokens, KEYS, INDEX, INDEX_P)
        acc = tl.dot(difference, index_k, acc, input_precision="ieee")
    channel = tl.arange(0, INDEX_P)
    at = (piece * tl.num_programs(2) + plane) * tl.num_programs(1) + place
    to = partial + at * (ROWS * INDEX) + (slot[:, None] * INDEX + channel[None, :])
    tl.store(to, acc, mask=(channel < INDEX)[None, :])


@triton.jit(do_not_specialize=["first_place", "last_place", "num_tokens"])
def _key_gradient(
    scratch, index_queries, tiles, begins, ends, grad_k,
    stride_iqb, stride_iqg, stride_iqt, stride_tiles, stride_bounds, stride_sp, stride_st, stride_gb,
    first_place, last_place, groups, num_tokens,
    TILE: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    INDEX: tl.constexpr, INDEX_P: tl.constexpr,
):  # fmt: skip
    """Adds ds^T q_idx of the places first_place .. last_place - 1 to KEYS rows of grad_k, float32."""
    PARTS: tl.constexpr = TILE // ROWS
    key_tile = tl.program_id(0)
    batch = tl.program_id(1).to(tl.int64)
    bounds = batch * stride_bounds + key_tile
    begin = tl.maximum(tl.load(begins + bounds), first_place)
    end = tl.minimum(tl.load(ends + bounds), last_place)
    position = key_tile * KEYS + tl.arange(0, KEYS)
    slot = tl.arange(0, ROWS)
    channel = tl.arange(0, INDEX_P)
    to = grad_k + batch * stride_gb + (key_tile * KEYS).to(tl.int64) * INDEX
    to += tl.arange(0, KEYS)[:, None] * INDEX + channel[None, :]
    mask = (position < num_tokens)[:, None] & (channel < INDEX)[None, :]
    acc = tl.load(to, mask=mask, other=0.0)
    for group in range(groups):
        plane = batch * groups + group
        for step in range(begin * PARTS, end * PARTS):
            place = step // PARTS
            first_query = (
                tl.load(tiles + batch * stride_tiles + place) * TILE + (step % PARTS) * ROWS
            )
            # Rows past the end have a difference of 0.
            row = tl.minimum(slot, num_tokens - 1 - first_query)
            base = batch * stride_iqb + group * stride_iqg + first_query.to(tl.int64) * stride_iqt
            index_q = load_rows(index_queries + base, row, stride_iqt, INDEX, INDEX_P)
            at = plane * stride_sp + ((step - first_place * PARTS) * ROWS).to(tl.int64) * stride_st
            difference = tl.load(scratch + at + (slot[:, None] * stride_st + position[None, :]))
            acc = tl.dot(tl.trans(difference), index_q, acc, input_precision="ieee")
    tl.store(to, acc, mask=mask)


def default_launch(width: int, index_width: int, dtype: torch.dtype) -> FullLaunch:
    """Tile sizes that compile without spills (benchmarks/codegen.py)."""
    if dtype == torch.float32 and interpreting():
        large = replace(float32_launch(), rows=32)
        return FullLaunch(tile=large.rows, student=large, difference=large, gradient=large)
    if dtype == torch.float32:
        small = Launch(rows=32, keys=16, num_warps=4, num_stages=1)
        return FullLaunch(
            tile=32,
            student=small,
            difference=Launch(rows=32, keys=32, num_warps=4, num_stages=1),
            gradient=Launch(rows=16, keys=16, num_warps=8, num_stages=1),
        )
    # Of queries and keys of one head, `keys` decides how much is read for a product. Two programs a
    # multiprocessor: one takes exponentials while the other multiplies.
    difference = Launch(rows=64, keys=128, num_warps=8, num_stages=3, programs=shared_by(2))
    if padded_width(width) > 128:
        difference = Launch(rows=64, keys=128, num_warps=8, num_stages=1)
    elif difference.programs is None:
        difference = replace(difference, num_stages=2)
    return FullLaunch(
        tile=128,
        student=Launch(rows=128, keys=64, num_warps=8, num_stages=2),
        difference=difference,
        gradient=Launch(rows=64, keys=64, num_warps=8, num_stages=2),
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
        # Rows of the scratch hold whole key tiles of every kernel, so that none needs a mask.
        step = max(launch.difference.keys, launch.gradient.keys)
        padded = triton.cdiv(num_tokens, step) * step
        tile_bytes = batch * groups * launch.tile * padded * self.q.element_size()
        places = min(num_taken, max(1, SCRATCH_BYTES // tile_bytes))
        scratch = self.q.new_empty(
            (batch * groups, places * launch.tile, padded) if need_grad else (1, 1, 1)
        )
        total = torch.zeros((), dtype=torch.float64, device=self.q.device)
        grad_q = grad_k = bounds = None
        if need_grad:
            grad_q = torch.empty(batch, groups, num_taken, launch.tile * index_width, **new)
            grad_k = torch.zeros(batch, 1, num_tokens, index_width, **new)
            bounds = query_bounds(
                self.tiles, self.starts, num_tokens, launch.tile, launch.gradient.keys
            )
        num_tiles = triton.cdiv(num_tokens, launch.tile)
        for first in range(0, num_taken, places):
            last = min(first + places, num_taken)
            # Tiles ascend, so place i holds at most tile num_tiles - num_taken + i.
            end = min(num_tokens, (num_tiles - num_taken + last) * launch.tile)
            total += self._differences(
                first, last, end, index_lse, scratch, scale, index_scale, need_grad
            )
            if grad_q is not None and grad_k is not None and bounds is not None:
                grad_q[:, :, first:last] = self._query_gradients(first, last, end, scratch)
                self._key_gradients(first, last, end, scratch, grad_k, *bounds)
        return total, grad_q, grad_k

    def _student_lse(self, index_scale: float) -> Tensor:
        """(B, G, T) float32 in log2 units; tiles that are not taken are not set."""
        launch = self.launch.student
        batch, groups, num_tokens, index_width = self.index_q.shape
        index_lse = torch.empty(
            batch, groups, num_tokens, dtype=torch.float32, device=self.q.device
        )
        _student[(self.tiles.shape[1], batch * groups)](
            self.index_q, self.index_k, index_lse, self.starts, self.tiles,
            *self.index_q.stride()[:3], self.index_k.stride(0), self.index_k.stride(2),
            self.tiles.stride(0), groups, num_tokens, index_scale,
            ROWS=self.launch.tile, KEYS=launch.keys, INDEX=index_width, INDEX_P=padded_width(index_width),
            DOCUMENTS=self.starts is not None,
            **launch.options,
        )  # fmt: skip
        return index_lse

    def _differences(
        self, first: int, last: int, end: int, index_lse: Tensor, scratch: Tensor,
        scale: float, index_scale: float, need_grad: bool,
    ) -> Tensor:  # fmt: skip
        launch = self.launch.difference
        batch, groups, num_tokens, index_width = self.index_q.shape
        heads, width = self.q.shape[1], self.q.shape[3]
        parts = self.launch.tile // launch.rows
        grid = (triton.cdiv(end, launch.keys), (last - first) * parts, batch * groups)
        divergences = torch.empty(grid, dtype=torch.float32, device=self.q.device)
        _difference[grid](
            self.q, self.k, self.lse, self.index_q, self.index_k, index_lse, self.starts, self.tiles,
            divergences, scratch,
            *self.q.stride()[:3], *self.k.stride()[:3], *self.index_q.stride()[:3],
            self.index_k.stride(0), self.index_k.stride(2), self.tiles.stride(0), *scratch.stride()[:2],
            first, groups, num_tokens, heads // groups, scale, index_scale,
            TILE=self.launch.tile, ROWS=launch.rows, KEYS=launch.keys,
            WIDTH=width, WIDTH_P=padded_width(width), INDEX=index_width, INDEX_P=padded_width(index_width),
            GRAD=need_grad, DOCUMENTS=self.starts is not None,
            **launch.options,
        )  # fmt: skip
        return divergences.sum(dtype=torch.float64)

    def _query_gradients(self, first: int, last: int, end: int, scratch: Tensor) -> Tensor:
        """(B, G, last - first, tile * D_idx) float32, not scaled."""
        launch = self.launch.gradient
        batch, groups, num_tokens, index_width = self.index_q.shape
        tile = self.launch.tile
        grid = (triton.cdiv(end, PIECE_TOKENS), last - first, batch * groups)
        partial = torch.empty(
            grid[0], batch, groups, last - first, tile * index_width,
            dtype=torch.float32, device=self.q.device,
        )  # fmt: skip
        _query_gradient[grid](
            scratch, self.index_k, self.starts, self.tiles, partial,
            self.index_k.stride(0), self.index_k.stride(2), self.tiles.stride(0), *scratch.stride()[:2],
            first, groups, num_tokens,
            ROWS=tile, KEYS=launch.keys, PIECE=PIECE_TOKENS,
            INDEX=index_width, INDEX_P=padded_width(index_width), DOCUMENTS=self.starts is not None,
            **launch.options,
        )  # fmt: skip
        return partial.sum(dim=0)

    def _key_gradients(
        self, first: int, last: int, end: int, scratch: Tensor,
        grad_k: Tensor, begins: Tensor, ends: Tensor,
    ) -> None:  # fmt: skip
        launch = self.launch.gradient
        batch, groups, num_tokens, index_width = self.index_q.shape
        _key_gradient[(triton.cdiv(end, launch.keys), batch)](
            scratch, self.index_q, self.tiles, begins, ends, grad_k,
            *self.index_q.stride()[:3], self.tiles.stride(0), begins.stride(0), *scratch.stride()[:2],
            grad_k.stride(0), first, last, groups, num_tokens,
            TILE=self.launch.tile, ROWS=launch.rows, KEYS=launch.keys,
            INDEX=index_width, INDEX_P=padded_width(index_width),
            **launch.options,
        )  # fmt: skip


def query_bounds(
    tiles: Tensor, starts: Tensor | None, num_tokens: int, tile: int, keys: int
) -> tuple[Tensor, Tensor]:
    """First of `tiles` that sees each key tile, and past the last: (B, ceil(S / keys)) int32 each."""
    batch, num_taken = tiles.shape
    first_keys = (
        torch.arange(0, num_tokens, keys, device=tiles.device).expand(batch, -1).contiguous()
    )
    taken = tiles.long().contiguous()
    # A tile ends before key j if its number is below j // tile.
    begins = torch.searchsorted(taken, first_keys // tile, out_int32=True)
    if starts is None:
        return begins, torch.full_like(begins, num_taken)
    # Starts ascend, so tiles whose first query starts after the last key end the list.
    first_starts = torch.gather(starts.long(), 1, taken * tile)
    last_keys = (first_keys + (keys - 1)).clamp(max=num_tokens - 1)
    return begins, torch.searchsorted(first_starts, last_keys, right=True, out_int32=True)
