"""Scores and tables from data files alone: by hand, refusals, and without torch."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from dense2sparse.eval import score, tables
from dense2sparse.eval.arms import ArmRun, arm_runs, comparisons
from dense2sparse.eval.score import check_same_prompts, evaluate, read_folder, scored
from dense2sparse.recipes.stages import RULER_TASKS

ARMS = (
    "original_dense",
    "converted_dense",
    "converted_sparse-k16",
    "converted_oracle-k16",
)


def record(index: int, said: str, *, task: str = "niah_single_1", length: int = 4096, **more):
    return {
        "id": f"{task}/{length}/{index:05d}",
        "task": task,
        "length": length,
        "references": ["1234567"],
        "prediction": said,
        **more,
    }


def arm(right: int, of: int = 10, **more) -> dict:
    """The first `right` of the answers are right."""
    made = [
        record(index, "It is 1234567." if index < right else "no", **more) for index in range(of)
    ]
    return {one["id"]: one for one in made}


def write(folder, arms: dict[str, dict], **note) -> None:
    for label, records in arms.items():
        home = folder / label
        home.mkdir(parents=True)
        lines = "".join(json.dumps(one) + "\n" for one in records.values())
        (home / "predictions.jsonl").write_text(lines, encoding="utf-8")
        if note:
            text = json.dumps({"label": label, **note})
            (home / "arm.json").write_text(text, encoding="utf-8")


@pytest.fixture()
def folder(tmp_path):
    write(tmp_path / "arms", dict(zip(ARMS, [arm(10), arm(9), arm(4), arm(7)], strict=True)))
    return tmp_path / "arms"


def test_parts_of_the_loss_add_up_to_the_whole():
    arms = dict(zip(ARMS, [arm(10), arm(9), arm(4), arm(7)], strict=True))
    found = evaluate({label: scored(one) for label, one in arms.items()}, margin=1.0)
    lost = {pair["meaning"]: pair["overall"]["lost"]["estimate"] for pair in found["comparisons"]}
    assert lost == {
        "training drift": 10.0,
        "budget cost": 20.0,
        "indexer error": 30.0,
        "cost of sparsity": 50.0,
        "whole conversion": 60.0,
    }
    assert sum(list(lost.values())[:3]) == lost["whole conversion"]
    assert found["arms"]["converted_sparse-k16"]["means"] == {"4096": 40.0}


def test_worse_and_better_and_the_exact_test_by_hand():
    first, second = scored(arm(10)), scored(arm(2))
    entry = tables.compare(first, second, margin=1.0)["lengths"][0]
    task = entry["tasks"][0]
    assert (task["worse"], task["better"], task["p"]) == (8, 0, pytest.approx(2 / 2**8))
    assert entry["verdict"] == "inferior" and entry["unseen_share"] is None


def test_holm_is_over_all_lengths_and_tasks_of_a_comparison():
    first, second = {}, {}
    for place, task in enumerate(("cwe", "fwe")):
        for length in (4096, 8192):
            lost = 8 if (place, length) == (0, 4096) else 0
            first |= scored(arm(10, task=task, length=length))
            second |= scored(arm(10 - lost, task=task, length=length))
    lengths = tables.compare(first, second, margin=1.0)["lengths"]
    cells = {(one["length"], task["task"]): task for one in lengths for task in one["tasks"]}
    assert cells[4096, "cwe"]["p_holm"] == pytest.approx(4 * cells[4096, "cwe"]["p"])
    assert cells[8192, "fwe"]["p_holm"] == 1.0


def test_cells_at_floor_and_ceiling_are_marked():
    table = tables.cells(scored(arm(10) | arm(0, task="cwe") | arm(5, task="vt")))["4096"]
    marks = {task: cell["uninformative"] for task, cell in table.items()}
    assert marks == {"niah_single_1": True, "cwe": True, "vt": False}
    first = scored(arm(10) | arm(0, task="cwe") | arm(10, task="vt"))
    second = scored(arm(10) | arm(0, task="cwe") | arm(6, task="vt"))
    entry = tables.compare(first, second, margin=1.0)["lengths"][0]
    marks = {task["task"]: task["uninformative"] for task in entry["tasks"]}
    assert marks == {"niah_single_1": True, "cwe": True, "vt": False}, "100 to 60 is a finding"
    assert entry["lost"]["estimate"] == pytest.approx(40 / 3)
    assert entry["lost_informative"]["estimate"] == 40 and entry["uninformative"] == 2


def test_counts_of_empty_cut_and_endless_answers():
    records = [
        record(0, " ", stopped="end token"),
        record(1, "1234567", stopped="found", cut_tokens=5),
        record(2, "no", stopped="budget"),
    ]
    cell = tables.cells(scored({one["id"]: one for one in records}))["4096"]["niah_single_1"]
    assert (cell["empty"], cell["truncated"], cell["at_limit"]) == (1, 1, 1)
    assert cell["stopped"] == {"end token": 1, "found": 1, "budget": 1}


def test_needle_blocks_are_set_against_correctness():
    seen = [0.1, 0.3, 0.8, 1.0]
    made = []
    for index, recall in enumerate(seen):
        needle = {"share": recall / 2, "first": recall, "any": recall, "kept": 0.1}
        needle |= {"by_layer": {"1": recall, "10": 0.0}, "positions": 3}
        made.append(record(index, "1234567" if recall > 0.5 else "no", needle=needle))
    found = tables.needles(scored({one["id"]: one for one in made}))
    assert found["lengths"]["4096"]["niah_single_1"]["any"] == pytest.approx(0.55)
    assert list(found["layers"]) == ["1", "10"]
    assert [one["samples"] for one in found["by_recall"]] == [1, 1, 0, 2]
    assert [one["score"] for one in found["by_recall"]] == [0.0, 0.0, None, 100.0]
    assert found["correlation"] == pytest.approx(0.7 / 0.53**0.5)
    assert tables.needles(scored(arm(3))) is None


def table_of(means: dict[int, float], tasks=RULER_TASKS) -> dict:
    """Cells of an arm whose tasks all have the mean."""
    return {str(n): {task: {"score": mean} for task in tasks} for n, mean in means.items()}


@pytest.mark.parametrize(
    ("published", "effective", "weighted"),
    [
        ((95.5, 93.8, 91.6, 87.4, 84.7, 77.0), 32768, (85.4, 91.3)),  # Llama-3.1-8B-Instruct
        ((96.5, 95.8, 95.4, 94.8, 88.4, 66.6), 65536, None),  # Llama-3.1-70B-Instruct
        ((96.8, 95.3, 93.0, 91.1, 90.4, 84.4), 65536, None),  # Qwen2.5-7B-Instruct-1M
        ((95.1, 93.6, 91.0, 87.8, 77.8, 66.0), 32768, None),  # Qwen3-4B
        ((84.0, 90.0, 90.0, 90.0, 90.0, 90.0), None, None),
        ((90.0, 85.6, 85.5, 90.0, 90.0, 90.0), 8192, None),
    ],
)
def test_rulers_own_figures_are_those_of_published_rows(published, effective, weighted):
    lengths = [4096 * 2**place for place in range(6)]
    found = tables.ruler_summary(table_of(dict(zip(lengths, published, strict=True))))
    assert found["effective_length"] == effective and found["all_tasks"]
    if weighted:
        assert (round(found["wavg_inc"], 1), round(found["wavg_dec"], 1)) == weighted


def test_rulers_own_figures_need_two_lengths_and_say_when_tasks_are_missing():
    one = tables.ruler_summary(table_of({4096: 90.0}, tasks=("vt",)))
    none = dict.fromkeys(("effective_length", "wavg_inc", "wavg_dec"))
    assert one == {**none, "all_tasks": False}
    long_first = tables.ruler_summary(table_of({131072: 60.0, 4096: 90.0}))
    assert (long_first["wavg_inc"], long_first["wavg_dec"]) == (70.0, 80.0), "shortest length first"


def test_score_command_says_rulers_own_figures_and_what_they_lack(tmp_path, capsys):
    records = {**arm(9, length=4096), **arm(5, length=8192)}
    write(tmp_path, {"theirs": records})
    assert score.main([str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "effective length: 4096  wAvg(inc): 63.33  wAvg(dec): 76.67 (not comparable" in said
    write(tmp_path / "short", {"theirs": arm(9)})
    assert score.main([str(tmp_path / "short")]) == 0
    assert "wAvg(dec): not computed: one length" in capsys.readouterr().out


def test_depth_is_where_the_only_needle_lies():
    places = {0: [[0, 5]], 1: [[50, 55]], 2: [[99, 100]], 3: [[10, 12], [60, 62]], 4: []}
    made = [
        record(index, "1234567" if index else "no", prompt_tokens=100, spans=spans)
        for index, spans in places.items()
    ]
    found = tables.depths(scored({one["id"]: one for one in made}))
    assert found == {
        "4096": [
            {"depth": 0.0, "score": 0.0, "samples": 1},
            {"depth": 0.5, "score": 100.0, "samples": 1},
            {"depth": 0.9, "score": 100.0, "samples": 1},
        ]
    }


def test_flips_show_the_largest_losses_first():
    first, second = scored(arm(3)), scored(arm(1))
    shown = tables.flips(first, second)
    assert [one["id"][-1] for one in shown] == ["1", "2"]
    assert shown[0]["scores"] == [100.0, 0.0] and shown[0]["second"] == "no"


def test_flips_are_of_many_tasks_where_many_are_lost():
    tasks = ("cwe", "fwe", "vt")
    first = scored({k: v for task in tasks for k, v in arm(6, task=task).items()})
    second = scored({k: v for task in tasks for k, v in arm(0, task=task).items()})
    shown = [one["id"].split("/")[0] for one in tables.flips(first, second)]
    assert shown == ["cwe", "fwe", "vt", "cwe", "fwe"]


def test_command_line_writes_the_tables_and_says_the_verdicts(folder, capsys):
    assert score.main([str(folder), "--compare", "original_dense", "converted_oracle-k16"]) == 0
    said = capsys.readouterr().out
    assert "converted_sparse-k16         4096: 40.00" in said
    assert "budget cost (converted_dense - converted_oracle-k16): +20.00 points lost" in said
    assert "difference (original_dense - converted_oracle-k16): +30.00 points lost" in said
    found = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
    assert found["margin"] == 1.0 and len(found["comparisons"]) == 6
    assert read_folder(folder).keys() == set(ARMS), "the result is not taken for an arm"


def test_scores_and_reports_need_neither_torch_nor_transformers(folder, made_up_run):
    """With both made impossible to import, predictions are scored and the report is written."""
    code = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'deepspeed', 'datasets', 'tokenizers'):\n"
        "    sys.modules[name] = None\n"
        "from dense2sparse.eval import report, score\n"
        f"sys.exit(score.main([{str(folder)!r}]) or report.main([{str(made_up_run)!r}]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (folder / "scores.json").is_file() and (made_up_run / "report.html").is_file()


def test_predictions_made_elsewhere_may_lack_the_last_line_end(tmp_path):
    write(tmp_path, {"theirs": arm(3)})
    path = tmp_path / "theirs" / "predictions.jsonl"
    path.rename(path.with_name("answers.jsonl"))
    path = path.with_name("answers.jsonl")
    path.write_bytes(path.read_bytes()[:-1])
    assert len(read_folder(tmp_path)["theirs"]) == 10
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="ends in a damaged line"):
        read_folder(tmp_path)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda home: (home / ARMS[2] / "predictions.jsonl").unlink(), None),
        (lambda home: _edit(home, 2, drop=1), "no prediction of 1 of 10 prompts"),
        (lambda home: _edit(home, 2, references=["7654321"]), "has another references in arm"),
        (lambda home: _edit(home, 1, length="4096"), "has length='4096'"),
        (lambda home: _edit(home, 1, prediction=None), "has prediction=None"),
        (lambda home: _edit(home, 1, benchmark="mmlu"), "benchmark='mmlu' of prediction"),
        (lambda home: _edit(home, 1, benchmark=5), "line 1, has benchmark=5: it needs str"),
        (lambda home: _edit(home, 1, metric="part"), "has another metric in arm"),
        (lambda home: _edit(home, 1, mode="reasoning"), "has another mode in arm"),
        (lambda home: _edit(home, 1, task="niah_singel_1"), "did you mean 'niah_single_1'?"),
        (lambda home: _edit(home, 1, references=[5]), "line 1, has references=[5]: it needs texts"),
        (
            lambda home: _edit(home, 1, references=[]),
            "predictions.jsonl, line 1, has references=[]",
        ),
        (lambda home: _edit(home, 1, length=True), "line 1, has length=True"),
        (lambda home: _edit(home, 1, stopped=["eos"]), "line 1, has stopped=['eos']"),
        (lambda home: _edit(home, 1, facts=None), "line 1, has facts=None"),
        (lambda home: _edit(home, 1, needle={"any": 1.0}), "line 1, has needle={'any': 1.0}"),
        (lambda home: _edit(home, 1, spans=[5]), "line 1, has spans=[5]: it needs pairs"),
        (lambda home: _edit(home, 1, prompt_tokens="9"), "line 1, has prompt_tokens='9'"),
        (lambda home: _edit(home, 1, again={"length": 1}), "a second time, with another length"),
        (lambda home: _note(home, 1, label=5), "arm.json is damaged (no JSON object with a text"),
        (lambda home: _edit(home, 1, id=None), "line 1, is damaged"),
        (lambda home: _edit(home, 1, twice="otherwise"), "a second time, otherwise"),
    ],
)
def test_bad_folders_are_refused_in_one_sentence(folder, capsys, spoil, words):
    spoil(folder)
    assert score.main([str(folder)]) == (2 if words else 0)
    error = capsys.readouterr().err
    if words:
        assert error.startswith("error: ") and error.count("\n") == 1 and words in error
        assert not (folder / "scores.json").exists()


def test_all_arms_without_a_prediction_are_refused(tmp_path, capsys):
    write(tmp_path, {ARMS[0]: {}, ARMS[1]: {}})
    assert score.main([str(tmp_path)]) == 2
    assert f"error: arm {ARMS[1]} holds no prediction: " in capsys.readouterr().err


@pytest.mark.parametrize("margin", ["nan", "inf", "0", "-1"])
def test_margin_that_is_no_number_of_points_is_refused(tmp_path, capsys, margin):
    write(tmp_path, {"theirs": arm(3)})
    assert score.main([str(tmp_path), f"--margin={margin}"]) == 2
    assert "use points above 0" in capsys.readouterr().err


def _note(home, place: int, **note) -> None:
    (home / ARMS[place] / "arm.json").write_text(json.dumps(note), encoding="utf-8")


def _edit(
    home,
    place: int,
    *,
    drop: int = 0,
    twice: str | None = None,
    again: dict | None = None,
    **change,
) -> None:
    path = home / ARMS[place] / "predictions.jsonl"
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    if twice:
        records.append({**records[0], "prediction": twice})
    if again:
        records.append({**records[0], **again})
    records[0].update(change)
    lines = [json.dumps(one) for one in records[drop:]]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def test_arms_of_different_checkpoints_are_not_compared(tmp_path):
    write(tmp_path, {ARMS[1]: arm(3)}, checkpoint="aaa", precision="float32")
    write(tmp_path, {ARMS[0]: arm(3)}, checkpoint="of the original", precision="float32")
    assert len(read_folder(tmp_path)) == 2
    write(tmp_path, {ARMS[2]: arm(3)}, checkpoint="bbb", precision="float32")
    with pytest.raises(ValueError, match=f"arms {ARMS[1]} and {ARMS[2]} have another checkpoint"):
        read_folder(tmp_path)


@pytest.mark.parametrize("key", ["precision", "index_precision", "prompts"])
def test_original_made_in_another_way_is_not_compared(tmp_path, key):
    write(tmp_path, {ARMS[0]: arm(3)}, **{key: "one"})
    write(tmp_path, {ARMS[1]: arm(3)}, **{key: "other"})
    with pytest.raises(ValueError, match=f"arms {ARMS[1]} and {ARMS[0]} have another {key}"):
        read_folder(tmp_path)


def test_arms_come_in_the_order_of_their_letters_and_budgets(tmp_path):
    labels = ["converted_sparse-k4", "converted_sparse-k16", "converted_oracle-k4", "theirs"]
    write(tmp_path, {label: arm(1) for label in ["theirs", *labels[:3], *ARMS[:2]]})
    assert list(read_folder(tmp_path)) == [*ARMS[:2], *labels]


@pytest.mark.parametrize("task", ["qa_1", "qa_2", "vt"])
def test_question_without_a_metric_counts_any_reference(task):
    found = record(0, "It is 1234567.", task=task) | {"references": ["1234567", "no"]}
    assert score.score_of(found) == (50.0 if task == "vt" else 100.0)


@pytest.mark.parametrize(
    ("said", "points"),
    [("<think>1234567", 0), ("<think>1234567</think>no", 0), ("no</think>1234567", 100)],
)
def test_thought_is_no_answer(said, points):
    assert score.score_of(record(0, said, mode="reasoning")) == points


@pytest.mark.parametrize(
    ("task", "benchmark"),
    [("vt", "ruler"), ("qasper", "longbench"), ("qasper_e", "longbench"), ("v2", "longbench")],
)
def test_task_names_its_benchmark(task, benchmark):
    assert score.benchmark_of({"id": "1", "task": task}) == benchmark


def test_task_of_ones_own_is_scored_where_its_benchmark_is_named():
    own = record(0, "It is 1234567.", task="own", benchmark="ruler")
    assert score.score_of(own) == 100.0
    del own["benchmark"]
    with pytest.raises(ValueError, match="need `benchmark`: ruler or longbench"):
        score.score_of(own)


def test_few_prompts_of_an_uneven_task_decide_what_can_be_non_inferior():
    """13 x 30 = 390 pairs may show a margin of 1 point; with 6 of one task they count as 13 x 6."""
    even = [scored(arm(30, of=30, task=task)) for task in RULER_TASKS]
    records = {name: one for many in even for name, one in many.items()}
    assert tables.compare(records, records, margin=1.0)["overall"]["verdict"] == "non-inferior"
    uneven = {name: one for name, one in records.items() if one["task"] != "vt" or name[-1] < "2"}
    found = tables.compare(uneven, uneven, margin=1.0)["overall"]
    assert found["verdict"] == "undecided" and found["unseen_share"] > 0.01


def test_too_few_pairs_of_two_tasks_are_not_counted_thrice():
    """2 x 175 pairs without a change leave 1.05 % possible, though the bootstrap ends below 1."""
    records = scored(arm(175, of=175) | arm(175, of=175, task="vt"))
    found = tables.compare(records, records, margin=1.0)["overall"]
    assert found["lost"]["high"] < 1 and found["verdict"] == "undecided"


@pytest.mark.parametrize(("mean", "marked"), [(10, False), (99, False), (9, True), (100, True)])
def test_cells_at_the_bounds_themselves_are_informative(mean, marked):
    records = scored(arm(mean, of=100))
    assert tables.cells(records)["4096"]["niah_single_1"]["uninformative"] == marked
    entry = tables.compare(records, records, margin=1.0)["lengths"][0]
    assert entry["tasks"][0]["uninformative"] == marked


def test_wrong_folder_names_the_right_one(folder, capsys):
    assert score.main([str(folder.parent)]) == 2
    assert f"did you mean {folder}?" in capsys.readouterr().err
    assert score.main([str(folder), "--compare", "original_dense", "theirs"]) == 2
    assert "--compare theirs: no such arm, there are" in capsys.readouterr().err


def test_labels_name_their_arm_and_back():
    runs = arm_runs(["converted_sparse", "original_dense"], [4, 8])
    assert [run.label for run in runs] == [
        "original_dense",
        "converted_sparse-k4",
        "converted_sparse-k8",
    ]
    assert [ArmRun.parse(run.label) for run in runs] == runs
    for label in ("converted_sparse", "original_dense-k4", "converted_sparse_k16", "theirs"):
        with pytest.raises(ValueError, match="is no arm: name it like"):
            ArmRun.parse(label)
    assert [meaning for meaning, _, _ in comparisons(runs)] == ["whole conversion"] * 2


def test_prompts_must_be_the_same_in_every_arm():
    with pytest.raises(ValueError, match="has another length in arm b than in a"):
        check_same_prompts({"a": arm(1), "b": {k: {**v, "length": 1} for k, v in arm(1).items()}})
