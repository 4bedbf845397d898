"""Shared by the evaluation's tests: a tiny tokenizer, RULER-like words, haystack, models, a made-up run."""

from __future__ import annotations

import importlib.util
import json
import random
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dense2sparse.eval.ruler_corpus import Corpus, Question, Questions
from dense2sparse.eval.sources import RulerWords, Template

CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


@pytest.fixture(scope="session")
def answering() -> ModuleType:
    """The makers of answering.py; tests cannot import it, since only the root is a package."""
    place = Path(__file__).with_name("answering.py")
    spec = importlib.util.spec_from_file_location("answering_for_tests", place)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def ruler_like_words() -> RulerWords:
    """Made-up words and templates with the benchmark's blanks, so that no test needs the network."""
    rng = random.Random(0)
    made = ["".join(rng.choices("abcdefghijklmnop", k=rng.randint(4, 8))) for _ in range(900)]
    return RulerWords(
        templates={
            "niah": Template(
                "Some secret {type_needle_v} are in this text.\n{context}\nWhat are all the secret "
                "{type_needle_v} for {query}?",
                " The secret {type_needle_v} for {query} are",
                128,
            ),
            "variable_tracking": Template(
                "Follow the assignments.\n\n{context}\nQuestion: which have the value {query}?",
                " Answer: {num_v} variables have the value {query}: ",
                30,
            ),
            "common_words_extraction": Template(
                "A list of words.\n{context}\nQuestion: which 10 are most common?", " Answer:", 120
            ),
            "freq_words_extraction": Template(
                "Coded words. {context}\nQuestion: which three are most frequent?", " Answer:", 50
            ),
            "qa": Template("Read these.\n\n{context}\n\nQuestion: {query}", " Answer:", 32),
        },
        needle="One of the secret {type_needle_v} for {key} is: {value}.",
        noise="Rain falls. Wind blows. Snow melts.",
        tracking_noise="Rain falls. Wind blows. Snow melts.\n",
        nouns=tuple(sorted(set(made[:500]))),
        adjectives=tuple(sorted(set(made[500:700]))),
        verbs=tuple(sorted(set(made[700:]))),
        document="Text {i}:\n{document}",
    )


@pytest.fixture(scope="session")
def works(ruler_like_words: RulerWords) -> dict[str, str]:
    """A haystack of 4,000 made-up words in sentences."""
    rng = random.Random(1)
    words = [rng.choice(ruler_like_words.nouns) for _ in range(4000)]
    text = " ".join(word + ("." if place % 9 == 8 else "") for place, word in enumerate(words))
    return {"made-up": text}


@pytest.fixture(scope="session")
def ruler_corpus(ruler_like_words: RulerWords, works: dict[str, str]) -> Corpus:
    """All 13 tasks on made-up text: 60 documents, the even ones state a fact that is asked for."""
    rng = random.Random(2)
    nouns = ruler_like_words.nouns
    documents, items = [], []
    for number in range(60):
        fact = f"The fact of {nouns[number]} is {nouns[-1 - number]}{number}."
        filler = " ".join(rng.choices(nouns, k=12))
        documents.append(f"{filler}. {fact} {filler}.")
        first = len(filler) + 2
        if number % 2 == 0:
            evidence = ((number, first, first + len(fact)),)
            answers = (f"{nouns[-1 - number]}{number}", "another answer that nobody gives")
            asked = f"What is the fact of {nouns[number]}?"
            items.append(Question(asked, answers, (number,), (number + 1,), evidence))
    questions = Questions(tuple(items), tuple(documents))
    return Corpus("nvidia", ruler_like_words, works, {"qa_1": questions, "qa_2": questions})


