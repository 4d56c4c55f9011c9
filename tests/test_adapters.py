"""PEFT adapters beside an artifact: written, put back, folded in, and everything wrong with one."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import catsparse
from catsparse import CatsparseError, hub
from catsparse.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from catsparse.modules import sparse_modules
from test_hub import one_line
from tiny import LONG, SHORT, calibrate, close, llama_config, logits, save_base, tokens

peft = pytest.importorskip("peft")
TARGETS = ["q_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("adapters") / "base")


def sparse_model(base: Path, preview: int | None = None, **options: Any) -> Any:
    model = hub.load_dense_model(str(base), **options)
    calibration = catsparse.calibrate(model, tokens(8, 32, 7), progress=False, preview=preview)
    return catsparse.sparsify(model, calibration, 0.6)


def adapted(model: Any, through: str = "get_peft_model", **options: Any) -> Any:
    torch.manual_seed(5)
    config = peft.LoraConfig(
        **({"r": 3, "target_modules": TARGETS, "init_lora_weights": False} | options)
    )
    if through == "get_peft_model":
        return peft.get_peft_model(model, config).eval()
    model.add_adapter(config)
    return model.eval()


@pytest.fixture(scope="module")
def saved(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An intact folder with an adapter; copy before breaking it."""
    folder = tmp_path_factory.mktemp("adapters") / "saved"
    catsparse.save(adapted(sparse_model(base)), folder)
    return folder


def both(model: Any) -> list[Tensor]:
    return [logits(model, n) for n in (SHORT, LONG)]


@pytest.mark.parametrize("preview", [None, 4])
@pytest.mark.parametrize("through", ["get_peft_model", "add_adapter"])
def test_round_trip(base: Path, tmp_path: Path, through: str, preview: int | None) -> None:
    plain = both(sparse_model(base, preview))
    model = adapted(sparse_model(base, preview), through)
    expected = both(model)
    assert not close(expected[1], plain[1], 0.1)  # the adapter is no small matter
    catsparse.save(model, tmp_path / "out")
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names == {
        *("catsparse.json", "calibration.safetensors", "README.md"),
        *(ADAPTER_CONFIG, ADAPTER_WEIGHTS),
    }
    loaded = catsparse.load(tmp_path / "out")
    assert all(map(torch.equal, both(loaded), expected))
    assert not loaded.training
    assert not any(p.requires_grad for n, p in loaded.named_parameters() if "lora_" in n)
    # Nothing is renamed, so what knows modules by name finds them.
    assert list(sparse_modules(loaded)) == list(loaded.catsparse.config.sites)
    merged = catsparse.load(tmp_path / "out", merge_adapter=True)
    assert "decode by the c kernel" in catsparse.explain(merged)
    assert not any("lora" in name for name in merged.state_dict())
    assert all(close(one, other) for one, other in zip(both(merged), expected, strict=True))
    # And saved once more.
    catsparse.save(loaded, tmp_path / "again")
    again = load_file(tmp_path / "again" / ADAPTER_WEIGHTS)
    first = load_file(tmp_path / "out" / ADAPTER_WEIGHTS)
    assert again.keys() == first.keys()
    assert all(torch.equal(again[name], first[name]) for name in first)


def test_peft_itself_reads_the_adapter(base: Path, saved: Path) -> None:
    config = json.loads((saved / ADAPTER_CONFIG).read_text())
    assert config["peft_type"] == "LORA"
    assert config["base_model_name_or_path"] == str(base)
    assert config["inference_mode"] is True
    theirs = peft.PeftModel.from_pretrained(sparse_model(base), saved).eval()
    assert all(map(torch.equal, both(theirs), both(catsparse.load(saved))))


def test_saving_changes_nothing_of_the_model(base: Path, tmp_path: Path) -> None:
    model = adapted(sparse_model(base))
    before = vars(model.peft_config["default"]).copy()
    catsparse.save(model, tmp_path)
    assert vars(model.peft_config["default"]) == before


def test_an_adapter_is_not_rounded_to_the_base(base: Path, tmp_path: Path) -> None:
    """PEFT trains in fp32 on a bf16 base."""
    model = adapted(sparse_model(base, dtype="bfloat16"))
    catsparse.save(model, tmp_path)
    loaded = catsparse.load(tmp_path, dtype="bfloat16")
    kinds = {p.dtype for n, p in loaded.named_parameters() if "lora_" in n}
    assert kinds == {torch.float32}
    assert loaded.dtype == torch.bfloat16
    assert all(map(torch.equal, both(loaded), both(model)))


def test_an_older_adapter_goes_when_a_model_without_is_saved(base: Path, saved: Path) -> None:
    folder = shutil.copytree(saved, saved.parent / "reused")
    plain = sparse_model(base)
    catsparse.save(plain, folder)
    assert not (folder / ADAPTER_CONFIG).exists()
    assert not (folder / ADAPTER_WEIGHTS).exists()
    assert all(map(torch.equal, both(catsparse.load(folder)), both(plain)))


