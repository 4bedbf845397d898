"""Size and geometry of the converted model, found before any weight is read.

The parameters are counted on the full model on torch's meta device. What attention the layers have is
observed, as the conversion does: on a narrow instance of the same configuration with random weights,
which keeps every layer and every head width.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from ..model import convert
from ..model.geometry import Geometry, check_heads, resolve_index_dim
from ..model.indexer import graft
from ..model.probe import attention_modules
from .flops import ModelCost, model_cost
from .start import read_part

_HEADS, _KV_HEADS, _INNER, _VOCABULARY, _TOKENS = 4, 2, 4, 64, 16
"""Of the narrow instance: heads, KV heads, width of the MLPs and experts, vocabulary, tokens shown."""


@dataclass(frozen=True)
class Sizes:
    """Parameter counts and shape of the model to come."""

    backbone: int
    index: int
    hidden: int
    layers: int
    sparse_layers: tuple[int, ...]
    index_dim: int
    cost: ModelCost


@dataclass(frozen=True)
class _Row:
    input_ids: Tensor
    position_ids: Tensor


def converted_sizes(config: Any, sparsity: Any, *, name: str) -> Sizes:
    """Sizes of the model that the conversion will make of a configuration.

    Args:
        config: of the dense checkpoint.
        sparsity: the recipe's section.
        name: of the checkpoint, for messages.

    Raises:
        ValueError: what the conversion would refuse.
    """
    with torch.device("meta"):
        model = read_part(f"the model of {name}", AutoModelForCausalLM.from_config, config)
    config = model.config  # of a wrapper, some classes take the text part
    geometry = converted_geometry(config, sparsity)
    backbone = sum(p.numel() for p in model.parameters())
    attentions = attention_modules(model)
    for layer in geometry.sparse_layers:
        graft(attentions[layer], geometry)
    index = convert.index_parameters(model)
    return Sizes(
        backbone=backbone,
        index=sum(p.numel() for _, p in index),
        hidden=config.hidden_size,
        layers=config.num_hidden_layers,
        sparse_layers=geometry.sparse_layers,
        index_dim=geometry.index_dim,
        cost=model_cost(model, {name for name, _ in index}, geometry.to_config()),
    )


def converted_geometry(config: Any, sparsity: Any) -> Geometry:
    """Geometry that the conversion will find; biases of q and k are taken not to be zero.

    Raises:
        ValueError: heads, widths, layers or an attention that cannot be converted.
    """
    check_heads(config)
    resolve_index_dim(config, sparsity)
    positions = torch.arange(_TOKENS)[None]
    row = _Row(positions + 3, positions)
    found, bridge = convert.inspect_layers(_narrow_model(config), row)
    return convert.resolve_geometry(config, sparsity, found, bridge=bridge)


def _narrow_model(config: Any) -> Any:
    """A random model with the configuration's layers and head width, and little of everything else."""
    narrow = copy.deepcopy(config)
    # Families take the head width from its own key or from this quotient: both stay as they are.
    narrow.hidden_size = _HEADS * (config.hidden_size // config.num_attention_heads)
    narrow.num_attention_heads, narrow.num_key_value_heads = _HEADS, _KV_HEADS
    for key, value in config.to_dict().items():
        if not isinstance(value, int):
            continue
        if key.endswith("intermediate_size"):
            setattr(narrow, key, min(value, _INNER))
        elif key.endswith("vocab_size"):
            setattr(narrow, key, min(value, _VOCABULARY))
        elif key.endswith("token_id"):
            setattr(narrow, key, min(value, _VOCABULARY - 1))
    narrow.tie_word_embeddings = True
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(
            narrow, dtype=torch.float32, experts_implementation="eager"
        )
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias"):  # they start at zero, where they would not show
                torch.nn.init.normal_(parameter, std=0.02)
    return model.eval()
