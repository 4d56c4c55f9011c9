"""Previews stored in a merged directory: taken where they are of the very weights, else made."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import catsparse
from catsparse import CatsparseError, derived, hub
from catsparse.kernels import make_preview
from catsparse.modules import sparse_modules
from catsparse.previews_file import PREVIEWS_NAME
from tiny import LONG, SHORT, logits, save_base, tokens

FIRST = "model.layers.0.mlp"


@pytest.fixture(scope="module", params=["energy", "product"])
def stored(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A merged directory with its previews; copy before breaking it."""
    base = save_base(tmp_path_factory.mktemp("previews") / "base")
    model = hub.load_dense_model(str(base))
    calibration = catsparse.calibrate(model, tokens(8, 32, 7), preview=4, progress=False)
    catsparse.sparsify(model, calibration, 0.6, request.param)
    folder = tmp_path_factory.mktemp("previews") / "merged"
    catsparse.save(model, folder, merge=True, store_preview=True)
    return folder


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The modules that make a preview."""
    calls: list[str] = []
    own = derived.Derived.make_preview

    def noted(self: Any, *arguments: Any) -> Any:
        calls.append(type(self).__name__)
        return own(self, *arguments)

    monkeypatch.setattr(derived.Derived, "make_preview", noted)
    return calls


def check_previews(model: Any) -> None:
    """Each is what its module's weights make."""
    for module in sparse_modules(model).values():
        gate, up = module.raw_gate_up()
        packed, scale = make_preview(gate, 4, up if module.catsparse_of_products else None)
        assert torch.equal(module.catsparse_preview, packed)
        assert torch.equal(module.catsparse_preview_scale, scale)


@pytest.mark.parametrize("how", ["catsparse", "transformers"])
def test_a_load_makes_no_preview(stored: Path, made: list[str], how: str) -> None:
    if how == "catsparse":
        model = catsparse.load(stored)
    else:
        model = AutoModelForCausalLM.from_pretrained(stored).eval()
    assert made == []
    check_previews(model)
    with torch.no_grad():
        short, long = logits(model, SHORT), logits(model, LONG)
    assert made == []
    other = catsparse.load(stored)
    for module in sparse_modules(other).values():
        module._forget()
    assert torch.equal(logits(other, SHORT), short)
    assert torch.equal(logits(other, LONG), long)
    assert len(made) == 2


def test_the_file(stored: Path) -> None:
    model = catsparse.load(stored)
    products = model.catsparse.config.method == "product"
    rows = model.catsparse.config.sites[FIRST].intermediate_size * (1 + products)
    tensors = load_file(stored / PREVIEWS_NAME)
    assert {name: (t.dtype, t.shape[0]) for name, t in tensors.items()} == {
        f"{site}.{part}": (dtype, rows)
        for site in sparse_modules(model)
        for part, dtype in (("preview", torch.uint8), ("preview_scale", torch.bfloat16))
    }


def test_a_directory_without_the_file_loads(stored: Path, made: list[str], tmp_path: Path) -> None:
    folder = shutil.copytree(stored, tmp_path / "merged")
    (folder / PREVIEWS_NAME).unlink()
    check_previews(catsparse.load(folder))
    assert len(made) == 2


# -- Previews of other weights


def test_changed_weights_beside_an_old_file(stored: Path, made: list[str], tmp_path: Path) -> None:
    """One number of one site's gate: that site's preview is made, the other's taken."""
    folder = shutil.copytree(stored, tmp_path / "merged")
    weights = load_file(folder / "model.safetensors")
    weights[f"{FIRST}.gate_proj.weight"][5, 3] += 1
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    check_previews(catsparse.load(folder))
    assert len(made) == 1


def test_changed_up_counts_for_products_only(stored: Path, made: list[str], tmp_path: Path) -> None:
    folder = shutil.copytree(stored, tmp_path / "merged")
    weights = load_file(folder / "model.safetensors")
    weights[f"{FIRST}.up_proj.weight"][5, 3] += 1
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    model = catsparse.load(folder)
    check_previews(model)
    assert len(made) == (model.catsparse.config.method == "product")


def test_another_dtype_makes_its_own(stored: Path, made: list[str]) -> None:
    check_previews(catsparse.load(stored, dtype=torch.bfloat16))
    assert len(made) == 2


