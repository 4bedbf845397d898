"""Every mistake in a recipe is one sentence that names the place, the value and what to write."""

from __future__ import annotations

from pathlib import Path

import pytest

from dense2sparse.eval import ruler
from dense2sparse.recipes.load import RecipeError, load
from dense2sparse.recipes.schema import RULER_TASKS

RECIPE = """\
name: tiny
model: {path: somewhere}
sparsity: {block_size: 32, top_k: 4}
data:
  row_len: 256
  sources:
    - {name: prose, kind: corpus, corpus: prose}
    - {name: recall, kind: recall}
  heldout:
    - {name: other, kind: corpus, corpus: heldout}
stages:
  - {kind: probe}
  - {kind: warmup, steps: 3}
  - {kind: sparse, tokens: 1e6}
  - {kind: perplexity}
  - {kind: ruler}
train: {precision: fp32}
"""


def refusal(folder: Path, *overrides: str, text: str | bytes = RECIPE) -> str:
    """The sentence, without the file's name."""
    file = folder / "recipe.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(RecipeError) as error:
        load(file, list(overrides))
    sentence = str(error.value)
    assert "\n" not in sentence
    return sentence.removeprefix(f"{file}: ")


def test_tiny_recipe_itself_is_good(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    recipe = load(tmp_path / "recipe.yaml")
    assert recipe.stages[2].tokens == 1_000_000
    assert recipe.deepspeed == {"zero_optimization": {"stage": 1}}


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        # unknown keys, at every depth
        (
            "sparsity.topk=4",
            "sparsity.topk=4: unknown key; the nearest valid key is sparsity.top_k",
        ),
        (
            "stages.1.step=3",
            "stages.1.step=3: unknown key; the nearest valid key is stages.1.steps",
        ),
        (
            "data.sources.0.corpora=x",
            'data.sources.0.corpora="x": unknown key; the nearest valid key is data.sources.0.corpus',
        ),
        ("block_size=32", "block_size=32: unknown key; that key belongs at sparsity.block_size"),
        (
            "train.index_lr=1",
            "train.index_lr=1: unknown key; that key belongs at stages.N.index_lr",
        ),
        ("wandb.xyz=1", "wandb.xyz=1: unknown key; valid keys here are mode, project, entity"),
        (
            "stages.1.index_schedule.ramps=0",
            "the nearest valid key is stages.1.index_schedule.ramp",
        ),
        # wrong types
        ("train.seed=true", "train.seed=true: must be a whole number"),
        ("train.seed=1.5", "train.seed=1.5: must be a whole number"),
        ('train.seed="3"', 'train.seed="3": must be a whole number'),
        ("stages.1.index_lr=fast", 'stages.1.index_lr="fast": must be a number'),
        ("stages.2.activation_checkpointing=1", "must be true or false"),
        ("stages.2.activation_checkpointing=yes", '="yes": must be true or false'),
        ("name=5", "name=5: must be text; put it in quotes"),
        ("train=3", "train=3: must be a section of keys"),
        ("stages=3", "stages=3: must be a list"),
        ("stages.1.betas=[0.9]", "stages.1.betas.1: the list needs this entry too"),
        ("sparsity.dense_layers=some", 'sparsity.dense_layers="some": must be a list or auto'),
        ("sparsity.dense_layers=[0,x]", 'sparsity.dense_layers.1="x": must be a whole number'),
        # impossible values
        ("sparsity.block_size=100", "sparsity.block_size=100: must be a multiple of 16"),
        ("sparsity.block_size=0", "sparsity.block_size=0: must be at least 16"),
        ("sparsity.top_k=1", "sparsity: top_k=1 leaves nothing to choose"),
        ("sparsity.init_blocks=3", "use top_k >= 5"),
        ("data.row_len=32", None),
        ("sparsity.block_size=512", "data.row_len=256 is shorter than one block"),
        ("stages.1.row_len=32", None),
        ("stages.1.row_len=16", "stages.1.row_len=16: must be at least 32"),
        ("stages.1.steps=0", "stages.1.steps=0: must be at least 1"),
        ("stages.1.index_lr=0", "stages.1.index_lr=0: must be greater than 0"),
        ("stages.1.until_learned_coverage=1", "must be less than 1"),
        ("stages.1.tokens=5", "stages.1: set exactly one of `tokens` and `steps`"),
        ("stages.1.steps=", "stages.1: set exactly one of `tokens` and `steps`"),
        ("stages.1.backbone=trained", "stages.1: backbone=trained needs `backbone_lr`"),
        ("stages.1.backbone_lr=1e-5", "stages.1: `backbone_lr` has no effect with backbone=frozen"),
        ("stages.2.backbone_lr=", "stages.2: a sparse stage trains the backbone"),
        ("stages.1.kind=warmpu", 'stages.1.kind="warmpu": must be one of warmup, sparse'),
        ("stages.1.kind=warmpu", "the nearest is warmup"),
        ("stages=[{steps: 3}]", "stages.0.kind=null: the key `kind` is missing"),
        ("stages=[]", "stages=[]: too short: at least 1 needed"),
        ("train.precision=b16", "must be one of fp32, bf16; the nearest is bf16"),
        ("name=a/b", 'name="a/b": must match the pattern'),
        ("model.path=", "model: name a checkpoint: set model.path, model.hub or model.wheel"),
        ("data.sources=[]", "data.sources=[]: too short: at least 1 needed"),
        ("data.sources.1.name=prose", "data: sources: the name 'prose' stands twice"),
        ("data.sources.0.kind=jsonl", "data.sources.0: kind=jsonl needs the key `path`"),
        ("data.sources.0.hub=a", "data.sources.0: key `hub` has no effect with kind=corpus"),
        ("data.sources.0.weight=0", "data.sources.0.weight=0: must be greater than 0"),
        ("data.heldout.0.corpus=prose", "data: heldout 'other' reads the same text as the source"),
        ("data.heldout=[]", "stages.0 (kind=probe) measures on held-out rows"),
        # what only an evaluation at the end of the run would meet
        ("stages.0.top_k=[4,1]", "stages.0.top_k=1 leaves nothing to choose"),
        ("stages.3.top_k=[1]", "stages.3.top_k=1 leaves nothing to choose"),
        ("stages.4.top_k=[0]", "stages.4.top_k=0 leaves nothing to choose"),
        ("stages.4.top_k=[1]", "local_blocks + init_blocks = 1 are always kept, so use at least 2"),
        ("stages.3.arms=[]", "stages.3.arms=[]: too short: at least 1 needed"),
        ("stages.4.arms=[]", "stages.4.arms=[]: too short: at least 1 needed"),
        ("stages.4.lengths=[]", "stages.4.lengths=[]: too short: at least 1 needed"),
        ("stages.4.lengths=[1024,511]", "stages.4.lengths.1=511: must be at least 512"),
        ("stages.4.tasks=[vt,niah_sing_1]", 'stages.4.tasks.1="niah_sing_1": must be one of niah_'),
        ("stages.4.tasks=[niah_sing_1]", "the nearest is niah_single_1"),
        ("stages.4.seed=-1", "stages.4.seed=-1: must be at least 0"),
        ("train.seed=-1", "train.seed=-1: must be at least 0"),
        ("train.seed=.nan", "override 'train.seed=.nan': .nan is not a finite number"),
        # names of results, each to be had once
        ("stages.0.top_k=[4,3,4]", "stages.0.top_k: names 4 twice: name it once"),
        ("stages.3.top_k=[4,4]", "stages.3.top_k: names 4 twice"),
        ("stages.3.arms=[original_dense,original_dense]", "stages.3.arms: names original_dense tw"),
        ("stages.4.lengths=[768,1024,768]", "stages.4.lengths: names 768 twice: name it once"),
        ("stages.4.tasks=[vt,vt]", "stages.4.tasks: names vt twice"),
        ("stages=[{kind: longbench, suites: [e, e]}]", "stages.0.suites: names e twice"),
        ("stages=[{kind: longbench, tasks: [trec, trec]}]", "stages.0.tasks: names trec twice"),
        # execution
        ("execution.backend=cuda", 'execution.backend="cuda": must be one of auto, triton, torch'),
        ("execution.index_precision=fp4", 'index_precision="fp4": must be one of input, fp8'),
        ("execution.prefill_chunk=0", "execution.prefill_chunk=0: must be at least 1"),
        (
            "execution.prefill_chunk=16",
            "is shorter than one block: use at least sparsity.block_size=32",
        ),
        ("execution.dense_below=9", "execution.dense_below=9: unknown key"),
        # overrides themselves
        ("train.seed", "override 'train.seed': write it as section.key=value"),
        ("=3", "override '=3': write it as section.key=value"),
        ("stages.9.steps=3", "stages is a list; '9' must be a number from 0 to 4"),
        ("stages.-1.steps=3", "'-1' must be a number from 0 to 4"),
        ("name.x=3", "override 'name.x=3': name='tiny' is a value, so it has no key 'x'"),
        ("train.seed=!!int 3", "the tag '!!int' is not allowed"),
        ("train.seed=[", "not valid YAML"),
    ],
)
def test_mistake_is_one_sentence(override: str, sentence: str | None, tmp_path: Path) -> None:
    if sentence is None:  # one block is enough
        (tmp_path / "recipe.yaml").write_text(RECIPE)
        load(tmp_path / "recipe.yaml", [override])
        return
    assert sentence in refusal(tmp_path, override)


