"""How many different blocks do neighbouring tokens select together, in a real model?

    python benchmarks/unions.py                                    the quick start's model, about 5 minutes
    python benchmarks/unions.py --save .cache/selection.pt --layer 15      also tensors for kernels.py

A kernel that reads each block of a tile's union once does union / k times the arithmetic of the selection,
so this factor decides between kernel designs. It is counted per layer, index group and tile of neighbouring
tokens, over tiles whose tokens all see more blocks than they keep (the others have nothing to choose),
for two selections: `oracle` (largest attention mass) and `index` (the closed-form index branch, untrained).
Beside them `random`: index queries and keys drawn independently, as benchmarks of kernels usually do.

Hidden states are those of the dense model. Writes benchmarks/results/unions-smollm2.json.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from bench_record import ROOT, environment, write
from torch import Tensor

from dense2sparse.data.loader import Batch, heldout_rows
from dense2sparse.kernels.tiled import block_mass
from dense2sparse.model import convert
from dense2sparse.model.attention import attention_mode
from dense2sparse.model.probe import Observation, observe
from dense2sparse.recipes import load as recipes
from dense2sparse.recipes.schema import Source
from dense2sparse.train.start import calibration_rows, find_original, load_checked

TILES = (4, 8, 16, 21, 32, 64)
"""Neighbouring tokens of one group: what 64 to 256 rows hold at 3 to 16 query heads a group."""
BLOCK_SIZES = (32, 64, 128)
BUDGETS = (8, 16, 32)

Counts = dict[str, dict[str, list[float]]]
"""'block 128, k 16' -> '16' or '16 late' -> union / k, one value a layer."""


def ranked_blocks(block_scores: Tensor, block_size: int, count: int) -> Tensor:
    """The `count` best visible blocks of each query, best first, its own block before all: (G, N, count).

    Rows of fewer visible blocks hold later blocks too: they have no choice and are not counted.
    """
    num_blocks = block_scores.shape[-1]
    here = torch.arange(block_scores.shape[-2])[:, None] // block_size
    block = torch.arange(num_blocks)
    scores = block_scores.masked_fill(block == here, torch.inf).masked_fill(
        block > here, -torch.inf
    )
    return scores.topk(min(count, num_blocks), dim=-1).indices


def union_factors(ids: Tensor, block_size: int, num_blocks: int) -> dict[str, float]:
    """Mean union over k for tiles of each size; tiles without a choice do not count.

    Args:
        ids: (G, N, K) block ids, all visible in rows that have a choice.

    Returns:
        "16" -> factor over all tiles of 16 tokens, "16 late" -> over those of the text's last quarter,
        which see the most blocks.
    """
    groups, num_tokens, top_k = ids.shape
    chosen = torch.zeros(groups, num_tokens, num_blocks, dtype=torch.bool)
    chosen.scatter_(-1, ids, True)
    factors = {}
    for tokens in TILES:
        first = -(-top_k * block_size // tokens)  # first tile whose first token has a choice
        whole = chosen[:, first * tokens : num_tokens // tokens * tokens]
        if whole.shape[1]:
            union = whole.unflatten(1, (-1, tokens)).any(dim=2).sum(-1).double()
            factors[str(tokens)] = float(union.mean()) / top_k
            late = max(0, num_tokens * 3 // 4 // tokens - first)
            factors[f"{tokens} late"] = float(union[:, late:].mean()) / top_k
    return factors


def count(fine: Tensor, pool: Any) -> dict[str, dict[str, float]]:
    """Factors at every block size and budget from scores of blocks of BLOCK_SIZES[0] tokens (G, N, C).

    Args:
        pool: how scores of several blocks become that of one, `torch.amax` or `torch.sum`.
    """
    found = {}
    for block_size in BLOCK_SIZES:
        together = block_size // BLOCK_SIZES[0]
        scores = pool(fine.unflatten(-1, (-1, together)), dim=-1)
        ranked = ranked_blocks(scores, block_size, max(BUDGETS))
        for top_k in BUDGETS:
            if ranked.shape[-1] >= top_k:
                ids = ranked[..., :top_k]
                found[f"block {block_size}, k {top_k}"] = union_factors(
                    ids, block_size, scores.shape[-1]
                )
    return found


def index_scores(index_q: Tensor, index_k: Tensor, block_size: int) -> Tensor:
    """Best visible token of each block, float32 (G, N, C), from (G, N, D) and (N, D)."""
    num_tokens = index_k.shape[0]
    position = torch.arange(num_tokens)
    out = torch.empty(index_q.shape[0], num_tokens, num_tokens // block_size)
    for start in range(0, num_tokens, 512):
        stop = min(start + 512, num_tokens)
        scores = index_q[:, start:stop] @ index_k.T
        scores.masked_fill_(position[None, :] > position[start:stop, None], -torch.inf)
        out[:, start:stop] = scores.unflatten(-1, (-1, block_size)).amax(-1)
    return out


def masses(q: Tensor, k: Tensor, block_size: int, scale: float) -> Tensor:
    """Group-mean attention mass of each block, float32 (G, N, C), from (1, H, N, D) and (1, G, N, D)."""
    num_tokens = k.shape[2]
    out = torch.zeros(k.shape[1], num_tokens, num_tokens // block_size)
    tiles = block_mass(q, k, block_size=block_size, scale=scale, offset=0)
    for start, stop, mass in tiles:
        out[:, start:stop, : mass.shape[-1]] = mass[0]
    return out


class Census:
    """Takes in the layers of one text, one after the other."""

    def __init__(self, save_layer: int | None, say: Any) -> None:
        self.counts: dict[str, Counts] = {"oracle": {}, "index": {}}
        self.layers: list[int] = []
        self.saved: dict[str, Any] = {}
        self._save_layer, self._say = save_layer, say

    def __call__(self, seen: Observation) -> None:
        if not hasattr(seen.attention, "index_q_proj"):
            return
        begun = time.perf_counter()
        attention: Any = seen.attention
        index_q, index_k = attention.index_states(seen.hidden, seen.positions)
        scale = seen.facts["scaling"] or seen.q.shape[-1] ** -0.5
        fine = BLOCK_SIZES[0]
        self._add("oracle", count(masses(seen.q, seen.k, fine, scale), torch.sum))
        best = index_scores(index_q[0].float(), index_k[0, 0].float(), fine)
        self._add("index", count(best, torch.amax))
        self.layers.append(seen.layer)
        self._say(f"  layer {seen.layer}: {time.perf_counter() - begun:.1f} s")
        if seen.layer == self._save_layer:
            v = attention.v_proj(seen.hidden).unflatten(-1, (seen.k.shape[1], -1)).transpose(1, 2)
            tensors = {"q": seen.q, "k": seen.k, "v": v, "index_q": index_q, "index_k": index_k}
            self.saved = {name: x.to(torch.bfloat16).contiguous() for name, x in tensors.items()}
            self.saved["scale"] = scale

    def _add(self, selection: str, found: dict[str, dict[str, float]]) -> None:
        for setting, factors in found.items():
            lists = self.counts[selection].setdefault(setting, {})
            for tokens, factor in factors.items():
                lists.setdefault(tokens, []).append(round(factor, 3))


def texts(tokenizer: Any, length: int, cache_dir: str | Path) -> dict[str, Tensor]:
    """Token ids (1, N) of a held-out novel and of a made recall document, N a multiple of the blocks."""
    sources: list[Any] = [
        Source(name="alice", kind="corpus", corpus="heldout"),
        Source(name="recall", kind="recall"),
    ]
    rows = heldout_rows(sources, tokenizer, row_len=length, count=8, cache_dir=cache_dir)
    prose, *recall = rows[0], *rows[4:]
    longest = max(recall, key=_first_len)
    found = {"prose": prose, "recall": longest}
    return {name: _cut(row) for name, row in found.items()}


def _first_len(row: Batch) -> int:
    return int((row.document_ids == row.document_ids[0, 0]).sum())


def _cut(row: Batch) -> Tensor:
    return row.input_ids[:, : _first_len(row) // max(BLOCK_SIZES) * max(BLOCK_SIZES)]


class _Row:
    """What model.probe.observe takes."""

    def __init__(self, input_ids: Tensor) -> None:
        self.input_ids = input_ids
        self.position_ids = torch.arange(input_ids.shape[1])[None]


def random_counts(groups: int, width: int, length: int) -> Counts:
    """The same count for independent normal index queries and keys."""
    generator = torch.Generator().manual_seed(0)
    index_q = torch.randn(groups, length, width, generator=generator)
    index_k = torch.randn(length, width, generator=generator)
    found = count(index_scores(index_q, index_k, BLOCK_SIZES[0]), torch.amax)
    return {
        setting: {tokens: [round(factor, 3)] for tokens, factor in factors.items()}
        for setting, factors in found.items()
    }


def means(counts: Counts) -> dict[str, dict[str, dict[str, float]]]:
    """Mean, smallest and largest layer."""
    return {
        setting: {
            tokens: {
                "mean": round(sum(layers) / len(layers), 3),
                "lowest": min(layers),
                "highest": max(layers),
            }
            for tokens, layers in by_tokens.items()
        }
        for setting, by_tokens in counts.items()
    }


def table(summary: dict[str, dict[str, Any]]) -> str:
    """Markdown: union / k, mean over layers, then in the last quarter of the text, then the highest layer's
    mean; one row a text, selection and setting."""
    lines = ["| text | selection | blocks | " + " | ".join(f"{n} tokens" for n in TILES) + " |"]
    lines.append("|---|---|---|" + "---|" * len(TILES))
    for text, selections in summary.items():
        for selection, settings in selections.items():
            for setting, by_tokens in settings.items():
                shown = [_cell(by_tokens, tokens) for tokens in TILES]
                lines.append(f"| {text} | {selection} | {setting} | {' | '.join(shown)} |")
    return "\n".join(lines)


def _cell(by_tokens: dict[str, Any], tokens: int) -> str:
    whole, late = (by_tokens.get(name) for name in (f"{tokens}", f"{tokens} late"))
    if whole is None or late is None:
        return "-"
    return f"{whole['mean']:.2f} / {late['mean']:.2f} / {whole['highest']:.2f}"


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table, write the file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--recipe", type=Path, default=ROOT / "recipes" / "quickstart.yaml")
    parser.add_argument("--set", nargs="*", default=[], help="overrides of the recipe, a.b=value")
    parser.add_argument("--length", type=int, default=8192, help="tokens of each text")
    out = ROOT / "benchmarks" / "results" / "unions-smollm2.json"
    parser.add_argument("--out", type=Path, default=out)
    parser.add_argument("--save", type=Path, help="q, k, v, index q and index k of one layer (.pt)")
    parser.add_argument("--layer", type=int, help="the layer of --save; default: the middle one")
    options = parser.parse_args(arguments)
    recipe = recipes.load(options.recipe, options.set)
    model, tokenizer = load_checked(find_original(recipe))
    model.eval()
    print("converting")
    convert.convert(model, recipe.sparsity, calibration_rows(recipe, tokenizer))
    geometry = convert.geometry_of(model)
    layer = options.layer
    if layer is None:
        layer = geometry.sparse_layers[len(geometry.sparse_layers) // 2]
    summary, by_layer, lengths = {}, {}, {}
    rows = texts(tokenizer, options.length, recipe.data.cache_dir)
    for name, ids in rows.items():
        print(f"{name}: {ids.shape[1]} tokens", flush=True)
        census = Census(layer if name == "prose" and options.save else None, print)
        with attention_mode(model, "dense"):
            observe(model, _Row(ids), census)
        summary[name] = {kind: means(counts) for kind, counts in census.counts.items()}
        by_layer[name] = census.counts
        lengths[name] = ids.shape[1]
        if census.saved:
            options.save.parent.mkdir(parents=True, exist_ok=True)
            torch.save({**census.saved, "layer": layer, "model": recipe.model.hub}, options.save)
    random = random_counts(geometry.num_index_heads, geometry.index_dim, options.length)
    summary["none"] = {"random": means(random)}
    print(table(summary))
    record = {
        "what": "mean union of selected blocks of neighbouring tokens over k; queries with a choice",
        "model": recipe.model.hub,
        "index_groups": geometry.num_index_heads,
        "index_dim": geometry.index_dim,
        "lengths": lengths,
        "layers": list(geometry.sparse_layers),
        "environment": environment(),
        "summary": summary,
        "by_layer": by_layer,
    }
    write(options.out, record)
    print(f"wrote {options.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
