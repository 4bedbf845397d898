"""Inputs of the kernel benchmark: shapes, random tensors, and selections like those of a real model.

How much two neighbouring tokens' selections share decides the speed of sparse attention, and independent
random index data share far less than a model's. `model_like_ids` draws selections whose unions over 16
tokens have the size that benchmarks/unions.py measured, at any length:

    score[t, b] = A_b + sin(p_b + w_b t / 64) + sigma * noise[t, b]      k - 1 best blocks and the own one

A_b makes some blocks popular everywhere, the sine lets taste drift, and sigma, found by bisection, sets how
much neighbours differ. Only the number at 16 tokens is fitted; what other tiles get is printed beside it.

Shape legend: B batch, N tokens, H query heads, G groups, D head width, C blocks, K selected blocks.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bench_record import ROOT
from torch import Tensor

SEGMENT = 64
"""Tokens that share one list of candidates."""
FITTED_TILE = 16
UNIONS = ROOT / "benchmarks" / "results" / "unions-smollm2.json"


@dataclass(frozen=True)
class Shape:
    """One layer."""

    length: int
    heads: int
    groups: int
    width: int
    block_size: int = 128
    top_k: int = 16
    index_width: int = 128
    batch: int = 1

    @property
    def name(self) -> str:
        return f"{self.heads}/{self.groups} d{self.width}"

    @property
    def num_blocks(self) -> int:
        return -(-self.length // self.block_size)

    @property
    def pairs(self) -> int:
        """Visible pairs of one head, all rows of the batch."""
        return self.batch * self.length * (self.length + 1) // 2

    @property
    def selected_pairs(self) -> int:
        """Visible pairs in selected blocks: whole blocks of the past and the own one up to the query."""
        block, kept = self.block_size, self.top_k
        total = 0
        for current in range(min(self.num_blocks, kept)):
            queries = min(block, self.length - current * block)
            total += queries * current * block + queries * (queries + 1) // 2
        if self.num_blocks > kept:
            rest = self.length - kept * block
            whole, ragged = divmod(rest, block)
            total += rest * (kept - 1) * block
            total += whole * block * (block + 1) // 2 + ragged * (ragged + 1) // 2
        return self.batch * total


@dataclass
class Inputs:
    """Tensors of one layer, heads after tokens in memory as models have them."""

    shape: Shape
    q: Tensor
    k: Tensor
    v: Tensor
    index_q: Tensor
    index_k: Tensor
    block_ids: Tensor | None
    """(B, G, N, K) int32 that sparse attention reads; None: those that selection finds."""
    data: str
    """Where the selection comes from, in words."""
    scale: float

    @property
    def budget(self) -> dict[str, Any]:
        shape = self.shape
        sizes = {"block_size": shape.block_size, "top_k": shape.top_k}
        return {**sizes, "local_blocks": 1, "init_blocks": 0}


def random_inputs(
    shape: Shape, *, dtype: torch.dtype, device: torch.device, seed: int, queries: int | None = None
) -> Inputs:
    """Independent normal tensors; selections follow from the index tensors.

    Args:
        queries: how many of the last tokens are queries (1 for decoding); None: all.
    """
    generator = torch.Generator(device).manual_seed(seed)
    num_queries = shape.length if queries is None else queries

    def tensor(tokens: int, heads: int, width: int) -> Tensor:
        size = (shape.batch, tokens, heads, width)
        made = torch.empty(size, dtype=dtype, device=device)
        return made.normal_(generator=generator).transpose(1, 2)

    return Inputs(
        shape=shape,
        q=tensor(num_queries, shape.heads, shape.width),
        k=tensor(shape.length, shape.groups, shape.width),
        v=tensor(shape.length, shape.groups, shape.width),
        index_q=tensor(num_queries, shape.groups, shape.index_width),
        index_k=tensor(shape.length, 1, shape.index_width),
        block_ids=None,
        data="random",
        scale=shape.width**-0.5,
    )


def stored_inputs(file: Path, shape: Shape, *, dtype: torch.dtype, device: torch.device) -> Inputs:
    """One layer of a real model, as benchmarks/unions.py --save wrote it; `shape` gives block and budget.

    Raises:
        ValueError: the file is of other heads.
    """
    stored = torch.load(file, map_location=device, weights_only=True)
    tensors = {name: stored[name].to(dtype) for name in ("q", "k", "v", "index_q", "index_k")}
    heads, groups, width = tensors["q"].shape[1], tensors["k"].shape[1], tensors["q"].shape[3]
    if (heads, groups, width) != (shape.heads, shape.groups, shape.width):
        raise ValueError(
            f"{file} holds {heads}/{groups} heads of width {width}, not {shape.name}: give --heads "
            f"{heads}/{groups}"
        )
    found = Shape(
        length=tensors["q"].shape[2],
        heads=heads,
        groups=groups,
        width=width,
        block_size=shape.block_size,
        top_k=shape.top_k,
        index_width=tensors["index_q"].shape[3],
    )
    data = f"layer {stored['layer']} of {stored['model']}"
    return Inputs(found, **tensors, block_ids=None, data=data, scale=float(stored["scale"]))


def measured_factor(num_blocks: int, top_k: int) -> tuple[float, str]:
    """Union factor at FITTED_TILE tokens that a real model has, and where it was measured.

    The measured text is 8192 tokens; the setting whose blocks per kept block come nearest stands for longer
    texts. Late tiles of the text and the index branch's selection count.
    """
    summary = json.loads(UNIONS.read_text())["summary"]["prose"]["index"]
    length = json.loads(UNIONS.read_text())["lengths"]["prose"]

    def distance(setting: str) -> float:
        block, kept = (int(part.split()[1]) for part in setting.split(", "))
        return abs(math.log(length / block / kept) - math.log(num_blocks / top_k))

    nearest = min(sorted(summary), key=distance)
    return summary[nearest][f"{FITTED_TILE} late"]["mean"], f"{nearest} at {length} tokens"


@dataclass
class Taste:
    """The slow part of the scores of one group."""

    level: Tensor
    phase: Tensor
    speed: Tensor

    @classmethod
    def draw(cls, num_blocks: int, generator: torch.Generator, device: torch.device) -> Taste:
        uniform = torch.rand(3, num_blocks, generator=generator, device=device)
        level = -torch.log(uniform[0].clamp(min=1e-9))
        level[0] += 4.0  # stands for the attention sink
        return cls(level, uniform[1] * 2 * math.pi, uniform[2] * 0.2)

    def at(self, segments: Tensor) -> Tensor:
        """(segments, C)."""
        return self.level + torch.sin(self.phase + self.speed * segments[:, None])


def model_like_ids(
    shape: Shape, *, factor: float, device: torch.device, seed: int = 0, chunk: int = 256
) -> Tensor:
    """Block ids (B, G, N, K) int32, ascending, -1 padded, with unions of `factor` * K over 16 tokens."""
    generator = torch.Generator(device).manual_seed(seed)
    size = (shape.batch, shape.groups, shape.length, shape.top_k)
    ids = torch.empty(size, dtype=torch.int32, device=device)
    num_segments = -(-shape.length // SEGMENT)
    for row in range(shape.batch):
        for group in range(shape.groups):
            taste = Taste.draw(shape.num_blocks, generator, device)
            noise = _noise_for(shape, taste, factor, generator)
            for first in range(0, num_segments, chunk):
                segments = torch.arange(first, min(first + chunk, num_segments), device=device)
                found = _draw(shape, taste, segments, noise, generator)
                stop = min(first * SEGMENT + len(found), shape.length)
                ids[row, group, first * SEGMENT : stop] = found[: stop - first * SEGMENT]
    return ids


def _noise_for(shape: Shape, taste: Taste, factor: float, generator: torch.Generator) -> float:
    """Bisection on a sample of segments; the nearest there is where no noise gives the factor."""
    num_segments = -(-shape.length // SEGMENT)
    first = min(num_segments - 1, -(-shape.top_k * shape.block_size // SEGMENT))
    device = taste.level.device
    sample = torch.linspace(first, num_segments - 1, 32, device=device).round().unique()
    low, high = 1e-3, 30.0
    for _ in range(14):
        middle = math.sqrt(low * high)
        ids = _draw(shape, taste, sample, middle, generator)
        tiles = ids.view(-1, FITTED_TILE, shape.top_k)
        low, high = (middle, high) if _mean_union(tiles) < factor * shape.top_k else (low, middle)
    return math.sqrt(low * high)


def _draw(
    shape: Shape, taste: Taste, segments: Tensor, noise: float, generator: torch.Generator
) -> Tensor:
    """(segments * SEGMENT, K) int32 ids."""
    device, top_k = taste.level.device, shape.top_k
    position = (segments.long()[:, None] * SEGMENT + torch.arange(SEGMENT, device=device)).flatten()
    current = (position // shape.block_size).clamp(max=shape.num_blocks - 1)
    block = torch.arange(shape.num_blocks, device=device)
    slow = taste.at(segments).masked_fill(
        block > (segments.long()[:, None] * SEGMENT + SEGMENT - 1) // shape.block_size, -math.inf
    )
    slow, pool = slow.topk(min(shape.num_blocks, 8 * top_k), dim=-1)
    pool = pool.repeat_interleave(SEGMENT, dim=0)  # (tokens, pool)
    fast = torch.randn(pool.shape, generator=generator, device=device)
    scores = slow.repeat_interleave(SEGMENT, dim=0) + noise * fast
    scores.masked_fill_(pool >= current[:, None], -math.inf)
    kept = min(top_k - 1, pool.shape[1])
    best = scores.topk(kept, dim=-1)
    others = torch.where(best.values > -math.inf, pool.gather(-1, best.indices), shape.num_blocks)
    ids = torch.cat([others, current[:, None]], dim=-1).sort(dim=-1).values
    ids = torch.where(ids < shape.num_blocks, ids, -1).to(torch.int32)
    return torch.nn.functional.pad(ids, (0, top_k - ids.shape[-1]), value=-1)


def union_factors(
    block_ids: Tensor, block_size: int, tiles: tuple[int, ...] = (4, 16, 32), sample: int = 256
) -> dict[str, float]:
    """Mean union over k of `sample` tiles in which every token has a choice; empty where none has."""
    _, _, num_tokens, top_k = block_ids.shape
    factors: dict[str, Any] = {}
    for tokens in tiles:
        first, end = -(-top_k * block_size // tokens), num_tokens // tokens
        if first >= end:
            continue
        chosen = torch.linspace(first, end - 1, sample).round().long().unique()
        rows = chosen[:, None] * tokens + torch.arange(tokens)
        tiles_ids = block_ids[:, :, rows.to(block_ids.device)].flatten(0, 2)  # (tiles, tokens, K)
        factors[str(tokens)] = round(_mean_union(tiles_ids) / top_k, 3)
    return factors


def _mean_union(ids: Tensor) -> float:
    """Mean number of different ids over the last two dimensions of (tiles, tokens, K); -1 is none."""
    flat = ids.flatten(1).sort(dim=-1).values
    new = torch.ones_like(flat, dtype=torch.bool)
    new[:, 1:] = flat[:, 1:] != flat[:, :-1]
    return float((new & (flat >= 0)).sum(-1).double().mean())
