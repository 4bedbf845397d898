"""What the Triton kernels serve, and the one-sentence refusals of the rest.

Imported by every kernel file and by ops.py before a kernel is compiled. Kernels run on CUDA tensors, or on
CPU tensors under Triton's interpreter (TRITON_INTERPRET=1, set before the first operation; for tests).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

OLDEST, NEWEST = (3, 6), (3, 9)
"""Triton versions that the kernels were compiled with, both ends included."""
MAX_WIDTH = 256
"""Widest head."""
MAX_TOP_K = 64
BLOCK_SIZES = (16, 32, 64, 128, 256)
REGISTERS, MAX_REGISTERS = 65536, 255
"""32-bit registers of a multiprocessor, and the most of one thread: sm_80 to sm_100."""
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Launch:
    """How a kernel is cut into programs; the numbers never change a result beyond rounding."""

    rows: int
    """Rows of a query tile: tokens times heads."""
    keys: int
    """Key tokens per step."""
    num_warps: int
    num_stages: int
    programs: int | None = None
    """Programs that share a multiprocessor's registers; None: as many as the compiler leaves room for."""

    @property
    def options(self) -> dict[str, int]:
        """What a kernel launch takes besides the sizes."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        if self.programs is not None:
            # Registers are handed out in eights.
            share = REGISTERS // (self.programs * self.num_warps * 32)
            options["maxnreg"] = min(MAX_REGISTERS, share // 8 * 8)
        return options


def interpreting() -> bool:
    """Whether kernels run in Python, on CPU tensors."""
    return bool(triton.knobs.runtime.interpret)


def float32_launch() -> Launch:
    """Tile for float32, which no tensor core multiplies exactly: small, so that it fits the registers.

    Under the interpreter a step costs the same whatever its size, so it takes few and large ones.
    """
    return Launch(64, 64, 4, 1) if interpreting() else Launch(16, 16, 4, 1)


def target_arch() -> int:
    """Compute capability that kernels are compiled for, 90 for sm_90; 90 under the interpreter."""
    if interpreting():
        return 90
    return int(triton.runtime.driver.active.get_current_target().arch)


def _version() -> tuple[int, ...]:
    return tuple(int(part) for part in triton.__version__.split(".")[:2])


def spills_less() -> bool:
    """Whether the compiler is older than 3.9, which fits less into a cap on registers."""
    return _version() < (3, 9)


def shared_by(programs: int) -> int | None:
    """`programs` of a launch, on sm_90: the only one where the cap on registers spills nothing in loops."""
    return programs if target_arch() == 90 else None


def check_version() -> None:
    """Raises:
    ValueError: Triton is older or newer than what the kernels were compiled with.
    """
    if not OLDEST <= _version() <= NEWEST:
        oldest, newest = (".".join(map(str, bound)) for bound in (OLDEST, NEWEST))
        raise ValueError(
            f"Triton {triton.__version__} is installed, the kernels were compiled with {oldest} to "
            f"{newest}: install one of these, or set backend='torch'"
        )


def check_tensors(**tensors: Tensor | None) -> None:
    """Refuse tensors that no kernel takes: mixed or foreign devices, mixed or wide dtypes.

    Integer tensors (block ids, document ids) count for the device only.
    """
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    first, *others = given
    device = given[first].device
    for name in others:
        if given[name].device != device:
            raise ValueError(
                f"{name} is on {given[name].device} and {first} on {device}: move them to one device"
            )
    if device.type not in ("cuda", "meta") and not interpreting():
        raise ValueError(
            f"backend='triton' got tensors on {device}: move them to a CUDA device, or set backend='torch'"
        )
    floats = [name for name in given if given[name].is_floating_point()]
    for name in floats:
        dtype = given[name].dtype
        if dtype not in DTYPES:
            raise ValueError(
                f"{name} is {dtype}: the Triton kernels take bfloat16, float16 and float32; "
                "set backend='torch'"
            )
        if dtype != given[floats[0]].dtype:
            raise ValueError(
                f"{name} is {dtype} and {floats[0]} is {given[floats[0]].dtype}: cast them to one dtype"
            )


def check_width(name: str, width: int) -> None:
    if width % 16 or not 16 <= width <= MAX_WIDTH:
        raise ValueError(
            f"{name} has width {width}: the Triton kernels serve multiples of 16 up to {MAX_WIDTH}; "
            "set backend='torch'"
        )


def check_block_size(block_size: int) -> None:
    if block_size not in BLOCK_SIZES:
        raise ValueError(
            f"block_size={block_size}: the Triton kernels serve {', '.join(map(str, BLOCK_SIZES))}; use "
            "one of these, or set backend='torch'"
        )


def check_top_k(top_k: int) -> None:
    if top_k > MAX_TOP_K:
        raise ValueError(
            f"top_k={top_k}: the Triton kernels keep at most {MAX_TOP_K} blocks a query; use fewer, or set "
            "backend='torch'"
        )


def padded_width(width: int) -> int:
    """Power of two that holds a head; the rest is masked."""
    return triton.next_power_of_2(width)
