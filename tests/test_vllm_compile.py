"""vLLM compiles sparse models, and runs what it compiled in other processes.

The compiled model sees opaque ops; a counter would not be one, so nothing is counted.

As test_vllm.py, of which this is a part.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import catsparse
from test_vllm import (
    LONG,
    SHORT,
    made_sparse,
    options_of,
    own_tokens,
    pytestmark,
    random_model,
    run,
)

__all__ = ["pytestmark"]

PROMPTS = [LONG, SHORT]
LOADED = "Directly load AOT compilation"


def sparse_folder(folder: Path, seed: int, sites: slice = slice(None)) -> Path:
    """Of a model whose config is that of any other seed, sparse in some MLPs."""
    model = random_model("mistral", seed)
    config = made_sparse(model, method="cats", compensate=False).catsparse.config
    catsparse.densify(model)
    some = dict(list(config.sites.items())[sites])
    catsparse.save(catsparse.sparsify(model, replace(config, sites=some)), folder, merge=True)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sparse")
    catsparse.save(made_sparse(random_model("mistral")), path, merge=True)
    return path


@pytest.mark.parametrize(("kind", "mlps"), [("tensor", 2), ("pipeline", 1)])
def test_two_ranks(folder: Path, kind: str, mlps: int) -> None:
    """Compiled, as vLLM's pipelines on CPUs have to be: without, its dense models fail, too."""
    tokens, _ = own_tokens(folder, PROMPTS)
    options: dict[str, Any] = {"enforce_eager": False, f"{kind}_parallel_size": 2}
    # Traced alone, where that will do: Inductor takes a minute.
    environment = {"VLLM_CPU_CI_ENV": str(int(kind == "tensor"))}
    found = run(folder, PROMPTS, False, environment=environment, **options)
    assert found["tokens"] == tokens
    assert f"catsparse: {mlps} of {mlps} MLPs run sparse" in found["log"]


def test_what_was_compiled_serves_other_processes(tmp_path: Path) -> None:
    def compiled(model: Path, **more: Any) -> Any:
        environment = {"VLLM_CACHE_ROOT": str(tmp_path / "cache")}
        more["whole_compile"] = True
        return run(
            model,
            PROMPTS,
            False,
            more,
            environment,
            enforce_eager=False,
            enable_prefix_caching=False,
        )

    model, other = sparse_folder(tmp_path / "model", 0), sparse_folder(tmp_path / "other", 1)
    tokens, others = own_tokens(model, PROMPTS)[0], own_tokens(other, PROMPTS)[0]
    assert tokens != others
    first = compiled(model)
    assert first["tokens"] == tokens
    assert LOADED not in first["log"]

    # It is not the process's first model now.
    second = compiled(model, before=[options_of(other)])
    assert second["tokens"] == tokens
    assert LOADED in second["log"]

    # In its place, one of the same weights with fewer MLPs sparse: other ops.
    shutil.rmtree(model)
    sparse_folder(model, 0, slice(1, None))
    fewer = own_tokens(model, PROMPTS)[0]
    assert fewer != tokens
    assert compiled(model)["tokens"] == fewer