def test_weights_written_past_their_version_are_those_that_are_stored(
    stored: Path, tmp_path: Path, made: list[str]
) -> None:
    model = catsparse.load(stored)
    sparse_modules(model)[FIRST].gate_proj.weight.data.mul_(-1.5)
    catsparse.save(model, tmp_path / "again", merge=True, store_preview=True)
    made.clear()
    check_previews(catsparse.load(tmp_path / "again"))
    assert made == []


def test_a_change_after_the_load_is_followed(stored: Path, made: list[str]) -> None:
    model = catsparse.load(stored)
    with torch.no_grad():
        sparse_modules(model)[FIRST].gate_proj.weight[3] *= 2
        model(input_ids=tokens(1, SHORT))
    check_previews(model)
    assert len(made) == 1


def test_saving_again_without_removes_the_file(stored: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(stored, tmp_path / "merged")
    catsparse.save(catsparse.load(folder), folder, merge=True)
    assert not (folder / PREVIEWS_NAME).exists()


# -- Refusals


def rewrite(change: Callable[[dict[str, Any], dict[str, str]], None], folder: Path) -> None:
    from safetensors import safe_open

    path = folder / PREVIEWS_NAME
    with safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata())
    tensors = load_file(path)
    change(tensors, metadata)
    save_file(tensors, path, metadata)


def narrower(tensors: dict[str, Any], metadata: dict[str, str]) -> None:
    tensors[f"{FIRST}.preview"] = tensors[f"{FIRST}.preview"][:, :-1].contiguous()


def fewer_rows(tensors: dict[str, Any], metadata: dict[str, str]) -> None:
    for part in ("preview", "preview_scale"):
        tensors[f"{FIRST}.{part}"] = tensors[f"{FIRST}.{part}"][:-1].contiguous()


def other_dtype(tensors: dict[str, Any], metadata: dict[str, str]) -> None:
    tensors[f"{FIRST}.preview_scale"] = tensors[f"{FIRST}.preview_scale"].float()


def missing(tensors: dict[str, Any], metadata: dict[str, str]) -> None:
    del tensors[f"{FIRST}.preview_scale"]


def no_digests(tensors: dict[str, Any], metadata: dict[str, str]) -> None:
    metadata.clear()


def odd_digests(tensors: dict[str, Any], metadata: dict[str, str]) -> None:
    metadata["catsparse.weights"] = json.dumps([1])


def broken_digests(tensors: dict[str, Any], metadata: dict[str, str]) -> None:
    metadata["catsparse.weights"] = "{"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (narrower, "holds no 4-bit preview of model.layers.0.mlp"),
        (fewer_rows, "holds no 4-bit preview of model.layers.0.mlp"),
        (other_dtype, "holds no 4-bit preview of model.layers.0.mlp"),
        (missing, "holds no 4-bit preview of model.layers.0.mlp"),
        (no_digests, "does not say of which weights it is"),
        (odd_digests, "does not say of which weights it is"),
        (broken_digests, "catsparse.weights"),
    ],
)
def test_a_broken_file(change: Any, message: str, stored: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(stored, tmp_path / "merged")
    rewrite(change, folder)
    with pytest.raises(CatsparseError, match=message) as caught:
        catsparse.load(folder)
    assert "\n" not in str(caught.value)


def test_a_damaged_file(stored: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(stored, tmp_path / "merged")
    (folder / PREVIEWS_NAME).write_bytes(b"no safetensors")
    with pytest.raises(CatsparseError, match=r"is damaged .*; save the model again, or delete"):
        catsparse.load(folder)


def test_what_cannot_be_stored(stored: Path, tmp_path: Path) -> None:
    model = catsparse.load(stored)
    with pytest.raises(CatsparseError, match="save with merge=True"):
        catsparse.save(model, tmp_path / "one", store_preview=True)
    sparse_modules(model)[FIRST].gate_proj.register_forward_hook(lambda *a: None)
    with pytest.raises(CatsparseError, match="gate_proj is hooked"):
        catsparse.save(model, tmp_path / "two", merge=True, store_preview=True)
    calibration = model.catsparse.calibration
    catsparse.densify(model)
    catsparse.sparsify(model, catsparse.calibrate(model, tokens(4, 16, 3), progress=False), 0.5)
    with pytest.raises(CatsparseError, match="no preview to store"):
        catsparse.save(model, tmp_path / "three", merge=True, store_preview=True)
    assert calibration is not None
    assert not any(
        path.exists() and any(path.iterdir())
        for path in (tmp_path / name for name in ("one", "two", "three"))
    )
