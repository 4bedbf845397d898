"""KL over the selected blocks (sparse stage): value and both gradients.

The support of a row is the visible tokens of its selected blocks, for teacher and student alike; the lse is
that of sparse attention over the same blocks.

    student_kernel  a tile of queries and the union of its blocks (triton_unions.py), index scores only: the
                    student's log-sum-exp, made anew rather than carried from the selection
    _key_tile       a block of keys and the queries that selected it (triton_lists.py): teacher, KL, dk_idx
                    in registers, and dq_idx by float32 atomics
    query_kernel    dq_idx in registers over the union, for `deterministic=True`: makes the teacher again

Block by block the arithmetic is that of the selection, no more; over unions it is theirs, a small multiple
(triton_unions.mean_union). So the heads' scores, the bulk of the work, are made block by block.

Called by triton_kl.py. Shapes: B batch, H query heads, G groups (= index heads), R = H / G, T = S tokens, K
selected blocks, M partial sums. Equations: triton_kl_tile.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_kl_tile import divergence_and_difference, load_keys, load_rows, teacher_tile
from .triton_kl_union import query_kernel, student_kernel
from .triton_lists import QueryLists, find_chunk, query_lists
from .triton_support import Launch, float32_launch, interpreting, padded_width, target_arch
from .triton_unions import Unions, tile_unions

LOG2_E = math.log2(math.e)
LANES = 16
"""Keys of one program that adds partial sums."""


@dataclass(frozen=True)
class SparseLaunch:
    """How the kernels are cut; the numbers never change a result beyond rounding."""

    student: Launch
    key_tile: Launch
    query_tile: Launch
    """`rows` is that of `student`: one union serves both."""


@triton.jit
def _own_keys(starts, batch, block, key, num_tokens, DOCUMENTS: tl.constexpr):
    """Which of the keys belong to the block: a document's last block ends with it."""
    here = key < num_tokens
    if DOCUMENTS:
        document = tl.load(starts + batch * num_tokens + key, mask=here, other=num_tokens)
        here = here & (document <= block)
    return here


