"""Several nodes, all of them on this machine: --no_ssh, a stand-in pdsh, and a stand-in Slurm."""

from __future__ import annotations

import shutil
import signal
import socket

import pytest
from toy_cluster import ROOT, ToyCluster, is_alive

pytestmark = pytest.mark.e2e

# As pdsh: `-w a,b COMMAND...` runs the command for every node, %n is the node's number, and -S returns
# the largest exit code. Never runs DeepSpeed's `pkill -f`, which would hit other people's processes.
PDSH = r"""
while [[ $1 == -* ]]; do
    if [[ $1 == -S ]]; then shift; continue; fi
    if [[ $1 == -w ]]; then nodes=${2//,/ }; fi
    shift 2
done
[[ $1 == pkill* ]] && exit 99
number=0
for node in $nodes; do
    # A fresh environment, as of a login on another machine.
    env -i HOME="$HOME" PATH=/usr/bin:/bin bash -c "${*//%n/$number}" & pids+=($!)
    number=$((number + 1))
done
worst=0
for pid in "${pids[@]}"; do wait "$pid" || { code=$?; ((code > worst)) && worst=$code; }; done
exit "$worst"
"""
SRUN = r"""
while [[ $1 == --* ]]; do shift; done
for node in 0 1; do SLURM_NODEID=$node "$@" & pids+=($!); done
worst=0
for pid in "${pids[@]}"; do wait "$pid" || { code=$?; ((code > worst)) && worst=$code; }; done
exit "$worst"
"""
SCONTROL = r"""
if [[ $1 == show ]]; then printf 'localhost\nnode-b\n'; else echo "$*" >>scontrol.log; fi
"""


@pytest.fixture
def two_nodes(cluster: ToyCluster) -> ToyCluster:
    (cluster.folder / "hosts").write_text("# made up\nnode-a slots=1\n\nnode-b slots=1\n")
    return cluster


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def test_two_nodes_without_ssh_are_one_run(two_nodes: ToyCluster) -> None:
    script = str(ROOT / "launch" / "multinode.sh")
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    nodes = [
        two_nodes.start(
            script, "hosts", "toy.yaml", "wandb.group=finish", NODE_RANK=str(rank), **address
        )
        for rank in (0, 1)
    ]
    endings = [two_nodes.finish(node) for node in nodes]
    assert [code for code, _ in endings] == [0, 0], endings
    ranks = [rank["environ"] for rank in two_nodes.started(2)]
    assert {(r["WORLD_SIZE"], r["MASTER_ADDR"]) for r in ranks} == {("2", "127.0.0.1")}
    assert {r["MASTER_PORT"] for r in ranks} == {address["MASTER_PORT"]}


def test_pdsh_run_forwards_the_environment_and_cleans_up(two_nodes: ToyCluster) -> None:
    two_nodes.add_program("pdsh", PDSH)
    mine = two_nodes.folder / ".deepspeed_env"
    mine.write_text("# a comment, which DeepSpeed itself cannot read\n\nHF_MINE=kept\n")
    before = mine.read_text()
    private = two_nodes.folder / "private"
    private.mkdir()
    run = two_nodes.start(
        str(ROOT / "launch" / "multinode.sh"),
        "hosts",
        "toy.yaml",
        "wandb.group=wait",
        "wandb.tags=[a,b]",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=free_port(),
        TMPDIR=str(private),
        WANDB_NOTES='say "hi" for $5',
        WANDB_API_KEY="secret",
        HF_HOME="",
    )
    ranks = two_nodes.started(2)
    files = list(private.glob("dense2sparse-env-*"))
    assert [file.stat().st_mode & 0o777 for file in files] == [0o600]
    run.send_signal(signal.SIGTERM)
    code, output = two_nodes.finish(run)
    assert code == 75, output
    for rank in ranks:
        environ = rank["environ"]
        assert environ["WANDB_NOTES"] == 'say "hi" for $5'
        assert environ["WANDB_API_KEY"] == "secret"
        assert (environ["HF_MINE"], environ["DS_ACCELERATOR"]) == ("kept", "cpu")
        assert "HF_HOME" not in environ and "WANDB_NAME" not in environ
        assert rank["arguments"][1:] == ["wandb.group=wait", "wandb.tags=[a,b]"]
        assert not is_alive(rank["pid"])
    assert "secret" not in output
    assert not list(private.glob("dense2sparse-env-*"))
    assert mine.read_text() == before


def test_slurm_job_that_is_asked_to_stop_saves_and_is_requeued(two_nodes: ToyCluster) -> None:
    two_nodes.add_program("srun", SRUN)
    two_nodes.add_program("scontrol", SCONTROL)
    job = two_nodes.start(
        str(ROOT / "launch" / "slurm.sh"),
        "toy.yaml",
        "wandb.group=wait",
        SLURM_SUBMIT_DIR=str(two_nodes.folder),
        SLURM_JOB_NODELIST="localhost,node-b",
        SLURM_JOB_ID="77",
    )
    ranks = two_nodes.started(2)
    assert {rank["environ"]["WORLD_SIZE"] for rank in ranks} == {"2"}
    job.send_signal(signal.SIGUSR1)
    code, output = two_nodes.finish(job)
    assert code == 75, output
    assert (two_nodes.run_folder / "saved-1").exists()
    assert (two_nodes.folder / "scontrol.log").read_text() == "requeue 77\n"
    assert not (two_nodes.folder / ".hostfile.77").exists()


def test_missing_pdsh_is_one_sentence(two_nodes: ToyCluster) -> None:
    script = str(ROOT / "launch" / "multinode.sh")
    for program in ("bash", "dirname"):  # a PATH on which there is surely no pdsh
        (two_nodes.programs / program).symlink_to(str(shutil.which(program)))
    process = two_nodes.start(script, "hosts", "toy.yaml", PATH=str(two_nodes.programs))
    code, output = two_nodes.finish(process)
    assert code == 2
    assert output.startswith("error: pdsh is not installed") and output.count("\n") == 1
