"""KL over the selected blocks (sparse stage): value and both gradients.

The support of a row is the visible tokens of its selected blocks, for teacher and student alike; the lse is
that of sparse attention over the same blocks.

    student_kernel     a tile of queries and the union of its blocks (triton_unions.py), index scores only:
                       the student's log-sum-exp, made anew rather than carried from the selection
    difference_kernel  fewer queries with all heads of the group: teacher, KL, dq_idx, and ds = p - t into a
                       scratch of bounded size, by query and block it selected
    key_kernel         a block of keys and the edges that selected it (triton_lists.py): dk_idx, from the
                       scratch

Windows of queries share the scratch, one after the other. Nothing is added by atomics: two runs give the
same bits. Over unions the arithmetic is that of the selection times a small number
(triton_unions.mean_union), which grows with the tokens of a tile as the reads of keys shrink.

Called by triton_kl.py. Shapes: B batch, H query heads, G groups (= index heads), R = H / G, T = S tokens, K
selected blocks, L tiles, M partial sums. Equations: triton_kl_tile.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor

from .triton_kl_lists import _add_partials, key_kernel
from .triton_kl_union import difference_kernel, student_kernel
from .triton_lists import query_lists
from .triton_support import Launch, float32_launch, interpreting, padded_width, target_arch
from .triton_unions import MAX_TOKENS, Unions, tile_unions

LOG2_E = math.log2(math.e)
SCRATCH_BYTES = 1 << 30
"""Size that the scratch aims at; one tile of all groups is the least."""
LANES = 16
"""Keys of one program that adds partial sums."""


@dataclass(frozen=True)
class SparseLaunch:
    """How the kernels are cut; the numbers never change a result beyond rounding."""

    student: Launch
    """`rows` query tokens."""
    difference: Launch
    """`rows` = tokens times heads of a group, these padded to a power of two."""
    gradient: Launch
    """`rows` edges a step, `keys` of a block a program."""


def default_launch(
    width: int, index_width: int, repeats: int, block_size: int, dtype: torch.dtype
) -> SparseLaunch:
    """Tile sizes that compile without spills for the device at hand (benchmarks/codegen.py)."""
    if dtype == torch.float32:
        small = float32_launch()
        keys = small if interpreting() else replace(small, keys=32)
        return SparseLaunch(student=small, difference=small, gradient=keys)
    hopper = target_arch() >= 90
    wide = max(padded_width(width), padded_width(index_width)) > 128
    # Under 64 keys products are those before Hopper, whose operands take registers: wide index keys spill.
    tight = block_size < 64 and padded_width(index_width) > 64
    # Twice the rows of one product: half the reads of keys, for a little more arithmetic. But not more
    # than 32 tokens: their own two products would take as many registers as the heads'.
    rows = min(64 if wide or tight or not hopper else 128, 32 * triton.next_power_of_2(repeats))
    return SparseLaunch(
        student=Launch(rows=64, keys=64, num_warps=4, num_stages=2),
        difference=Launch(rows=rows, keys=64, num_warps=4, num_stages=2),
        gradient=Launch(
            rows=64 if hopper else 32, keys=128 if hopper else 64,
            num_warps=4 if tight and target_arch() == 90 else 8, num_stages=3,
        ),
    )  # fmt: skip


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
        chunk: queries of a list that one program takes, see triton_lists.py.

    Returns:
        KL, scalar float32; its gradients with respect to index_q and index_k, float32, or None.
    """
    q, k, index_q, index_k = (
        x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, index_q, index_k)
    )
    starts = None if starts is None else starts.contiguous()
    batch, groups, num_tokens, index_width = index_q.shape
    repeats = q.shape[1] // groups
    launch = launch or default_launch(q.shape[3], index_width, repeats, block_size, q.dtype)
    blocks = _SelectedBlocks(
        q, k, lse.float().contiguous(), index_q, index_k, block_ids, starts,
        block_size, scale * LOG2_E, index_scale * LOG2_E, launch,
    )  # fmt: skip
    weight = 1.0 / (batch * groups * num_tokens)
    total, grad_q, grad_k = blocks.run(weight * index_scale, need_grad, chunk)
    return (total * (weight * math.log(2.0))).float(), grad_q, grad_k


