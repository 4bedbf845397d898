"""Tokens of one source, endless and restartable to the token.

`TokenStream` tokenises documents lazily and hands out consecutive pieces of them; `data.mixture` mixes
several streams. A few documents are open side by side, so that rows from one long novel and from the
next are mixed; a new epoch begins, in another order, once all documents of the last one are used up.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np

from .documents import Documents, Position

PART_CHARS = 100_000


class Stream(Protocol):
    """A source of tokens as the mixture sees it."""

    name: str
    splits: bool
    """Whether a document may be cut to fill what is left of a row."""

    def take(self, room: int) -> np.ndarray:
        """The next 1 to `room` tokens of one document, (n,) int32."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def source_key(seed: int, name: str) -> list[int]:
    """Seed of one source's order: depends on its name, not on its place in the list."""
    return [seed, zlib.crc32(name.encode())]


class Tokenizer:
    """Text to ids as documents need them: BOS if the tokenizer puts one by default, EOS at the end."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        bare = self.encode("a")
        full = list(tokenizer("a")["input_ids"])
        bos = tokenizer.bos_token_id
        self.bos = [bos] if bos is not None and full[:1] == [bos] and bare[:1] != [bos] else []
        if tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no EOS token: documents could not be told apart")
        self.eos = [int(tokenizer.eos_token_id)]

    def encode(self, text: str) -> list[int]:
        """Ids of `text` without any token put around it."""
        return self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def encode_many(self, texts: list[str]) -> list[list[int]]:
        """`encode` for a list, several threads where the tokenizer has them."""
        if not texts:
            return []
        return self._tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]

    def chat(self, messages: list[dict[str, str]]) -> str | None:
        """The messages in the model's chat template; None if it has none."""
        if not getattr(self._tokenizer, "chat_template", None):
            return None
        return self._tokenizer.apply_chat_template(messages, tokenize=False)

    def document(self, text: str) -> Iterator[np.ndarray]:
        """A document's ids in parts, BOS and EOS included; a long text is tokenised bit by bit.

        A text in a chat template may bring its own BOS or EOS: they are not doubled.
        """
        begin = 0
        while begin < len(text):
            end = _part_end(text, begin)
            ids = self.encode(text[begin:end])
            head = self.bos if begin == 0 and ids[:1] != self.bos else []
            tail = self.eos if end == len(text) and ids[-1:] != self.eos else []
            begin = end
            yield np.array([*head, *ids, *tail], dtype=np.int32)


def _part_end(text: str, begin: int) -> int:
    """End of the part that starts at `begin`: after a paragraph, else after a blank, else anywhere."""
    if len(text) - begin <= PART_CHARS:
        return len(text)
    limit = begin + PART_CHARS
    for mark in ("\n\n", "\n", " "):
        at = text.rfind(mark, begin + PART_CHARS // 2, limit)
        if at > 0:
            # A blank stays with the word after it: that is how most vocabularies are cut.
            return at if mark == " " else at + len(mark)
    return limit


class OpenDocument:
    """A document being handed out; `offset` counts the tokens that are gone.

    `checksum` is the CRC-32 of its text, to notice on resuming that a file is another one.
    """

    def __init__(self, tokenizer: Tokenizer, text: str, epoch: int, position: Position) -> None:
        self.epoch, self.position, self.offset = epoch, position, 0
        self.checksum = zlib.crc32(text.encode("utf-8", "surrogatepass"))
        self._parts = tokenizer.document(text)
        self._rest = np.empty(0, dtype=np.int32)
        self._fill()

    @property
    def done(self) -> bool:
        return not len(self._rest)

    def take(self, room: int) -> np.ndarray:
        """Up to `room` tokens; fewer only at the document's end."""
        pieces = []
        while room and len(self._rest):
            pieces.append(self._rest[:room])
            self._rest = self._rest[room:]
            room -= len(pieces[-1])
            self.offset += len(pieces[-1])
            self._fill()
        return np.concatenate(pieces)

    def _fill(self) -> None:
        while not len(self._rest):
            part = next(self._parts, None)
            if part is None:
                return
            self._rest = part


class TokenStream:
    """Endless stream over a source's documents."""

    splits = True

    def __init__(self, documents: Documents, tokenizer: Tokenizer, seed: int) -> None:
        self.name = documents.name
        self._documents, self._tokenizer = documents, tokenizer
        self._key = source_key(seed, documents.name)
        self._seed = int(np.random.default_rng(self._key).integers(2**31))
        self._open: list[OpenDocument] = []
        self._takes = 0
        self._start_epoch(0)

    @property
    def epoch(self) -> int:
        """Number of times that the documents were used up."""
        return self._epoch

    def take(self, room: int) -> np.ndarray:
        """See `Stream.take`.

        Raises:
            ValueError: the source holds no text at all.
        """
        self._refill()
        choice = int(np.random.default_rng([*self._key, self._takes]).integers(len(self._open)))
        self._takes += 1
        document = self._open[choice]
        tokens = document.take(room)
        if document.done:
            self._open.pop(choice)
        return tokens

    def state_dict(self) -> dict[str, Any]:
        """Position as plain JSON values."""
        return {
            "epoch": self._epoch,
            "next": list(self._next),
            "exhausted": self._exhausted,
            "takes": self._takes,
            "open": [[d.epoch, *d.position, d.offset, d.checksum] for d in self._open],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was called, to the token.

        Raises:
            ValueError: an open document is gone or another text, or a changed tokenizer makes it shorter.
        """
        self._start_epoch(state["epoch"])
        self._next = (state["next"][0], state["next"][1])
        self._exhausted, self._takes = state["exhausted"], state["takes"]
        self._open = [self._reopened(*entry) for entry in state["open"]]

    def _reopened(
        self, epoch: int, unit: int, number: int, offset: int, checksum: int
    ) -> OpenDocument:
        """A document of a state, at its offset; refused if it is not the one it was."""
        position, text = next(self._documents.read(self._seed, epoch, (unit, number)), (None, ""))
        if position != (unit, number):
            raise self._changed(unit, number, "is gone")
        document = OpenDocument(self._tokenizer, text, epoch, position)
        if document.checksum != checksum:
            raise self._changed(unit, number, "has another text")
        if offset:
            document.take(offset)
        if document.done:
            raise self._changed(unit, number, f"has no token left after {offset}")
        return document

    def _changed(self, unit: int, number: int, how: str) -> ValueError:
        return ValueError(
            f"source {self.name!r} changed since the checkpoint: its document {number} of unit "
            f"{unit} {how}; restore the files and the tokenizer, or start a new run"
        )

    def _start_epoch(self, epoch: int) -> None:
        self._epoch, self._next, self._exhausted = epoch, (0, 0), False
        self._reader: Iterator[tuple[Position, str]] | None = None

    def _refill(self) -> None:
        """Open documents up to the wanted number; begin the next epoch when none is left."""
        while len(self._open) < self._documents.num_open:
            if self._exhausted:
                if self._open:
                    return
                if self._next == (0, 0):
                    raise ValueError(f"source {self.name!r} holds no text: the corpus is empty")
                self._start_epoch(self._epoch + 1)
            if self._reader is None:
                self._reader = self._documents.read(self._seed, self._epoch, self._next)
            item = next(self._reader, None)
            if item is None:
                self._exhausted = True
                continue
            position, text = item
            self._next = (position[0], position[1] + 1)
            self._open.append(OpenDocument(self._tokenizer, text, self._epoch, position))
