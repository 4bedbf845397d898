"""Two ranks under every ZeRO stage, against ZeRO 0 and against a plain torch loop."""

from __future__ import annotations

import math

import pytest
import torch

from dense2sparse.model import convert
from dense2sparse.model.attention import AttentionCall

pytestmark = pytest.mark.slow

STAGES = (0, 1, 2, 3)


def steps_of(result: dict) -> list[dict]:
    """Records of optimizer steps, without those of measurements."""
    return [record for record in result["records"] if "train/loss_lm" in record]


def curve(result: dict, name: str) -> torch.Tensor:
    """One series over the steps."""
    return torch.tensor([record[name] for record in steps_of(result)], dtype=torch.float64)


def branch_change(result: dict, branch: str) -> dict[str, float]:
    """Largest change of each master weight of one branch."""
    return {
        name: float((result["after"][name] - before).abs().max())
        for name, before in result["before"].items()
        if convert.is_index_name(name) == (branch == "index")
    }


@pytest.fixture(scope="module")
def plain(tiny, start_folder) -> dict:
    """The sparse stage of four steps in plain torch: one process, the whole batch, KL beside the loss."""
    stage = tiny.stage("sparse")
    model = convert.load(start_folder)
    index, backbone = convert.index_parameters(model), convert.backbone_parameters(model)
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for _, p in index], "lr": stage.index_lr},
            {"params": [p for _, p in backbone], "lr": stage.backbone_lr},
        ],
        betas=stage.betas,
        weight_decay=0.0,
    )
    batch = tiny.join([tiny.rows(1, seed=seed) for seed in (0, 2, 1, 3)])
    seen: dict = {"lm": [], "kl": [], "index": [], "backbone": []}
    for step in range(4):
        # One ramp step of four (3 % rounded up), then a cosine over the other three down to a tenth.
        share = 1.0 if step == 0 else 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * step / 3))
        optimizer.param_groups[0]["lr"] = stage.index_lr * share
        optimizer.param_groups[1]["lr"] = stage.backbone_lr * share
        call = AttentionCall("sparse", kl_weight=1.0, attach_kl=False)
        logits = model(
            input_ids=batch.input_ids, position_ids=batch.position_ids, msa_call=call
        ).logits
        lm = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten())
        kl = torch.stack([report.kl for report in call.reports.values()]).mean()
        optimizer.zero_grad()
        (lm + stage.kl_weight * kl).backward()
        for name, members in (("index", index), ("backbone", backbone)):
            squares = [p.grad.double().square().sum() for _, p in members]
            seen[name].append(float(torch.stack(squares).sum().sqrt()))
        torch.nn.utils.clip_grad_norm_(model.parameters(), stage.gradient_clipping)
        optimizer.step()
        seen["lm"].append(float(lm.detach()))
        seen["kl"].append(float(kl.detach()))
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    return {**seen, "weights": weights}


