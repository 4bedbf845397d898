"""The command line itself: fast, without torch, with one sentence and the right exit code for a mistake."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from toy_cluster import ROOT, ToyCluster

from dense2sparse.launch import cli, launcher
from dense2sparse.launch.processes import Ending
from dense2sparse.launch.run import is_finished, run_folder, verdict
from dense2sparse.recipes.load import fingerprint, load

QUICKSTART = str(ROOT / "recipes" / "quickstart.yaml")


def test_plan_needs_no_heavy_library() -> None:
    code = (
        "import sys; from dense2sparse.launch.cli import main; "
        f"code = main(['plan', {QUICKSTART!r}, 'train.seed=3']); "
        "heavy = {'torch', 'transformers', 'deepspeed', 'numpy', 'datasets', 'wandb'} & set(sys.modules); "
        "sys.exit(str(heavy) if heavy else code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "seed: 3" in done.stdout and "block_size: 32" in done.stdout
    assert "full attention; trains index branch" in done.stdout


def test_plan_counts_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes = [
        "stages.2.steps=7",
        "stages.2.micro_batch_size=2",
        "stages.2.gradient_accumulation=3",
    ]
    assert cli.main(["plan", QUICKSTART, *changes, "stages.2.row_len=512"]) == 0
    assert "7 steps x 3,072 tokens = 21,504 tokens per rank" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["run", "plan", "stop", "preflight", "eval"])
def test_bad_recipe_is_one_sentence_and_exit_code_2(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([command, QUICKSTART, f"output_dir={tmp_path}", "sparsity.topk=4"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert "sparsity.topk=4: unknown key; the nearest valid key is sparsity.top_k" in captured.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--no_ssh"], "need --hostfile"),
        (["--master_addr", "a"], "need --hostfile"),
        (["--hostfile", "missing"], "cannot be read"),
        (["--hostfile", "empty"], "names no node"),
        (["--hostfile", "twice"], "stands twice"),
        (["--hostfile", "bad"], "is not `name slots=N`"),
        (["--hostfile", "good", "--no_ssh"], "0 to 1"),
        (["--hostfile", "good", "--no_ssh", "--node_rank", "2"], "0 to 1"),
        (["--hostfile", "good", "--ranks", "2"], "exclude each other"),
    ],
)
def test_impossible_cluster_is_one_sentence(
    options: list[str], sentence: str, cluster: ToyCluster
) -> None:
    for name, text in {
        "empty": "# nothing\n",
        "twice": "a slots=1\na slots=2\n",
        "bad": "a 8\n",
        "good": "a slots=1\nb slots=1\n",
    }.items():
        (cluster.folder / name).write_text(text)
    code, output = cluster.run(*options)
    assert (code, output.count("\n")) == (2, 1)
    assert sentence in output
    assert not cluster.run_folder.exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["run"],
        ["walk"],
        ["run", QUICKSTART, "--ranks", "0"],
        ["run", QUICKSTART, "--master_port", "0"],
        ["run", QUICKSTART, "--master_port", "65536"],
        ["plan", QUICKSTART, "-x"],
    ],
)
def test_misused_command_ends_with_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ending:
        cli.main(arguments)
    assert ending.value.code == 2


def test_stop_without_a_run_is_refused(cluster: ToyCluster) -> None:
    code, output = cluster.finish(cluster.start("dense2sparse", "stop", "toy.yaml"))
    assert (code, "there is no run in" in output) == (2, True)


def test_stop_of_a_finished_run_says_so_and_asks_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = f"output_dir={tmp_path}"
    recipe = load(QUICKSTART, [output])
    folder = run_folder(recipe)
    folder.mkdir()
    assert cli.main(["stop", QUICKSTART, output]) == 0
    assert (folder / "STOP").exists() and "asked to stop" in capsys.readouterr().out
    (folder / "finished.json").write_text(json.dumps({"fingerprint": fingerprint(recipe)}))
    assert cli.main(["stop", QUICKSTART, output]) == 0
    assert not (folder / "STOP").exists()
    assert "is finished: there is nothing to stop" in capsys.readouterr().out


@pytest.fixture
def handed_over(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Arguments of the modules that the command would have become."""
    seen: list[list[str]] = []
    monkeypatch.setattr(cli.os, "execve", lambda program, words, environ: seen.append(words[2:]))
    return seen


