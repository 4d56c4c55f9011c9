"""Arguments that belong together, and each way in which they may not."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from catsparse.kernels.arguments import Call, belong_together

H, N, OUT = 6, 5, 4


def arguments(**changed: Any) -> dict[str, Any]:
    return {
        "x": torch.ones(2, 3, H),
        "w_gate": torch.ones(N, H),
        "w_up": torch.ones(N, H),
        "w_down_t": torch.ones(N, OUT),
        "threshold": torch.ones(N),
        "act": "silu",
        "mean": torch.ones(N),
        "bias": torch.ones(OUT),
    } | changed


def preview(neurons: int = N, width: int = 32, scales: int = 8, **changed: Any) -> dict[str, Any]:
    """Of one group: 32 bytes in 4 bits, 64 in 8."""
    packed = torch.ones(neurons, width, dtype=torch.uint8)
    scale = torch.ones(neurons, scales, dtype=torch.bfloat16)
    return {"preview": packed, "preview_scale": scale} | changed


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"x": torch.ones(H)},
        {"threshold": torch.tensor(0.5)},
        {"mean": None, "bias": None},
        {"mean": None},
        {"w_down_t": torch.ones(OUT, N).t()},
        {"product_threshold": torch.ones(N)},
        {"product_threshold": torch.tensor(0.5)},
        preview(),
        preview(width=64),
        preview(product_threshold=torch.ones(N), x=torch.ones(H)),
    ],
)
def test_they_do(changed: dict[str, Any]) -> None:
    assert belong_together(Call(**arguments(**changed)))


META = torch.device("meta")


@pytest.mark.parametrize(
    "changed",
    [
        {"x": torch.tensor(1.0)},
        {"x": torch.ones(3, H + 1)},
        {"x": torch.ones(0, H)},
        {"x": torch.ones(3, H, dtype=torch.float64)},
        {"x": torch.ones(3, H, device=META)},
        {"w_gate": torch.ones(N, H, 1)},
        {"w_gate": torch.ones(N, H, dtype=torch.bfloat16)},
        {"w_up": torch.ones(N + 1, H)},
        {"w_up": torch.ones(N, H, device=META)},
        {"w_down_t": torch.ones(N)},
        {"w_down_t": torch.ones(N + 1, OUT)},
        {"w_down_t": torch.ones(N, 0), "bias": torch.ones(0)},
        {"w_gate": torch.ones(0, H), "w_up": torch.ones(0, H), "w_down_t": torch.ones(0, OUT)},
        {"threshold": torch.ones(N + 1)},
        {"threshold": torch.ones(N, 1)},
        {"threshold": torch.ones(N, dtype=torch.float64)},
        {"threshold": torch.ones(N, device=META)},
        {"threshold": torch.tensor(1, dtype=torch.bfloat16)},
        {"act": "tanh"},
        {"mean": torch.ones(N - 1)},
        {"mean": torch.ones(N, dtype=torch.bfloat16)},
        {"bias": torch.ones(OUT, device=META)},
        {"bias": torch.ones(H)},
        {"product_threshold": torch.ones(N - 1)},
        {"product_threshold": torch.ones(1, N)},
        {"product_threshold": torch.ones(N, dtype=torch.float16)},
        {"product_threshold": torch.ones(N, device=META)},
        preview(preview=None),
        preview(preview_scale=None),
        preview(neurons=N + 1),
        preview(width=16),
        preview(width=33),
        preview(width=128),
        preview(scales=1),
        preview(scales=16),
        preview(preview=torch.ones(32, dtype=torch.uint8)),
        preview(preview=torch.ones(N, 32, dtype=torch.int8)),
        preview(preview=torch.ones(N, 32, dtype=torch.uint8, device=META)),
        preview(preview_scale=torch.ones(8, dtype=torch.bfloat16)),
        preview(preview_scale=torch.ones(N, 8)),
        preview(preview_scale=torch.ones(N, 8, dtype=torch.bfloat16, device=META)),
    ],
)
def test_they_do_not(changed: dict[str, Any]) -> None:
    assert not belong_together(Call(**arguments(**changed)))
