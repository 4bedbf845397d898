"""Parts of the loop that need no engine: schedules, losses, FLOPs, parameter groups, ends of a stage."""

from __future__ import annotations

import math
import os
import signal
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dense2sparse.kernels.measures import SelectionMeasures
from dense2sparse.model import convert
from dense2sparse.model.attention import LayerReport
from dense2sparse.recipes.schema import Schedule
from dense2sparse.train import flops, losses
from dense2sparse.train.engine import deepspeed_config, parameter_groups
from dense2sparse.train.loop import Position, StageLoop, StepSums, TrainingError
from dense2sparse.train.metrics import Metrics, read_records
from dense2sparse.train.schedule import lr_factor
from dense2sparse.train.stages import num_steps_of
from dense2sparse.train.stopping import Stopped, StopRequests


@given(
    shape=st.sampled_from(["cosine", "linear", "constant"]),
    ramp=st.floats(0, 1),
    final=st.floats(0, 1),
    total=st.integers(1, 200),
)
def test_schedule_ramps_up_to_the_peak_and_decays_to_its_end(shape, ramp, final, total):
    schedule = Schedule(shape=shape, ramp=ramp, final=final)
    factors = [lr_factor(schedule, step=n, total_steps=total) for n in range(total)]
    peak = math.ceil(ramp * total)
    assert all(0 < f <= 1 + 1e-12 or final == 0 for f in factors)
    assert factors[:peak] == sorted(factors[:peak])
    assert factors[max(0, peak - 1) :] == sorted(factors[max(0, peak - 1) :], reverse=True)
    if peak:
        assert factors[peak - 1] == 1.0
    if peak < total:
        assert factors[-1] == pytest.approx(1.0 if shape == "constant" else final)


def test_a_token_budget_is_rounded_up_to_a_step(tiny):
    recipe = SimpleNamespace(data=SimpleNamespace(row_len=128))
    fields = {"steps": None, "micro_batch_size": 2, "gradient_accumulation": 3}
    assert num_steps_of(recipe, tiny.stage("sparse", tokens=1537, **fields), 2) == 2
    assert num_steps_of(recipe, tiny.stage("sparse", tokens=1536, **fields), 2) == 1
    assert num_steps_of(recipe, tiny.stage("sparse", tokens=1536, row_len=64, **fields), 2) == 2


