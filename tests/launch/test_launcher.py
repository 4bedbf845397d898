"""Runs through the real `deepspeed` launcher: what decides success, and who is left behind."""

from __future__ import annotations

import os
import signal
import time

import pytest
from toy_cluster import ToyCluster, is_alive, parent

pytestmark = pytest.mark.e2e


def test_finished_run_is_done_and_is_not_started_again(cluster: ToyCluster) -> None:
    code, output = cluster.run("--ranks", "2", "wandb.group=finish", "train.seed=3")
    assert code == 0, output
    ranks = cluster.started(2)
    assert [r["environ"]["RANK"] for r in ranks] == ["0", "1"]
    assert {r["environ"]["WORLD_SIZE"] for r in ranks} == {"2"}
    assert ranks[0]["arguments"] == ["toy.yaml", "wandb.group=finish", "train.seed=3"]
    assert f"report is at {os.path.join('runs', 'toy', 'report.html')}" in output

    (cluster.run_folder / "started-0.json").unlink()
    code, output = cluster.run("wandb.group=finish", "train.seed=3")
    assert (code, "all is done" in output) == (0, True)
    assert not (cluster.run_folder / "started-0.json").exists()


def test_finished_mark_of_another_recipe_does_not_count(cluster: ToyCluster) -> None:
    cluster.run_folder.mkdir(parents=True)
    (cluster.run_folder / "finished.json").write_text('{"fingerprint": "another", "stages": []}')
    code, output = cluster.run("wandb.group=no_mark")
    assert code == 1
    assert "did not finish (exit code 0" in output


def test_finished_mark_beats_the_exit_code(cluster: ToyCluster) -> None:
    code, output = cluster.run("wandb.group=mark_then_crash")
    assert code == 0, output


def test_sigterm_lets_every_rank_save_and_leaves_no_orphan(cluster: ToyCluster) -> None:
    run = cluster.start("dense2sparse", "run", "toy.yaml", "wandb.group=wait", "--ranks", "2")
    ranks = cluster.started(2)
    launcher = parent(ranks[0]["pid"])
    run.send_signal(signal.SIGTERM)
    code, output = cluster.finish(run)
    assert code == 75, output
    assert "the same command continues" in output
    assert (cluster.run_folder / "saved-0").exists() and (cluster.run_folder / "saved-1").exists()
    assert not any(is_alive(pid) for pid in (launcher, ranks[0]["pid"], ranks[1]["pid"]))


def test_workers_whose_launcher_was_killed_save_and_do_not_live_on(cluster: ToyCluster) -> None:
    run = cluster.start("dense2sparse", "run", "toy.yaml", "wandb.group=wait", "--ranks", "2")
    ranks = cluster.started(2)
    os.kill(parent(ranks[0]["pid"]), signal.SIGKILL)
    code, output = cluster.finish(run)
    assert code == 1, output  # although `deepspeed` itself says 0
    assert (cluster.run_folder / "saved-0").exists() and (cluster.run_folder / "saved-1").exists()
    assert not any(is_alive(rank["pid"]) for rank in ranks)


def test_ranks_that_outlived_a_killed_command_keep_the_next_one_out(cluster: ToyCluster) -> None:
    run = cluster.start("dense2sparse", "run", "toy.yaml", "wandb.group=wait")
    (rank,) = cluster.started(1)
    run.kill()
    code, output = cluster.run("wandb.group=wait")
    assert (code, f"`kill {rank['pid']}`" in output) == (2, True), output
    os.kill(rank["pid"], signal.SIGTERM)
    cluster.wait_for(cluster.run_folder / "saved-0")
    while is_alive(rank["pid"]):
        time.sleep(0.05)
    assert cluster.run("wandb.group=mark_then_crash")[0] == 0


def test_second_launch_of_a_run_that_goes_on_is_refused(cluster: ToyCluster) -> None:
    run = cluster.start("dense2sparse", "run", "toy.yaml", "wandb.group=wait")
    cluster.started(1)
    code, output = cluster.run("wandb.group=wait")
    assert (code, "already going on" in output) == (2, True)
    stop = cluster.start("dense2sparse", "stop", "toy.yaml")
    assert cluster.finish(stop)[0] == 0
    assert cluster.finish(run)[0] == 75