@pytest.fixture(scope="session")
def tokenizer(ruler_like_words: RulerWords) -> PreTrainedTokenizerFast:
    """Byte-level BPE with 900 tokens and no chat template."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    lists = (*ruler_like_words.nouns, *ruler_like_words.adjectives, *ruler_like_words.verbs)
    sentence = (
        "which three are most frequent one of the secret numbers for is rain falls wind blows"
    )
    bpe.train_from_iterator([" ".join(lists), *[sentence] * 50], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")


@pytest.fixture()
def chat_tokenizer(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The same with a chat template."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    chat = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    chat.chat_template = CHAT
    return chat


@pytest.fixture(scope="session")
def tiny_model() -> LlamaForCausalLM:
    """Random Llama, 2 layers, 4 query heads and 2 KV heads."""
    torch.manual_seed(0)
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
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture()
def made_up_run(tmp_path: Path) -> Path:
    """A finished run's folder with invented numbers, as the stages would have left it."""
    run = tmp_path / "made-up"
    _write(run / "recipe.json", {"name": "made-up", "sparsity": {"top_k": 16, "block_size": 32}})
    _write(
        run / "environment.json",
        {"date": "2026-01-01", "commit": "abc", "packages": {"torch": "2"}},
    )
    _write(run / "stages/1-warmup/done.json", {"kind": "warmup", "seconds": 61.0})
    lines = []
    for step in range(1, 11):
        record = {
            "step": step,
            "tokens": 1024 * step,
            "stage_index": 1 if step < 6 else 2,
            "stage": "1-warmup" if step < 6 else "2-sparse",
            "train/loss_lm": 3.5 - 0.01 * step,
            "train/loss_kl": 1.0 / step,
        }
        if step in (5, 10):
            record |= {f"index/learned_coverage/layer_{n:02d}": 0.9 + n / 100 for n in (3, 4, 5)}
            record |= {"index/learned_coverage_mean": 0.94, "index/learned_coverage_min": 0.93}
        lines.append(json.dumps(record))
    (run / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 11, "tok', encoding="utf-8")
    _write(run / "eval/perplexity/stage-3.json", _perplexity())
    _write(run / "eval/ruler/stage-4.json", _ruler())
    _write(
        run / "eval/longbench/stage-5.json", {"stage": 5, "measured": False, "reason": "no room"}
    )
    return run


def _write(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def _gap(estimate: float) -> dict:
    return {"estimate": estimate, "low": estimate - 1, "high": estimate + 1, "samples": 8} | {
        "confidence": 0.95
    }


def _perplexity() -> dict:
    arms = {
        name: {"perplexity": value, "loss": 3.2, "seconds": 9.0, "row_losses": [], "row_tokens": []}
        for name, value in (
            ("original_dense", 24.111),
            ("converted_dense", 24.222),
            ("converted_sparse-k16", 24.333),
            ("converted_oracle-k16", 24.289),
        )
    }
    pairs = [
        ("training drift", "original_dense", "converted_dense", 0.46),
        ("budget cost", "converted_dense", "converted_oracle-k16", 0.28),
        ("indexer error", "converted_oracle-k16", "converted_sparse-k16", 0.18),
        ("cost of sparsity", "converted_dense", "converted_sparse-k16", 1.57),
    ]
    named = [
        {"meaning": meaning, "first": one, "second": two, "change_pct": _gap(value)}
        for meaning, one, two, value in pairs
    ]
    head = {"kind": "perplexity", "stage": 3, "after": ["1-warmup", "2-sparse"], "rows": 8}
    sizes = {"row_len": 1024, "blocks": 32, "rows_digest": "feed" * 16}
    return {**head, **sizes, "arms": arms, "comparisons": named}


def _ruler() -> dict:
    cell = {"samples": 6, "stopped": {"budget": 6}, "empty": 0, "uninformative": False}
    arms = {
        label: {
            "arm": label.partition("-k")[0],
            "top_k": None,
            "scores": {"1024": {"niah_single_1": {**cell, "score": value}}},
            "means": {"1024": value},
            "seconds": 33.0,
        }
        for label, value in (("converted_dense", 83.375), ("converted_sparse-k16", 66.625))
    }
    task = {
        "task": "niah_single_1",
        "lost": _gap(16.75),
        "worse": 1,
        "better": 0,
        "p": 1.0,
        "p_holm": 1.0,
    }
    flip = {"id": "niah_single_1/1024/00003", "references": ["7654321"], "scores": [100.0, 0.0]} | {
        "first": "7654321",
        "second": "<script>alert(1)</script>",
    }
    lost = {**_gap(16.75), "samples": 6}
    pair = {
        "meaning": "cost of sparsity",
        "first": "converted_dense",
        "second": "converted_sparse-k16",
        "lengths": [{"length": 1024, "lost": lost, "unseen_share": None, "tasks": [task]}],
        "flips": [flip],
    }
    skipped = [{"task": "cwe", "length": 1024, "reason": "cwe needs 1216 tokens"}]
    return {
        "kind": "ruler",
        "stage": 4,
        "after": ["1-warmup", "2-sparse"],
        "label": "ruler-pd, not comparable with published scores",
        "prompts": "beef" * 16,
        "samples": 6,
        "lengths": [1024],
        "tasks": ["niah_single_1", "cwe"],
        "skipped": skipped,
        "block_size": 32,
        "arms": arms,
        "comparisons": [pair],
    }
