"""Fixtures for every test: no network, fixed seeds, tiny models with random weights."""

from __future__ import annotations

import os

# Before anything imports huggingface_hub, which reads them once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import catsparse
import tiny

# Derandomized: a failure is the same for everyone who runs it.
hypothesis.settings.register_profile(
    "catsparse", derandomize=True, database=None, deadline=None, max_examples=40
)
hypothesis.settings.load_profile("catsparse")

# Tiny matrices: more threads would only wait for each other, above all under pytest-xdist.
torch.set_num_threads(1)

SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture(autouse=True)
def seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def llama() -> PreTrainedModel:
    """A dense llama of two layers, H = 32, I = 48, fp32; the same weights each time."""
    return tiny.build(tiny.llama_config())


@pytest.fixture(scope="session")
def windows() -> Tensor:
    """``[8, 32]`` token ids, none of them special."""
    return tiny.tokens(8, 32, seed=7)


@pytest.fixture(scope="session")
def shared_calibration(windows: Tensor) -> catsparse.Calibration:
    model = tiny.build(tiny.llama_config())
    return catsparse.calibrate(model, windows, progress=False)


@pytest.fixture
def calibration(shared_calibration: catsparse.Calibration) -> catsparse.Calibration:
    """What ``llama`` gives on ``windows``; a copy, so that a test may change its tables."""
    return catsparse.Calibration(
        dict(shared_calibration.sites),
        dict(shared_calibration.statistics),
        shared_calibration.provenance,
    )


@pytest.fixture
def sparse_llama(llama: PreTrainedModel, calibration: catsparse.Calibration) -> PreTrainedModel:
    """``llama`` with half of its neurons dropped: per-neuron thresholds, compensated."""
    return catsparse.sparsify(llama, calibration, sparsity=0.5)


@pytest.fixture(scope="session")
def books() -> Path:
    """Folder of the 44M-parameter reference model."""
    folder = SHARED / "models" / "books-44m"
    if not folder.is_dir():
        pytest.skip(f"the reference model is not here: {folder}")
    return folder


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Headless Chromium, for tests marked as in need of it."""
    from browsing import open_browser

    with open_browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture
def poisoned() -> Iterator[None]:
    """New memory is NaN, or the greatest integer, until it is written."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
