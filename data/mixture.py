"""Several token streams as one, in the shares that the weights ask for.

The next piece comes from the stream that is furthest behind its share of the tokens so far: no random
numbers, no dependence on the number of ranks, and shares that hold at every point of the run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .stream import Stream


class Mixture:
    """Draws pieces for rows of `row_len` tokens."""

    def __init__(self, streams: Sequence[Stream], weights: Sequence[float], row_len: int) -> None:
        if not any(stream.splits for stream in streams):
            raise ValueError(
                "data.sources has no source of prose: kind=recall takes its filler from the others, "
                "so add a text, jsonl, parquet, hub or corpus source"
            )
        self._streams, self._row_len = list(streams), row_len
        self._shares = np.array(weights, dtype=np.float64) / sum(weights)
        self._drawn = np.zeros(len(self._streams), dtype=np.int64)

    @property
    def tokens_drawn(self) -> dict[str, int]:
        """Tokens taken from each source so far."""
        return {s.name: int(n) for s, n in zip(self._streams, self._drawn, strict=True)}

    def draw(self, room: int) -> np.ndarray:
        """The next piece, (n,) int32 with 1 <= n <= room.

        A document that must stay whole starts a row; what it leaves of the row, cut prose fills.
        """
        behind = self._shares * (self._drawn.sum() + room) - self._drawn
        allowed = [room == self._row_len or stream.splits for stream in self._streams]
        choice = int(np.argmax(np.where(allowed, behind, -np.inf)))
        piece = self._streams[choice].take(room)
        self._drawn[choice] += len(piece)
        return piece

    def state_dict(self) -> dict[str, Any]:
        """Positions of all streams, by name, as plain JSON values."""
        return {
            "drawn": self.tokens_drawn,
            "streams": {stream.name: stream.state_dict() for stream in self._streams},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was called.

        Raises:
            ValueError: the state is of other sources.
        """
        names = [stream.name for stream in self._streams]
        if sorted(names) != sorted(state["streams"]):
            raise ValueError(
                f"the data position is of the sources {sorted(state['streams'])}, the recipe names "
                f"{sorted(names)}: resume with the recipe of the run"
            )
        for number, stream in enumerate(self._streams):
            stream.load_state_dict(state["streams"][stream.name])
            self._drawn[number] = state["drawn"][stream.name]
