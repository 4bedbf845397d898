"""What the Triton backend does not serve is refused in one sentence that names the way out."""

import subprocess
import sys

import pytest
import torch
import triton

from dense2sparse.kernels import ops, triton_ops, triton_support


def select(width=16, block_size=16, top_k=2, dtype=torch.float32, **options):
    index_q, index_k = (torch.randn(1, 1, 20, width).to(dtype) for _ in range(2))
    options = {"backend": "triton", **options}
    return ops.select_blocks(index_q, index_k, block_size=block_size, top_k=top_k, **options)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"width": 24}, "index_q has width 24.*multiples of 16 up to 256; set backend='torch'"),
        ({"width": 272}, "index_q has width 272"),
        ({"block_size": 48}, "block_size=48: the Triton kernels serve 16, 32, 64, 128, 256"),
        ({"top_k": 65}, "top_k=65: the Triton kernels keep at most 64 blocks"),
        ({"dtype": torch.float64}, "index_q is torch.float64.*set backend='torch'"),
    ],
)
def test_a_shape_that_no_kernel_serves(change, words):
    with pytest.raises(ValueError, match=words):
        select(**change)


def test_tensors_on_different_devices_or_of_different_dtypes():
    q, k = torch.randn(1, 1, 4, 16), torch.randn(1, 1, 4, 16, device="meta")
    with pytest.raises(ValueError, match="k is on meta and q on cpu: move them to one device"):
        ops.dense_attention(q, k, k, backend="triton")
    k = torch.randn(1, 1, 4, 16).half()
    with pytest.raises(ValueError, match="k is torch.float16 and q is torch.float32: cast them"):
        ops.dense_attention(q, k, k, backend="triton")


def test_a_scale_that_turns_scores_round():
    q = torch.randn(1, 1, 20, 16)
    ids = torch.zeros(1, 1, 20, 1, dtype=torch.int32)
    with pytest.raises(ValueError, match="scale=-1.0: the Triton kernels take positive scales"):
        ops.sparse_attention(q, q, q, ids, block_size=32, scale=-1.0, backend="triton")


@pytest.mark.parametrize("version", ["3.5.1", "3.10.0", "4.0.0"])
def test_a_triton_version_outside_the_range(monkeypatch, version):
    monkeypatch.setattr(triton, "__version__", version)
    with pytest.raises(ValueError, match=f"Triton {version} is installed.*3.6 to 3.9"):
        select()


def test_fp8_where_the_device_lacks_it(monkeypatch):
    monkeypatch.setattr(triton_ops, "target_arch", lambda: 80)
    with pytest.raises(ValueError, match="index_precision='fp8' needs compute capability 8.9"):
        select(precision="fp8")
    monkeypatch.setattr(triton_ops, "target_arch", lambda: 90)
    assert select(precision="fp8").shape == (1, 1, 20, 2)


def test_cpu_tensors_without_the_interpreter(monkeypatch):
    monkeypatch.setattr(triton_support, "interpreting", lambda: False)
    with pytest.raises(
        ValueError, match="tensors on cpu: move them to a CUDA device, or set backend='torch'"
    ):
        select()


def test_triton_that_is_not_installed():
    program = (
        "import sys, importlib.util as u; found = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name == 'triton' else found(name, *rest)\n"
        "import torch; from dense2sparse.kernels import ops\n"
        "x = torch.zeros(1, 1, 4, 16)\n"
        "try: ops.dense_attention(x, x, x, backend='triton')\n"
        "except ValueError as error: print(error)\n"
        "print('triton' in sys.modules)\n"
    )
    printed = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout
    assert "needs Triton, which is not installed: pip install" in printed
    assert printed.splitlines()[-1] == "False", "the torch path must not need Triton"


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ([1, 0, 2], "ids out of order"),
        ([0, 0, 2], "ids out of order"),
        ([0, -1, 2], "ids out of order"),
        ([0, 1, -1], "no id of the query's own block"),
        ([0, 2, 3], "an id after the query's own block"),
        ([-2, 0, 2], "an id below -1"),
    ],
)
def test_wrong_block_ids_are_named_in_debug_mode(row, words):
    q = torch.randn(1, 1, 48, 16)
    ids = ops.select_blocks(q, q, block_size=16, top_k=3)
    ops.sparse_attention(q, q, q, ids, block_size=16, validate=True)
    ids[0, 0, 40] = torch.tensor(row, dtype=torch.int32)
    with pytest.raises(ValueError, match=rf"block_ids\[0, 0, 40\] = .* has {words}.*own block, 2"):
        ops.sparse_attention(q, q, q, ids, block_size=16, validate=True)
