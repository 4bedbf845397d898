"""Dense checkpoint to sparse one, and back from a folder.

A converted folder is a plain `save_pretrained` folder: the backbone keeps its names, so plain transformers
loads it as the dense model; the index branch adds `self_attn.index_*` tensors and the config block
`sparse_attention_config`.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from .attention import NAME, Mode, register
from .bridge import install
from .closed_form import LayerMoments, fit
from .execution import Execution, set_execution
from .geometry import (
    Geometry,
    SparsityLike,
    check_heads,
    head_width,
    resolve_index_dim,
    resolve_sparse_layers,
)
from .indexer import INDEX_MODULES, graft
from .probe import Observation, RowLike, Transforms, attention_modules, observe, transforms

CONFIG_KEY = "sparse_attention_config"


@torch.no_grad()
def convert(
    model: PreTrainedModel,
    sparsity: SparsityLike,
    calibration: Iterable[RowLike],
    *,
    seed: int = 0,
) -> PreTrainedModel:
    """Add an index branch to every sparse layer, in place, and switch to our attention.

    Args:
        model: any GQA causal language model of transformers.
        sparsity: the recipe's section.
        calibration: rows of training tokens; `init=pca` reads all of them, `init=random` the first.
        seed: of the random start.

    Raises:
        ValueError: a geometry, a layer choice or an attention that cannot be converted.
    """
    if is_indexed(model):
        raise ValueError(
            f"{model.name_or_path} is converted already: start from the dense checkpoint"
        )
    check_heads(model.config)
    resolve_index_dim(model.config, sparsity)
    rows = iter(calibration)
    first = next(rows, None)
    if first is None:
        raise ValueError("no calibration row: give at least one row of training tokens")
    found, bridge = inspect_layers(model, first)
    attentions = attention_modules(model)
    layers = {layer: LayerMoments(one, attentions[layer]) for layer, one in found.items()}
    geometry = resolve_geometry(model.config, sparsity, found, bridge=bridge)

    def collect(seen: Observation) -> None:
        if seen.layer in geometry.sparse_layers:
            layers[seen.layer].add(seen)

    if sparsity.init == "pca":
        observe(model, first, collect)
        for row in rows:
            observe(model, row, collect)
    generator = torch.Generator().manual_seed(seed)
    for layer in geometry.sparse_layers:
        attention = layers[layer].attention
        graft(attention, geometry)
        if sparsity.init == "pca":
            weights = fit(layers[layer], geometry)
        else:
            weights = _random_weights(attention, model.config, generator)
        for name, value in weights.items():
            attention.get_parameter(name).copy_(value)
    setattr(model.config, CONFIG_KEY, geometry.to_config())
    set_execution(model, Execution())
    model.config._attn_implementation = NAME
    return model


def inspect_layers(model: PreTrainedModel, row: RowLike) -> tuple[dict[int, Transforms], bool]:
    """What every layer's attention does, and whether a bridge had to be installed to see it.

    Raises:
        ValueError: attention that MSA does not define (soft-capping, sinks).
    """
    register()
    found: dict[int, Transforms] = {}

    def note(seen: Observation) -> None:
        found[seen.layer] = transforms(seen)

    observe(model, row, note)
    bridge = not found
    if bridge:
        install(model, list(attention_modules(model).values()))
        observe(model, row, note)
    return found, bridge


def save(
    model: nn.Module,
    path: str | Path,
    *,
    state_dict: dict[str, Tensor] | None = None,
    also: Any = None,
) -> None:
    """Write a folder that `load` and plain transformers read; it appears whole or not at all.

    Args:
        state_dict: full-precision tensors to write instead of the model's own (ZeRO gathers them).
        also: a tokenizer, or anything else with `save_pretrained`, for the same folder.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.parent.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(partial, state_dict=state_dict)  # type: ignore[operator]
    if also is not None:
        also.save_pretrained(partial)
    if path.exists():
        old = path.with_name(f".{path.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        os.replace(path, old)
        os.replace(partial, path)
        shutil.rmtree(old)
    else:
        os.replace(partial, path)


def load(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    mode: Mode = "sparse",
    execution: Execution | None = None,
) -> PreTrainedModel:
    """Load a converted folder with its index branch; `mode` is the default of plain forward passes.

    `execution` says how they are computed; None is the default of `Execution`.

    Raises:
        ValueError: not a converted folder, or index tensors missing, unused or of a wrong shape.
    """
    config = _config(path)
    block = getattr(config, CONFIG_KEY, None)
    if not block:
        raise ValueError(f"{path} has no {CONFIG_KEY} in its config.json: convert the model first")
    geometry = Geometry.from_config(block, config.num_hidden_layers)
    register()
    model = load_dense(path, dtype=dtype)
    attentions = attention_modules(model)
    if geometry.argument_bridge:
        install(model, list(attentions.values()))
    for layer in geometry.sparse_layers:
        graft(attentions[layer], geometry)
        attentions[layer].msa_mode = mode  # type: ignore[assignment]
    _load_index_tensors(model, Path(path))
    set_execution(model, execution or Execution())
    model.config._attn_implementation = NAME
    return model


def load_dense(path: str | Path, *, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Load a folder as plain transformers does: the dense model, also from a converted folder.

    Raises:
        ValueError: backbone tensors are missing from the folder.
    """
    check_shards(path)
    # transformers reports the index tensors as unexpected; `load` accounts for each of them itself.
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.ERROR)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, output_loading_info=True
        )
    finally:
        transformers_logging.set_verbosity(verbosity)
    model, info = loaded
    missing = sorted(info["missing_keys"])
    if missing:
        raise ValueError(
            f"{path} lacks {len(missing)} tensors of the model, {missing[0]} first: copy the folder again"
        )
    return model


def is_converted(path: str | Path) -> bool:
    """Whether a folder's config.json has the sparse attention block."""
    file = Path(path) / "config.json"
    return file.is_file() and CONFIG_KEY in json.loads(file.read_text())


def is_indexed(model: nn.Module) -> bool:
    """Whether the model in memory has an index branch."""
    return any(hasattr(module, "msa_geometry") for module in model.modules())


def geometry_of(model: PreTrainedModel) -> Geometry:
    """Geometry of a converted model in memory."""
    return Geometry.from_config(getattr(model.config, CONFIG_KEY), model.config.num_hidden_layers)


def index_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Named parameters of the index branch."""
    return [(name, p) for name, p in model.named_parameters() if is_index_name(name)]


def backbone_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Named parameters of everything else."""
    return [(name, p) for name, p in model.named_parameters() if not is_index_name(name)]


def is_index_name(name: str) -> bool:
    """Whether a parameter or tensor name belongs to the index branch."""
    return any(part in INDEX_MODULES for part in name.split("."))


def check_shards(path: str | Path) -> None:
    """Refuse a folder whose weights are not all there.

    Raises:
        ValueError: no weights, a file that the shard index names and the folder lacks, or a file that is
            shorter than its own header says.
    """
    tensor_files(Path(path))


def tensor_files(path: Path) -> dict[str, Path]:
    """Safetensors file of each tensor in a folder; checks as in `check_shards`."""
    index = path / "model.safetensors.index.json"
    names = {"model.safetensors"}
    if index.is_file():
        names = set(json.loads(index.read_text())["weight_map"].values())
    found: dict[str, Path] = {}
    for name in sorted(names):
        file = path / name
        if not file.is_file():
            raise ValueError(f"{path} has no {name}: copy the missing weight file into the folder")
        try:
            with safe_open(file, framework="pt") as tensors:
                found.update(dict.fromkeys(tensors.keys(), file))
        except Exception as error:
            raise ValueError(f"{file} is damaged ({error}): copy it again") from error
    return found


def _config(path: str | Path) -> Any:
    if not (Path(path) / "config.json").is_file():
        raise ValueError(f"{path} has no config.json: give a folder written by save_pretrained")
    return AutoConfig.from_pretrained(path)


def _load_index_tensors(model: nn.Module, path: Path) -> None:
    expected = dict(index_parameters(model))
    stored = {name: file for name, file in tensor_files(path).items() if is_index_name(name)}
    for problem, names in (
        ("lacks", expected.keys() - stored.keys()),
        ("has unused", stored.keys() - expected.keys()),
    ):
        if names:
            raise ValueError(
                f"{path} {problem} {len(names)} index tensors, {min(names)} first: the weights and "
                f"{CONFIG_KEY} in config.json do not belong together"
            )
    for name, parameter in expected.items():
        with safe_open(stored[name], framework="pt") as tensors:
            value = tensors.get_tensor(name)
        if value.shape != parameter.shape:
            raise ValueError(
                f"{path}: {name} has shape {tuple(value.shape)}, {CONFIG_KEY} needs "
                f"{tuple(parameter.shape)}"
            )
        parameter.data.copy_(value)


def resolve_geometry(
    config: Any, sparsity: SparsityLike, layers: dict[int, Transforms], *, bridge: bool
) -> Geometry:
    """Geometry of the sparse layers, from the recipe, the model and what `inspect_layers` found.

    Raises:
        ValueError: a layer choice or a width of the index heads that cannot be.
    """
    full = [layer for layer, found in sorted(layers.items()) if found.full]
    sparse = resolve_sparse_layers(sparsity, config.num_hidden_layers, full)
    chosen = [layers[layer] for layer in sparse]
    index_dim, pca = resolve_index_dim(config, sparsity), sparsity.init == "pca"
    main_scale = chosen[0].scaling or head_width(config) ** -0.5
    norm = sparsity.index_norm
    if norm == "auto":
        norm = any(layer.norm for layer in chosen) if pca else True
    return Geometry(
        block_size=sparsity.block_size,
        top_k=sparsity.top_k,
        local_blocks=sparsity.local_blocks,
        init_blocks=sparsity.init_blocks,
        num_index_heads=config.num_key_value_heads,
        index_dim=index_dim,
        index_scale=main_scale if pca else index_dim**-0.5,
        index_norm=norm,
        index_bias=pca and any(layer.bias for layer in chosen),
        num_layers=config.num_hidden_layers,
        sparse_layers=tuple(sparse),
        rotary_layers=tuple(n for n in sparse if layers[n].rotary),
        argument_bridge=bridge,
    )


def _random_weights(
    attention: nn.Module, config: Any, generator: torch.Generator
) -> dict[str, Tensor]:
    """Normal projections of the model's own initializer range; norms and biases stay zero."""
    std = getattr(config, "initializer_range", 0.02)
    names = ("index_q_proj.weight", "index_k_proj.weight")
    shapes = {name: attention.get_parameter(name).shape for name in names}
    return {name: torch.randn(shape, generator=generator) * std for name, shape in shapes.items()}
