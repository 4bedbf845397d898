"""Cases of the step benchmark: which there are, running one, and its figures."""

from __future__ import annotations

import gc
import math
import statistics
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from bench_data import Shape, measured_factor, model_like_ids, union_factors
from step_model import MODES, Row, Size, Update, build, gradients, random_row, selecting
from step_profile import profiled
from torch import Tensor

from dense2sparse.train.flops import flops_per_token, peak_flops

TOKENS = 32768
"""Of a step at least: shorter rows are several in a micro batch."""
MOST_STEPS = 5
CHECK_TOKENS = 4096
TOLERANCE = {torch.bfloat16: 0.1, torch.float32: 1e-3}
"""Largest distance of the Triton gradient from the torch one, relative, as one vector a branch."""
Record = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One mode of one model at one length."""

    size: Size
    length: int
    mode: str

    @property
    def rows(self) -> int:
        return max(1, TOKENS // self.length) if self.size.name != "tiny" else 1

    @property
    def key(self) -> dict[str, Any]:
        """What tells its record apart."""
        size = self.size
        return {
            "size": size.name,
            "layers": size.layers,
            "length": self.length,
            "mode": self.mode,
        }

    def flops_per_token(self, size: Size | None = None) -> float:
        """Model FLOPs (train/flops.py: recomputation not counted), of another size if given."""
        size = size or self.size
        return flops_per_token(
            size.cost(converted=self.mode != "dense"),
            mode="sparse" if self.mode == "sparse" else "warmup",
            frozen=self.mode == "warmup frozen",
            visible_keys=(self.length + 1) / 2,
        )


def cases(sizes: list[Size], lengths: list[int], modes: list[str]) -> list[Case]:
    """Small models first, of each the second shortest rows first: they say most if time runs out."""
    ascending = sorted(lengths)
    order = [*ascending[1:], ascending[0]]
    chosen = [mode for mode in MODES if mode in modes]
    return [Case(size, length, mode) for size in sizes for length in order for mode in chosen]


@dataclass
class Runner:
    """Runs cases on one device."""

    device: torch.device
    dtype: torch.dtype
    budget_s: float
    """For timing one case."""
    data: str
    """"model": selections as a trained model makes them; "random": those of the random weights."""
    speed: bool
    check_only: bool = False
    _compared_before: dict[tuple[str, str], str] = field(default_factory=dict)
    """What the comparison of a size and mode said."""

    def run(self, case: Case) -> Record:
        """Check on a small part, then time and profile; what does not run is recorded, not raised."""
        record: Record = {
            **case.key,
            "of_layers": case.size.whole().layers,
            "rows": case.rows,
            "data": self.data if case.mode == "sparse" else None,
            "failed": False,
            "said": "",
        }
        try:
            known = (case.size.name, case.mode)
            if known not in self._compared_before:
                self._compared_before[known] = self._compared(case)
            record["said"] = self._compared_before[known]
            if not self.check_only:
                self._timed(case, record)
        except torch.OutOfMemoryError:
            record["said"] = "out of memory"
        except Exception as error:  # the other cases go on
            said = (str(error).strip() or "no message").splitlines()[0][:200]
            record |= {"failed": True, "said": f"{type(error).__name__}: {said}"}
        gc.collect()
        return record

    def _compared(self, case: Case) -> str:
        """Gradients of two layers on short rows through Triton against those through torch.

        Raises:
            ValueError: they differ.
        """
        if case.mode == "dense":
            return "the library's attention"
        size = case.size.part(min(2, case.size.layers))
        length = min(CHECK_TOKENS, case.length)
        row = random_row(size, 1, length, self.device)
        found = []
        ids = self._ids(size, length, 1) if case.mode == "sparse" else None
        for backend in ("triton", "torch"):
            objective, groups = build(size, case.mode, self.dtype, self.device, backend)
            branches = [group["branch"] for group in groups]
            members = [list(group["params"]) for group in groups]
            for parameter in objective.parameters():
                parameter.data = parameter.data.to(self.dtype)
            with selecting(ids):
                gradients(objective, case.mode, row)
            flat = [torch.cat([p.grad.float().flatten() for p in part]) for part in members]
            found.append(flat)
            del objective
        limit = TOLERANCE[self.dtype]
        worst = 0.0
        for branch, ours, theirs in zip(branches, *found, strict=True):
            distance = float((ours - theirs).norm() / theirs.norm())
            worst = max(worst, distance if math.isfinite(distance) else math.inf)
            if worst > limit:
                raise ValueError(
                    f"the gradient of the {branch} through Triton is {worst:.3g} from that through torch, "
                    f"more than {limit:g}"
                )
        return f"gradients within {worst:.1e} of torch's"

    def _timed(self, case: Case, record: Record) -> None:
        size, cuda = case.size, self.device.type == "cuda"
        objective, groups = build(size, case.mode, self.dtype, self.device)
        if not cuda:
            _use_triton(objective)
        update = Update(objective, groups, self.dtype, fused=cuda)
        row = random_row(size, case.rows, case.length, self.device)
        ids = self._ids(size, case.length, case.rows) if case.mode == "sparse" else None
        if ids is not None:
            record["union_factor"] = union_factors(ids, size.block_size)
        with selecting(ids):
            self._figures(case, record, objective, update, row)

    def _figures(
        self, case: Case, record: Record, objective: Any, update: Update, row: Row
    ) -> None:
        def step() -> tuple[Tensor, Tensor | None]:
            losses = gradients(objective, case.mode, row)
            update()
            return losses

        loss, kl = step()  # compiles
        record["loss"], record["kl"] = float(loss), None if kl is None else float(kl)
        if not math.isfinite(record["loss"]):
            raise ValueError(f"the loss is {record['loss']}")
        if not self.speed:
            if case.mode == "dense":  # interpreted kernels are slow: once is enough
                self._seconds(step), profiled(step, self.device)
            return
        torch.cuda.reset_peak_memory_stats()
        seconds = self._seconds(step)
        tokens_per_s = case.rows * case.length / seconds
        achieved = case.flops_per_token() * tokens_per_s
        peak = peak_flops(self.device, "bf16")
        scale = case.flops_per_token() / case.flops_per_token(case.size.whole())
        record |= {
            "step_ms": seconds * 1e3,
            "tokens_per_s": tokens_per_s,
            "tokens_per_s_whole_model": tokens_per_s * scale,
            "tflops": achieved / 1e12,
            "mfu_pct": None if peak is None else 100 * achieved / peak,
            "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
            "shares": {},
        }
        try:
            shares, record["busy_ms"] = profiled(step, self.device)
            record["shares"] = {name: round(share, 4) for name, share in shares.items()}
        except Exception as error:  # the speed stands without it
            record["said"] += f"; no profile: {type(error).__name__}: {str(error)[:100]}"

    def _seconds(self, step: Any) -> float:
        """Median of steps by the clock, launches included, as a run has them."""

        def once() -> float:
            self._wait()
            begun = time.perf_counter()
            step()
            self._wait()
            return time.perf_counter() - begun

        first = once()
        more = min(MOST_STEPS, int(self.budget_s / max(first, 1e-6)) - 1)
        return statistics.median([once() for _ in range(more)]) if more > 0 else first

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _ids(self, size: Size, length: int, rows: int) -> Tensor | None:
        shape = Shape(
            length,
            size.heads,
            size.groups,
            size.width,
            block_size=size.block_size,
            top_k=size.top_k,
            index_width=size.index_width,
            batch=rows,
        )
        if self.data != "model" or shape.num_blocks <= shape.top_k:
            return None
        factor, _ = measured_factor(shape.num_blocks, shape.top_k)
        return model_like_ids(shape, factor=factor, device=self.device)


def _use_triton(objective: Any) -> None:
    """On a CPU `auto` is the torch path: take the kernels, which the interpreter runs."""
    from dense2sparse.model.execution import Execution, set_execution

    set_execution(objective.model, Execution(backend="triton"))
