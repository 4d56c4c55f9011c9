"""vLLM itself runs sparse directories: its greedy tokens are catsparse's own, and as sparse.

Each case is a process of its own, on the CPU in fp32. `make test-vllm` makes the environment that
these tests need and runs them there; elsewhere they skip.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen3Config,
)

import catsparse
from catsparse import hub
from catsparse.data import load_windows
from catsparse.modules import sparse_modules

pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="no vLLM here: make test-vllm")

RUN = Path(__file__).with_name("vllm_run.py")
LONG, SHORT = list(range(20, 60)), list(range(100, 110))  # a prompt above 16 tokens, one below
NEW = 24
SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
}
FAMILIES = {
    "mistral": MistralConfig(**SIZES),
    "qwen3": Qwen3Config(**SIZES),
    "gemma": GemmaConfig(**SIZES, hidden_activation="gelu_pytorch_tanh"),
}


def random_model(family: str, seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(FAMILIES[family], dtype=torch.float32).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data.normal_(0, parameter.shape[-1] ** -0.5)
    model.generation_config.eos_token_id = None
    return model


def made_sparse(model: Any, sparsity: float = 0.6, calibration: Any = None, **options: Any) -> Any:
    windows = torch.randint(3, 500, (8, 64), generator=torch.Generator().manual_seed(1))
    found = catsparse.calibrate(model, windows, progress=False, **calibration or {})
    return catsparse.sparsify(model, found, sparsity, **options)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The bundled model, by its gate and by a preview of products, merged."""
    model, tokenizer = hub.load_dense_model("default"), hub.load_tokenizer("default")
    windows = load_windows(hub.bundled_text("calibration"), tokenizer, tokens=20_000, seq_len=256)
    folders = {}
    for method, preview in (("energy", None), ("product", 4)):
        folders[method] = tmp_path_factory.mktemp(method)
        found = catsparse.calibrate(model, windows, progress=False, preview=preview)
        catsparse.save(catsparse.sparsify(model, found, 0.5), folders[method], merge=True)
        tokenizer.save_pretrained(folders[method])
        catsparse.densify(model)
    return folders


def options_of(model: Path) -> dict[str, Any]:
    options = {"model": str(model), "dtype": "float32", "enforce_eager": True}
    return options | ({} if (model / "tokenizer.json").exists() else {"skip_tokenizer_init": True})


def run(
    model: Path,
    prompts: list[list[int]],
    count: bool = True,
    more: dict[str, Any] | None = None,
    environment: dict[str, str] | None = None,
    **options: Any,
) -> Any:
    """What vllm_run.py found, with its ``log``; a process that failed raises what it said.

    Args:
        count: whether to count kept neurons.
        more: what else it is asked.
        options: of vllm.LLM.
    """
    asked = {"options": options_of(model) | options, "prompts": prompts, "new_tokens": NEW}
    asked |= {"count": count} | (more or {})
    done = subprocess.run(
        [sys.executable, RUN],
        input=json.dumps(asked) + "\n",
        capture_output=True,
        text=True,
        env=os.environ | (environment or {}),
    )
    found = [line for line in done.stdout.splitlines() if line.startswith('{"tokens"')]
    assert found, (done.stdout + done.stderr)[-4000:]
    return json.loads(found[-1]) | {"log": done.stdout + done.stderr}


def own_tokens(folder: Path, prompts: list[list[int]]) -> tuple[list[list[int]], float]:
    """What catsparse generates, and the share of neurons that it drops."""
    model = catsparse.load(folder, dtype=torch.float32)
    for module in sparse_modules(model).values():
        decide_exactly_above_16_tokens(module)
    found = []
    with catsparse.achieved_sparsity(model) as meter:
        for ids in prompts:
            out = model.generate(
                torch.tensor([ids]),
                max_new_tokens=NEW,
                min_new_tokens=NEW,
                do_sample=False,
                repetition_penalty=1.0,
                pad_token_id=0,
            )
            found.append(out[0, len(ids) :].tolist())
    return found, meter.sparsity


