"""Losses by position in the document: sums agree with the whole, pairs with the row; old folders do.

A document that is read in chunks has the losses of one that is read whole, in every arm.
"""

from __future__ import annotations

import copy
import json
import math
from types import SimpleNamespace

import pytest
import torch

from dense2sparse.eval import perplexity
from dense2sparse.eval.arms import ArmRun
from dense2sparse.eval.models import attending
from dense2sparse.eval.perplexity import LossMeter, bucket, change_pct, measure, summarise
from dense2sparse.model import convert
from dense2sparse.recipes.schema import Sparsity


def row_of(*lengths: int) -> SimpleNamespace:
    """A row with a document of each length; the last token of each has no target."""
    ids = torch.randint(2, 900, (1, sum(lengths)))
    targets = torch.cat([ids[:, 1:], torch.tensor([[-100]])], dim=1)
    ends = torch.tensor(lengths).cumsum(0) - 1
    targets[0, ends] = -100
    documents = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return SimpleNamespace(input_ids=ids, targets=targets, document_ids=documents[None].int())


@pytest.fixture(autouse=True)
def small_buckets(monkeypatch):
    """0-8, 8-16, 16-32, 32-64 instead of buckets that begin with 128 positions."""
    monkeypatch.setattr(perplexity, "FIRST_EDGE", 8)
    torch.manual_seed(0)


def test_buckets_double_and_leave_no_position_out():
    found = [bucket(place) for place in range(5)]
    assert found == [(0, 8), (8, 16), (16, 32), (32, 64), (64, 128)]


@pytest.mark.parametrize("lengths", [(1,), (2,), (8,), (9,), (40,), (40, 5, 17), (16, 16)])
def test_every_target_is_in_the_bucket_of_its_position_in_its_document(tiny_model, lengths):
    row = row_of(*lengths)
    found = LossMeter(tiny_model).by_position(row)
    expected: dict[int, list[float]] = {}
    with torch.no_grad():
        for ids, targets in perplexity.documents(row):
            logits = tiny_model(input_ids=ids[None]).logits[0]
            losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
            for position in range(len(ids) - 1):
                place = next(n for n in range(9) if position < bucket(n)[1])
                expected.setdefault(place, []).append(float(losses[position]))
    counted = {place: tokens for place, (_, tokens) in enumerate(found) if tokens}
    assert counted == {place: len(losses) for place, losses in expected.items()}
    for place, losses in expected.items():
        assert found[place][0] == pytest.approx(sum(losses), rel=1e-5)


def test_journal_sums_are_those_of_its_positions_and_resume_adds_nothing(tiny_model, tmp_path):
    rows = [row_of(40), row_of(20, 12)]
    assert measure(tiny_model, rows, tmp_path) == 2
    assert measure(tiny_model, rows, tmp_path) == 0
    found = summarise(tmp_path, 2)
    ends = [(entry["first"], entry["last"], entry["rows"]) for entry in found["positions"]]
    assert ends == [(0, 8, 2), (8, 16, 2), (16, 32, 2), (32, 64, 1)]
    assert sum(entry["tokens"] for entry in found["positions"]) == sum(found["row_tokens"])
    total = sum(entry["loss"] * entry["tokens"] for entry in found["positions"])
    assert total / sum(found["row_tokens"]) == pytest.approx(found["loss"])


def invented(rows: list[list[tuple[float, int]]]) -> dict:
    """An arm's summary from losses by row and bucket."""
    return {
        "row_losses": [sum(loss for loss, _ in row) for row in rows],
        "row_tokens": [sum(tokens for _, tokens in row) for row in rows],
        "row_positions": rows,
    }


