"""Half the precision is asked for in one place, which looks at what the machine has instructions for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import saferedir_torch
from saferedir_torch.precision import mixed_precision


@pytest.mark.parametrize(("capabilities", "halved"), [({}, False), ({"avx512_bf16": False}, False), ({"amx_bf16": True}, True)])
def test_a_cpu_without_bf16_computes_in_full(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, bool], halved: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    with mixed_precision(torch.device("cpu")):
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == (torch.bfloat16 if halved else torch.float32)


def test_nothing_in_training_asks_for_half_past_that_rule() -> None:
    folder = Path(saferedir_torch.__file__).parent
    asking = {
        str(path.relative_to(folder))
        for path in folder.rglob("*.py")
        for line in path.read_text().splitlines()
        if "autocast(" in line and "enabled=False" not in line
    }
    assert asking == {"precision.py"}