def decide_exactly_above_16_tokens(module: Any) -> None:
    """As the plugin does where a preview would have to be unpacked for dense products."""
    finish = module.mask_and_project
    module.mask_and_project = lambda x, gate, up: finish(
        x, gate, up, foretell=x.numel() <= 16 * x.shape[-1]
    )


def agrees(folder: Path, prompts: list[list[int]], **options: Any) -> None:
    tokens, sparsity = own_tokens(folder, prompts)
    found = run(folder, prompts, **options)
    assert found["tokens"] == tokens
    # Not to the digit: vLLM may run several prompts, or a token that is not needed, at once.
    assert found["sparsity"] == pytest.approx(sparsity, abs=0.03)


def test_a_trained_model(trained: dict[str, Path]) -> None:
    agrees(trained["energy"], [LONG, SHORT])


@pytest.mark.parametrize("prompt", [LONG, SHORT], ids=["long", "short"])
def test_a_trained_model_by_a_preview(trained: dict[str, Path], prompt: list[int]) -> None:
    """One prompt at a time: together they are more than 16 tokens, and exact weights decide."""
    agrees(trained["product"], [prompt])


@pytest.mark.parametrize("family", FAMILIES)
def test_families(tmp_path: Path, family: str) -> None:
    catsparse.save(made_sparse(random_model(family)), tmp_path, merge=True)
    agrees(tmp_path, [LONG, SHORT])


def test_chunks_and_cached_prefixes(tmp_path: Path) -> None:
    """Prompts one by one: the first in chunks, the last but for its end from the cache."""
    catsparse.save(made_sparse(random_model("mistral")), tmp_path, merge=True)
    tokens, _ = own_tokens(tmp_path, [LONG, SHORT])
    options = {"max_num_batched_tokens": 24, "block_size": 16, "max_num_seqs": 1}
    found = run(tmp_path, [LONG, SHORT, LONG], enable_prefix_caching=True, **options)
    assert found["tokens"] == [*tokens, tokens[0]]
    assert found["cached"] == [0, 0, 32]


def test_second_decision(tmp_path: Path) -> None:
    at = catsparse.calibration.GateDecision(0.4, "energy")
    model = made_sparse(
        random_model("mistral"), 0.4, {"products_at": at.sparsity}, down_sparsity=0.7
    )
    catsparse.save(model, tmp_path, merge=True)
    agrees(tmp_path, [LONG, SHORT])


def test_dense_prompts(tmp_path: Path) -> None:
    """With the dense prefill policy a long prompt is not masked, and so gives other tokens."""
    model = random_model("mistral")
    catsparse.save(made_sparse(model, prefill="dense"), tmp_path / "dense", merge=True)
    catsparse.densify(model)
    catsparse.save(made_sparse(model), tmp_path / "masked", merge=True)
    dense, masked = (own_tokens(tmp_path / name, [LONG])[0] for name in ("dense", "masked"))
    assert dense != masked
    assert run(tmp_path / "dense", [LONG], count=False)["tokens"] == dense


def test_an_adapter_directory_over_its_base(tmp_path: Path) -> None:
    base, folder = tmp_path / "base", tmp_path / "sparse"
    random_model("mistral").save_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    catsparse.save(made_sparse(model), folder)
    tokens, sparsity = own_tokens(folder, [LONG, SHORT])
    settings = {"quantization_config": {"quant_method": "cats", "artifact": str(folder)}}
    found = run(base, [LONG, SHORT], quantization="cats", hf_overrides=settings)
    assert found["tokens"] == tokens
    assert found["sparsity"] == pytest.approx(sparsity, abs=0.03)


def test_what_vllm_has_no_place_for_is_refused(tmp_path: Path) -> None:
    model = made_sparse(random_model("mistral"), 0.4, {"inputs": "mlp"}, method="teal")
    catsparse.save(model, tmp_path, merge=True)
    with pytest.raises(AssertionError, match="sparsify with --scope mlp and another method"):
        run(tmp_path, [SHORT])
