"""One LongBench prompt: filled in, cut in the middle and put into the chat template as the reference does.

A prompt above `max_length` tokens keeps its first and last half, is decoded, and only then gets the chat
template, which six tasks never get. How many tokens were cut stands in the sample. Called by longbench.py.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from .longbench_tasks import TASKS, V2, V2_MAX_LENGTH, base, bucket, suite_of
from .longbench_templates import Template

BENCHMARK = "longbench"
_BATCH_LETTERS = 4_000_000
_THOUGHT_BEGINS = "<think>"


@dataclass(frozen=True)
class LongbenchSample:
    """One stored prompt; `generate.Prompt` with what scoring and tables need."""

    id: str
    """Task, place in the records' file, and the record's checksum."""
    task: str
    """Full name: `qasper`, `qasper_e`, `v2`."""
    length: int
    """Prompt tokens allowed before the chat template, the same for all samples of a run."""
    index: int
    prompt: str
    num_tokens: int
    new_tokens: int
    references: list[str]
    chat: bool
    """Whether the prompt stands in the chat template, which brings its own special tokens."""
    full_tokens: int
    """Tokens before truncation, special tokens included."""
    cut_tokens: int
    """Tokens taken out of the middle; 0 where the prompt is whole."""
    facts: dict[str, Any]
    """`record` (its _id), and by suite `classes`, `bucket`, `difficulty`, `size`, `domain`."""
    stop_ids: list[int] = field(default_factory=list)
    """Token ids that end the answer; neither they nor an end token may be its first token."""
    benchmark: str = BENCHMARK

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> LongbenchSample:
        """Back from the stored JSON."""
        return cls(**record)

    def record(self) -> dict[str, Any]:
        """As stored."""
        return asdict(self)


class Builder:
    """Makes the samples of one task."""

    def __init__(
        self, tokenizer: Any, template: Template, task: str, max_length: int, chat: bool
    ) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self.task = task
        self.max_length = min(max_length, V2_MAX_LENGTH) if task == V2 else max_length
        self.chat = chat and (task == V2 or TASKS[base(task)].chat)
        newline = task != V2 and TASKS[base(task)].stops_at_newline
        self.stop_ids = [tokenizer.encode("\n", add_special_tokens=False)[-1]] if newline else []

    def samples(
        self, places: Sequence[int], records: Sequence[dict[str, Any]]
    ) -> list[LongbenchSample]:
        """The prompts of the records at these places, read in batches: a fast tokenizer uses all cores."""
        made: list[LongbenchSample] = []
        batch: list[int] = []
        letters = 0
        for place in places:
            batch.append(place)
            letters += len(records[place]["context"])
            if letters > _BATCH_LETTERS or place == places[-1]:
                made += self._batch(batch, [records[one] for one in batch])
                batch, letters = [], 0
        return made

    def _batch(
        self, places: Sequence[int], records: Sequence[dict[str, Any]]
    ) -> list[LongbenchSample]:
        prompts = [self.template.fill(record) for record in records]
        read = self.tokenizer(prompts, verbose=False)["input_ids"]
        joined = self.task == V2
        cuts = [
            truncate(self.tokenizer, prompt, ids, self.max_length, joined=joined)
            for prompt, ids in zip(prompts, read, strict=True)
        ]
        prompts = [in_chat(self.tokenizer, text) if self.chat else text for text, _ in cuts]
        final = self.tokenizer(prompts, add_special_tokens=not self.chat, verbose=False)[
            "input_ids"
        ]
        return [
            LongbenchSample(
                id=f"{self.task}/{places[i]:05d}-{_checksum(records[i])}",
                task=self.task,
                length=self.max_length,
                index=places[i],
                prompt=prompts[i],
                num_tokens=len(final[i]),
                new_tokens=self.template.new_tokens,
                references=references(self.task, records[i]),
                chat=self.chat,
                full_tokens=len(read[i]),
                cut_tokens=cuts[i][1],
                facts=facts(self.task, records[i]),
                stop_ids=self.stop_ids,
            )
            for i in range(len(records))
        ]


def truncate(
    tokenizer: Any, prompt: str, ids: Sequence[int], max_length: int, *, joined: bool = False
) -> tuple[str, int]:
    """The reference's middle truncation of a prompt with these token ids: text, and tokens cut.

    A prompt of at most `max_length` tokens, special tokens included, is returned as it is. Of a longer one
    the first and the last `max_length // 2` tokens are decoded without special tokens: each half for
    itself in version 1, both in one piece in version 2 (`joined`), where an odd length keeps one more at
    the end. Read again, the text may have a few tokens more or less than were kept.
    """
    if len(ids) <= max_length:
        return prompt, 0
    head = ids[: max_length // 2]
    tail = ids[len(ids) - (max_length - len(head) if joined else len(head)) :]
    parts = [[*head, *tail]] if joined else [head, tail]
    text = "".join(tokenizer.decode(part, skip_special_tokens=True) for part in parts)
    return text, len(ids) - len(head) - len(tail)


def references(task: str, record: dict[str, Any]) -> list[str]:
    """The right answers of a record."""
    return [record["answer"]] if task == V2 else [str(one) for one in record["answers"]]


def in_chat(tokenizer: Any, prompt: str) -> str:
    """The prompt as the only turn of a user, the assistant's turn opened, thinking off.

    Raises:
        ValueError: the template opens a thought all the same: answers of 32 tokens leave no room for it.
    """
    turns = [{"role": "user", "content": prompt}]
    opened = tokenizer.apply_chat_template(
        turns, tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    if opened.rstrip().endswith(_THOUGHT_BEGINS):
        raise ValueError(
            "the chat template opens a thought even with enable_thinking=False, and LongBench's answers "
            "have no room for one: set longbench.chat=false"
        )
    return opened


def facts(task: str, record: dict[str, Any]) -> dict[str, Any]:
    """What of a record scoring and tables need."""
    known: dict[str, Any] = {"record": record["_id"]}
    if task == V2:
        keys = {"difficulty": "difficulty", "size": "length", "domain": "domain"}
        return known | {key: record[name] for key, name in keys.items()}
    if TASKS[base(task)].metric == "classification":
        known["classes"] = record["all_classes"]
    if suite_of(task) == "e":
        known["bucket"] = bucket(record["length"])
    return known


def _checksum(record: dict[str, Any]) -> str:
    """First 8 hex digits of the sha256 of a record's content."""
    content = json.dumps(record, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:8]