def test_smallest_budget_that_leaves_a_choice_is_accepted(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    recipe = load(tmp_path / "recipe.yaml", ["sparsity.init_blocks=1", "stages.3.top_k=[3]"])
    assert recipe.stages[3].top_k == [3]
    assert "use at least 3" in refusal(tmp_path, "sparsity.init_blocks=1", "stages.3.top_k=[2]")


def test_a_chunk_needs_a_stage_that_reads_prompts_or_documents(tmp_path: Path) -> None:
    chunk = "execution.prefill_chunk=64"
    sentence = refusal(tmp_path, chunk, "stages=[{kind: probe}, {kind: report}]")
    assert "execution.prefill_chunk=64 has no effect: no stage reads prompts" in sentence
    for stage in ("{kind: probe, needles: 2}", "{kind: perplexity}"):
        recipe = load(tmp_path / "recipe.yaml", [chunk, f"stages=[{stage}]"])
        assert recipe.execution.prefill_chunk == 64


def test_recipe_and_evaluation_know_the_same_ruler_tasks_and_lengths(tmp_path: Path) -> None:
    assert tuple(ruler.TASKS) == RULER_TASKS
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    load(tmp_path / "recipe.yaml", [f"stages.4.lengths=[{ruler.MIN_LENGTH}]"])
    assert "must be at least" in refusal(tmp_path, f"stages.4.lengths=[{ruler.MIN_LENGTH - 1}]")


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        (
            "bf16.enabled=true",
            'deepspeed.bf16={"enabled": true}: the recipe sets this itself; use tr',
        ),
        ("train_batch_size=8", "use stages.N.micro_batch_size and stages.N.gradient_accumulation"),
        ("train_micro_batch_size_per_gpu=8", "use stages.N.micro_batch_size instead"),
        ("gradient_accumulation_steps=8", "use stages.N.gradient_accumulation instead"),
        ("gradient_clipping=1.0", "use stages.N.gradient_clipping instead"),
        ("optimizer.type=Adam", "use stages.N.index_lr, stages.N.backbone_lr"),
        ("scheduler.type=x", "use stages.N.index_schedule"),
        ("fp16.enabled=true", "use train.precision instead"),
        ("steps_per_print=1", "use train.log_every instead"),
        (
            "elasticity.enabled=true",
            "not used here (DeepSpeed has removed this feature); remove it",
        ),
        ("tensorboard.enabled=true", "not used here (metrics go to wandb"),
        ("zero_optimisation.stage=2", "the nearest valid key is deepspeed.zero_optimization"),
        ("zero_optimization.overlap_com=true", "is deepspeed.zero_optimization.overlap_comm"),
        ("stage=2", "that key belongs at deepspeed.zero_optimization.stage"),
        (
            "zero_optimization.stage=4",
            "deepspeed.zero_optimization.stage=4: must be one of 0, 1, 2, 3",
        ),
        ("zero_optimization.stage=auto", 'stage="auto": must be one of 0, 1, 2, 3'),
        ("zero_optimization=1", "deepspeed.zero_optimization=1: must be a section of keys"),
        ("zero_optimization.reduce_bucket_size=auto", "must be a whole number"),
        ("zero_optimization.reduce_bucket_size=0", "must be greater than 0"),
        (
            "zero_optimization.stage3_prefetch_bucket_size=1",
            "deepspeed.zero_optimization: stage3_prefetch_bucket_size has no effect at stage=1",
        ),
        ("zero_optimization.offload_optimizer.device=cpu", "supported at stage 2 and 3 only"),
        ("zero_optimization.offload_optimizer.devise=cpu", "offload_optimizer.device"),
        (
            "zero_optimization={stage: 3, offload_param: {device: nvme}}",
            "needs offload_param.nvme_path",
        ),
        (
            "zero_optimization={stage: 2, offload_optimizer: {device: cpu}}",
            "needs the key zero_force_ds_cpu_optimizer: false",
        ),
    ],
)
def test_deepspeed_key_that_would_be_ignored_is_refused(
    override: str, sentence: str, tmp_path: Path
) -> None:
    assert sentence in refusal(tmp_path, f"deepspeed.{override}")