def test_chunked_loss_and_its_gradients_equal_the_whole(tiny, monkeypatch):
    monkeypatch.setattr(losses, "_CHUNK_ELEMENTS", 64 * tiny.VOCAB)
    model, batch = tiny.dense_model(), tiny.rows(2, seed=3, split=50)
    rule = losses.HeadRule(model.config)
    gradients = []
    for chunked in (True, False):
        model.zero_grad()
        hidden = model.model(batch.input_ids).last_hidden_state
        if chunked:
            loss = losses.summed_lm_loss(hidden, model.lm_head, batch.targets, rule)
        else:
            logits = model.lm_head(hidden).flatten(0, 1)
            loss = torch.nn.functional.cross_entropy(
                logits, batch.targets.flatten(), reduction="sum"
            )
        loss.backward()
        gradients.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_head_rules_of_families_are_known_and_others_refused():
    from transformers import CohereConfig, CohereForCausalLM, GraniteConfig, GraniteForCausalLM

    sizes = {
        "vocab_size": 50,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    granite = GraniteForCausalLM(GraniteConfig(**sizes, logits_scaling=3.0))
    losses.check_head(granite)
    losses.check_head(CohereForCausalLM(CohereConfig(**sizes, logit_scale=0.25)))
    granite.config.logits_scaling = 1.0
    granite.lm_head.register_forward_hook(lambda module, args, out: out)
    granite.forward = _shifted(granite.forward)
    with pytest.raises(ValueError, match="extend HeadRule"):
        losses.check_head(granite)


def _shifted(forward):
    def changed(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = output.logits * 7 + 1
        return output

    return changed


def test_groups_hold_every_parameter_once_and_decay_matrices_only(tiny, start_folder):
    model = convert.load(start_folder)
    stage = tiny.stage("sparse", weight_decay=0.1)
    groups = parameter_groups(
        stage, convert.index_parameters(model), convert.backbone_parameters(model)
    )
    listed = [id(p) for group in groups for p in group["params"]]
    assert sorted(listed) == sorted(id(p) for p in model.parameters())
    for group in groups:
        decays = group["weight_decay"] > 0
        assert all((p.dim() >= 2) == decays for p in group["params"])
        assert group["lr"] == (stage.index_lr if group["branch"] == "index" else stage.backbone_lr)


def test_frozen_warmup_passes_index_parameters_only(tiny, start_folder):
    model = convert.load(start_folder)
    index = convert.index_parameters(model)
    groups = parameter_groups(tiny.stage("warmup"), index, convert.backbone_parameters(model))
    listed = {id(p) for group in groups for p in group["params"]}
    assert listed == {id(p) for _, p in index}
    assert not any(p.requires_grad for _, p in convert.backbone_parameters(model))


def test_deepspeed_config_keeps_the_section_and_reduces_in_float32(tiny):
    section = {"zero_optimization": {"stage": 1, "reduce_bucket_size": 7}}
    stage = tiny.stage("sparse", gradient_accumulation=3)
    config = deepspeed_config(section, zero_stage=2, precision="bf16", stage=stage, world_size=4)
    assert config["zero_optimization"] == {"stage": 2, "reduce_bucket_size": 7}
    assert config["train_batch_size"] == 2 * 3 * 4
    assert config["communication_data_type"] == "fp32"
    assert config["data_types"] == {"grad_accum_dtype": "fp32"}
    assert section == {"zero_optimization": {"stage": 1, "reduce_bucket_size": 7}}


def test_flops_of_a_dense_pass_equal_those_torch_counts(tiny, start_folder):
    """With the budget above the row, the backbone's forward pass is that of the dense model."""
    from torch.utils.flop_counter import FlopCounterMode

    model = convert.load(start_folder)
    index = {name for name, _ in convert.index_parameters(model)}
    cost = flops.model_cost(model, index)
    dense = tiny.dense_model()
    dense.config._attn_implementation = "eager"
    with FlopCounterMode(display=False) as counter:
        dense(torch.randint(0, tiny.VOCAB, (1, 128)))
    # transformers 5.17 makes its rotary table by a product, which is no work of the model's.
    tables = counter.get_flop_counts().get("LlamaForCausalLM.model.rotary_emb", {})
    counted = counter.get_total_flops() - sum(tables.values())
    per_token = flops.flops_per_token(cost, mode="warmup", frozen=True, visible_keys=128)
    index_only = flops.flops_per_token(
        _without_backbone(cost), mode="warmup", frozen=True, visible_keys=128
    )
    assert (per_token - index_only) * 128 == pytest.approx(counted, rel=1e-6)


def _without_backbone(cost: flops.ModelCost) -> flops.ModelCost:
    import dataclasses

    return dataclasses.replace(cost, backbone_weights=0, query_width=0)


def test_sparse_training_costs_less_than_dense_on_long_rows(start_folder):
    model = convert.load(start_folder)
    cost = flops.model_cost(model, {name for name, _ in convert.index_parameters(model)})
    sparse = flops.flops_per_token(cost, mode="sparse", frozen=False, visible_keys=50_000)
    warmup = flops.flops_per_token(cost, mode="warmup", frozen=False, visible_keys=50_000)
    frozen = flops.flops_per_token(cost, mode="warmup", frozen=True, visible_keys=50_000)
    assert sparse < 0.6 * warmup
    assert frozen < 0.6 * warmup


class FakeEngine:
    """Only what the loop calls outside of a step."""

    def eval(self) -> None: ...

    def train(self) -> None: ...


class ScriptedLoop(StageLoop):
    """A loop whose steps do nothing and whose measurements follow a script."""

    script: list[tuple[float, float]]

    def _step(self, position, logged):
        position.step += 1
        position.global_step += 1
        position.tokens += self.tokens_per_step
        values = {"train/loss_lm": 1.0, "train/loss_kl": 0.1}
        return (values, 10.0) if logged else ({}, 0.0)

    def _measure_row(self, batch):
        found = {}
        for layer, learned in zip(self.sparse_layers, self.script.pop(0), strict=True):
            measures = SelectionMeasures(0.9, 0.95, learned, 0.7, 0.9, 5.0)
            found[f"index/learned_coverage/layer_{layer:02d}"] = measures.learned_coverage
        return found


def scripted(tiny, tmp_path, script, *, steps=20, saves=None, **train) -> ScriptedLoop:
    """A scripted loop of two sparse layers that measures every fourth step."""
    stage = tiny.stage("warmup", steps=steps, until_learned_coverage=0.9)
    cost = flops.ModelCost(1, 1, 2, 2, 1, 1, 1)
    loop = ScriptedLoop(
        engine=FakeEngine(),
        stage=stage,
        train=tiny.train_section(measure_every=4, checkpoint_every=3, **train),
        loader=None,
        heldout=[object()],
        label="0-warmup",
        stage_index=0,
        row_len=64,
        num_steps=steps,
        sparse_layers=(1, 2),
        cost=cost,
        peak=None,
        rank=0,
        world_size=1,
        device=torch.device("cpu"),
        metrics=Metrics(tmp_path / "metrics.jsonl"),
        stop=StopRequests(tmp_path / "STOP"),
        save=lambda position: (saves if saves is not None else []).append(position.step),
        say=lambda text: None,
    )
    loop.script = script
    return loop


class ForgetfulEngine(FakeEngine):
    """Its backward pass reaches layer 1 only."""

    def __call__(self, call, **inputs):
        self.call = call
        call.reports.update({1: LayerReport(), 2: LayerReport()})
        return torch.ones(()), torch.ones(())

    def backward(self, loss) -> None:
        self.call.reports[1].kl = torch.ones(())


def test_a_layer_whose_kl_was_never_computed_ends_training_in_every_step(tiny, tmp_path):
    """Trap 1: a KL that nobody computes must not be lost, whether the step is logged or not."""
    loop = scripted(tiny, tmp_path, [])
    loop.engine = ForgetfulEngine()
    for sums in (None, StepSums()):
        with pytest.raises(
            TrainingError, match="0-warmup computed no KL for layers 2: no gradient"
        ):
            loop._micro_batch(tiny.rows(1, seed=0), 1.0, sums, 0)


def test_stage_ends_when_the_worst_layer_passes_the_threshold(tiny, tmp_path):
    script = [(0.5, 0.5), (0.95, 0.8), (0.97, 0.91)]
    saves: list[int] = []
    loop, position = scripted(tiny, tmp_path, script, saves=saves), Position()
    assert loop.run(position) == "coverage"
    assert position == Position(8, 8, 8 * 2 * 64)
    assert saves == [3, 6]
    worst = [
        r["index/learned_coverage_min"]
        for r in read_records(tmp_path / "metrics.jsonl")
        if "index/learned_coverage_min" in r
    ]
    assert worst == [0.5, 0.8, 0.91]


def test_stage_that_has_learned_enough_makes_no_step(tiny, tmp_path):
    loop, position = scripted(tiny, tmp_path, [(0.99, 0.98)]), Position()
    assert loop.run(position) == "coverage"
    assert position.step == 0


def test_stage_that_never_learns_ends_with_its_steps_and_a_last_measurement(tiny, tmp_path):
    loop, position = scripted(tiny, tmp_path, [(0.5, 0.5)] * 4, steps=10), Position()
    assert loop.run(position) == "steps"
    assert position.step == 10
    steps = [
        r["step"]
        for r in read_records(tmp_path / "metrics.jsonl")
        if "index/learned_coverage_min" in r
    ]
    assert steps == [0, 4, 8, 10]


def test_resumed_stage_does_not_measure_its_start_again(tiny, tmp_path):
    loop, position = scripted(tiny, tmp_path, [(0.5, 0.5)], steps=10), Position(9, 9, 9)
    assert loop.run(position) == "steps"
    assert loop.script == []


def test_a_loss_that_is_not_finite_ends_the_run_in_one_sentence(tiny, tmp_path):
    loop = scripted(tiny, tmp_path, [])
    sums = SimpleNamespace(lm=torch.tensor(float("nan")), kl={1: torch.tensor(1.0)})
    with pytest.raises(TrainingError, match="not finite at step 6 of 0-warmup.*lower index_lr"):
        loop._losses(sums, 1, Position(5, 5, 5), {})
    finite = SimpleNamespace(lm=torch.tensor(2.0), kl={1: torch.tensor(1.0)})
    with pytest.raises(TrainingError, match="gradient norms {'index': nan}"):
        loop._losses(finite, 1, Position(5, 5, 5), {"index": float("nan")})


def test_mean_over_layers_divides_lambda_and_the_reported_kl(tiny, tmp_path):
    loop = scripted(tiny, tmp_path, [])
    sums = SimpleNamespace(lm=torch.tensor(2.0), kl={1: torch.tensor(1.0), 2: torch.tensor(3.0)})
    assert loop.kl_scale == 1.0
    assert loop._losses(sums, 1, Position(), {})["train/loss_total"] == pytest.approx(6.0)
    loop.stage = tiny.stage("warmup", kl_reduction="mean", kl_weight=0.5)
    loop.__post_init__()
    assert loop.kl_scale == 0.25
    values = loop._losses(sums, 1, Position(), {})
    assert values["train/loss_kl"] == pytest.approx(2.0)
    assert values["train/loss_total"] == pytest.approx(3.0)


@pytest.fixture
def requests(tmp_path):
    """Stop requests with the signals taken over for the length of a test."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    interrupt = signal.getsignal(signal.SIGINT)
    asked = StopRequests(tmp_path / "STOP")
    asked.install()
    yield asked
    for number, handler in {**before, signal.SIGINT: interrupt}.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_outside_the_loop_leaves_at_once_with_the_requeue_code(requests, number):
    with pytest.raises(Stopped) as stopped:
        os.kill(os.getpid(), number)
    assert stopped.value.code == 75


def test_a_signal_inside_the_loop_waits_for_the_step_boundary(requests):
    reached = False
    with pytest.raises(Stopped), requests.at_step_boundaries():  # honoured on leaving at the latest
        assert not requests.agreed(torch.device("cpu"))
        os.kill(os.getpid(), signal.SIGTERM)
        assert requests.agreed(torch.device("cpu"))
        reached = True
    assert reached


def test_a_stop_file_asks_too_and_is_used_up(requests, tmp_path):
    (tmp_path / "STOP").touch()
    assert requests.agreed(torch.device("cpu"))
    assert requests.consume_file()
    assert not requests.agreed(torch.device("cpu")) and not requests.consume_file()


def test_loop_asked_to_stop_saves_before_the_next_step(tiny, tmp_path):
    saves: list[int] = []
    loop, position = scripted(tiny, tmp_path, [], saves=saves), Position(5, 5, 5)
    (tmp_path / "STOP").touch()
    with pytest.raises(Stopped):
        loop.run(position)
    assert saves == [5] and position == Position(5, 5, 5)