def test_change_by_position_is_that_of_the_rows_that_reach_it():
    base = invented(
        [[(16.0, 8), (12.0, 6)], [(20.0, 8), (10.0, 8), (30.0, 16)], [(9.0, 7), (0.0, 0)]]
    )
    worse = invented(
        [[(16.0, 8), (12.6, 6)], [(20.0, 8), (10.8, 8), (32.4, 16)], [(9.0, 7), (0.0, 0)]]
    )
    found = change_pct(worse, base).record()
    first, second, third = found["by_position"]
    assert (first["estimate"], first["low"], first["high"]) == (0.0, 0.0, 0.0)
    assert (
        second["estimate"] == pytest.approx(100 * math.expm1(1.4 / 14)) and second["samples"] == 2
    )
    assert third["estimate"] == pytest.approx(100 * math.expm1(2.4 / 16)) and third["samples"] == 1
    assert found["estimate"] == pytest.approx(100 * math.expm1(3.8 / 53))


def test_folder_of_an_earlier_version_has_sums_only(tmp_path):
    record = {"id": "row-00000", "loss": 30.0, "tokens": 10, "seconds": 1.0}
    (tmp_path / "rank-0-of-1.jsonl").write_text(json.dumps(record) + "\n", encoding="utf-8")
    found = summarise(tmp_path, 1)
    assert found["perplexity"] == pytest.approx(math.exp(3)) and "positions" not in found
    assert change_pct(found, found).record()["by_position"] == []


@pytest.fixture(scope="module")
def converted(tiny_model):
    """Every layer selects 3 of up to 13 blocks of 16 tokens."""
    row = SimpleNamespace(
        input_ids=torch.randint(2, 900, (1, 64)),
        position_ids=torch.arange(64)[None],
        document_ids=torch.zeros(1, 64, dtype=torch.int32),
    )
    sparsity = Sparsity(block_size=16, top_k=3, index_dim=16, dense_layers=[], init="random")
    return convert.convert(copy.deepcopy(tiny_model), sparsity, [row]).eval()


@pytest.mark.parametrize("chunk", [16, 40, 300])
@pytest.mark.parametrize(
    "label", ["original_dense", "converted_dense", "converted_sparse-k3", "converted_oracle-k3"]
)
def test_losses_of_a_document_do_not_depend_on_the_chunk(tiny_model, converted, label, chunk):
    run = ArmRun.parse(label)
    model = tiny_model if run.arm == "original_dense" else converted
    row = row_of(201, 5, 17)  # 201: the last chunk of 40 is one token long
    with attending(model, run):
        whole = LossMeter(model).by_position(row)
        found = LossMeter(model, chunk).by_position(row)
    assert [tokens for _, tokens in found] == [tokens for _, tokens in whole]
    assert [loss for loss, _ in found] == pytest.approx([loss for loss, _ in whole], rel=1e-5)


def test_budget_of_the_sparse_arm_is_felt_by_the_document_of_the_chunk_tests(converted):
    row = row_of(201)
    losses = []
    for run in (ArmRun("converted_dense"), ArmRun("converted_sparse", 3)):
        with attending(converted, run):
            losses.append(LossMeter(converted, 40).row(row)[0])
    assert abs(losses[0] - losses[1]) > 1e-3


@pytest.mark.parametrize("scaled", [False, True])
def test_no_pass_holds_more_than_a_chunk_of_tokens_or_logits(tiny_model, monkeypatch, scaled):
    """`scaled`: a family whose logits come from its own forward pass."""
    sizes: dict[str, list[int]] = {"read": [], "logits": []}
    seen = [
        tiny_model.model.embed_tokens.register_forward_hook(
            lambda module, given, out: sizes["read"].append(out.shape[1])
        ),
        tiny_model.lm_head.register_forward_hook(
            lambda module, given, out: sizes["logits"].append(out.numel() // out.shape[-1])
        ),
    ]
    row = row_of(150)
    try:
        meter = LossMeter(tiny_model, 32)
        monkeypatch.setattr(meter, "_plain", not scaled)
        found = meter.row(row)
        assert found == pytest.approx(LossMeter(tiny_model, 150).row(row), rel=1e-5)
    finally:
        for hook in seen:
            hook.remove()
    chunks = [32, 32, 32, 32, 22]
    assert sizes["read"][2:7] == chunks and sizes["logits"][2:7] == chunks
