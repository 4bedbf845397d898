"""What is carried to a machine without network: cut, verified, put together; a mistake is one sentence."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from argparse import Namespace
from pathlib import Path

import carry
import pytest
from carry_parts import MIB, CarryError, Piece, complete, main, plan, receive, sha256, write_calls
from carry_wheels import Machine, lacking, read_machine, read_pins, requirements_of
from hypothesis import given
from hypothesis import strategies as st
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
MACHINE = ROOT / "benchmarks" / "gpu_machine.txt"
RECIPE = ROOT / "recipes" / "smollm2-8k.yaml"


@given(st.lists(st.integers(1, 5 * MIB), min_size=1, max_size=12), st.integers(MIB, 3 * MIB))
def test_the_calls_hold_every_byte_once_and_none_is_larger_than_its_room(sizes, room) -> None:
    pieces = plan([(str(n), size) for n, size in enumerate(sizes)], room=room)
    for number, size in enumerate(sizes):
        mine = [piece for piece in pieces if piece.file == str(number)]
        assert [piece.begin for piece in mine] == [
            sum(p.size for p in mine[:n]) for n in range(len(mine))
        ]
        assert sum(piece.size for piece in mine) == size
    calls = [piece.call for piece in pieces]
    assert calls == sorted(calls)
    assert set(calls) == set(range(1, -(-sum(sizes) // room) + 1))
    for call in set(calls):
        assert sum(piece.size for piece in pieces if piece.call == call) <= room


def test_a_tree_that_fills_a_call_is_refused_in_one_sentence() -> None:
    with pytest.raises(CarryError, match="has -2.0 MiB left for parts, and 1 MiB is the least"):
        plan([("a", 1)], room=-2 * MIB)


def prepared(tmp_path: Path, room: int = 2 * MIB) -> Path:
    """Three calls with two small files and a large one in `tmp_path/carry`."""
    store = tmp_path / "store"
    contents = {"wheels/a.whl": b"a" * 1000, "cache.tar.xz": b"c" * 10, "ckpt/w": bytes(5 * MIB)}
    for name, content in contents.items():
        (store / name).parent.mkdir(parents=True, exist_ok=True)
        (store / name).write_bytes(content)
    sizes = [(name, len(content)) for name, content in contents.items()]
    folder = tmp_path / "carry"
    folder.mkdir(exist_ok=True)
    write_calls(store, plan(sizes, room=room), folder)
    return folder


@pytest.mark.parametrize("order", [(1, 2, 3), (3, 1, 2), (2, 2, 1, 3)])
def test_calls_in_any_order_and_twice_give_the_files_back(tmp_path, order) -> None:
    folder, home = prepared(tmp_path), tmp_path / "home"
    assert sorted(p.name for p in folder.glob("call-*")) == ["call-1", "call-2", "call-3"]
    for call in order:
        receive(call, folder, home)
    complete(home)
    for name in ("wheels/a.whl", "cache.tar.xz", "ckpt/w"):
        assert (home / "files" / name).read_bytes() == (tmp_path / "store" / name).read_bytes()
    assert not list((home / "pieces").iterdir())


def test_writing_again_keeps_what_is_whole_mends_what_is_not_and_removes_what_is_old(tmp_path):
    folder = prepared(tmp_path)
    kept, broken = folder / "call-1" / "wheels--a.whl", folder / "call-2" / "ckpt--w.part-2"
    (folder / "call-2" / "stale").write_text("old")
    broken.write_bytes(b"")
    before = kept.stat().st_ino
    prepared(tmp_path)
    assert kept.stat().st_ino == before
    assert broken.stat().st_size > MIB
    assert not (folder / "call-2" / "stale").exists()
    prepared(tmp_path, room=6 * MIB)
    assert [p.name for p in folder.glob("call-*")] == ["call-1"]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda path: path.unlink(), r"ckpt--w.part-2 is missing"),
        (
            lambda path: path.write_bytes(b"short"),
            r"ckpt--w.part-2 has 5 bytes and not 1,\d{3},\d{3}",
        ),
        (
            lambda path: path.write_bytes(b"x" + path.read_bytes()[1:]),
            r"ckpt--w.part-2 has another sha256",
        ),
    ],
)
def test_receive_names_the_part_that_is_broken_and_keeps_nothing(
    tmp_path, capsys, damage, said
) -> None:
    folder, home = prepared(tmp_path), tmp_path / "home"
    damage(folder / "call-2" / "ckpt--w.part-2")
    with pytest.raises(CarryError, match=rf"call 2: 1 of 1 parts did not arrive whole \({said}\)"):
        receive(2, folder, home)
    assert not home.exists()
    assert main(["receive", "2", "--source", str(folder), "--home", str(home)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_what_has_not_come_is_named_with_its_call(tmp_path) -> None:
    folder, home = prepared(tmp_path), tmp_path / "home"
    with pytest.raises(CarryError, match="has no manifest"):
        complete(home)
    receive(1, folder, home)
    receive(3, folder, home)
    with pytest.raises(
        CarryError, match="ckpt/w and 0 other files are not complete .* call 2 first"
    ):
        complete(home)


def test_calls_of_two_preparations_do_not_mix(tmp_path) -> None:
    folder, home = prepared(tmp_path), tmp_path / "home"
    receive(1, folder, home)
    (tmp_path / "store" / "ckpt" / "w").write_bytes(bytes(4 * MIB))
    pieces = [Piece("ckpt/w", 0, 2 * MIB, 1), Piece("ckpt/w", 2 * MIB, 2 * MIB, 2)]
    write_calls(tmp_path / "store", pieces, folder)
    with pytest.raises(CarryError, match="another preparation"):
        receive(2, folder, home)


def test_the_script_receives_and_refuses_with_its_exit_code(tmp_path) -> None:
    folder, home = prepared(tmp_path), tmp_path / "home"
    environ = {
        **os.environ,
        "CARRY_HOME": str(home),
        "SOURCE": str(folder),
        "PYTHON": sys.executable,
    }

    def convert(*words: str) -> subprocess.CompletedProcess[str]:
        command = ["bash", str(ROOT / "benchmarks" / "convert_on_gpu.sh"), *words]
        return subprocess.run(command, env=environ, capture_output=True, text=True)

    assert convert("receive", "1").returncode == 0
    early = convert("run", str(tmp_path / "out"))
    assert (early.returncode, early.stderr.count("receive call 2 and 3 first")) == (2, 1)
    (folder / "call-2" / "ckpt--w.part-2").write_bytes(b"")
    assert "ckpt--w.part-2 has 0 bytes" in convert("receive", "2").stderr
    assert convert().returncode == 2


STUB = """#!/usr/bin/env bash
# In place of Python: what is verified is real, the run is not.
case "$*" in
benchmarks/carry_parts.py*) exec "$REAL" "$@" ;;
-c*) echo tiny ;;
*launch.cli\\ run*)
    folder=$CARRY_HOME/runs/tiny
    mkdir -p "$folder/eval/ruler" "$folder/stages/0-warmup"
    echo '{}' | tee "$folder/metrics.jsonl" "$folder/recipe.json" >"$folder/eval/ruler/stage-1.json"
    head -c 17000000 /dev/zero >"$folder/environment.json"
    echo "offline $HF_HUB_OFFLINE $PIP_NO_INDEX $PIP_FIND_LINKS $WANDB_MODE"
    echo "said $*"
    exit "$CODE"
    ;;
