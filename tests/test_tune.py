"""``bench tune``: what it tries, and what it refuses; it times on a GPU only."""

from __future__ import annotations

import pytest
import torch

from catsparse import CatsparseError, bench
from catsparse.bench import tune
from catsparse.kernels import cuda
from catsparse.kernels.cuda import auto_tokens
from catsparse.kernels.stream import Plan, find_plan, group_size

CPU = torch.device("cpu")


def test_without_a_gpu_there_is_nothing_to_tune() -> None:
    with pytest.raises(CatsparseError, match="nothing to tune: no kernel for cpu"):
        bench.bench_tune(bench.find_shape("mistral-7b"), torch.bfloat16, [0.5], 1, CPU, 3)


@pytest.mark.parametrize("tokens", [1, 2, 4])
@pytest.mark.parametrize("row_bytes", [16, 640, 1152, 4096, 8192, 10240, 16384, 32768])
def test_candidates_hold_the_rule_and_fit_a_block(row_bytes: int, tokens: int) -> None:
    plans = tune.candidates(row_bytes, tokens)
    assert plans[0] == find_plan(row_bytes, tokens)
    assert len(plans) == len(set(plans))
    for plan in plans:
        assert plan.threads % 32 == 0
        assert 32 <= plan.threads <= 512
        assert plan.rows in (1, 2, 4, 8)
        assert plan.chunks >= 1


@pytest.mark.parametrize("row_bytes", range(16, 65537, 1488))
def test_a_plan_covers_the_row_in_few_registers(row_bytes: int) -> None:
    for tokens in (1, 2, 4):
        if tokens > group_size(row_bytes):
            continue
        plan = find_plan(row_bytes, tokens)
        pieces = -(-row_bytes // 16)
        columns = -(-pieces // plan.threads)
        assert columns * plan.threads >= pieces
        assert columns * tokens <= 8  # a consumer's share of x and of the output
        # No warp without a piece of the first column, none that is all idle.
        assert pieces > (columns - 1) * plan.threads


def test_the_rule_on_known_shapes() -> None:
    assert find_plan(2 * 2048, 1) == Plan(threads=256, rows=4, chunks=3)
    assert find_plan(2 * 4096, 1) == Plan(threads=256, rows=4, chunks=3)
    assert find_plan(2 * 8192, 1) == Plan(threads=256, rows=4, chunks=3)
    assert find_plan(2 * 576, 1) == Plan(threads=96, rows=4, chunks=3)


def test_groups_shrink_with_the_row() -> None:
    assert [group_size(row) for row in (16, 16384, 32768, 65536)] == [4, 4, 2, 1]
    rows = (8192, 16384, 32768, 65536)
    assert [auto_tokens(torch.bfloat16, row) for row in rows] == [4, 4, 2, 1]
    assert [auto_tokens(torch.float32, row) for row in rows] == [8, 8, 2, 1]


def test_sizes_are_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        multi_processor_count = 132
        shared_memory_per_block_optin = 232448

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    device = torch.device("cuda", 0)
    why = cuda.why_not_sizes.__wrapped__
    assert why(device, torch.bfloat16, 4096, 14336, 4096) is None
    assert why(device, torch.bfloat16, 8192, 28672, 8192) is None
    assert why(device, torch.float32, 16384, 53248, 16384) is None
    assert "whole 16-byte pieces" in why(device, torch.bfloat16, 100, 300, 100)
    assert "whole 16-byte pieces" in why(device, torch.float32, 8, 300, 6)
    assert "shared memory" in why(device, torch.bfloat16, 65536, 300, 65536)
    assert "shared memory" in why(device, torch.bfloat16, 4096, 2_000_000, 4096)