@pytest.mark.parametrize(
    "before", [["--ranks", "2"], ["--ranks=2"], ["--rank", "2", "--probe"], ["--probe"], []]
)
def test_recipe_is_found_and_checked_behind_options(
    before: list[str], handed_over: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    cli.main(["preflight", *before, QUICKSTART, "train.seed=3"])
    assert handed_over == [["dense2sparse.train.preflight", *before, QUICKSTART, "train.seed=3"]]
    assert cli.main(["preflight", *before, QUICKSTART, "--ranks", "2", "sparsity.topk=4"]) == 2
    assert "sparsity.topk=4: unknown key" in capsys.readouterr().err
    assert len(handed_over) == 1


@pytest.mark.parametrize(
    ("options", "passed_on"),
    [
        (["--checkpoint", "folder"], ["--checkpoint", "folder"]),
        (["--output=b", "--ranks", "1"], ["--output", "b"]),
        ([], []),
    ],
)
def test_an_evaluation_in_one_process_needs_no_launcher(
    options: list[str],
    passed_on: list[str],
    handed_over: list[list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cli, "own_gpus", list)
    cli.main(["eval", *options, QUICKSTART, "train.seed=3"])
    assert handed_over == [["dense2sparse.eval.run", QUICKSTART, "train.seed=3", *passed_on]]


@pytest.mark.parametrize(
    ("code", "stop_requests", "marked", "expected"),
    [
        (0, 0, True, 0),
        (0, 0, False, 1),  # the launcher also says 0 of ranks that were lost
        (2, 0, False, 2),
        (-15, 1, False, 75),
        (247, 0, False, 1),
    ],
)
def test_an_evaluation_on_several_ranks_goes_through_the_launcher_and_wants_their_mark(
    code: int,
    stop_requests: int,
    marked: bool,
    expected: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    started = []

    def launch(command: list[str], environ: dict[str, str], **_: object) -> Ending:
        started.append(command)
        if marked:
            Path(command[-1]).touch()
        return Ending(code, stop_requests, killed=False)

    for module in (cli, launcher):
        monkeypatch.setattr(module, "own_gpus", list)
    monkeypatch.setattr(launcher, "run_group", launch)
    out = f"output_dir={tmp_path}"
    assert cli.main(["eval", QUICKSTART, "--ranks", "2", "--checkpoint", "folder", out]) == expected
    command = started[0]
    assert command[command.index("--num_gpus") + 1] == "2"
    started_with = ["--module", "dense2sparse.eval.run"]
    assert command[-8:-1] == [*started_with, QUICKSTART, out, "--checkpoint", "folder", "--mark"]
    assert not list(tmp_path.iterdir()), "the mark is removed"
    error = capsys.readouterr().err
    assert ("did not finish" in error) == (expected == 1)


def test_an_evaluation_in_one_process_takes_no_options_of_a_cluster(
    handed_over: list[list[str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(cli, "own_gpus", list)
    assert cli.main(["eval", QUICKSTART, "--node_rank", "3"]) == 2
    assert "--node_rank and --master_addr need --hostfile" in capsys.readouterr().err
    assert not handed_over


def test_options_with_a_value_are_those_of_the_modules() -> None:
    found = {"--local_rank"}  # of the launcher only
    for command in cli.TAKE_A_RECIPE:
        module = cli.HANDED_OVER[command][0]
        done = subprocess.run(
            [sys.executable, "-m", module, "--help"], capture_output=True, text=True, check=True
        )
        options = done.stdout.partition("options:")[2]
        found |= set(re.findall(r"^ +(?:-\w, )?(--\w+)[ ,]+[A-Z]", options, flags=re.MULTILINE))
    assert found - {"--local_rank"} == set(cli.VALUE_OPTIONS)


@pytest.mark.parametrize("command", ["preflight", "export", "report"])
def test_command_without_arguments_helps_and_ends_with_2(
    command: str, handed_over: list[list[str]], capfd: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([command]) == 2
    captured = capfd.readouterr()
    assert captured.out == "" and not handed_over
    assert f"usage: dense2sparse {command}" in captured.err
    assert captured.err.splitlines()[-1].startswith(f"error: `dense2sparse {command}` needs a r")
    cli.main([command, "-h"])
    assert handed_over == [[cli.HANDED_OVER[command][0], "-h"]]


def test_output_folder_that_cannot_be_written_is_refused(cluster: ToyCluster) -> None:
    (cluster.folder / "file").touch()
    code, output = cluster.run("output_dir=file")
    assert (code, output.count("\n")) == (2, 1)
    assert "output_dir: cannot write to file/toy" in output


@pytest.mark.parametrize(
    ("ending", "finished", "expected"),
    [
        (Ending(0, 0, False), True, 0),
        (Ending(-9, 1, True), True, 0),
        (Ending(0, 0, False), False, 1),
        (Ending(1, 0, False), False, 1),
        (Ending(2, 0, False), False, 2),
        (Ending(75, 0, False), False, 75),
        (Ending(75, 1, False), False, 75),
        (Ending(241, 1, False), False, 75),
        (Ending(241, 0, False), False, 1),
        (Ending(75, 3, True), False, 1),
    ],
)
def test_verdict(ending: Ending, finished: bool, expected: int, tmp_path: Path) -> None:
    if finished:
        (tmp_path / "finished.json").write_text(json.dumps({"fingerprint": "f", "stages": []}))
    assert verdict(tmp_path, "f", ending, wait_s=0) == expected


def test_rank_that_was_killed_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    verdict(tmp_path, "f", Ending(247, 0, False), wait_s=0)
    assert "a rank was ended by signal 9, as when memory runs out" in capsys.readouterr().err
    verdict(tmp_path, "f", Ending(-9, 0, False), wait_s=0)
    assert "the launcher was ended by signal 9" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "{", "[]", '{"fingerprint": "g"}', '{"stages": []}'])
def test_damaged_or_foreign_mark_is_no_mark(text: str, tmp_path: Path) -> None:
    (tmp_path / "finished.json").write_text(text)
    assert not is_finished(tmp_path, "f")
