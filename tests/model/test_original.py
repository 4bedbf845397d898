"""`model.rope`: the stretched checkpoint equals transformers' own; what cannot be stretched is refused."""

import json
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoTokenizer,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedTokenizerFast,
    StableLmConfig,
    StableLmForCausalLM,
)

from dense2sparse.model.attention import attention_mode
from dense2sparse.model.convert import convert, load_dense
from dense2sparse.model.original import (
    check_positions,
    check_rows,
    find_original,
    positions,
    stretched,
)
from dense2sparse.model.probe import observe
from dense2sparse.recipes.schema import Rope, Sparsity

SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
}
YARN = Rope(type="yarn", factor=4)


def small(config_class=LlamaConfig, model_class=LlamaForCausalLM, **changes):
    torch.manual_seed(0)
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return model_class(config_class(**{**SIZES, **ends, **changes})).eval()


def saved(model, folder):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    model.save_pretrained(folder)
    words = WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2, "word": 3}, unk_token="<pad>")
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return saved(small(), tmp_path_factory.mktemp("dense") / "dense")


def row(length=300):
    ids = torch.randint(3, 64, (2, length), generator=torch.Generator().manual_seed(5))
    places = torch.arange(length).expand(2, length)
    return SimpleNamespace(input_ids=ids, position_ids=places)


@pytest.mark.parametrize(
    ("rope", "parameters", "window"),
    [
        (YARN, {"rope_type": "yarn", "original_max_position_embeddings": 128}, 512),
        (
            Rope(type="yarn", factor=4, original_window=64),
            {"rope_type": "yarn", "original_max_position_embeddings": 64},
            256,
        ),
        (Rope(type="linear", factor=4), {"rope_type": "linear"}, 512),
    ],
)
def test_a_stretched_checkpoint_equals_transformers_own(folder, tmp_path, rope, parameters, window):
    found = stretched(folder, rope, tmp_path)
    theta = {"rope_theta": 10000.0, "factor": 4.0}
    config = LlamaConfig.from_pretrained(folder, max_position_embeddings=window)
    config.rope_parameters = {**theta, **parameters}
    wanted = LlamaForCausalLM.from_pretrained(folder, config=config).eval()
    model, plain = load_dense(found).eval(), load_dense(folder).eval()
    ids = row().input_ids
    with torch.no_grad():
        assert torch.equal(model(ids).logits, wanted(ids).logits)
        assert not torch.allclose(model(ids).logits, plain(ids).logits, atol=1e-2)
    assert positions(model.config) == {"window": window, "rope": {**theta, **parameters}}
    assert AutoTokenizer.from_pretrained(found).get_vocab()["word"] == 3


def test_the_original_stays_and_its_weights_are_not_copied(folder, tmp_path):
    before = (folder / "config.json").read_bytes()
    found = stretched(folder, YARN, tmp_path)
    made = (found / "config.json").stat().st_mtime_ns
    assert stretched(folder, YARN, tmp_path) == found
    assert (found / "config.json").stat().st_mtime_ns == made, "made once"
    assert (found / "model.safetensors").is_symlink() and not (found / "config.json").is_symlink()
    assert (folder / "config.json").read_bytes() == before
    other = stretched(folder, Rope(type="yarn", factor=2), tmp_path)
    assert other != found and AutoConfig.from_pretrained(other).max_position_embeddings == 256


def test_the_recipe_decides(folder, tmp_path):
    def of(rope):
        model = SimpleNamespace(path=folder, hub=None, revision=None, wheel=None, rope=rope)
        return SimpleNamespace(model=model, data=SimpleNamespace(cache_dir=tmp_path))

    assert find_original(of(None)) == folder.resolve()
    assert find_original(of(YARN)) == stretched(folder, YARN, tmp_path)


