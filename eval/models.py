"""The models behind the arms: loaded when first needed, one at a time; and what tells checkpoints apart.

B, C and D are one loaded model in three attention modes; A is loaded before and freed.
"""

from __future__ import annotations

import gc
import hashlib
import json
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from ..model.attention import Mode, attention_mode
from ..model.convert import load, load_dense
from ..model.execution import Execution
from .arms import ArmRun

MODES: dict[str, Mode] = {
    "converted_dense": "dense",
    "converted_sparse": "sparse",
    "converted_oracle": "oracle",
}
"""Attention mode of each arm of the converted model."""
_WINDOW = 4096
"""Bytes that the fingerprint reads at a time."""


def attending(model: Any, run: ArmRun) -> AbstractContextManager[None]:
    """Context in which `model` attends as this arm does."""
    if run.arm == "original_dense":
        return nullcontext()
    return attention_mode(model, MODES[run.arm], top_k=run.top_k)


class Models:
    """Loads the model of an arm when it is first needed and keeps one at a time."""

    def __init__(
        self,
        original: Path,
        converted: Path,
        *,
        device: torch.device,
        dtype: torch.dtype,
        execution: Execution | None = None,
    ) -> None:
        """`execution` is how the converted model attends; the original is plain transformers."""
        self._paths = {"original": original, "converted": converted}
        self._device, self._dtype = device, dtype
        self._execution = execution
        self._held: tuple[str, Any] | None = None
        self._fingerprints: dict[str, str] = {}

    def fingerprint(self, run: ArmRun) -> str:
        """Checksum of the checkpoint behind an arm."""
        which = _which(run)
        if which not in self._fingerprints:
            self._fingerprints[which] = checkpoint_fingerprint(self._paths[which])
        return self._fingerprints[which]

    def of(self, run: ArmRun) -> Any:
        """The arm's model in evaluation mode."""
        which = _which(run)
        if self._held is None or self._held[0] != which:
            self.release()
            path = self._paths[which]
            model: Any
            if which == "original":
                model = load_dense(path, dtype=self._dtype)
            else:
                model = load(path, dtype=self._dtype, mode="dense", execution=self._execution)
            self._held = (which, model.to(self._device).eval())
        return self._held[1]

    def release(self) -> None:
        """Free the model that is held."""
        self._held = None
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


def _which(run: ArmRun) -> str:
    return "original" if run.arm == "original_dense" else "converted"


def checkpoint_fingerprint(path: Path) -> str:
    """Checksum that tells checkpoints apart: the config, and three windows of every tensor.

    Every tensor is looked at, because a warm-up with a frozen backbone moves only a few per cent of the
    bytes; not all of each, because training moves a tensor everywhere and a large model is 60 GB.

    Raises:
        ValueError: no safetensors file in the folder.
    """
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise ValueError(
            f"{path} holds no *.safetensors file: save the checkpoint with save_pretrained"
        )
    digest = hashlib.sha256((path / "config.json").read_bytes())
    for file in files:
        with open(file, "rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            header = stream.read(size)
            digest.update(header)
            for name, tensor in sorted(json.loads(header).items()):
                if name != "__metadata__":
                    for place in _windows(*tensor["data_offsets"]):
                        stream.seek(8 + size + place)
                        digest.update(stream.read(_WINDOW))
    return digest.hexdigest()


def _windows(first: int, last: int) -> tuple[int, int, int]:
    """Where to read in a tensor's bytes: its beginning, middle and end."""
    end = max(first, last - _WINDOW)
    return first, (first + end) // 2, end
