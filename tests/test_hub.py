"""Artifacts: adapter directories, merged directories, and everything that can be wrong with one."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import shutil
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Qwen2Config

import catsparse
from catsparse import CatsparseError, hub, quantizer, surgery
from catsparse.config import FORMAT_VERSION, MAX_CONFIG_BYTES
from catsparse.modules import sparse_modules
from tiny import LONG, SHORT, build, calibrate, close, llama_config, logits, save_base, tokens

CONFIG, TENSORS = "catsparse.json", "calibration.safetensors"
FIRST = "model.layers.0.mlp"
VARIANTS = [("cats", False), ("cats", True), ("chess", False), ("chess", True), ("energy", True)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("hub") / "base")


@pytest.fixture(scope="module")
def calibration(base: Path) -> catsparse.Calibration:
    return calibrate(hub.load_dense_model(str(base)))


def sparse_model(base: Path, calibration: catsparse.Calibration, **options: Any) -> Any:
    return catsparse.sparsify(hub.load_dense_model(str(base)), calibration, 0.6, **options)


@pytest.fixture(scope="module")
def saved(
    base: Path, calibration: catsparse.Calibration, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """An intact adapter directory (one threshold a layer, compensated); copy before breaking it."""
    folder = tmp_path_factory.mktemp("hub") / "adapter"
    catsparse.save(sparse_model(base, calibration, method="cats"), folder)
    return folder


@pytest.fixture(scope="module")
def merged(
    base: Path, calibration: catsparse.Calibration, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "merged"
    catsparse.save(sparse_model(base, calibration), folder, merge=True)
    return folder


def same_logits(one: Any, other: Any) -> bool:
    return all(torch.equal(logits(one, n), logits(other, n)) for n in (SHORT, LONG))


def close_logits(one: Any, other: Any) -> bool:
    """For weights mapped from several files: their alignment changes how a product is summed."""
    return all(torch.allclose(logits(one, n), logits(other, n), atol=1e-5) for n in (SHORT, LONG))


def one_line(error: BaseException) -> str:
    """The message, which must be one short sentence that is safe to print."""
    message = str(error)
    assert message.isprintable(), f"{message[:300]!r} would break a terminal"
    assert len(message) < 1000
    assert not re.search(r"[.!?] [A-Z]", message), f"more than one sentence: {message}"
    return message


# -- adapter directories


@pytest.mark.parametrize("prefill", ["masked", "dense"])
@pytest.mark.parametrize(("method", "compensate"), VARIANTS)
def test_adapter_round_trip(
    base: Path,
    calibration: catsparse.Calibration,
    tmp_path: Path,
    method: str,
    compensate: bool,
    prefill: str,
) -> None:
    model = sparse_model(base, calibration, method=method, compensate=compensate, prefill=prefill)
    catsparse.save(model, tmp_path / "out")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {CONFIG, TENSORS, "README.md"}
    # No weights: thresholds and statistics are all there is.
    stored = {key.removeprefix("model.layers.") for key in load_file(tmp_path / "out" / TENSORS)}
    fields = {"threshold", "histogram", "gate_square", "up_square", "bucket_count", "bucket_sum"}
    fields |= {"mean"} if compensate else set()
    assert stored == {f"{layer}.mlp.{field}" for layer in (0, 1) for field in fields}

    loaded = catsparse.load(tmp_path / "out")
    assert not loaded.training
    assert same_logits(loaded, model)
    # Neither of the two runs the dense maths, save for long calls under the dense policy.
    dense = hub.load_dense_model(str(base))
    assert not torch.equal(logits(loaded, SHORT), logits(dense, SHORT))
    assert torch.equal(logits(loaded, LONG), logits(dense, LONG)) == (prefill == "dense")

    for name, module in sparse_modules(model).items():
        twin = loaded.get_submodule(name)
        assert torch.equal(twin.catsparse_threshold, module.catsparse_threshold)
        assert twin.catsparse_threshold.dtype == torch.float32
        assert twin.catsparse_threshold.dim() == (method != "cats")
        assert twin.catsparse_prefill == prefill
        if compensate:
            assert torch.equal(twin.catsparse_mean, module.catsparse_mean)
        else:
            assert twin.catsparse_mean is None
    assert loaded.catsparse.config.sparsity == 0.6
    assert loaded.catsparse.config.calibration == calibration.provenance


def test_calibration_comes_back(
    base: Path, calibration: catsparse.Calibration, saved: Path
) -> None:
    loaded = catsparse.load(saved)
    again = loaded.catsparse.calibration
    assert again.sites == calibration.sites
    assert again.provenance == calibration.provenance
    catsparse.densify(loaded)
    catsparse.sparsify(loaded, again, 0.8)
    fresh = catsparse.sparsify(hub.load_dense_model(str(base)), calibration, 0.8)
    assert same_logits(loaded, fresh)


def test_sensitivities_come_back(
    base: Path, calibration: catsparse.Calibration, tmp_path: Path
) -> None:
    """From the artifact any budget is solved again, and its layers stay apart."""
    rows = ([0.1, 0.5], [1.0, 5.0])
    losses = {n: torch.tensor(r).double() for n, r in zip(calibration.sites, rows, strict=True)}
    table = catsparse.Sensitivities("energy", True, None, 64, (0.5, 0.9), losses)
    measured = replace(calibration, sensitivities=table)
    model = hub.load_dense_model(str(base))
    catsparse.sparsify(model, measured, bytes_skipped=0.4, allocation="optimal")
    catsparse.save(model, tmp_path)
    loaded = catsparse.load(tmp_path)
    assert same_logits(loaded, model)
    again = loaded.catsparse.calibration
    for budget in (0.1, 0.4, 0.55):
        assert catsparse.allocate(again, budget) == catsparse.allocate(measured, budget)
    first, second = loaded.catsparse.config.sites.values()
    assert first.sparsity > second.sparsity + 0.1


def test_save_again_over_itself(base: Path, calibration: catsparse.Calibration, tmp_path: Path):
    for sparsity in (0.3, 0.7):
        model = catsparse.sparsify(hub.load_dense_model(str(base)), calibration, sparsity)
        catsparse.save(model, tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {CONFIG, TENSORS, "README.md"}
    assert same_logits(catsparse.load(tmp_path), model)
    assert catsparse.load(tmp_path).catsparse.config.sparsity == 0.7


def test_json_names_what_the_model_holds(saved: Path, base: Path) -> None:
    raw = json.loads((saved / CONFIG).read_text())
    assert Path(raw["base_model"]["name_or_path"]) == base
    assert raw["base_model"]["model_type"] == "llama"
    assert raw["method"] == "cats"
    assert raw["compensate"] is True
    tensors = load_file(saved / TENSORS)
    assert set(raw["sites"]) == {FIRST, "model.layers.1.mlp"}
    for name, site in raw["sites"].items():
        assert (site["hidden_size"], site["intermediate_size"]) == (32, 48)
        # fp32 survives the way through decimal digits.
        assert torch.tensor(site["threshold"]) == tensors[f"{name}.threshold"]


def test_artifact_files_are_readable_by_others(saved: Path) -> None:
    mask = os.umask(0)
    os.umask(mask)
    for path in saved.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask, path.name


def test_relative_base_survives_another_directory(
    base: Path, calibration: catsparse.Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(base.parent)
    model = catsparse.sparsify(hub.load_dense_model(base.name), calibration)
    catsparse.save(model, tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    assert same_logits(catsparse.load("out"), model)


def test_base_model_can_be_given(
    base: Path, calibration: catsparse.Calibration, tmp_path: Path
) -> None:
    moved = shutil.copytree(base, tmp_path / "first")
    model = sparse_model(moved, calibration)
    catsparse.save(model, tmp_path / "out")
    os.rename(moved, tmp_path / "second")
    with pytest.raises(CatsparseError) as caught:
        catsparse.load(tmp_path / "out")
    assert "first" in one_line(caught.value)
    loaded = catsparse.load(tmp_path / "out", base_model=str(tmp_path / "second"))
    assert same_logits(loaded, model)


def test_from_pretrained_options_pass_through(saved: Path) -> None:
    assert catsparse.load(saved, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_load_tokenizer_of_an_artifact_is_the_base_models(
    calibration: catsparse.Calibration, tmp_path: Path
) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    base = save_base(tmp_path / "base")
    words = Tokenizer(models.WordLevel({"<unk>": 0, "cat": 1, "sat": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(base)
    model = sparse_model(base, calibration)
    for merge in (False, True):
        catsparse.save(model, tmp_path / str(merge), merge=merge)
        tokenizer = hub.load_tokenizer(str(tmp_path / str(merge)))
        assert tokenizer("sat cat")["input_ids"] == [2, 1]


def test_is_artifact(saved: Path, merged: Path, base: Path) -> None:
    assert hub.is_artifact(str(saved))
    assert hub.is_artifact(str(merged))
    assert not hub.is_artifact(str(base))


def test_save_of_a_dense_model_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(CatsparseError, match="sparsify"):
        catsparse.save(hub.load_dense_model(str(base)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_save_needs_a_base_or_merge(calibration: catsparse.Calibration, tmp_path: Path) -> None:
    model = catsparse.sparsify(build(llama_config()), calibration)
    with pytest.raises(CatsparseError, match="merge=True") as caught:
        catsparse.save(model, tmp_path / "out")
    one_line(caught.value)
    assert not (tmp_path / "out").exists()
    catsparse.save(model, tmp_path / "out", merge=True)
    # In memory and mapped from a file, weights are aligned otherwise: equal but for the last bit.
    assert close(logits(catsparse.load(tmp_path / "out")), logits(model), 1e-5)
    # There is no base, so none is named: not the folder in which the program runs.
    base = json.loads((tmp_path / "out" / CONFIG).read_text())["base_model"]
    assert base["name_or_path"] == ""
    for name in (CONFIG, "README.md", "config.json"):
        assert os.getcwd() not in (tmp_path / "out" / name).read_text()
    assert (tmp_path / "out" / "README.md").read_text().startswith("# a model of yours, ")
    with pytest.raises(CatsparseError, match=f"tokenizer of {re.escape(str(tmp_path / 'out'))}"):
        hub.load_tokenizer(str(tmp_path / "out"))


def test_save_onto_a_file_is_refused(
    base: Path, calibration: catsparse.Calibration, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CatsparseError, match="is a file"):
        catsparse.save(sparse_model(base, calibration), tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("through", ["get_peft_model", "add_adapter"])
def test_merging_with_an_unmerged_adapter_is_refused(
    base: Path, calibration: catsparse.Calibration, tmp_path: Path, through: str
) -> None:
    peft = pytest.importorskip("peft")
    model = sparse_model(base, calibration)
    config = peft.LoraConfig(r=2, target_modules=["down_proj"])
    if through == "add_adapter":
        model.add_adapter(config)
        holders = [model]
    else:
        holders = [peft.get_peft_model(model, config), model]
    for holder in holders:
        with pytest.raises(CatsparseError, match="merge_and_unload") as caught:
            catsparse.save(holder, tmp_path / "out", merge=True)
        one_line(caught.value)
    assert not (tmp_path / "out").exists()


def test_save_after_merging_an_adapter(
    base: Path, calibration: catsparse.Calibration, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["down_proj"], init_lora_weights=False)
    model = peft.get_peft_model(sparse_model(base, calibration), config).merge_and_unload()
    catsparse.save(model, tmp_path / "out", merge=True)
    loaded = catsparse.load(tmp_path / "out")
    assert same_logits(loaded, model)
    assert not torch.equal(logits(loaded), logits(sparse_model(base, calibration)))


@pytest.mark.parametrize("through", ["quantization_config", "quantize_"])
def test_merge_of_quantized_weights_is_refused(
    base: Path, calibration: catsparse.Calibration, tmp_path: Path, through: str
) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    if through == "quantize_":
        model = hub.load_dense_model(str(base))
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    else:
        from transformers import TorchAoConfig

        config = TorchAoConfig(quantization.Int8WeightOnlyConfig())
        model = hub.load_dense_model(str(base), quantization_config=config)
    catsparse.sparsify(model, calibration)
    with pytest.raises(CatsparseError, match="quantized") as caught:
        catsparse.save(model, tmp_path / "merged", merge=True)
    one_line(caught.value)
    left = list((tmp_path / "merged").iterdir()) if (tmp_path / "merged").exists() else []
    assert left == []
    catsparse.save(model, tmp_path / "adapter")
    assert torch.equal(
        load_file(tmp_path / "adapter" / TENSORS)[f"{FIRST}.threshold"],
        model.get_submodule(FIRST).catsparse_threshold,
    )


# -- merged directories


def test_merged_loads_through_transformers(
    merged: Path, base: Path, calibration: catsparse.Calibration
) -> None:
    model = sparse_model(base, calibration)
    for loaded in (
        AutoModelForCausalLM.from_pretrained(merged),
        AutoModelForCausalLM.from_pretrained(str(merged)),
        catsparse.load(merged),
    ):
        assert same_logits(loaded, model)
        assert not loaded.training
        assert list(loaded.state_dict()) == list(model.state_dict())
        assert loaded.catsparse.calibration.sites == calibration.sites


def test_merged_keeps_the_dense_tensors(merged: Path, base: Path) -> None:
    kept, original = load_file(merged / "model.safetensors"), load_file(base / "model.safetensors")
    assert kept.keys() == original.keys()
    assert all(torch.equal(kept[name], original[name]) for name in original)
    assert json.loads((merged / "config.json").read_text())["quantization_config"] == {
        "quant_method": "cats"
    }
    assert not any(path.name.startswith(".") for path in merged.iterdir())


def test_merging_leaves_the_model_as_it_was(
    base: Path, calibration: catsparse.Calibration, tmp_path: Path
) -> None:
    model = sparse_model(base, calibration)
    before, was = logits(model), model.config.to_dict()
    catsparse.save(model, tmp_path, merge=True)
    assert torch.equal(logits(model), before)
    assert model.config.to_dict() == was
    assert "save_pretrained" not in model.__dict__


@pytest.mark.parametrize("how", ["save", "save_pretrained"])
def test_merged_round_trips_twice(merged: Path, tmp_path: Path, how: str) -> None:
    first = AutoModelForCausalLM.from_pretrained(merged)
    model = first
    for turn in ("1", "2"):
        if how == "save":
            catsparse.save(model, tmp_path / turn, merge=True)
        else:
            model.save_pretrained(tmp_path / turn)
        assert {p.name for p in (tmp_path / turn).iterdir()} == {p.name for p in merged.iterdir()}
        model = AutoModelForCausalLM.from_pretrained(tmp_path / turn)
        assert same_logits(model, first)
    assert (tmp_path / "2" / CONFIG).read_text() == (merged / CONFIG).read_text()


def test_merged_saved_over_itself(merged: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(merged, tmp_path / "merged")
    model = catsparse.load(folder)
    before = logits(model).clone()
    model.save_pretrained(folder)  # the weights may be mapped from the file being replaced
    assert torch.equal(logits(model), before)
    assert torch.equal(logits(catsparse.load(folder)), before)


def test_merged_save_pretrained_in_shards(merged: Path, tmp_path: Path) -> None:
    model = catsparse.load(merged)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    shards = list(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1
    assert (tmp_path / "model.safetensors.index.json").exists()
    for loaded in (catsparse.load(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)):
        # Mapped from other files, weights are aligned otherwise: equal but for the last bit.
        for n in (SHORT, LONG):
            assert close(logits(loaded, n), logits(model, n), 1e-5)
        mine, its = model.state_dict(), loaded.state_dict()
        assert all(torch.equal(mine[name], its[name]) for name in mine)


def test_merge_over_another_models_shards(
    base: Path, calibration: catsparse.Calibration, tmp_path: Path
) -> None:
    """What an earlier save left must not be taken for the new weights."""
    build(llama_config(), seed=5).save_pretrained(tmp_path, max_shard_size="20KB")
    model = sparse_model(base, calibration)
    catsparse.save(model, tmp_path, merge=True)
    assert same_logits(catsparse.load(tmp_path), model)
    assert not list(tmp_path.glob("model-*.safetensors"))


def test_merged_shards_over_a_single_file(merged: Path, tmp_path: Path) -> None:
    model = catsparse.load(merged)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        model.get_submodule(FIRST).down_proj.weight.mul_(0.5)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert close(logits(catsparse.load(tmp_path)), logits(model), 1e-5)


def test_merged_densify_then_save_is_dense(merged: Path, base: Path, tmp_path: Path) -> None:
    model = catsparse.densify(AutoModelForCausalLM.from_pretrained(merged))
    dense = hub.load_dense_model(str(base))
    assert same_logits(model, dense)
    assert "save_pretrained" not in model.__dict__
    model.save_pretrained(tmp_path)
    assert not (tmp_path / CONFIG).exists()
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not sparse_modules(again)
    assert same_logits(again, dense)


@pytest.mark.parametrize("merge", [False, True])
def test_merged_made_sparse_anew(
    merged: Path, calibration: catsparse.Calibration, tmp_path: Path, merge: bool
) -> None:
    """Load a merged directory, choose another sparsity, save, load."""
    model = catsparse.densify(catsparse.load(merged))
    catsparse.sparsify(model, calibration, 0.3)
    catsparse.save(model, tmp_path, merge=merge)
    assert same_logits(catsparse.load(tmp_path), model)


@pytest.mark.parametrize("kind", ["half", "float", "bfloat16", "to"])
def test_merged_changes_dtype(merged: Path, kind: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(merged)
    exact = {n: m.catsparse_threshold.clone() for n, m in sparse_modules(model).items()}
    means = {n: m.catsparse_mean.clone() for n, m in sparse_modules(model).items()}
    model = model.to(torch.float16) if kind == "to" else getattr(model, kind)()
    wanted = {"float": torch.float32, "bfloat16": torch.bfloat16}.get(kind, torch.float16)
    assert {p.dtype for p in model.parameters()} == {wanted}
    for name, module in sparse_modules(model).items():
        assert torch.equal(module.catsparse_threshold, exact[name])
        assert torch.equal(module.catsparse_mean, means[name])
    assert logits(model).isfinite().all()
    assert logits(model, SHORT).isfinite().all()


@pytest.mark.parametrize("how", ["transformers", "merged", "adapter"])
def test_low_precision_load_keeps_thresholds_exact(merged: Path, saved: Path, how: str) -> None:
    if how == "transformers":
        model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.bfloat16)
    else:
        model = catsparse.load(merged if how == "merged" else saved, dtype=torch.bfloat16)
    stored = load_file((saved if how == "adapter" else merged) / TENSORS)
    assert model.get_submodule(FIRST).down_proj.weight.dtype == torch.bfloat16
    for name, module in sparse_modules(model).items():
        threshold, mean = module.catsparse_threshold, module.catsparse_mean
        assert threshold.dtype == mean.dtype == torch.float32
        assert torch.equal(threshold, stored[f"{name}.threshold"])
        assert torch.equal(mean, stored[f"{name}.mean"])
        # Not representable in bf16: a rounded one could not pass.
        assert not torch.equal(threshold, threshold.bfloat16().float())


def test_merged_trains_in_full(merged: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(merged).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    ids = tokens(2, LONG)
    losses = []
    for _ in range(5):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        missing = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
        assert missing == []
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


def test_trainer_accepts_a_merged_model(merged: Path, tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    model = AutoModelForCausalLM.from_pretrained(merged)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    rows = [{"input_ids": row, "labels": row} for row in tokens(4, LONG)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=1, report_to=[], use_cpu=True, disable_tqdm=True,
        save_strategy="no", learning_rate=0.01,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    assert any(not torch.equal(p, before[name]) for name, p in model.named_parameters())
    trainer.save_model(str(tmp_path / "out"))
    model.eval()
    assert same_logits(catsparse.load(tmp_path / "out"), model)


def test_merged_without_catsparse_is_dense_and_says_so(
    merged: Path, base: Path, tmp_path: Path
) -> None:
    code = f"""
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(merged)!r}).eval()
assert not any(name.split(".")[0] == "catsparse" for name in sys.modules)
with torch.no_grad():
    logits = model(torch.tensor({tokens(1, LONG, 3).tolist()}), use_cache=False).logits