@triton.jit(do_not_specialize=["num_tokens", "num_slots", "edges", "chunk", "programs"])
def _key_tile(
    queries, keys, lse, index_queries, index_keys, index_lse, starts,
    divergences, grad_q, grad_k, sums,
    lists, offsets, owners, firsts, count, partials,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kg, stride_k,
    stride_iqb, stride_iqg, stride_iqt, stride_ikb, stride_ik,
    groups, num_tokens, num_slots, edges, chunk, programs, repeats, scale, index_scale,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr, SLOT_KEYS: tl.constexpr,
    WIDTH: tl.constexpr, WIDTH_P: tl.constexpr, INDEX: tl.constexpr, INDEX_P: tl.constexpr,
    GRAD: tl.constexpr, ATOMIC: tl.constexpr, DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """One chunk of one block's list at a time, KEYS keys of the block."""
    PARTS: tl.constexpr = BLOCK // KEYS
    # Neighbouring programs hold the parts of one block, so that the second finds the queries in the cache.
    part = tl.program_id(0) % PARTS
    lane = tl.arange(0, KEYS)
    channel = tl.arange(0, INDEX_P)
    total = 0.0
    for item in range(tl.program_id(0) // PARTS, tl.load(count), programs):
        owner, plane, slot, begin, size, which, num_chunks = find_chunk(
            owners, firsts, offsets, item, num_slots, edges, chunk, False
        )
        batch, group = plane // groups, plane % groups
        first = slot * SLOT_KEYS + part * KEYS
        from_keys = keys + batch * stride_kb + group * stride_kg
        k = tl.trans(load_keys(from_keys, first, stride_k, num_tokens, KEYS, WIDTH, WIDTH_P))
        from_keys = index_keys + batch * stride_ikb
        index_k = load_keys(from_keys, first, stride_ik, num_tokens, KEYS, INDEX, INDEX_P)
        acc = tl.zeros([KEYS, INDEX_P], tl.float32)
        for step in range(0, size, ROWS):
            row = step + tl.arange(0, ROWS)
            # Past the end of the list its last query is read again, for an empty support.
            query = tl.load(lists + begin + tl.minimum(row, size - 1))
            far = query.to(tl.int64)  # neighbours in a list may lie a whole row apart
            teacher = teacher_tile(
                k, queries + batch * stride_qb, lse + batch * groups * repeats * num_tokens,
                far, group * repeats, repeats, stride_qh, stride_qt, num_tokens, scale,
                WIDTH, WIDTH_P,
            )  # fmt: skip
            from_queries = index_queries + batch * stride_iqb + group * stride_iqg
            index_q = load_rows(from_queries, far, stride_iqt, INDEX, INDEX_P)
            log_student = tl.dot(index_q, tl.trans(index_k), input_precision="ieee") * index_scale
            log_student -= tl.load(index_lse + plane * num_tokens + query)[:, None]
            support = ((first + lane)[None, :] <= query[:, None]) & (row < size)[:, None]
            divergence, difference = divergence_and_difference(teacher, log_student, support)
            total += tl.sum(divergence)
            if GRAD:
                difference = difference.to(index_q.dtype)
                acc = tl.dot(tl.trans(difference), index_q, acc, input_precision="ieee")
            if ATOMIC:
                added = tl.dot(difference, index_k, input_precision="ieee")  # [ROWS, INDEX_P]
                at = grad_q + (plane * num_tokens + far)[:, None] * INDEX + channel[None, :]
                # Rows past the end of the list add 0 to its last query.
                if INDEX == INDEX_P:
                    tl.atomic_add(at, added, sem="relaxed")
                else:
                    tl.atomic_add(at, added, mask=(channel < INDEX)[None, :], sem="relaxed")
        if GRAD:
            wide = (channel < INDEX)[None, :]
            if num_chunks == 1:
                key = first + lane
                here = _own_keys(starts, batch, slot * SLOT_KEYS, key, num_tokens, DOCUMENTS)
                at = grad_k + (plane * num_tokens + key)[:, None] * INDEX + channel[None, :]
                tl.store(at, acc, mask=here[:, None] & wide)
            else:
                at = (tl.load(partials + owner) + which).to(tl.int64) * BLOCK + part * KEYS
                at = sums + at * INDEX + (lane[:, None] * INDEX + channel[None, :])
                tl.store(at, acc, mask=wide)
    tl.store(divergences + tl.program_id(0), total)


@triton.jit(do_not_specialize=["num_tokens", "num_slots", "planes", "chunk"])
def _add_partials(
    grad_k, sums, offsets, split_owners, partials, starts,
    groups, num_tokens, num_slots, planes, chunk,
    BLOCK: tl.constexpr, LANES: tl.constexpr, SLOT_KEYS: tl.constexpr,
    INDEX: tl.constexpr, INDEX_P: tl.constexpr, DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """Add the partial sums of one list, in order, LANES keys a program."""
    PARTS: tl.constexpr = BLOCK // LANES
    owner = tl.load(split_owners + tl.program_id(0) // PARTS)
    if owner < planes * num_slots:
        plane = (owner // num_slots).to(tl.int64)
        slot = owner % num_slots
        list_ = offsets + plane * (num_slots + 1) + slot
        num_chunks = tl.cdiv(tl.load(list_ + 1) - tl.load(list_), chunk)
        within = (tl.program_id(0) % PARTS) * LANES + tl.arange(0, LANES)
        channel = tl.arange(0, INDEX_P)
        key = slot * SLOT_KEYS + within
        here = _own_keys(starts, plane // groups, slot * SLOT_KEYS, key, num_tokens, DOCUMENTS)
        mask = here[:, None] & (channel < INDEX)[None, :]
        at = sums + tl.load(partials + owner).to(tl.int64) * (BLOCK * INDEX)
        at += within[:, None] * INDEX + channel[None, :]
        acc = tl.zeros([LANES, INDEX_P], tl.float32)
        for _ in range(num_chunks):
            acc += tl.load(at, mask=mask, other=0.0)
            at += BLOCK * INDEX
        to = grad_k + (plane * num_tokens + key)[:, None] * INDEX + channel[None, :]
        tl.store(to, acc, mask=mask)


def default_launch(
    width: int, index_width: int, block_size: int, dtype: torch.dtype
) -> SparseLaunch:
    """Tile sizes that compile without spills (benchmarks/codegen.py); `rows` are query tokens."""
    if dtype == torch.float32 and interpreting():
        large = replace(float32_launch(), keys=min(float32_launch().keys, block_size))
        return SparseLaunch(student=large, key_tile=large, query_tile=large)
    if dtype == torch.float32:
        small = Launch(rows=16, keys=16, num_warps=8, num_stages=1)
        return SparseLaunch(student=small, key_tile=replace(small, keys=32), query_tile=small)
    wide = max(padded_width(width), padded_width(index_width)) > 128
    # Hopper's products take 64 rows, for which older devices have not the registers.
    rows = 32 if target_arch() < 90 else 64
    return SparseLaunch(
        student=Launch(rows=64, keys=64, num_warps=4, num_stages=2),
        key_tile=Launch(rows=rows, keys=32 if wide else 64, num_warps=8, num_stages=2),
        query_tile=Launch(rows=64, keys=32 if wide else 64, num_warps=8, num_stages=2),
    )


def sparse_kl(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    index_q: Tensor,
    index_k: Tensor,
    block_ids: Tensor,
    starts: Tensor | None,
    *,
    block_size: int,
    scale: float,
    index_scale: float,
    need_grad: bool,
    deterministic: bool = False,
    launch: SparseLaunch | None = None,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Mean over rows and index heads of KL(teacher || student) over the selected blocks' visible tokens.

    Args:
        q: (B, H, T, D); k: (B, G, T, D); index_q: (B, G, T, D_idx); index_k: (B, 1, T, D_idx): one dtype,
            any strides with contiguous channels.
        lse: (B, H, T) natural log-sum-exp of sparse attention over the same ids.
        block_ids: (B, G, T, K) int32 ascending, -1 padded, counted from the document's first block.
        starts: (B, T) int32, first position of each token's document, or None.
        deterministic: dq_idx in a pass of its own instead of by atomics; two runs give the same bits.
        chunk: queries of a list that one program takes, see triton_lists.py.

    Returns:
        KL, scalar float32; its gradients with respect to index_q and index_k, float32, or None.
    """
    q, k, index_q, index_k = (
        x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, index_q, index_k)
    )
    starts = None if starts is None else starts.contiguous()
    batch, groups, num_tokens, index_width = index_q.shape
    launch = launch or default_launch(q.shape[3], index_width, block_size, q.dtype)
    unions = tile_unions(
        block_ids, starts, num_keys=num_tokens, block_size=block_size, tokens=launch.student.rows
    )
    lists = query_lists(block_ids, starts, num_keys=num_tokens, block_size=block_size, chunk=chunk)
    inputs = (q, k, lse.float().contiguous(), index_q, index_k)
    blocks = _SelectedBlocks(
        *inputs, starts, block_size, scale * LOG2_E, index_scale * LOG2_E, launch
    )
    index_lse = blocks.student_lse(unions)
    total, grad_q, grad_k = blocks.key_tiles(
        index_lse, lists, need_grad, need_grad and not deterministic
    )
    weight = 1.0 / (batch * groups * num_tokens)
    kl = (total * (weight * math.log(2.0))).float()
    if grad_k is None:
        return kl, None, None
    if grad_q is None:
        grad_q = blocks.query_tiles(index_lse, unions)
    return kl, grad_q.mul_(weight * index_scale), grad_k.mul_(weight * index_scale)


@dataclass(frozen=True)
class _SelectedBlocks:
    """Inputs of sparse_kl, ready for the kernels; scales are those of log2 units."""

    q: Tensor
    k: Tensor
    lse: Tensor
    index_q: Tensor
    index_k: Tensor
    starts: Tensor | None
    block_size: int
    scale: float
    index_scale: float
    launch: SparseLaunch

    def _index_strides(self) -> tuple[int, ...]:
        return (*self.index_q.stride()[:3], self.index_k.stride(0), self.index_k.stride(2))

    def _sizes(self, launch: Launch, main: bool) -> dict[str, int]:
        width, index_width = self.q.shape[3], self.index_q.shape[3]
        sizes = {
            "ROWS": launch.rows,
            "BLOCK": self.block_size,
            "KEYS": min(launch.keys, self.block_size),
        }
        sizes |= {"INDEX": index_width, "INDEX_P": padded_width(index_width)}
        if main:
            sizes |= {"WIDTH": width, "WIDTH_P": padded_width(width)}
        return sizes | {"num_warps": launch.num_warps, "num_stages": launch.num_stages}

    def student_lse(self, unions: Unions) -> Tensor:
        """(B, G, T) float32, log2 units."""
        batch, groups, num_tokens, _ = self.index_q.shape
        index_lse = torch.empty(
            batch, groups, num_tokens, dtype=torch.float32, device=self.q.device
        )
        student_kernel[(unions.counts.shape[2], batch * groups)](
            self.index_q, self.index_k, index_lse, unions.first_keys, unions.members, unions.counts,
            *self._index_strides(), groups, num_tokens, unions.first_keys.shape[3], self.index_scale,
            **self._sizes(self.launch.student, main=False),
        )  # fmt: skip
        return index_lse

    def key_tiles(
        self, index_lse: Tensor, lists: QueryLists, grad: bool, atomic: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Sum of the KL in log2 units; dq_idx if `atomic`, dk_idx if `grad`: float32, not scaled."""
        batch, groups, num_tokens, index_width = self.index_q.shape
        sizes = self._sizes(self.launch.key_tile, main=True)
        new: dict[str, Any] = {"dtype": torch.float32, "device": self.q.device}
        programs = lists.programs * (self.block_size // sizes["KEYS"])
        divergences = torch.empty(programs, **new)
        # Tokens that selected nothing, and blocks that nobody selected, are not written.
        grad_q = torch.zeros(batch, groups, num_tokens, index_width, **new) if atomic else None
        grad_k = torch.zeros(batch, groups, num_tokens, index_width, **new) if grad else None
        sums = torch.empty(lists.max_partials if grad else 0, self.block_size, index_width, **new)
        unused = divergences
        _key_tile[(programs,)](
            self.q, self.k, self.lse, self.index_q, self.index_k, index_lse, self.starts, divergences,
            unused if grad_q is None else grad_q, unused if grad_k is None else grad_k, sums,
            lists.queries, lists.offsets, lists.owners, lists.firsts, lists.count, lists.partials,
            *self.q.stride()[:3], *self.k.stride()[:3], *self._index_strides(),
            groups, num_tokens, lists.num_slots, lists.queries.shape[1], lists.chunk, lists.programs,
            self.q.shape[1] // groups, self.scale, self.index_scale,
            SLOT_KEYS=lists.slot_keys, GRAD=grad, ATOMIC=atomic, DOCUMENTS=self.starts is not None, **sizes,
        )  # fmt: skip
        if grad_k is None:
            return divergences.sum(dtype=torch.float64), None, None
        num_split = lists.split_owners.shape[0]
        if num_split:
            _add_partials[(num_split * (self.block_size // LANES),)](
                grad_k, sums, lists.offsets, lists.split_owners, lists.partials, self.starts,
                groups, num_tokens, lists.num_slots, batch * groups, lists.chunk,
                BLOCK=self.block_size, LANES=LANES, SLOT_KEYS=lists.slot_keys,
                INDEX=index_width, INDEX_P=padded_width(index_width), DOCUMENTS=self.starts is not None,
                num_warps=4,
            )  # fmt: skip
        return divergences.sum(dtype=torch.float64), grad_q, grad_k.sum(dim=1, keepdim=True)

    def query_tiles(self, index_lse: Tensor, unions: Unions) -> Tensor:
        """dq_idx (B, G, T, D_idx) float32, not scaled."""
        batch, groups, num_tokens, _ = self.index_q.shape
        grad_q = torch.empty(self.index_q.shape, dtype=torch.float32, device=self.q.device)
        query_kernel[(unions.counts.shape[2], batch * groups)](
            self.q, self.k, self.lse, self.index_q, self.index_k, index_lse,
            unions.first_keys, unions.members, unions.counts, grad_q,
            *self.q.stride()[:3], *self.k.stride()[:3], *self._index_strides(),
            groups, num_tokens, unions.first_keys.shape[3], self.q.shape[1] // groups,
            self.scale, self.index_scale, **self._sizes(self.launch.query_tile, main=True),
        )  # fmt: skip
        return grad_q
