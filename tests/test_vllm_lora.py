"""LoRA adapters over a sparse model in vLLM: greedy tokens are those of the merged weights.

As test_vllm.py, of which this is a part.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import catsparse
from test_vllm import LONG, SHORT, made_sparse, own_tokens, pytestmark, random_model, run

__all__ = ["pytestmark"]

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
RANK, ALPHA = 8, 16
PROMPTS = [LONG, SHORT, SHORT]
# On the CPU vLLM gives requests without an adapter the last slot's; two leave that one empty.
LORA: dict[str, Any] = {"enable_lora": True, "max_loras": 2, "max_lora_rank": RANK}


def write_adapter(model: Any, folder: Path, targets: list[str], seed: int = 3) -> None:
    """A LoRA directory as PEFT writes it, and its product added to the model's weights."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in targets:
            rows, columns = module.weight.shape
            a = torch.randn(RANK, columns, generator=generator) * columns**-0.5
            b = torch.randn(rows, RANK, generator=generator) * 0.5 * RANK**-0.5
            for part, value in (("A", a), ("B", b)):
                tensors[f"base_model.model.{name}.lora_{part}.weight"] = value
            module.weight.data += ALPHA / RANK * b @ a
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": targets}
    (folder / "adapter_config.json").write_text(json.dumps(settings))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A sparse model; by targets an adapter of it, and the tokens without and with it."""
    root = tmp_path_factory.mktemp("lora")
    found: dict[str, Any] = {"model": root / "sparse"}
    for name, targets in (("attention", ATTENTION), ("mlp", MLP)):
        model = made_sparse(random_model("mistral"))
        if name == "attention":
            catsparse.save(model, root / "sparse", merge=True)
            found["tokens"] = own_tokens(root / "sparse", [LONG, SHORT])[0]
        write_adapter(model, root / name, targets)
        catsparse.save(model, root / f"merged-{name}", merge=True)
        long, short = own_tokens(root / f"merged-{name}", [LONG, SHORT])[0]
        assert (long, short) != tuple(found["tokens"])
        found[name] = str(root / name), [long, short, found["tokens"][1]]
    return found


@pytest.mark.parametrize("name", ["attention", "mlp"])
def test_with_and_without_an_adapter_in_one_batch(folders: dict[str, Any], name: str) -> None:
    adapter, tokens = folders[name]
    found = run(folders["model"], PROMPTS, more={"adapters": [adapter, adapter, None]}, **LORA)
    assert found["tokens"] == tokens
    assert found["sparsity"] == pytest.approx(0.6, abs=0.1)
    assert "--lora-target-modules" in found["log"]


def test_adapters_kept_off_the_mlps_leave_them_to_the_kernels(folders: dict[str, Any]) -> None:
    adapter, tokens = folders["attention"]
    more = {"adapters": [adapter, adapter, None]}
    found = run(folders["model"], PROMPTS, more=more, lora_target_modules=ATTENTION, **LORA)
    assert found["tokens"] == tokens
    assert "catsparse: 2 of 2 MLPs run sparse" in found["log"]
    assert "LoRA adapters may reach" not in found["log"]
