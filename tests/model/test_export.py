"""Export takes the newest weights of a run and writes a whole folder or nothing."""

import json

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dense2sparse.model.convert import convert, load, save
from dense2sparse.model.export import main, newest_weights
from dense2sparse.recipes.schema import Sparsity


class Row:
    input_ids = torch.arange(64)[None] % 32
    position_ids = torch.arange(64)[None]


@pytest.fixture
def run(tmp_path):
    """A run folder with a start and two finished training stages, told apart by one weight."""
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
    )
    sparsity = Sparsity(block_size=16, top_k=2, dense_layers=[0])
    model = convert(LlamaForCausalLM(config), sparsity, [Row()])
    words = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
    folders = {"start": 0.0, "stages/2-warmup": 2.0, "stages/10-sparse": 10.0}
    for folder, value in folders.items():
        with torch.no_grad():
            model.model.norm.weight.fill_(value)
        save(model, tmp_path / "run" / folder / "hf", also=tokenizer)
        (tmp_path / "run" / folder / "done.json").write_text(json.dumps({}))
    return tmp_path / "run"


def test_newest_stage_is_exported_with_its_tokenizer(run, tmp_path):
    assert main([str(run), "--out", str(tmp_path / "out"), "--dtype", "bf16"]) == 0
    model = load(tmp_path / "out", dtype=torch.bfloat16)
    assert model.model.norm.weight[0] == 10
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_an_unfinished_stage_is_not_taken(run):
    (run / "stages/10-sparse/done.json").unlink()
    assert newest_weights(run) == run / "stages/2-warmup/hf"
    (run / "stages/2-warmup/done.json").unlink()
    assert newest_weights(run) == run / "start/hf"


def test_mistakes_are_one_sentence(run, tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "holds no converted model" in error
    (tmp_path / "out").mkdir()
    assert main([str(run), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "exists: name another folder" in error and error.count("\n") == 1
