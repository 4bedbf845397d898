"""NaN in memory that nobody wrote yet."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def poison(monkeypatch):
    """Memory from `torch.empty` and its kin starts as NaN (or the largest integer)."""

    def filled(make):
        def poisoned(*args, **options):
            tensor = make(*args, **options)
            if tensor.is_floating_point():
                return tensor.fill_(float("nan"))
            return (
                tensor
                if tensor.dtype == torch.bool
                else tensor.fill_(torch.iinfo(tensor.dtype).max)
            )

        return poisoned

    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch.Tensor, "new_empty"),
    ):
        monkeypatch.setattr(owner, name, filled(getattr(owner, name)))
