"""Prompts for the tests of predicting, and a recipe around a tiny converted model (loaded by path)."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dense2sparse.eval.context import EvalContext
from dense2sparse.model import convert
from dense2sparse.recipes.load import load as load_recipe

RECIPE = """
name: tiny
output_dir: {home}/runs
model: {{path: {home}/dense}}
sparsity: {{block_size: 16, top_k: 4, index_dim: 16, dense_layers: [0], init: random}}
data:
  row_len: 128
  cache_dir: {home}/cache
  sources:
    - {{name: prose, kind: text, path: {home}/prose.txt}}
train: {{precision: fp32}}
wandb: {{mode: disabled}}
stages:
  - {{kind: report, margin: 2.0}}
"""
STAGES = "  - {kind: ruler, lengths: [512]}"


@dataclass(frozen=True)
class Asked:
    """One prompt, as `generate.Prompt` wants it."""

    id: str
    task: str
    length: int
    prompt: str
    num_tokens: int
    new_tokens: int
    references: list[str]
    chat: bool = False
    spans: list[list[int]] = field(default_factory=list)
    stop_ids: list[int] = field(default_factory=list)
    benchmark: str = "ruler"

    def record(self) -> dict[str, Any]:
        """As stored."""
        return asdict(self)


@dataclass(frozen=True)
class AskedSet:
    """A prompt set."""

    samples: list[Asked]
    digest: str = "feed" * 16


def prompts(
    tokenizer: Any, words: Sequence[str], count: int, *, tokens: int = 200, new_tokens: int = 3
) -> list[Asked]:
    """Two tasks of random words; sizes differ, and every prompt names a needle of three tokens or more."""
    rng = random.Random(7)
    made = []
    for index in range(count):
        size = tokens // 4 + index * tokens // count // 4
        text = " ".join(rng.choices(words, k=size))
        ids = tokenizer(text)["input_ids"]
        first = rng.randrange(20, len(ids) - 20)
        made.append(
            Asked(
                id=f"task_{index % 2}/{tokens}/{index:05d}",
                task=f"task_{index % 2}",
                length=tokens,
                prompt=text,
                num_tokens=len(ids),
                new_tokens=new_tokens,
                references=["\x00 never said"],
                spans=[[first, first + 3]],
            )
        )
    return made


def lively_model() -> LlamaForCausalLM:
    """A random Llama whose attention decides what it says; with tied weights it repeats the last token."""
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=900,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=2048,
        bos_token_id=0,
        eos_token_id=1,
        initializer_range=0.25,
    )
    model = LlamaForCausalLM(config).eval()
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.o_proj.weight, std=1.0)
    return model


def build_home(home: Path, model: Any, tokenizer: Any, stages: str = STAGES) -> Path:
    """A dense folder, its conversion and a recipe under `home`; `{home}` in `stages` is its path."""
    model.save_pretrained(home / "dense")
    tokenizer.save_pretrained(home / "dense")
    (home / "prose.txt").write_text("Rain falls.", encoding="utf-8")
    text = RECIPE.format(home=home)
    head, report = text.split("stages:\n")
    stages = stages.strip("\n").replace("{home}", str(home))
    (home / "recipe.yaml").write_text(f"{head}stages:\n{stages}\n{report}", encoding="utf-8")
    row = SimpleNamespace(
        input_ids=torch.randint(2, 900, (1, 64), generator=torch.Generator().manual_seed(0)),
        position_ids=torch.arange(64)[None],
        document_ids=torch.zeros(1, 64, dtype=torch.int32),
    )
    recipe = load_recipe(home / "recipe.yaml")
    dense = convert.load_dense(home / "dense")
    convert.save(convert.convert(dense, recipe.sparsity, [row]), home / "converted")
    return home


def context(home: Path, run_dir: Path, **changes: Any) -> EvalContext:
    """The context of one rank alone, unless told otherwise."""
    given = {
        "recipe": load_recipe(home / "recipe.yaml"),
        "run_dir": run_dir,
        "original": home / "dense",
        "converted": home / "converted",
        "rank": 0,
        "world_size": 1,
        "device": torch.device("cpu"),
        "dtype": torch.float32,
        "barrier": lambda: None,
        "log": lambda values: None,
    }
    return EvalContext(**{**given, **changes})


def write_samples(path: Path, samples: Sequence[Asked]) -> None:
    """Store prompts for another process."""
    path.write_text(json.dumps([one.record() for one in samples]), encoding="utf-8")


def read_samples(path: Path) -> list[Asked]:
    """The stored prompts."""
    return [Asked(**record) for record in json.loads(path.read_text(encoding="utf-8"))]