def test_folded_weights_are_nobodys_base(saved: Path, tmp_path: Path) -> None:
    """Saved as an adapter directory they would load without the adapter."""
    model = catsparse.load(saved, merge_adapter=True)
    with pytest.raises(CatsparseError, match="merge=True") as caught:
        catsparse.save(model, tmp_path / "out")
    one_line(caught.value)
    catsparse.save(model, tmp_path / "out", merge=True)
    again = catsparse.load(tmp_path / "out")
    assert all(close(a, b) for a, b in zip(both(again), both(model), strict=True))


def test_thresholds_follow_a_loaded_adapter(base: Path, saved: Path, tmp_path: Path) -> None:
    """densify and sparsify work under it, and it stays."""
    model = catsparse.load(saved)
    calibration = model.catsparse.calibration
    catsparse.sparsify(catsparse.densify(model), calibration, 0.2)
    catsparse.save(model, tmp_path)
    assert all(map(torch.equal, both(catsparse.load(tmp_path)), both(model)))
    assert (tmp_path / ADAPTER_WEIGHTS).exists()


def test_an_adapter_of_a_tied_head_is_not_merged(tmp_path: Path) -> None:
    """It would change the embedding, too."""
    base = save_base(tmp_path / "tied", llama_config(tie_word_embeddings=True))
    model = adapted(sparse_model(base), target_modules=["lm_head", "q_proj"])
    catsparse.save(model, tmp_path / "out")
    assert all(map(torch.equal, both(catsparse.load(tmp_path / "out")), both(model)))
    refused(
        lambda: catsparse.load(tmp_path / "out", merge_adapter=True),
        "lm_head shares its weight with model.embed_tokens",
    )


def test_an_adapter_that_peft_cannot_merge(base: Path, tmp_path: Path) -> None:
    catsparse.save(adapted(sparse_model(base), lora_bias=True), tmp_path / "out")
    refused(
        lambda: catsparse.load(tmp_path / "out", merge_adapter=True),
        "cannot be merged .* without merge_adapter",
    )


def test_no_adapter_beside_other_weights(base: Path, tmp_path: Path) -> None:
    """They would be read instead of the base model's."""
    catsparse.save(sparse_model(base), tmp_path / "out", merge=True)
    before = both(catsparse.load(tmp_path / "out"))
    model = adapted(sparse_model(base))
    refused(lambda: catsparse.save(model, tmp_path / "out"), "holds a whole model")
    assert all(map(torch.equal, both(catsparse.load(tmp_path / "out")), before))


def refused(call: Any, match: str) -> None:
    with pytest.raises(CatsparseError, match=match) as caught:
        call()
    one_line(caught.value)


def test_several_adapters_are_refused(base: Path, tmp_path: Path) -> None:
    model = adapted(sparse_model(base))
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    refused(lambda: catsparse.save(model, tmp_path / "out"), "2 PEFT adapters")
    assert not list(tmp_path.glob("out/*"))


def test_an_adapter_merged_in_place_is_refused(base: Path, tmp_path: Path) -> None:
    """Its weights would be added a second time on loading."""
    model = adapted(sparse_model(base))
    model.merge_adapter()
    refused(lambda: catsparse.save(model, tmp_path / "out"), "unmerge_adapter")
    model.unmerge_adapter()
    catsparse.save(model, tmp_path / "out")


@pytest.mark.parametrize("what", ["config", "weights", "no weights", "another model", "a part"])
def test_damaged_adapters(base: Path, saved: Path, tmp_path: Path, what: str) -> None:
    folder = shutil.copytree(saved, tmp_path / "broken")
    tensors = load_file(folder / ADAPTER_WEIGHTS)
    match = "cannot be loaded"
    if what == "config":
        (folder / ADAPTER_CONFIG).write_text("{")
    elif what == "weights":
        (folder / ADAPTER_WEIGHTS).write_bytes(b"no tensors")
    elif what == "no weights":
        (folder / ADAPTER_WEIGHTS).unlink()
        match = "holds no adapter_model.safetensors"
    elif what == "another model":
        other = save_base(tmp_path / "other", llama_config(hidden_size=64))
        text = (folder / "catsparse.json").read_text()
        assert str(base) in text
        shutil.rmtree(folder)
        model = hub.load_dense_model(str(other))
        catsparse.save(catsparse.sparsify(model, calibrate(model), 0.6), folder)
        for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
            shutil.copy(saved / name, folder / name)
    else:
        tensors.popitem()
        save_file(tensors, folder / ADAPTER_WEIGHTS)
        match = "does not fit"
    refused(lambda: catsparse.load(folder), match)


def test_a_pickled_adapter_is_never_opened(saved: Path, tmp_path: Path) -> None:
    marker = tmp_path / "marker"

    class Trap:
        def __reduce__(self) -> Any:
            return Path.touch, (marker,)

    folder = shutil.copytree(saved, tmp_path / "trap")
    (folder / ADAPTER_WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Trap()))
    refused(lambda: catsparse.load(folder), ADAPTER_WEIGHTS)
    assert not marker.exists()
