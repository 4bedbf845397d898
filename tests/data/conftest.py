"""A small real tokenizer, made here, and prose to go with it."""

from __future__ import annotations

import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
WORD_LIST = (
    "harbour winter letter garden silence copper morning bridge orchard stranger window river candle "
    "journey market shadow engine teacher island mountain kitchen weather question blanket doctor "
    "forest evening village promise station pocket captain hunger summer thunder corner ladder "
    "paper river music carpet marble butter finger hammer saddle velvet yellow wander gather listen "
    "follow travel answer borrow carry hurry notice reason second single tender bitter gentle simple "
    "hollow narrow steady sudden clever honest mellow rugged secret silver wooden"
)


def prose(paragraphs: int, seed: int = 0) -> str:
    """Made sentences: no fact in them, and no digit."""
    rng = random.Random(seed)
    blocks = []
    for _ in range(paragraphs):
        sentences = [
            " ".join(rng.choices(WORD_LIST.split(), k=rng.randint(4, 12))).capitalize() + "."
            for _ in range(rng.randint(2, 6))
        ]
        blocks.append(" ".join(sentences))
    return "\n\n".join(blocks) + "\n"


def make_source(**fields: Any) -> SimpleNamespace:
    """What the loader sees of a recipe's source."""
    defaults = {
        "name": "prose",
        "kind": "text",
        "path": None,
        "hub": None,
        "config": None,
        "split": "train",
        "field": "text",
        "corpus": None,
        "works": None,
        "weight": 1.0,
    }
    return SimpleNamespace(**(defaults | fields))


@pytest.fixture(scope="session")
def source() -> Callable[..., SimpleNamespace]:
    return make_source


@pytest.fixture(scope="session")
def write_prose() -> Callable[..., str]:
    return prose


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of 600 tokens with EOS and a chat template, trained on made prose."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    special = ["<|eos|>", "<|bos|>", "<|user|>", "<|assistant|>", "<|end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator([prose(300, seed=9)], trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|eos|>", bos_token="<|bos|>")
    made.chat_template = CHAT_TEMPLATE
    return made
