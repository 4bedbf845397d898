"""From a draft to the text and the tokens that the model reads.

| mode      | around the question                            | answer prefix     | tokens to generate      |
|-----------|------------------------------------------------|-------------------|-------------------------|
| base      | nothing                                        | yes               | as published            |
| chat      | the tokenizer's chat template, thinking is off | behind the header | as published            |
| reasoning | the same, thinking is on                       | none              | an eighth of the length |

What stands around the question counts inside the length, and so do special tokens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .ruler_material import Draft
from .ruler_score import THOUGHT_BEGINS

MODES = ("auto", "base", "chat", "reasoning")
_REASONING_SHARE = 8
"""A length's share for reasoning: 16K of 128K, as in RULER's issue 99."""
_PROBE_TEXT = "The quick brown fox, 1234567 of them; naïve café — VAR QXZ = 98765.\n\n  Twice?"


@dataclass(frozen=True)
class Placed:
    """A rendered prompt; `spans` and `decoys` are tokens [first, last), by needle."""

    prompt: str
    num_tokens: int
    spans: list[list[int]]
    decoys: list[list[int]]


class Prompter:
    """Renders and counts the prompts of one tokenizer and mode."""

    def __init__(self, tokenizer: Any, mode: str, *, strip_prefix: bool = True) -> None:
        """`strip_prefix`: drop the answer prefix's first space behind a chat header.

        Raises:
            ValueError: a tokenizer without character offsets.
        """
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(
                "RULER prompts need a fast tokenizer (tokenizer.json), which knows where each token stands "
                "in the text: save the checkpoint with one"
            )
        self.mode = resolve_mode(tokenizer, mode)
        self._tokenizer, self._strip_prefix = tokenizer, strip_prefix
        self._last: tuple[str, Any] | None = None
        for special in (True, False):  # also takes a stored truncation off
            ids = tokenizer(_PROBE_TEXT, add_special_tokens=special)["input_ids"]
            same = tokenizer.backend_tokenizer.encode(_PROBE_TEXT, add_special_tokens=special).ids
            assert ids == same, "the tokenizer and its backend disagree"

    def render(self, draft: Draft) -> str:
        """The whole prompt as text.

        Raises:
            ValueError: the chat template leaves a thought open although thinking is off.
        """
        if self.mode == "base":
            return draft.question + draft.answer_prefix
        turns = [{"role": "user", "content": draft.question}]
        opened = self._tokenizer.apply_chat_template(
            turns,
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=self.mode == "reasoning",
        )
        if self.mode == "reasoning":
            return opened
        if opened.rstrip().endswith(THOUGHT_BEGINS):
            raise ValueError(
                "the chat template opens a thought even with enable_thinking=False, so an answer prefix "
                "cannot follow: set `mode: reasoning`, or `mode: base`"
            )
        return opened + (
            draft.answer_prefix.lstrip() if self._strip_prefix else draft.answer_prefix
        )

    def tokens(self, draft: Draft) -> int:
        """Tokens of the whole prompt."""
        return len(self._encoding(self.render(draft)))

    def count(self, text: str) -> int:
        """Tokens of a text alone, without special tokens."""
        return len(self._tokenizer.backend_tokenizer.encode(text, add_special_tokens=False))

    def placed(self, draft: Draft) -> Placed:
        """The prompt with its needles in tokens.

        Raises:
            ValueError: the chat template changes the question.
        """
        prompt = self.render(draft)
        encoding = self._encoding(prompt)
        if not draft.needles:
            return Placed(prompt, len(encoding), [], [])
        begin = prompt.find(draft.question.strip())
        if begin < 0:
            raise ValueError(
                "the chat template changes the question's text, so needles cannot be found in it: "
                "set `mode: base`"
            )
        begin -= len(draft.question) - len(draft.question.lstrip())
        offsets = encoding.offsets
        return Placed(
            prompt,
            len(encoding),
            _token_spans(offsets, draft.needles, begin),
            _token_spans(offsets, draft.decoys, begin),
        )

    def _encoding(self, prompt: str) -> Any:
        if self._last is None or self._last[0] != prompt:  # the one that fitted is placed next
            special = self.mode == "base"
            encoded = self._tokenizer.backend_tokenizer.encode(prompt, add_special_tokens=special)
            self._last = prompt, encoded
        return self._last[1]


def resolve_mode(tokenizer: Any, mode: str) -> str:
    """The mode that `auto` stands for: chat where there is a chat template, else base.

    Raises:
        ValueError: no such mode, or one that needs a chat template.
    """
    if mode not in MODES:
        raise ValueError(f"mode={mode!r} is not known: use {', '.join(MODES)}")
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if mode == "auto":
        return "chat" if has_template else "base"
    if mode != "base" and not has_template:
        raise ValueError(f"mode={mode} needs a tokenizer with a chat template: use `mode: base`")
    return mode


def generation_tokens(published: int, length: int, mode: str, asked: int | None = None) -> int:
    """Tokens that may be generated; `asked` replaces reasoning's share of the length."""
    if mode != "reasoning":
        return published
    return max(published, asked or length // _REASONING_SHARE)


def encode(tokenizer: Any, prompt: str, *, chat: bool) -> list[int]:
    """Token ids of a stored prompt; a chat template brings its own special tokens."""
    return tokenizer(prompt, add_special_tokens=not chat, verbose=False)["input_ids"]


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """sha256 of what decides a prompt's tokens: vocabulary, chat template, special ids, a probe text."""
    content = [
        sorted(tokenizer.get_vocab().items()),
        getattr(tokenizer, "chat_template", None),
        [tokenizer.bos_token_id, tokenizer.eos_token_id],
        tokenizer(_PROBE_TEXT)["input_ids"],
    ]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _token_spans(
    offsets: list[tuple[int, int]], wanted: Sequence[tuple[int, int]], begin: int
) -> list[list[int]]:
    """Tokens [first, last) that hold a character of each of `wanted`, which count from `begin`."""
    spans = []
    for first, last in wanted:
        inside = [
            place
            for place, (start, end) in enumerate(offsets)
            if start < begin + last and end > begin + first and end > start
        ]
        spans.append([inside[0], inside[-1] + 1])
    return spans
