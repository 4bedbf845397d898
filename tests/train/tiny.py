"""A tiny converted Llama, rows of it, and stages for the training tests (loaded by path)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dense2sparse.model import convert
from dense2sparse.recipes.schema import SparseStage, Sparsity, WarmupStage

VOCAB, ROW_LEN, BLOCK, TOP_K, LAYERS = 300, 128, 16, 4, 4


@dataclass
class Row:
    """The fields of `data.loader.Batch`."""

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    document_ids: torch.Tensor
    targets: torch.Tensor


def rows(count: int, *, seed: int, split: int | None = None, row_len: int = ROW_LEN) -> Row:
    """`count` rows of tokens that repeat with period 7; with `split`, two documents a row."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (count, 7), generator=generator)
    input_ids = ids.repeat(1, row_len // 7 + 1)[:, :row_len].contiguous()
    flips = torch.rand(count, row_len, generator=generator) < 0.3
    noise = torch.randint(3, VOCAB, (count, row_len), generator=generator)
    input_ids = torch.where(flips, noise, input_ids)
    positions = torch.arange(row_len).repeat(count, 1)
    documents = torch.zeros(count, row_len, dtype=torch.int32)
    targets = torch.full_like(input_ids, -100)
    targets[:, :-1] = input_ids[:, 1:]
    if split is not None:
        positions[:, split:] -= split
        documents[:, split:] = 1
        targets[:, split - 1] = -100
    return Row(input_ids, positions, documents, targets)


def join(parts: list[Row]) -> Row:
    """Several batches as one."""
    names = ("input_ids", "position_ids", "document_ids", "targets")
    return Row(*(torch.cat([getattr(part, name) for part in parts]) for name in names))


class Rows:
    """A loader of given batches, repeated for ever."""

    def __init__(self, batches: list[Row]) -> None:
        self._batches, self._next = batches, 0

    def __next__(self) -> Row:
        batch = self._batches[self._next % len(self._batches)]
        self._next += 1
        return batch


def dense_model(seed: int = 0, *, kv_heads: int = 2) -> LlamaForCausalLM:
    """A tiny random Llama, 4 layers, 4 query heads of width 16."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        head_dim=16,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.1,
    )
    return LlamaForCausalLM(config)


def save_converted(path: Path, *, init: str = "random") -> Path:
    """Convert a tiny model and save it."""
    model = dense_model()
    sparsity = Sparsity(block_size=BLOCK, top_k=TOP_K, init=init, dense_layers=[0], index_dim=32)
    convert.convert(model, sparsity, [rows(1, seed=5)])
    convert.save(model, path)
    return path


def stage(kind: str, **fields: object) -> SparseStage | WarmupStage:
    """A training stage of four steps; other fields as given.

    The sparse one weighs the KL and takes the layers' mean, so that neither can be forgotten unseen.
    """
    common = {"kind": kind, "steps": 4, "index_lr": 1e-2, "micro_batch_size": 2, **fields}
    if kind == "warmup":
        return WarmupStage.model_validate(common)
    weighed = {"backbone_lr": 1e-3, "kl_weight": 0.3, "kl_reduction": "mean"}
    return SparseStage.model_validate({**weighed, **common})


def train_section(**fields: object) -> SimpleNamespace:
    """The recipe's `train` section as far as the loop reads it."""
    given = {"seed": 0, "log_every": 1, "measure_every": 100, "checkpoint_every": 100, **fields}
    return SimpleNamespace(**given)


def save_dense(path: Path) -> Path:
    """Save a tiny dense model with a byte-level tokenizer, as a checkpoint a recipe can name."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {token: number for number, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    backend = Tokenizer(models.BPE(vocab=words, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    dense_model().save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def write_corpus(path: Path, *, seed: int, documents: int = 60) -> Path:
    """A text file of made-up sentences, one document a paragraph block."""
    import random

    rng = random.Random(seed)
    words = ["stone", "river", "lamp", "green", "seven", "walks", "under", "the", "a", "old", "sea"]
    lines = [
        " ".join(rng.choice(words) for _ in range(rng.randint(20, 60))) + "."
        for _ in range(documents)
    ]
    path.write_text("\n\n".join(lines), encoding="utf-8")
    return path
