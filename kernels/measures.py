"""How good a selection is: coverage and recall against the true attention mass (no gradient).

P_b is the main branch's mass in block b under full attention, averaged over the group; I the selection;
I* the blocks of largest P_b, the forced ones included, as many as the budget allows. Only queries that
see more blocks than the budget count: the others have nothing to choose.

    coverage          mass of I                    block recall   |I & I*| / |I*|
    oracle coverage   mass of I*                   score recall   mass of I & I* / mass of I*
    learned coverage  (mass of I - mass of the forced) / (mass of I* - mass of the forced)

Plain coverage over oracle coverage reads about 0.9 with an untrained index branch, since the local block
dominates; learned coverage is 0 for a selection that adds nothing to the forced blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .documents import DocumentIds, pieces
from .reference import top_blocks
from .tiled import block_mass

UNION_TILE = 16
"""Neighbouring queries whose union of selected blocks is counted: it decides which kernel is fastest."""


@dataclass(frozen=True)
class SelectionMeasures:
    """Means over queries and groups; ratios are ratios of means."""

    coverage: float
    oracle_coverage: float
    learned_coverage: float
    block_recall: float
    score_recall: float
    tile_union: float
    """Mean number of blocks that UNION_TILE neighbouring queries select together."""


@torch.no_grad()
def measure_selection(
    q: Tensor,
    k: Tensor,
    block_ids: Tensor,
    *,
    block_size: int,
    scale: float | None = None,
    local_blocks: int = 1,
    init_blocks: int = 0,
    document_ids: DocumentIds = None,
) -> SelectionMeasures | None:
    """Measure block ids (B, G, N, K) against q (B, H, N, D), k (B, G, N, D).

    Returns:
        the measures, or None where no query sees more than K blocks.
    """
    top_k = block_ids.shape[-1]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    sums = torch.zeros(6, dtype=torch.float64, device=q.device)
    unions: list[tuple[float, int]] = []
    for piece in pieces(q.shape[2], k.shape[2], document_ids, 0):
        ids = block_ids[piece.rows, :, piece.queries]
        unions.append((tile_union(ids), max(1, ids.shape[2] // UNION_TILE) * ids.shape[0]))
        q_piece, k_piece = q[piece.rows, :, piece.queries], k[piece.rows, :, piece.keys]
        masses = block_mass(q_piece, k_piece, block_size=block_size, scale=scale, offset=0)
        for start, stop, mass in masses:
            current = torch.arange(start, stop, device=q.device) // block_size
            choice = current >= top_k
            if not choice.any():
                continue
            mass, current = mass[:, :, choice], current[choice]
            here = current.expand(mass.shape[:3])
            best = _as_mask(top_blocks(mass, here, top_k, local_blocks, init_blocks), mass)
            chosen = _as_mask(ids[:, :, start:stop][:, :, choice], mass)
            block = torch.arange(mass.shape[-1], device=q.device)
            recent = block > current[:, None] - local_blocks
            forced = (block <= current[:, None]) & (recent | (block < init_blocks))
            both = chosen & best
            parts = [(mass * part).sum() for part in (chosen, best, forced, both)]
            sums += torch.stack([*parts, both.sum(), best.sum()]).double()
    if sums[5] == 0:
        return None
    of_chosen, of_best, of_forced, of_both, num_both, num_best = sums.tolist()
    rows = num_best / top_k
    room = of_best - of_forced
    return SelectionMeasures(
        coverage=of_chosen / rows,
        oracle_coverage=of_best / rows,
        learned_coverage=(of_chosen - of_forced) / room if room > 0 else 1.0,
        block_recall=num_both / num_best,
        score_recall=of_both / of_best,
        tile_union=sum(u * n for u, n in unions) / sum(n for _, n in unions),
    )


def tile_union(block_ids: Tensor) -> float:
    """Mean size of the union of blocks over tiles of UNION_TILE neighbouring queries of one group."""
    num_blocks = int(block_ids.max()) + 1
    chosen = _as_mask(block_ids, block_ids.new_empty((*block_ids.shape[:3], num_blocks)))
    whole = chosen.shape[2] // UNION_TILE * UNION_TILE
    if whole == 0:
        return float(chosen.any(dim=2).sum(-1).double().mean())
    tiled = chosen[:, :, :whole].unflatten(2, (-1, UNION_TILE))
    return float(tiled.any(dim=3).sum(-1).double().mean())


def _as_mask(block_ids: Tensor, like: Tensor) -> Tensor:
    """Block ids (B, G, t, K) as bool (B, G, t, C) of `like`'s width; -1 selects nothing."""
    mask = torch.zeros(
        *like.shape[:3], like.shape[3] + 1, dtype=torch.bool, device=block_ids.device
    )
    mask.scatter_(-1, (block_ids + 1).clamp(max=like.shape[3]).long(), True)
    return mask[..., 1:]
