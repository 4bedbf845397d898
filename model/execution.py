"""How a converted model computes its attention, as against what: backend, precision, dense below a length.

Every attention module of a model holds the same `Dispatch`, put there by `convert.load(...,
execution=)` or `set_execution`; `attention.attend` asks it in every layer. Nothing is global.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from ..kernels.break_even import MEASURED, Measured, Phase, break_even
from ..kernels.ops import BACKENDS

logger = logging.getLogger(__name__)


class ExecutionLike(Protocol):
    """The recipe's section."""

    @property
    def backend(self) -> str: ...
    @property
    def index_precision(self) -> Literal["input", "fp8"]: ...
    @property
    def debug(self) -> bool: ...


@dataclass(frozen=True)
class Execution:
    """Options that change speed and rounding. fp8 may also move a block whose score is close to another's
    into or out of the selection."""

    backend: str = "auto"
    """Of `kernels.ops.BACKENDS`."""
    index_precision: Literal["input", "fp8"] = "input"
    """Precision in which blocks are scored: that of the index heads, or fp8 (kernels/fp8.py)."""
    debug: bool = False
    """Look at every block id before it is used; waits for the device in every layer."""
    dense_below: int | None = None
    """Mode "auto" runs dense attention on fewer keys than this; None takes what `measured` says of the
    device, and where it says nothing dense attention ends where blocks begin to be left out."""
    measured: tuple[Measured, ...] = MEASURED
    """Break-even lengths; `kernels.break_even.read` reads those of a benchmark of one's own."""

    def __post_init__(self) -> None:
        if self.index_precision not in ("input", "fp8"):
            raise ValueError(f"index_precision={self.index_precision!r}: use 'input' or 'fp8'")
        if self.backend not in BACKENDS:
            raise ValueError(f"backend={self.backend!r}: use one of {', '.join(BACKENDS)}")
        if self.dense_below is not None and self.dense_below < 0:
            raise ValueError(f"dense_below={self.dense_below}: use a number of tokens, or None")

    @classmethod
    def of(cls, section: ExecutionLike) -> Execution:
        """The options that a recipe names."""
        return cls(
            backend=section.backend,
            index_precision=section.index_precision,
            debug=section.debug,
        )

    @property
    def precision(self) -> dict[str, Any]:
        """Keyword of the operations that score blocks."""
        return {} if self.index_precision == "input" else {"precision": self.index_precision}


class Dispatch:
    """One model's options, and what was said of them already."""

    def __init__(self, execution: Execution | None = None) -> None:
        self.execution = execution or Execution()
        self._said: set[str] = set()

    def runs_dense(
        self, auto: bool, q: Tensor, k: Tensor, *, budget_tokens: int, one_token: bool
    ) -> bool:
        """Whether a sparse layer runs dense attention instead.

        Always where every block fits the budget: both are then the same, and dense is one kernel.
        In mode "auto" also below the break-even length. Documents only make rows shorter, so the row's
        length decides; looking at each would wait for the device.

        Args:
            auto: the call's mode is "auto".
            q: (B, H, T, D); k: (B, G, S, D).
            budget_tokens: top_k * block_size.
            one_token: a decoding step.
        """
        num_keys = k.shape[2]
        if num_keys <= budget_tokens:
            self._say(f"up to {budget_tokens} keys run dense: every block fits the budget")
            return True
        if not auto:
            return False
        heads, groups = q.shape[1], k.shape[1]
        device = _device_name(q.device)
        limit, why = self.execution.dense_below, "dense_below"
        if limit is None:
            phase: Phase = "decode" if one_token else "prefill"
            limit = break_even(device, heads, groups, phase, self.execution.measured)
            why = f"{phase}, measured on {device} for about {heads // groups} heads a group"
        if limit is None:
            self._say(
                f"mode auto runs sparse from {budget_tokens + 1} keys on: no break-even length is known of "
                f"{device} with about {heads // groups} heads a group"
            )
            return False
        self._say(f"mode auto runs dense below {limit} keys and sparse from there on ({why})")
        return num_keys < limit

    def _say(self, line: str) -> None:
        if line not in self._said:
            self._said.add(line)
            logger.info("attention: %s", line)


def set_execution(model: nn.Module, execution: Execution | Dispatch) -> None:
    """Let every attention module of a model follow these options from now on."""
    dispatch = execution if isinstance(execution, Dispatch) else Dispatch(execution)
    for module in model.modules():
        if (
            isinstance(getattr(module, "layer_idx", None), int)
            and "Attention" in type(module).__name__
        ):
            module.msa_dispatch = dispatch  # type: ignore[assignment]


def dispatch_of(module: nn.Module) -> Dispatch:
    """The dispatch of an attention module; defaults for one that was never given any."""
    found = getattr(module, "msa_dispatch", None)
    return Dispatch() if found is None else found


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