*launch.cli\\ report*) echo made >"${@: -1}/report.html" ;;
*) exit 2 ;;
esac
"""


@pytest.mark.parametrize("code", [0, 75, 1])
def test_a_run_leaves_few_small_files_whatever_becomes_of_it(tmp_path, code) -> None:
    folder, home, out = prepared(tmp_path, room=8 * MIB), tmp_path / "home", tmp_path / "out"
    receive(1, folder, home)
    (home / "installed").touch()
    stub = tmp_path / "python"
    stub.write_text(STUB)
    stub.chmod(0o755)
    environ = {**os.environ, "CARRY_HOME": str(home), "PYTHON": str(stub), "CODE": str(code)}
    environ |= {"REAL": sys.executable, "LIMIT_S": "60"}
    command = [
        "bash",
        str(ROOT / "benchmarks" / "convert_on_gpu.sh"),
        "run",
        str(out),
        "train.seed=3",
    ]
    done = subprocess.run(command, env=environ, capture_output=True, text=True)
    assert done.returncode == code
    wanted = {"log.txt", "metrics.jsonl", "recipe.json", "results.tar.gz", "summary.txt"}
    assert {path.name for path in out.iterdir()} == wanted | ({"report.html"} if code else set())
    assert "larger than 16 MiB: environment.json" in done.stdout
    log = (out / "log.txt").read_text()
    assert f"offline 1 1 {home}/files/checkpoint offline" in log
    assert f"output_dir={home}/runs data.cache_dir={home}/cache train.seed=3" in log
    assert f"exit code {code} after" in (out / "summary.txt").read_text()


def wheel(folder: Path, name: str, version: str, *needs: str) -> Path:
    """A wheel with nothing but metadata."""
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}-{version}-py3-none-any.whl"
    lines = [
        f"Name: {name}",
        *(f"Requires-Dist: {need}" for need in needs),
        "",
        "Requires-Dist: no",
    ]
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}-{version}.dist-info/METADATA", "\n".join(lines))
    return path


def test_only_what_the_machine_lacks_is_fetched_with_what_that_needs(tmp_path) -> None:
    needs = {
        "big": ("there>=2", "old>=2", "Small_Part[x]==1.5", 'win; sys_platform == "win32"'),
        "small-part": ('extra-only; extra == "x"', "big"),
        "old": (),
    }
    machine = Machine("3.12", {"there": None, "old": "1.0"})
    pins = {"big": "3.0", "small-part": "1.5", "old": "2.1"}
    fetched = lacking(
        [Requirement("big>=1")], machine, pins, lambda n, v: wheel(tmp_path, n, v, *needs[n])
    )
    assert [path.name.split("-py3")[0] for path in fetched] == [
        "big-3.0",
        "old-2.1",
        "small-part-1.5",
    ]
    assert [str(r) for r in requirements_of(fetched[2])][1] == "big"


@pytest.mark.parametrize(("pins", "said"), [({}, "does not pin"), ({"big": "0.5"}, "pins to 0.5")])
def test_a_need_that_no_pin_meets_is_refused(tmp_path, pins, said) -> None:
    with pytest.raises(
        CarryError, match=f"the package needs big>=1, which the machine lacks .* {said}"
    ):
        lacking([Requirement("big>=1")], Machine("3.12", {}), pins, lambda n, v: tmp_path)


def test_the_list_of_the_machine_is_read_and_a_bad_line_refused(tmp_path) -> None:
    machine = read_machine(MACHINE)
    assert machine.python == "3.12"
    assert machine.has(Requirement("Huggingface_Hub>=1.5,<2"))  # as transformers 5.17 needs it
    assert not machine.has(Requirement("huggingface-hub>=2"))
    for absent in ("deepspeed", "wandb", "pydantic", "gguf", "datasets"):
        assert not machine.has(Requirement(absent))
    (tmp_path / "list").write_text("python==3.12\ntorch 2.11\n")
    with pytest.raises(CarryError, match="line 2: 'torch 2.11' is not"):
        read_machine(tmp_path / "list")
    (tmp_path / "list").write_text("torch==2.11.0  # with CUDA\n")
    with pytest.raises(CarryError, match="does not say which Python"):
        read_machine(tmp_path / "list")


def test_everything_the_package_needs_is_there_or_pinned() -> None:
    machine, pins = read_machine(MACHINE), read_pins(ROOT / "launch" / "requirements.txt")
    for requirement in carry.roots([]):
        assert machine.has(requirement) or requirement.specifier.contains(pins[requirement.name])
    assert "wandb" not in [requirement.name for requirement in carry.roots(["wandb"])]


def test_a_recipe_that_reads_what_cannot_be_carried_is_refused() -> None:
    carry.check_recipe(carry.load(RECIPE))
    for override, said in (
        ("model.wheel=", "model.wheel is not set"),
        ("data.sources.0={name: web, kind: hub, hub: a/b}", "'web' has kind=hub"),
        ("stages.4={kind: longbench}", "stages.4 has kind=longbench"),
    ):
        with pytest.raises(CarryError, match=said):
            carry.check_recipe(carry.load(RECIPE, [override]))


def test_a_damaged_file_of_the_store_is_made_again(tmp_path, capsys) -> None:
    def make() -> Path:
        (tmp_path / "file").write_bytes(b"content")
        return tmp_path / "file"

    for damage in (None, b"other", None):
        if damage:
            (tmp_path / "file").write_bytes(damage)
        assert sha256(carry.Store(tmp_path).get("key", make))[:4] == "ed70"
    said = capsys.readouterr().out
    assert [word in said for word in ("key: made", "damaged, so", "key: there")] == [True] * 3


def test_texts_are_packed_to_the_same_bytes_whenever_they_are(tmp_path) -> None:
    hashes = set()
    for seconds in (1, 10**9):
        (tmp_path / "text").write_text("words")
        os.utime(tmp_path / "text", (seconds, seconds))
        hashes.add(sha256(carry._archive(tmp_path, ["text"], tmp_path / "packed")))
    assert len(hashes) == 1


def test_the_table_names_paths_and_commands_short_enough_to_give(tmp_path) -> None:
    folder = prepared(tmp_path)
    manifest = json.loads((folder / "call-1" / "manifest.json").read_text())
    pieces = [
        Piece(file["name"], 0, piece["bytes"], piece["call"])
        for file in manifest["files"]
        for piece in file["pieces"]
    ]
    options = Namespace(folder=folder, overrides=["stages.1.steps=5"], limit_mib=8)
    said = carry.table(pieces, options, 3 * MIB)
    commands = [line.strip() for line in said if line.startswith("    bash")]
    assert commands[0].endswith("receive 1 && bash benchmarks/convert_on_gpu.sh check")
    assert commands[2].endswith(
        'receive 3 && bash benchmarks/convert_on_gpu.sh run "$OUT" stages.1.steps=5'
    )
    assert max(map(len, commands)) < 2000
    with pytest.raises(CarryError, match="call 1 is .* MiB with the repository and 4 are allowed"):
        carry.table(pieces, Namespace(**{**vars(options), "limit_mib": 4}), 3 * MIB)