def test_bf16_at_zero_stage_0_is_refused(tmp_path: Path) -> None:
    stage_0 = "deepspeed.zero_optimization.stage=0"
    sentence = refusal(tmp_path, stage_0, "train.precision=bf16")
    assert "use stage 1, or train.precision=fp32" in sentence
    assert load(tmp_path / "recipe.yaml", [stage_0]).train.precision == "fp32"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "the file is empty"),
        ("# only a comment\n", "the file is empty"),
        ("- a\n- b\n", "a recipe is a mapping of keys, but this is a list"),
        ("hello\n", "but this is the single value 'hello'"),
        (b"\x00\x01\x02binary", "not a text file"),
        (b"\xff\xfe\x00", "not a text file: byte 0 is not UTF-8"),
        (b"name: \xe9t\xe9\n", "not a text file: byte 6 is not UTF-8"),
        ("#" * 10_000_000, "the file has 10000000 bytes, but a recipe has at most 1000000"),
        ("name: a\nname: b\n", "line 2: the key 'name' stands twice (first in line 1); remove one"),
        ("a:\n  b: 1\n  c: 2\n  b: 3\n", "line 4: the key 'b' stands twice (first in line 2)"),
        ("name: !!python/object:os.system x\n", "line 1: the tag '!!python/object:os.system'"),
        ("name: a\nx: !include y\n", "line 2: the tag '!include' is not allowed"),
        ("x: !!str 5\n", "line 1: the tag '!!str' is not allowed; write the plain value"),
        ("a: 1\n---\nb: 2\n", "not valid YAML: but found another document"),
        ("a: [1, 2\n", "not valid YAML"),
        ("a: b: c\n", "line 1, column 5: not valid YAML"),
        ("\ta: 1\n", "not valid YAML"),
        ("[a, b]: 1\n", "line 1: a key must be plain text"),
        ("a: *missing\n", "not valid YAML: found undefined alias"),
        ("a: " + "[" * 100 + "]" * 100, "nested too deeply; a recipe has at most 40 levels"),
        ("a: " + "[" * 100_000, "nested too deeply"),
        ("a: &a [*a]\n", "nested too deeply"),
        (
            "a0: &a0 [x, x, x, x, x, x, x, x, x]\n"
            + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 10)),
            "over 50000 values once its anchors are expanded",
        ),
        ("a: .inf\n", "line 1: .inf is not a finite number"),
        ("a: 1e999\n", "line 1: 1e999 is not a finite number"),
        ("name: tiny\n", "model: this required key is missing"),
    ],
)
def test_file_that_is_no_recipe_is_refused(
    text: str | bytes, sentence: str, tmp_path: Path
) -> None:
    assert sentence in refusal(tmp_path, text=text)


def test_missing_file_and_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no such recipe file"):
        load(tmp_path / "none.yaml")
    with pytest.raises(RecipeError, match="this is a folder"):
        load(tmp_path)
