"""What check_run.py goes through: head layouts, widths, blocks and kinds of rows that training meets.

Between them the settings hold one document and several, batches, queries behind cached keys, ragged last
blocks, forced first blocks, several head widths, blocks and budgets, and every dtype that the kernels take.
`small` cuts one down to what Triton's interpreter does in seconds.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

SMALL_TOKENS = 140


@dataclass(frozen=True)
class Setting:
    """One kind of layer and row."""

    name: str
    heads: int
    groups: int
    width: int
    block_size: int
    top_k: int
    tokens: int
    """Keys of a row; no multiple of the block."""
    batch: int = 1
    documents: int = 1
    """Documents of a row, of unequal lengths, other ones in each row."""
    offset: int = 0
    """Keys before the first query; operations of whole rows leave it out."""
    local_blocks: int = 1
    init_blocks: int = 0
    index_width: int = 128
    dtype: torch.dtype = torch.bfloat16
    tokens_first: bool = True
    """Memory order (B, N, H, D), as models have it, or (B, H, N, D)."""

    @property
    def budget(self) -> dict[str, int]:
        names = ("block_size", "top_k", "local_blocks", "init_blocks")
        return {name: getattr(self, name) for name in names}


SETTINGS = (
    Setting("many heads", 64, 4, 128, block_size=128, top_k=4, tokens=1000),
    Setting("packed", 32, 8, 128, block_size=64, top_k=2, tokens=900, batch=2, documents=4),
    Setting("cached keys", 28, 4, 128, block_size=128, top_k=3, tokens=700, batch=2, offset=301),
    Setting(
        "narrow", 9, 3, 64, block_size=32, top_k=3, tokens=500, batch=2, documents=3, offset=133,
        index_width=64,
    ),
    Setting(
        "float16", 16, 8, 128, block_size=32, top_k=16, tokens=1100, documents=2,
        local_blocks=2, init_blocks=1, dtype=torch.float16, tokens_first=False,
    ),
    Setting("float32", 8, 4, 64, block_size=64, top_k=4, tokens=420, batch=2, dtype=torch.float32),
)  # fmt: skip


def small(setting: Setting) -> Setting:
    """The same kind of row with few heads and blocks; the interpreter gets bfloat16 wrong, so float16."""
    groups = 2
    repeats = min(4, setting.heads // setting.groups)
    block = min(16 if setting.documents > 1 else 32, setting.block_size)
    half = torch.float32 if setting.dtype == torch.float32 else torch.float16
    return replace(
        setting, heads=groups * repeats, groups=groups, width=min(32, setting.width), index_width=32,
        block_size=block, top_k=max(2, setting.local_blocks + setting.init_blocks), tokens=SMALL_TOKENS,
        offset=min(setting.offset, 61), dtype=half,
    )  # fmt: skip


@dataclass(frozen=True)
class Row:
    """Tensors of one setting."""

    q: Tensor
    """(B, H, T, D), T = tokens - offset"""
    k: Tensor
    v: Tensor
    index_q: Tensor
    index_k: Tensor
    grad: Tensor
    """(B, H, T, D), gradient of the output."""
    document_ids: Tensor | None
    """(B, S) int32"""
    offset: int


def make_row(setting: Setting, device: torch.device, *, whole: bool = False, seed: int = 0) -> Row:
    """Random tensors; `whole`: without the offset, every key has its query."""
    generator = torch.Generator(device).manual_seed(seed)
    offset = 0 if whole else setting.offset

    def tensor(tokens: int, heads: int, width: int) -> Tensor:
        size = (setting.batch, tokens, heads, width)
        if not setting.tokens_first:
            size = (setting.batch, heads, tokens, width)
        made = torch.empty(size, dtype=setting.dtype, device=device).normal_(generator=generator)
        return made.transpose(1, 2) if setting.tokens_first else made

    queries = setting.tokens - offset
    return Row(
        q=tensor(queries, setting.heads, setting.width),
        k=tensor(setting.tokens, setting.groups, setting.width),
        v=tensor(setting.tokens, setting.groups, setting.width),
        index_q=tensor(queries, setting.groups, setting.index_width),
        index_k=tensor(setting.tokens, 1, setting.index_width),
        grad=tensor(queries, setting.heads, setting.width),
        document_ids=_documents(setting, device),
        offset=offset,
    )


def _documents(setting: Setting, device: torch.device) -> Tensor | None:
    """Bounds that differ from row to row and are no multiples of a block."""
    if setting.documents == 1:
        return None
    position = torch.arange(setting.tokens)
    rows = []
    for row in range(setting.batch):
        each = setting.tokens // setting.documents
        bounds = [each * n + 7 * (n + row) for n in range(1, setting.documents)]
        rows.append(torch.bucketize(position, torch.tensor(bounds), right=True))
    return torch.stack(rows).to(torch.int32).to(device)