torch.save(logits, {str(tmp_path / "logits.pt")!r})
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr
    assert re.search("unknown quantization type, got cats", done.stderr, re.IGNORECASE)
    found = torch.load(tmp_path / "logits.pt", weights_only=True)
    assert torch.equal(found, logits(hub.load_dense_model(str(base))))
    # The card tells the reader.
    assert "import catsparse" in (merged / "README.md").read_text()
    assert "dense" in (merged / "README.md").read_text()


def test_registering_twice_changes_nothing() -> None:
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    before = AUTO_QUANTIZER_MAPPING["cats"]
    quantizer.register_with_transformers()
    assert AUTO_QUANTIZER_MAPPING["cats"] is before


# -- broken artifacts


def edit_json(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        raw = json.loads((folder / CONFIG).read_text())
        change(raw)
        (folder / CONFIG).write_text(json.dumps(raw))

    return damage


def edit_tensors(
    change: Callable[[dict[str, Tensor], dict[str, str]], Any],
) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        with safe_open(folder / TENSORS, framework="pt") as file:
            metadata = dict(file.metadata())
        tensors = load_file(folder / TENSORS)
        change(tensors, metadata)
        save_file(tensors, folder / TENSORS, metadata)

    return damage


def write_json(text: str | bytes) -> Callable[[Path], None]:
    raw = text.encode() if isinstance(text, str) else text
    return lambda folder: (folder / CONFIG).write_bytes(raw) and None


def write_tensors(raw: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / TENSORS).write_bytes(raw) and None


def put(name: str, value: object) -> Callable[[Path], None]:
    return edit_json(lambda raw: raw.update({name: value}))


def site(field: str, text: str) -> Callable[[Path], None]:
    """Put raw JSON ``text`` in the place of a site's value."""

    def damage(folder: Path) -> None:
        edit_json(lambda raw: raw["sites"][FIRST].update({field: "@"}))(folder)
        path = folder / CONFIG
        path.write_text(path.read_text().replace('"@"', text))

    return damage


def rename_site(name: str) -> Callable[[Path], None]:
    """A consistent artifact in which one site has another name."""

    def damage(folder: Path) -> None:
        edit_json(lambda raw: raw["sites"].update({name: raw["sites"].pop(FIRST)}))(folder)

        def change(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
            for key in [k for k in tensors if k.startswith(FIRST)]:
                tensors[name + key.removeprefix(FIRST)] = tensors.pop(key)
            for key in ("catsparse.sites", "catsparse.tokens"):
                metadata[key] = metadata[key].replace(json.dumps(FIRST), json.dumps(name))

        edit_tensors(change)(folder)

    return damage


def replace_tensor(key: str, value: Tensor) -> Callable[[Path], None]:
    return edit_tensors(lambda tensors, _: tensors.update({f"{FIRST}.{key}": value}))


def set_metadata(key: str, text: str) -> Callable[[Path], None]:
    return edit_tensors(lambda _, metadata: metadata.update({f"catsparse.{key}": text}))


def truncate(name: str, share: float) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        os.truncate(folder / name, int((folder / name).stat().st_size * share))

    return damage


def huge_json(folder: Path) -> None:
    os.truncate(folder / CONFIG, 2**40)  # sparse: takes no space


def many_keys(folder: Path) -> None:
    edit_json(lambda raw: raw.update({f"nonsense{i}": i for i in range(200_000)}))(folder)


def header(declared: int, text: bytes = b"") -> Callable[[Path], None]:
    return write_tensors(struct.pack("<Q", declared) + text)


def base_path(name: str) -> Callable[[Path], None]:
    return edit_json(lambda raw: raw["base_model"].update(name_or_path=name))


def site_metadata(**changes: object) -> Callable[[Path], None]:
    def change(_: object, metadata: dict[str, str]) -> None:
        sites = json.loads(metadata["catsparse.sites"])
        sites[0].update(changes)
        metadata["catsparse.sites"] = json.dumps(sites)

    return edit_tensors(change)


BROKEN: dict[str, Callable[[Path], None]] = {
    # catsparse.json: not a JSON object at all
    "json truncated": truncate(CONFIG, 0.5),
    "json empty": truncate(CONFIG, 0),
    "json is prose": write_json("thresholds: 0.3"),
    "json is binary": write_json(b"\x80\x04\xff\xfe\x00"),
    "json has a byte order mark": write_json(b"\xef\xbb\xbf{}"),
    "json is a list": write_json("[]"),
    "json is a string": write_json('"cats"'),
    "json is null": write_json("null"),
    "json is too deep": write_json("[" * 100_000),
    "json is too deep inside": write_json('{"format_version": 1, "a": ' + '{"a":' * 100_000),
    "json is huge": huge_json,
    "json is just too big": lambda folder: os.truncate(folder / CONFIG, MAX_CONFIG_BYTES + 1),
    "json has many keys": many_keys,
    "json has an endless number": site("threshold", "1" * 5000),
    # catsparse.json: a wrong object
    "unknown key": put("gates", 1),
    "unknown key with escapes": put("\x1b[2J\n", 1),
    "unknown key in a site": site('x": 1, "act', '"silu"'),
    "missing key": edit_json(lambda raw: raw.pop("compensate")),
    "missing key in a site": edit_json(lambda raw: raw["sites"][FIRST].pop("act")),
    "missing format_version": edit_json(lambda raw: raw.pop("format_version")),
    "newer format_version": put("format_version", FORMAT_VERSION + 1),
    "format_version 1 with keys of version 2": put("format_version", 1),
    "newest format_version": put("format_version", 10**30),
    "format_version 0": put("format_version", 0),
    "format_version true": put("format_version", True),
    "format_version a string": put("format_version", "1"),
    "no site": put("sites", {}),
    "sites a list": put("sites", []),
    "a site is a number": edit_json(lambda raw: raw["sites"].update({FIRST: 0.3})),
    "unknown method": put("method", "magic"),
    "long method": put("method", "m" * 100_000),
    "method with a newline": put("method", "cats\nchess"),
    "method a number": put("method", 3),
    "method a list": put("method", []),
    "prefill unknown": put("prefill", "sometimes"),
    "sparsity 1": put("sparsity", 1.0),
    "sparsity -0.1": put("sparsity", -0.1),
    "sparsity a string": put("sparsity", "0.5"),
    "sparsity true": put("sparsity", True),
    "sparsity NaN": put("sparsity", float("nan")),
    "measured_sparsity infinite": lambda folder: (
        put("measured_sparsity", "@")(folder)
        or (
            (folder / CONFIG).write_text((folder / CONFIG).read_text().replace('"@"', "1e999"))
            and None
        )
    ),
    "compensate a number": put("compensate", 1),
    "base_model a string": put("base_model", "llama"),
    "base_model null": put("base_model", None),
    "calibration a list": put("calibration", [1]),
    "threshold NaN": site("threshold", "NaN"),
    "threshold Infinity": site("threshold", "Infinity"),
    "threshold -Infinity": site("threshold", "-Infinity"),
    "threshold 1e999": site("threshold", "1e999"),
    "threshold a huge integer": site("threshold", "1" * 400),
    "threshold null": site("threshold", "null"),
    "threshold a list": site("threshold", "[0.1]"),
    "site sparsity 1.5": site("sparsity", "1.5"),
    "site sparsity NaN": site("sparsity", "NaN"),
    "site act unknown": site("act", '"softmax"'),
    "site act long": site("act", json.dumps("s" * 100_000)),
    "hidden_size negative": site("hidden_size", "-32"),
    "hidden_size 0": site("hidden_size", "0"),
    "hidden_size huge": site("hidden_size", "1" * 400),
    "hidden_size a fraction": site("hidden_size", "32.5"),
    "intermediate_size negative": site("intermediate_size", "-48"),
    "intermediate_size huge": site("intermediate_size", str(2**62)),
    # calibration.safetensors
    "tensors truncated": truncate(TENSORS, 0.5),
    "tensors cut in the header": truncate(TENSORS, 0.0001),
    "tensors empty": truncate(TENSORS, 0),
    "tensors are noise": write_tensors(bytes(range(256)) * 64),
    "tensors declare a huge header": header(2**60),
    "tensors declare a longer header": header(1000, b"{}"),
    "tensors have no JSON header": header(4, b"%%%%"),
    "tensors have a deep header": header(90_000, b"[" * 90_000),
    "tensors are a pickle": write_tensors(pickle.dumps({"a": 1})),
    "tensors without metadata for a site": set_metadata("tokens", "{}"),
    "tensors are missing": lambda folder: (folder / TENSORS).unlink(),
    "threshold of a wrong shape": replace_tensor("threshold", torch.zeros(47)),
    "threshold of a column": replace_tensor("threshold", torch.zeros(48, 1)),
    "threshold of one element": replace_tensor("threshold", torch.zeros(1)),
    "threshold of none": replace_tensor("threshold", torch.zeros(0)),
    "threshold in bf16": replace_tensor("threshold", torch.zeros(48, dtype=torch.bfloat16)),
    "threshold in fp64": replace_tensor("threshold", torch.zeros(48, dtype=torch.float64)),
    "threshold of integers": replace_tensor("threshold", torch.zeros(48, dtype=torch.int64)),
    "threshold tensor NaN": replace_tensor("threshold", torch.full((48,), torch.nan)),
    "threshold tensor with one NaN": replace_tensor(
        "threshold", torch.tensor([torch.nan] + [0.1] * 47)
    ),
    "threshold tensor infinite": replace_tensor("threshold", torch.tensor(torch.inf)),
    "threshold other than in the json": replace_tensor("threshold", torch.tensor(0.123)),
    "threshold missing": edit_tensors(lambda t, _: t.pop(f"{FIRST}.threshold")),
    "mean missing": edit_tensors(lambda t, _: t.pop(f"{FIRST}.mean")),
    "mean of a wrong shape": replace_tensor("mean", torch.zeros(47)),
    "mean a scalar": replace_tensor("mean", torch.zeros(())),
    "mean NaN": replace_tensor("mean", torch.full((48,), torch.nan)),
    "mean in fp16": replace_tensor("mean", torch.zeros(48, dtype=torch.float16)),
    "histogram missing": edit_tensors(lambda t, _: t.pop(f"{FIRST}.histogram")),
    "histogram of a wrong shape": replace_tensor("histogram", torch.zeros(7, dtype=torch.int64)),
    "histogram negative": replace_tensor("histogram", torch.full((32768,), -1)),
    "histogram in floats": replace_tensor("histogram", torch.zeros(32768)),
    "up_square NaN": replace_tensor("up_square", torch.full((48,), torch.nan).double()),
    "bucket_sum infinite": replace_tensor("bucket_sum", torch.full((32, 48), torch.inf)),
    "metadata sites is prose": set_metadata("sites", "none"),
    "metadata sites is null": set_metadata("sites", "null"),
    "metadata sites is a number": set_metadata("sites", "[1]"),
    "metadata sites is too deep": set_metadata("sites", "[" * 100_000),
    "metadata site lacks keys": set_metadata("sites", "[{}]"),
    "metadata tokens is a list": set_metadata("tokens", "[]"),
    "metadata tokens is infinite": set_metadata("tokens", f'{{"{FIRST}": Infinity}}'),
    "metadata tokens negative": set_metadata("tokens", f'{{"{FIRST}": -5}}'),
    "metadata provenance is a string": set_metadata("provenance", '"me"'),
    "metadata provenance of wrong types": set_metadata(
        "provenance", '{"data": [], "tokens": "x", "seq_len": {}, "seed": null, "dtype": 1}'
    ),
    "metadata site of a wrong size": site_metadata(intermediate_size=47),
    "metadata site size a string": site_metadata(intermediate_size="48"),
    "metadata site with another act": site_metadata(act="relu"),
    "metadata site with an unknown act": site_metadata(act="magic"),
    "metadata site of another name": site_metadata(name="model.layers.7.mlp"),
    "metadata site name a list": site_metadata(name=[]),
    # a site that the model does not have
    "site with a path": rename_site("../../etc/passwd"),
    "site without a name": rename_site(""),
    "site with an empty part": rename_site("model..x"),
    "site named after a dunder": rename_site("__class__"),
    "site under a dunder": rename_site("model.layers.0.mlp.__class__"),
    "site is the whole decoder": rename_site("model"),
    "site is a linear": rename_site("model.layers.0.mlp.gate_proj"),
    "site is an attention": rename_site("model.layers.0.self_attn"),
    "site of a missing layer": rename_site("model.layers.9.mlp"),
    "site with a long name": rename_site("m" * 100_000),
    "site with escapes": rename_site("\x1b[2J\x07\nmodel"),
    # a base that is not there
    "base does not exist": base_path("/nonexistent/model"),
    "base is empty": base_path(""),
    "base is a bad repository name": base_path("no such/model/anywhere"),
    "base holds a null byte": base_path("model\0"),
    "base holds a lone surrogate": base_path("model\ud800"),
    "base holds escapes": base_path("/nonexistent/\x1b[2J\nmodel"),
    "base is a file": base_path("/etc/hostname"),
    "base is of another type": edit_json(lambda raw: raw["base_model"].update(model_type="qwen2")),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_artifact(
    name: str, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exactly one CatsparseError, and whatever was loaded is left dense."""
    models: list[nn.Module] = []
    real = hub.load_dense_model
    monkeypatch.setattr(
        hub, "load_dense_model", lambda *a, **k: models.append(real(*a, **k)) or models[-1]
    )
    folder = shutil.copytree(saved, tmp_path / "artifact")
    catsparse.load(folder)  # intact
    BROKEN[name](folder)
    start = time.monotonic()
    with pytest.raises(CatsparseError) as caught:
        catsparse.load(folder)
    assert time.monotonic() - start < 3
    one_line(caught.value)
    for model in models[1:]:
        assert_untouched(model)


def assert_untouched(model: nn.Module) -> None:
    assert not sparse_modules(model)
    assert not hasattr(model, "catsparse")
    assert not [name for name, _ in model.named_buffers() if "catsparse" in name]


@pytest.fixture(scope="module")
def saved_twice(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An intact adapter with a preview and a second decision."""
    model = hub.load_dense_model(str(base))
    calibration = catsparse.calibrate(
        model, tokens(8, 32, 7), preview=4, products_at=0.4, progress=False
    )
    catsparse.sparsify(model, calibration, 0.4, down_sparsity=0.6)
    folder = tmp_path_factory.mktemp("hub") / "twice"
    catsparse.save(model, folder)
    return folder


@pytest.mark.parametrize("merge", [False, True])
def test_round_trip_with_preview_and_second_decision(
    saved_twice: Path, merge: bool, tmp_path: Path
) -> None:
    first = catsparse.load(saved_twice)
    catsparse.save(first, tmp_path / "again", merge=merge)
    second = catsparse.load(tmp_path / "again")
    assert second.catsparse.config.preview == 4
    assert second.catsparse.config.down_sparsity == 0.6
    assert second.catsparse.config.sites == first.catsparse.config.sites
    for n in (SHORT, LONG):
        assert torch.equal(logits(first, n), logits(second, n))
    for one, other in zip(
        sparse_modules(first).values(), sparse_modules(second).values(), strict=True
    ):
        for name in ("product_threshold", "preview", "preview_scale", "mean"):
            values = [getattr(m, f"catsparse_{name}") for m in (one, other)]
            assert torch.equal(*values), name
    calibration = second.catsparse.calibration
    assert calibration.products_at.sparsity == 0.4
    catsparse.densify(second)
    catsparse.sparsify(second, calibration, 0.4, down_sparsity=0.7)  # without the model's data
    card = (tmp_path / "again" / "README.md").read_text()
    assert "4-bit gate preview, 60% of the down rows unread" in card


@pytest.fixture(scope="module")
def saved_products(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An intact adapter of method product."""
    model = hub.load_dense_model(str(base))
    catsparse.sparsify(
        model, catsparse.calibrate(model, tokens(8, 32, 7), preview=4, progress=False), 0.6
    )
    folder = tmp_path_factory.mktemp("hub") / "products"
    catsparse.save(model, folder)
    return folder


@pytest.mark.parametrize("merge", [False, True])
def test_round_trip_of_method_product(saved_products: Path, merge: bool, tmp_path: Path) -> None:
    first = catsparse.load(saved_products)
    catsparse.save(first, tmp_path / "again", merge=merge)
    second = catsparse.load(tmp_path / "again")
    assert second.catsparse.config.method == "product"
    assert second.catsparse.config.sites == first.catsparse.config.sites
    for n in (SHORT, LONG):
        assert torch.equal(logits(first, n), logits(second, n))
    for one, other in zip(
        sparse_modules(first).values(), sparse_modules(second).values(), strict=True
    ):
        assert other.catsparse_of_products
        for name in ("threshold", "preview", "preview_scale", "mean"):
            values = [getattr(m, f"catsparse_{name}") for m in (one, other)]
            assert torch.equal(*values), name
    assert "product, compensated, 4-bit product preview" in (
        (tmp_path / "again" / "README.md").read_text()
    )
    calibration = second.catsparse.calibration
    catsparse.sparsify(catsparse.densify(second), calibration, 0.7)  # without the model's data
    assert second.catsparse.config.method == "product"
    catsparse.sparsify(catsparse.densify(second), calibration, 0.5, "cats")
    assert second.catsparse.config.method == "cats"


def test_files_older_than_method_product(saved_twice: Path, tmp_path: Path) -> None:
    """Nothing foretold is in them: they load, and other thresholds follow by the gate's methods."""
    expected = logits(catsparse.load(saved_twice))
    folder = shutil.copytree(saved_twice, tmp_path / "older")

    def cut(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        del metadata["catsparse.foretold"]
        for key in [key for key in tensors if ".foretold_" in key]:
            del tensors[key]

    edit_tensors(cut)(folder)
    model = catsparse.load(folder)
    assert torch.equal(logits(model), expected)
    calibration = model.catsparse.calibration
    catsparse.sparsify(catsparse.densify(model), calibration, 0.5)
    assert model.catsparse.config.method == "energy"
    with pytest.raises(CatsparseError, match="calibrate again with preview=4") as caught:
        catsparse.sparsify(catsparse.densify(model), calibration, 0.5, "product")
    one_line(caught.value)


BROKEN_PRODUCTS: dict[str, Callable[[Path], None]] = {
    "no preview": put("preview", None),
    "another method": put("method", "energy"),
    "down_sparsity": put("down_sparsity", 0.7),
    "site with a product_threshold": site("product_threshold", "0.5"),
    "statistics missing": edit_tensors(lambda t, _: t.pop(f"{FIRST}.foretold_histogram")),
    "statistics of the gate itself": edit_tensors(lambda _, m: m.pop("catsparse.preview")),
}


@pytest.mark.parametrize("name", BROKEN_PRODUCTS)
def test_broken_artifact_of_method_product(name: str, saved_products: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(saved_products, tmp_path / "artifact")
    BROKEN_PRODUCTS[name](folder)
    with pytest.raises(CatsparseError) as caught:
        catsparse.load(folder)
    one_line(caught.value)


BROKEN_TWICE: dict[str, Callable[[Path], None]] = {
    "preview of another width": put("preview", 8),
    "no preview": put("preview", None),
    "preview 3": put("preview", 3),
    "preview a string": put("preview", "4"),
    "no second decision": put("down_sparsity", None),
    "down_sparsity below the sparsity": put("down_sparsity", 0.3),
    "down_sparsity 1": put("down_sparsity", 1.0),
    "measured_down_sparsity 2": put("measured_down_sparsity", 2),
    "site without product_threshold": site("product_threshold", "null"),
    "site with an endless product_threshold": site("product_threshold", "1e999"),
    "site with another product_threshold": site("product_threshold", "0.5"),
    "site without down_sparsity": site("down_sparsity", "null"),
    "site with a lower down_sparsity": site("down_sparsity", "0.1"),
    "format_version 1": put("format_version", 1),
    "product threshold missing": edit_tensors(lambda t, _: t.pop(f"{FIRST}.product_threshold")),
    "product threshold of a wrong shape": replace_tensor("product_threshold", torch.zeros(47)),
    "product threshold NaN": replace_tensor("product_threshold", torch.full((48,), torch.nan)),
    "product threshold in bf16": replace_tensor("product_threshold", torch.zeros(48).bfloat16()),
    "statistics of the gate itself": edit_tensors(lambda _, m: m.pop("catsparse.preview")),
    "statistics of another preview": set_metadata("preview", "8"),
    "products missing": edit_tensors(lambda t, _: t.pop(f"{FIRST}.product_histogram")),
    "products behind nonsense": set_metadata("products_at", '{"sparsity": 9, "method": "cats"}'),
}


@pytest.mark.parametrize("name", BROKEN_TWICE)
def test_broken_artifact_with_preview_and_second_decision(
    name: str, saved_twice: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(saved_twice, tmp_path / "artifact")
    hub.read_artifact(str(folder))  # intact
    BROKEN_TWICE[name](folder)
    with pytest.raises(CatsparseError) as caught:
        catsparse.load(folder)
    one_line(caught.value)


def to_version_1(folder: Path) -> None:
    """What version 1 wrote for the same model: no new keys, and its digest."""

    def change(raw: dict[str, Any]) -> None:
        raw["format_version"] = 1
        for key in ("preview", "down_sparsity", "measured_down_sparsity", "inputs", "scope"):
            del raw[key]
        for part in raw["sites"].values():
            del part["product_threshold"], part["down_sparsity"]
        del raw["calibration"]["weights"]

    edit_json(change)(folder)
    raw = json.loads((folder / CONFIG).read_text())
    parts = json.dumps([raw["method"], raw["compensate"], raw["sites"]], sort_keys=True)
    set_metadata("digest", hashlib.sha256(parts.encode()).hexdigest())(folder)


def test_version_1_loads_and_is_saved_as_the_newest(saved: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(saved, tmp_path / "old")
    to_version_1(folder)
    old, new = catsparse.load(folder), catsparse.load(saved)
    assert old.catsparse.config == new.catsparse.config
    assert torch.equal(logits(old), logits(new))
    catsparse.save(old, tmp_path / "new")
    assert json.loads((tmp_path / "new" / CONFIG).read_text())["format_version"] == FORMAT_VERSION
    assert torch.equal(logits(catsparse.load(tmp_path / "new")), logits(new))


def test_infinite_threshold_beside_per_neuron_ones(
    base: Path, calibration: catsparse.Calibration, tmp_path: Path
) -> None:
    """There the tensors hold no copy of the number that could differ."""
    catsparse.save(sparse_model(base, calibration, method="chess"), tmp_path)
    site("threshold", "1e999")(tmp_path)
    with pytest.raises(CatsparseError, match="finite") as caught:
        catsparse.load(tmp_path)
    one_line(caught.value)


def test_huge_json_is_refused_unread(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(saved, tmp_path / "artifact")
    huge_json(folder)
    monkeypatch.setattr(Path, "read_text", lambda *a, **k: pytest.fail("it was read"))
    with pytest.raises(CatsparseError, match="bytes"):
        catsparse.load(folder)


@pytest.mark.parametrize(
    "config",
    [
        llama_config(num_hidden_layers=1),
        llama_config(intermediate_size=64),
        llama_config(hidden_size=40),
        llama_config(hidden_act="gelu"),
        llama_config(mlp_bias=True, num_hidden_layers=1),
        Qwen2Config(**{**llama_config().to_dict(), "model_type": "qwen2"}),
    ],
    ids=["fewer layers", "other neurons", "other width", "other act", "biases", "other type"],
)
def test_another_model_is_refused(
    config: Any, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models: list[nn.Module] = []
    real = hub.load_dense_model
    monkeypatch.setattr(
        hub, "load_dense_model", lambda *a, **k: models.append(real(*a, **k)) or models[-1]
    )
    other = save_base(tmp_path / "other", config)
    with pytest.raises(CatsparseError) as caught:
        catsparse.load(saved, base_model=str(other))
    one_line(caught.value)
    assert_untouched(models[0])


@pytest.mark.parametrize("kind", ["calibration", "config"])
def test_failed_sparsify_leaves_the_model_dense(
    base: Path, calibration: catsparse.Calibration, kind: str
) -> None:
    """The first site fits, the second does not."""
    config = llama_config(num_hidden_layers=1)
    model = build(config)
    before = logits(model)
    classes = [type(m) for m in model.modules()]
    given: Any = calibration
    if kind == "config":
        sparse = sparse_model(base, calibration, method="cats", compensate=False)
        given = sparse.catsparse.config
    with pytest.raises(CatsparseError, match=r"layers\.1\.mlp"):
        catsparse.sparsify(model, given)
    assert_untouched(model)
    assert [type(m) for m in model.modules()] == classes
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p.mkdir(), "catsparse.json"),
        (lambda p: p.write_text("{}"), "is a file"),
        (lambda p: (p / CONFIG).mkdir(parents=True), "catsparse.json"),
        (lambda p: None, "thing"),
    ],
    ids=["empty", "a file", "a folder for a file", "absent"],
)
def test_not_an_artifact(make: Callable[[Path], Any], message: str, tmp_path: Path) -> None:
    make(tmp_path / "thing")
    with pytest.raises(CatsparseError, match=message) as caught:
        catsparse.load(tmp_path / "thing")
    one_line(caught.value)


def test_a_dense_model_is_not_an_artifact(base: Path) -> None:
    with pytest.raises(CatsparseError, match="catsparse directory"):
        catsparse.load(base)


@pytest.mark.parametrize(
    "damage",
    [
        "json truncated", "json is too deep", "json is huge", "unknown key", "threshold NaN",
        "tensors truncated", "tensors declare a huge header", "tensors are missing",
        "threshold of a wrong shape", "mean NaN", "site with a path", "metadata sites is too deep",
    ],
)  # fmt: skip
@pytest.mark.parametrize("through", ["catsparse", "transformers"])
def test_broken_merged_directory(damage: str, through: str, merged: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(merged, tmp_path / "merged")
    BROKEN[damage](folder)
    load = catsparse.load if through == "catsparse" else AutoModelForCausalLM.from_pretrained
    with pytest.raises(CatsparseError) as caught:
        load(folder)
    one_line(caught.value)


def test_merged_directory_without_its_artifact(merged: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(merged, tmp_path / "merged")
    (folder / CONFIG).unlink()
    with pytest.raises(CatsparseError, match=r"catsparse\.json"):
        AutoModelForCausalLM.from_pretrained(folder)


class _Marker:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.path,)


def test_pickled_base_is_never_opened(saved: Path, base: Path, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    pickle.loads(pickle.dumps(_Marker(marker)))
    assert marker.exists()  # the trap works
    marker.rmdir()
    trap = tmp_path / "trap"
    trap.mkdir()
    shutil.copy(base / "config.json", trap)
    (trap / "pytorch_model.bin").write_bytes(pickle.dumps(_Marker(marker)))
    folder = shutil.copytree(saved, tmp_path / "artifact")
    base_path(str(trap))(folder)
    for call in (
        lambda: catsparse.load(folder),
        lambda: catsparse.load(saved, base_model=str(trap)),
        lambda: hub.load_dense_model(str(trap)),
    ):
        with pytest.raises(CatsparseError, match="safetensors") as caught:
            call()
        one_line(caught.value)
        assert not marker.exists()


def test_pickled_adapter_beside_the_base_is_never_opened(
    saved: Path, base: Path, tmp_path: Path
) -> None:
    marker = tmp_path / "marker"
    trap = shutil.copytree(base, tmp_path / "trap")
    raw = {"peft_type": "LORA", "base_model_name_or_path": str(base), "target_modules": ["q_proj"]}
    (trap / "adapter_config.json").write_text(json.dumps(raw))
    (trap / "adapter_model.bin").write_bytes(pickle.dumps(_Marker(marker)))
    with pytest.raises(CatsparseError) as caught:
        catsparse.load(saved, base_model=str(trap))
    assert not marker.exists()
    one_line(caught.value)


def test_pickle_in_the_artifact_is_never_opened(saved: Path, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    folder = shutil.copytree(saved, tmp_path / "artifact")
    for name in (TENSORS, CONFIG):
        (folder / name).write_bytes(pickle.dumps(_Marker(marker)))
        with pytest.raises(CatsparseError):
            catsparse.load(folder)
    assert not marker.exists()


def test_code_beside_the_base_is_never_run(
    saved: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is anybody asked whether to run it."""
    marker = tmp_path / "marker"
    trap = shutil.copytree(base, tmp_path / "trap")
    (trap / "evil.py").write_text(f"import os; os.mkdir({str(marker)!r})")
    raw = json.loads((trap / "config.json").read_text())
    raw["model_type"] = "evil"
    raw["auto_map"] = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}
    (trap / "config.json").write_text(json.dumps(raw))
    questions: list[str] = []
    monkeypatch.setattr("builtins.input", lambda prompt="": questions.append(prompt) or "n")
    with pytest.raises(CatsparseError) as caught:
        catsparse.load(saved, base_model=str(trap))
    assert not marker.exists()
    assert questions == []
    one_line(caught.value)


# -- saving is all or nothing


def fail(*args: Any, **kwargs: Any) -> None:
    raise OSError("disk full")


def fail_on(name: str, real: Callable[..., None]) -> Callable[..., None]:
    """``real`` (os.replace), but it raises when the target is called ``name``."""

    def replace(source: Any, target: Any) -> None:
        if Path(target).name == name:
            fail()
        real(source, target)

    return replace


def half_written(tensors: Any, path: Any, metadata: Any = None) -> None:
    Path(path).write_bytes(b"half")
    fail()


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("save_file_stand_in", [fail, half_written], ids=["at once", "half-way"])
def test_failed_save_changes_nothing(
    base: Path,
    calibration: catsparse.Calibration,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    existing: bool,
    save_file_stand_in: Callable[..., None],
) -> None:
    folder = tmp_path / "out"
    old = sparse_model(base, calibration)
    if existing:
        catsparse.save(old, folder)
    before = {p.name: p.read_bytes() for p in folder.iterdir()} if existing else {}
    new = catsparse.sparsify(hub.load_dense_model(str(base)), calibration, 0.2, method="cats")
    with monkeypatch.context() as patch:
        patch.setattr(hub, "save_file", save_file_stand_in)
        with pytest.raises(OSError, match="disk full"):
            catsparse.save(new, folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    if existing:
        assert same_logits(catsparse.load(folder), old)


@pytest.mark.parametrize("method", ["cats", "chess", "energy"])
@pytest.mark.parametrize("name", [TENSORS, "README.md", CONFIG])
def test_save_interrupted_at_a_file_never_mixes(
    base: Path,
    calibration: catsparse.Calibration,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    method: str,
) -> None:
    """Old and new files side by side must not load as if they were one artifact."""
    old = sparse_model(base, calibration, method=method)
    catsparse.save(old, tmp_path)
    new = catsparse.sparsify(hub.load_dense_model(str(base)), calibration, 0.2, method=method)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail_on(name, os.replace))
        with pytest.raises(OSError, match="disk full"):
            catsparse.save(new, tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {CONFIG, TENSORS, "README.md"}
    try:
        loaded = catsparse.load(tmp_path)
    except CatsparseError:
        return  # said out loud
    if loaded.catsparse.config.sparsity == 0.6:
        assert same_logits(loaded, old)
    else:
        assert same_logits(loaded, new)


@pytest.mark.parametrize("where", ["save_file", "save_pretrained"])
def test_failed_merge_changes_nothing(
    merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    folder = shutil.copytree(merged, tmp_path / "merged")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    model = catsparse.load(folder)
    expected = logits(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    with monkeypatch.context() as patch:
        if where == "save_file":
            patch.setattr(hub, "save_file", fail)
        else:
            patch.setattr(type(model), "save_pretrained", fail)
        with pytest.raises(OSError, match="disk full"):
            catsparse.save(model, folder, merge=True)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert torch.equal(logits(catsparse.load(folder)), expected)
    # The model itself can still be saved.
    catsparse.save(model, folder, merge=True)
    assert same_logits(catsparse.load(folder), model)


@pytest.mark.parametrize("name", [TENSORS, CONFIG, "model.safetensors", "config.json"])
def test_merge_interrupted_at_a_file_never_mixes(
    merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The new weights must not meet the old thresholds."""
    folder = shutil.copytree(merged, tmp_path / "merged")
    old, model = catsparse.load(folder), catsparse.load(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    calibration = calibrate(catsparse.densify(model))
    catsparse.sparsify(model, calibration, 0.2)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail_on(name, os.replace))
        with pytest.raises(OSError, match="disk full"):
            catsparse.save(model, folder, merge=True)
    assert {p.name for p in folder.iterdir()} == {p.name for p in merged.iterdir()}
    try:
        loaded = catsparse.load(folder)
    except CatsparseError:
        return  # said out loud
    assert same_logits(loaded, old) or same_logits(loaded, model)


def test_read_artifact_needs_no_model(saved: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(saved, tmp_path / "artifact")
    base_path("/nonexistent/model")(folder)
    config, thresholds, calibration = hub.read_artifact(str(folder))
    assert set(thresholds) == set(config.sites) == set(calibration.sites)


def test_artifact_without_statistics_loads(
    base: Path, calibration: catsparse.Calibration, tmp_path: Path
) -> None:
    """Made from a config alone, there is nothing to choose another sparsity from."""
    config = sparse_model(base, calibration, method="cats", compensate=False).catsparse.config
    model = catsparse.sparsify(hub.load_dense_model(str(base)), config)
    catsparse.save(model, tmp_path)
    loaded = catsparse.load(tmp_path)
    assert loaded.catsparse.calibration is None
    assert same_logits(loaded, model)
    assert surgery.state_of(loaded).config == config
