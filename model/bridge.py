"""For families whose decoder layer drops unknown keyword arguments (StableLM does): carry ours past it.

The layer's class is changed to a subclass that leaves our arguments on its attention module while the
layer runs. Under activation checkpointing the subclass's forward is what is recomputed, so the arguments
are those of the pass that is recomputed.
"""

from __future__ import annotations

from typing import Any

from torch import nn

ARGUMENTS = ("msa_call", "msa_observer")
"""Keyword arguments of `model(...)` that must reach the attention function."""


class ArgumentBridge:
    """Mixin over a family's decoder layer."""

    def forward(self, *args: Any, **kwargs: Any):
        attention = self.msa_attention[0]  # type: ignore[attr-defined]
        attention.msa_passed = {name: kwargs.get(name) for name in ARGUMENTS}
        try:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        finally:
            attention.msa_passed = {}


def install(model: nn.Module, attentions: list[nn.Module]) -> None:
    """Bridge every decoder layer: the module that holds one of the attention modules as a child."""
    for layer in list(model.modules()):
        held = [child for child in layer.children() if any(child is one for one in attentions)]
        if len(held) != 1 or isinstance(layer, ArgumentBridge):
            continue
        base = type(layer)
        layer.__class__ = type(f"Bridged{base.__name__}", (ArgumentBridge, base), {})
        # In a list: the attention module must not become a second child of that name.
        layer.msa_attention = held  # type: ignore[assignment]


def passed(attention: nn.Module, name: str, given: Any) -> Any:
    """The argument as given, or as a bridge left it."""
    return given if given is not None else getattr(attention, "msa_passed", {}).get(name)
