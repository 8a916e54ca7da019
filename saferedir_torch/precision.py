"""Half the precision where it halves the time: bfloat16 for products, float32 for weights, sums and losses."""

from __future__ import annotations

from typing import Any

import torch


def mixed_precision(device: torch.device) -> torch.autocast:
    """A context in which networks on `device` compute in bfloat16, if it has instructions for that; else one that does
    nothing."""
    return torch.autocast(device.type, torch.bfloat16, enabled=_has_bfloat16(device))


def _has_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        able: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # from torch 2.9 on; before that, full precision
        return any(bool(able.get(name)) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return False