@pytest.mark.parametrize("recompute", [0, 1])
@pytest.mark.parametrize("zero", STAGES)
def test_two_ranks_follow_plain_torch(zero_results, plain, zero, recompute):
    result = zero_results[f"sparse-z{zero}-c{recompute}"]
    for ours, theirs in (
        ("train/loss_lm", "lm"),
        ("train/loss_kl", "kl"),
        ("train/grad_norm/index", "index"),
        ("train/grad_norm/backbone", "backbone"),
    ):
        expected = torch.tensor(plain[theirs], dtype=torch.float64)
        torch.testing.assert_close(curve(result, ours), expected, rtol=1e-4, atol=1e-4)
    for name, value in result["after"].items():
        torch.testing.assert_close(value, plain["weights"][name], rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize(
    "name",
    [
        "sparse-z1-c1",
        "sparse-z2-c0",
        "sparse-z3-c1",
        "warmup-z3",
        "joint-warmup-z1",
    ],
)
def test_triton_kernels_train_as_the_torch_path_does(triton_results, zero_results, name):
    """KL, loss and gradient norms, a second step's after an update; also with recomputation."""
    ours, theirs = triton_results[name], zero_results[name]
    series = ["train/loss_lm", "train/loss_kl", "train/grad_norm/index"]
    if not name.startswith("warmup"):
        series.append("train/grad_norm/backbone")
    for one in series:
        found = curve(ours, one)
        expected = curve(theirs, one)[: len(found)]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    steps = 1 if name in ("sparse-z1-c1", "sparse-z2-c0") else 2
    assert len(curve(ours, "train/loss_kl").unique()) == steps


def test_kl_is_computed_once_a_layer_micro_batch_and_step(tiny, zero_results):
    """Under every ZeRO stage, with recomputation and accumulation, backbone frozen or trained."""
    layers = tiny.LAYERS - 1
    for name, result in zero_results.items():
        micro_batches = 2 if name.startswith("gas") else 1
        steps = max(record["step"] for record in result["records"])
        assert result["num_kls"] == layers * micro_batches * steps, name


@pytest.mark.parametrize("zero", STAGES)
def test_one_rank_sees_the_same_as_two(zero_results, one_rank_results, zero):
    one, two = one_rank_results[f"sparse-z{zero}"], zero_results[f"sparse-z{zero}-c0"]
    for name in (
        "train/loss_lm",
        "train/loss_kl",
        "train/grad_norm/index",
        "train/grad_norm/total",
    ):
        torch.testing.assert_close(curve(one, name), curve(two, name), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("recompute", [0, 1])
@pytest.mark.parametrize("zero", (1, 2, 3))
def test_master_weights_of_both_branches_move_in_the_sparse_stage(zero_results, zero, recompute):
    result = zero_results[f"sparse-z{zero}-c{recompute}"]
    for branch in ("index", "backbone"):
        still = [name for name, change in branch_change(result, branch).items() if change == 0.0]
        assert not still


@pytest.mark.parametrize("zero", STAGES)
def test_frozen_warmup_leaves_every_byte_of_the_backbone(zero_results, start_folder, zero):
    result = zero_results[f"warmup-z{zero}"]
    assert not branch_change(result, "backbone")
    assert all(change > 0 for change in branch_change(result, "index").values())
    start = dict(convert.load(start_folder).named_parameters())
    assert len(result["live"]) == len(start)
    for name, value in result["live"].items():
        name = name.removeprefix("model.")
        if not convert.is_index_name(name):
            assert torch.equal(value, start[name])
    kl = curve(result, "train/loss_kl")
    assert kl[-1] < kl[0]
    assert curve(result, "train/loss_lm").unique().numel() == 1


@pytest.mark.parametrize("zero", STAGES)
def test_warmup_curve_is_that_of_zero_0(zero_results, zero):
    ours, theirs = zero_results[f"warmup-z{zero}"], zero_results["warmup-z0"]
    for name in ("train/loss_kl", "train/grad_norm/index"):
        torch.testing.assert_close(curve(ours, name), curve(theirs, name), rtol=1e-4, atol=1e-4)


def test_zero_3_stands_steps_that_are_not_logged_and_measurements_between(zero_results):
    """The head runs only on logged steps, so the order of modules changes from step to step."""
    result = zero_results["rarely-logged-z3"]
    assert [record["step"] for record in steps_of(result)] == [1, 3, 6, 7]
    assert curve(result, "train/loss_kl")[-1] < curve(result, "train/loss_kl")[0]


def test_joint_warmup_trains_both_branches_with_full_attention(zero_results):
    result = zero_results["joint-warmup-z1"]
    assert all(change > 0 for change in branch_change(result, "index").values())
    assert all(change > 0 for change in branch_change(result, "backbone").values())
    first, frozen = steps_of(result)[0], steps_of(zero_results["warmup-z1"])[0]
    for name in ("train/loss_lm", "train/loss_kl", "train/grad_norm/index"):
        assert first[name] == pytest.approx(frozen[name], rel=1e-5)


@pytest.mark.parametrize("zero", STAGES)
def test_accumulating_two_equals_a_micro_batch_of_twice_the_rows(zero_results, zero):
    """Also with micro batches of unequal numbers of targets, and for the KL beside the loss."""
    ours, theirs = zero_results[f"gas-z{zero}"], zero_results["whole-z1"]
    names = [n for n in steps_of(theirs)[0] if n.startswith(("train/", "index/kl"))]
    assert len(names) > 8
    for name in names:
        torch.testing.assert_close(curve(ours, name), curve(theirs, name), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("zero", (1, 2, 3))
def test_bf16_keeps_float32_masters_and_float32_frequencies(zero_results, start_folder, zero):
    result = zero_results[f"bf16-z{zero}"]
    start = dict(convert.load(start_folder).named_parameters())
    for name, value in result["before"].items():
        assert value.dtype == torch.float32
        assert torch.equal(value, start[name].detach())
    frequencies = [b for name, b in result["buffers"].items() if name.endswith("inv_freq")]
    assert frequencies and all(b.dtype == torch.float32 for b in frequencies)
    assert any(not torch.equal(b, b.bfloat16().float()) for b in frequencies)
    exact = curve(zero_results[f"sparse-z{zero}-c0"], "train/loss_lm")
    torch.testing.assert_close(curve(result, "train/loss_lm"), exact, rtol=5e-3, atol=5e-3)


def test_measures_are_the_same_on_one_rank_and_two(zero_results, one_rank_results):
    """Three held-out rows on two ranks: one rank runs a surplus row that must not count."""
    two, one = (
        [r for r in results["measured-z3"]["records"] if "heldout/loss_lm" in r]
        for results in (zero_results, one_rank_results)
    )
    assert [record["step"] for record in two] == [0, 1, 2, 3]
    for name, value in one[0].items():
        if isinstance(value, float):
            assert two[0][name] == pytest.approx(value, rel=1e-5)
    layers = [n for n in two[0] if n.startswith("index/learned_coverage/layer_")]
    assert layers == [f"index/learned_coverage/layer_{n:02d}" for n in (1, 2, 3)]
    assert two[0]["index/learned_coverage_min"] == min(two[0][n] for n in layers)
    assert 0 < two[0]["index/block_recall_mean"] <= 1
    assert two[0]["select/mean_union_blocks"] >= 4
    assert zero_results["measured-z3"]["ended_by"] == "steps"


def test_learning_rates_and_speed_are_recorded(zero_results):
    record = steps_of(zero_results["sparse-z2-c0"])[0]
    assert record["train/lr/index"] == pytest.approx(1e-2)
    assert record["train/lr/backbone"] == pytest.approx(1e-3)
    assert record["tokens"] == 2 * 2 * 128
    assert record["perf/tokens_per_s"] > 0
    assert record["perf/mfu_pct"] > 0
    assert record["memory/peak_gib"] > 0
    index, backbone = record["train/grad_norm/index"], record["train/grad_norm/backbone"]
    assert record["train/grad_norm/total"] == pytest.approx(math.hypot(index, backbone))