@dataclass(frozen=True)
class _SelectedBlocks:
    """Inputs of sparse_kl, ready for the kernels; scales are those of log2 units."""

    q: Tensor
    k: Tensor
    lse: Tensor
    index_q: Tensor
    index_k: Tensor
    block_ids: Tensor
    starts: Tensor | None
    block_size: int
    scale: float
    index_scale: float
    launch: SparseLaunch

    @property
    def repeats(self) -> int:
        return self.q.shape[1] // self.k.shape[1]

    def run(
        self, factor: float, need_grad: bool, chunk: int | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Sum of the KL in log2 units, float64; its gradients times `factor`, float32."""
        batch, groups, num_tokens, index_width = self.index_q.shape
        top_k = self.block_ids.shape[3]
        index_lse = self._student_lse()
        padded = triton.next_power_of_2(self.repeats)
        unions = self._unions(min(MAX_TOKENS, max(1, self.launch.difference.rows // padded)))
        num_tiles = unions.counts.shape[2]
        divergences = torch.empty_like(unions.counts, dtype=torch.float32)
        if not need_grad:
            none = divergences
            self._differences(index_lse, unions, 0, num_tiles, divergences, none, none, 0.0)
            return divergences.sum(dtype=torch.float64), None, None
        shape = batch, groups, num_tokens, index_width
        grad_q = torch.empty(shape, dtype=torch.float32, device=self.q.device)
        # Blocks that nobody selected are not written.
        grad_k = torch.zeros(shape, dtype=torch.float32, device=self.q.device)
        tile_bytes = unions.tokens * batch * groups * top_k * self.block_size
        tile_bytes *= self.q.element_size()
        step = min(num_tiles, max(1, SCRATCH_BYTES // tile_bytes))
        scratch = self.q.new_empty(batch * groups, step * unions.tokens, top_k, self.block_size)
        for tile in range(0, num_tiles, step):
            last = min(tile + step, num_tiles)
            self._differences(index_lse, unions, tile, last, divergences, grad_q, scratch, factor)
            self._add_key_gradients(
                tile * unions.tokens, min(last * unions.tokens, num_tokens), scratch, grad_k, chunk
            )
        grad_k = grad_k.sum(dim=1, keepdim=True).mul_(factor)
        return divergences.sum(dtype=torch.float64), grad_q, grad_k

    def _unions(self, tokens: int) -> Unions:
        return tile_unions(
            self.block_ids, self.starts,
            num_keys=self.q.shape[2], block_size=self.block_size, tokens=tokens,
        )  # fmt: skip

    def _index_sizes(self, launch: Launch) -> dict[str, int]:
        width = self.index_q.shape[3]
        return {
            "BLOCK": self.block_size,
            "KEYS": min(launch.keys, self.block_size),
            "INDEX": width,
            "INDEX_P": padded_width(width),
            "num_warps": launch.num_warps,
        }

    def _student_lse(self) -> Tensor:
        """(B, G, T) float32, log2 units."""
        batch, groups, num_tokens, _ = self.index_q.shape
        launch = self.launch.student
        unions = self._unions(launch.rows)
        index_lse = torch.empty(
            batch, groups, num_tokens, dtype=torch.float32, device=self.q.device
        )
        student_kernel[(unions.counts.shape[2], batch * groups)](
            self.index_q, self.index_k, index_lse, unions.first_keys, unions.members, unions.counts,
            *self.index_q.stride()[:3], self.index_k.stride(0), self.index_k.stride(2),
            groups, num_tokens, unions.first_keys.shape[3], self.index_scale,
            ROWS=launch.rows, **self._index_sizes(launch), num_stages=launch.num_stages,
        )  # fmt: skip
        return index_lse

    def _differences(
        self, index_lse: Tensor, unions: Unions, first: int, last: int,
        divergences: Tensor, grad_q: Tensor, scratch: Tensor, factor: float,
    ) -> None:  # fmt: skip
        """Tiles first .. last - 1; `factor` 0 means no gradients."""
        batch, groups, num_tokens, _ = self.index_q.shape
        launch, width = self.launch.difference, self.q.shape[3]
        num_tiles, union_len = unions.first_keys.shape[2:]
        difference_kernel[(last - first, batch * groups)](
            self.q, self.k, self.lse, self.index_q, self.index_k, index_lse,
            unions.first_keys, unions.members, unions.counts,
            divergences, grad_q, scratch,
            *self.q.stride()[:3], *self.k.stride()[:3],
            *self.index_q.stride()[:3], self.index_k.stride(0), self.index_k.stride(2),
            groups, num_tokens, num_tiles, union_len, first, scratch.shape[1],
            self.scale, self.index_scale, math.log2(self.repeats), factor,
            REPEATS=self.repeats, REPEATS_P=triton.next_power_of_2(self.repeats), TOKENS=unions.tokens,
            COLUMNS=max(unions.tokens, 16), TOP_K=self.block_ids.shape[3], STAGES=launch.num_stages,
            WIDTH=width, WIDTH_P=padded_width(width), GRAD=factor != 0.0,
            WHOLE=self.starts is None and num_tokens % self.block_size == 0,
            **self._index_sizes(launch), num_stages=launch.num_stages,
        )  # fmt: skip

    def _add_key_gradients(
        self, first: int, last: int, scratch: Tensor, grad_k: Tensor, chunk: int | None
    ) -> None:
        """Add dk_idx, not scaled, of queries first .. last - 1 to grad_k (B, G, T, D_idx) float32."""
        batch, groups, num_tokens, index_width = self.index_q.shape
        launch = self.launch.gradient
        lists = query_lists(
            self.block_ids[:, :, first:last], self.starts,
            num_keys=num_tokens, block_size=self.block_size, query_offset=first, chunk=chunk,
            keep_edges=True,
        )  # fmt: skip
        sizes = self._index_sizes(launch)
        sums = grad_k.new_empty(lists.max_partials, self.block_size, index_width)
        documents = {"SLOT_KEYS": lists.slot_keys, "DOCUMENTS": self.starts is not None}
        index_q = self.index_q[:, :, first:last]
        key_kernel[(lists.programs * (self.block_size // sizes["KEYS"]),)](
            scratch, index_q, grad_k, sums, self.starts,
            lists.edges, lists.offsets, lists.owners, lists.firsts, lists.count, lists.partials,
            *index_q.stride()[:3], groups, num_tokens, scratch.shape[1], lists.num_slots,
            lists.queries.shape[1], lists.chunk, lists.programs,
            TOP_K=self.block_ids.shape[3], ROWS=launch.rows, STAGES=launch.num_stages,
            **documents, **sizes,
        )  # fmt: skip
        if lists.split_owners.shape[0]:
            _add_partials[(lists.split_owners.shape[0] * (self.block_size // LANES),)](
                grad_k, sums, lists.offsets, lists.split_owners, lists.partials, self.starts,
                groups, num_tokens, lists.num_slots, batch * groups, lists.chunk,
                BLOCK=self.block_size, LANES=LANES, INDEX=index_width,
                INDEX_P=padded_width(index_width), **documents, num_warps=4,
            )  # fmt: skip