def test_index_scores_of_the_closed_form_carry_the_attention_factor(folder, tmp_path):
    """YaRN scales its tables, so index scores must come out scaled as the logits are."""
    model = load_dense(stretched(folder, YARN, tmp_path)).eval()
    sparsity = Sparsity(block_size=16, top_k=3, dense_layers=[0], index_dim=32)
    convert(model, sparsity, [row(), row(200)])
    seen_layers = []

    def compare(seen):
        if seen.layer == 0:
            return
        index_q, index_k = seen.attention.index_states(seen.hidden, seen.positions)
        mean_q = seen.q.unflatten(1, (2, 2)).mean(2)
        logits = torch.einsum("bgnd,bgsd->bgns", mean_q, seen.k)
        torch.testing.assert_close(index_q @ index_k.mT, logits, rtol=1e-3, atol=1e-3)
        seen_layers.append(seen.layer)

    observe(model, row(), compare)
    assert seen_layers == [1]
    ids = row().input_ids
    with torch.no_grad():
        with attention_mode(model, "dense"):
            dense = model(ids).logits
        with attention_mode(model, "sparse", top_k=64):
            torch.testing.assert_close(model(ids).logits, dense, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("model", "rope", "words"),
    [
        (
            lambda: GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=64, n_layer=2, n_head=4)),
            YARN,
            "has no rotary embedding to scale",
        ),
        (
            lambda: small(
                rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
            ),
            YARN,
            "are scaled already (window 128, linear, factor 2)",
        ),
        (
            lambda: small(Gemma3TextConfig, Gemma3ForCausalLM, head_dim=16),
            YARN,
            "another rotary embedding in each kind of layer",
        ),
        (
            small,
            Rope(type="yarn", factor=1.5, original_window=64),
            "64 positions times 1.5 are 96, no more than the 128 of",
        ),
    ],
    ids=["learned positions", "scaled already", "by kind of layer", "not longer"],
)
def test_what_cannot_be_stretched_is_refused_in_a_sentence(tmp_path, model, rope, words):
    folder = saved(model(), tmp_path / "dense")
    with pytest.raises(ValueError) as refused:
        stretched(folder, rope, tmp_path / "cache")
    assert str(refused.value).startswith("model.rope: ") and words in str(refused.value)
    assert not list((tmp_path / "cache").glob("checkpoints/*/config.json"))


def test_a_family_with_a_scaling_of_its_own_is_refused_and_nothing_is_left(tmp_path):
    folder = saved(small(Phi3Config, Phi3ForCausalLM), tmp_path / "dense")
    with pytest.raises(ValueError, match=r"^model.rope.type=yarn does not suit .*\['longrope'\]"):
        stretched(folder, YARN, tmp_path / "cache")
    assert [file.name for file in (tmp_path / "cache/checkpoints").iterdir()] == [".lock"]


def test_partial_rotary_embeddings_keep_their_share(tmp_path):
    part = small(StableLmConfig, StableLmForCausalLM, partial_rotary_factor=0.5)
    folder = saved(part, tmp_path / "dense")
    config = AutoConfig.from_pretrained(stretched(folder, YARN, tmp_path))
    assert config.rope_parameters["partial_rotary_factor"] == 0.5
    assert config.rope_parameters["rope_type"] == "yarn"


def test_arms_with_other_positions_are_not_compared(folder, tmp_path):
    found = stretched(folder, YARN, tmp_path)
    check_positions(folder, folder)
    check_positions(found, found)
    with pytest.raises(ValueError, match=r"\(window 512, yarn, factor 4\) than the recipe's origi"):
        check_positions(folder, found)


def test_rows_above_the_window_are_refused():
    stages = [SimpleNamespace(row_len=None), SimpleNamespace(row_len=4096), SimpleNamespace()]
    recipe = SimpleNamespace(data=SimpleNamespace(row_len=1024), stages=stages)
    check_rows(recipe, 4096)
    check_rows(recipe, None)
    with pytest.raises(ValueError, match=r"^stages.1.row_len=4096 is above .* 1500: .*model.rope$"):
        check_rows(recipe, 1500)
    with pytest.raises(ValueError, match=r"^data.row_len=1024 is above .* 1000: lower it"):
        check_rows(recipe, 1000)


def test_results_say_how_far_positions_reach():
    plain = positions(small().config)
    assert plain == {"window": 128, "rope": None} and json.dumps(plain)
    assert positions(small(Gemma3TextConfig, Gemma3ForCausalLM, head_dim=16).config) == plain
