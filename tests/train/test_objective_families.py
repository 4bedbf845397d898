"""The training objective on every family: its head is known, and every weight gets a gradient."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from dense2sparse.model import convert
from dense2sparse.model.attention import AttentionCall
from dense2sparse.train.flops import model_cost
from dense2sparse.train.losses import Objective, check_head


def load_families():
    """The tiny models of tests/model/test_families.py."""
    place = Path(__file__).parents[1] / "model" / "test_families.py"
    spec = importlib.util.spec_from_file_location("families_for_training_tests", place)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


families = load_families()


@pytest.mark.parametrize("family", families.FAMILIES)
def test_every_weight_of_every_family_is_trained_with_recomputed_activations(family):
    model = families.converted(family)
    check_head(model)
    cost = model_cost(model, {name for name, _ in convert.index_parameters(model)})
    assert cost.index_weights > 0 and cost.backbone_weights > 0
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    ids = torch.randint(3, model.config.vocab_size, (2, 64))
    call = AttentionCall(
        "sparse", kl_weight=1.0, document_ids=torch.zeros_like(ids, dtype=torch.int32)
    )
    targets = torch.full_like(ids, -100)
    targets[:, :-1] = ids[:, 1:]
    loss, reported = Objective(model)(
        input_ids=ids,
        position_ids=torch.arange(64).repeat(2, 1),
        targets=targets,
        call=call,
        normaliser=float((targets >= 0).sum()),
    )
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits.float()
    whole = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(reported, whole, rtol=1e-4, atol=1e-4)
    loss.backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    allowed = [n for n in without if ".experts" in n or n.endswith(".bias")]
    assert without == allowed
