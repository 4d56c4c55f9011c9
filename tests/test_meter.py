"""Achieved sparsity against counting by hand."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import catsparse
import tiny
from catsparse import CatsparseError, achieved_sparsity, sparsify
from catsparse import modules as sparse_forward
from catsparse.config import SiteConfig, SparsityConfig
from catsparse.kernels import dequantize, make_preview
from catsparse.modules import sparse_modules

SITES = ["model.layers.0.mlp", "model.layers.1.mlp"]


def watch(model: nn.Module) -> dict[str, list[Tensor]]:
    """Every gate's output from now on, by site."""
    gates: dict[str, list[Tensor]] = {name: [] for name in sparse_modules(model)}
    for name, mlp in sparse_modules(model).items():
        mlp.gate_proj.register_forward_hook(
            lambda m, a, out, name=name: gates[name].append(out.detach().flatten(0, -2))
        )
    return gates


def dropped_by_hand(model: nn.Module, gates: dict[str, list[Tensor]]) -> dict[str, Tensor]:
    return {
        name: F.silu(torch.cat(outputs)).abs() <= model.get_submodule(name).catsparse_threshold
        for name, outputs in gates.items()
    }


@pytest.mark.parametrize("method", ["cats", "chess", "energy"])
@pytest.mark.parametrize("length", [tiny.SHORT, tiny.LONG])
def test_against_counting_by_hand(
    llama: Any, calibration: catsparse.Calibration, method: str, length: int
) -> None:
    sparsify(llama, calibration, 0.6, method)
    gates = watch(llama)
    with achieved_sparsity(llama) as meter:
        tiny.logits(llama, length)
        tiny.logits(llama, length, seed=8)
    dropped = dropped_by_hand(llama, gates)
    assert {n: len(d) for n, d in dropped.items()} == dict.fromkeys(SITES, 2 * length)
    assert list(meter.sites) == SITES
    for name, share in meter.sites.items():
        assert share == pytest.approx(float(dropped[name].double().mean()), abs=1e-12)
    everything = torch.cat([d.flatten() for d in dropped.values()]).double()
    assert meter.sparsity == pytest.approx(float(everything.mean()), abs=1e-12)
    assert 0.3 < meter.sparsity < 0.9


def test_decode_steps_are_counted(sparse_llama: Any) -> None:
    gates = watch(sparse_llama)
    with achieved_sparsity(sparse_llama) as meter:
        sparse_llama.generate(tiny.tokens(1, 20), max_new_tokens=5, do_sample=False)
    dropped = dropped_by_hand(sparse_llama, gates)
    assert len(dropped[SITES[0]]) == 24  # the last token is not run again
    for name, share in meter.sites.items():
        assert share == pytest.approx(float(dropped[name].double().mean()), abs=1e-12)


@pytest.mark.parametrize(
    ("length", "starts"),
    [
        (1, [0]),
        (2, [0, 1]),
        (3, [0, 1, 2]),
        (8, [0, 1, 2, 4]),
        (9, [0, 1, 2, 4, 8]),
        (24, [0, 1, 2, 4, 8, 16]),
    ],
)
def test_positions_against_counting_by_hand(
    sparse_llama: Any, length: int, starts: list[int]
) -> None:
    gates = watch(sparse_llama)
    with achieved_sparsity(sparse_llama, positions=True) as meter, torch.no_grad():
        for rows, seed in ((3, 1), (2, 5)):
            sparse_llama(input_ids=tiny.tokens(rows, length, seed=seed), use_cache=False)
    dropped = dropped_by_hand(sparse_llama, gates)
    found = meter.positions
    assert found is not None
    assert (found.starts, found.length) == (starts, length)
    by_place = {name: d.view(5, length, -1).double() for name, d in dropped.items()}
    for k, (a, b) in enumerate(zip(starts, [*starts[1:], length], strict=True)):
        here = [values[:, a:b] for values in by_place.values()]
        assert found.sparsity[k] == pytest.approx(float(torch.cat(here).mean()), abs=1e-12)
        for name, values in zip(by_place, here, strict=True):
            assert found.sites[name][k] == pytest.approx(float(values.mean()), abs=1e-12)
    # What is counted besides is the same as without positions.
    for name, share in meter.sites.items():
        assert share == pytest.approx(float(dropped[name].double().mean()), abs=1e-12)


def test_positions_of_texts_of_different_length(sparse_llama: Any) -> None:
    gates = watch(sparse_llama)
    with achieved_sparsity(sparse_llama, positions=True) as meter, torch.no_grad():
        for length in (6, 20):
            sparse_llama(input_ids=tiny.tokens(1, length), use_cache=False)
    found = meter.positions
    assert found is not None
    assert (found.starts, found.length) == ([0, 1, 2, 4, 8, 16], 20)
    dropped = dropped_by_hand(sparse_llama, gates)[SITES[0]].double()
    short, long = dropped[:6], dropped[6:]
    expected = torch.cat([short[4:6], long[4:8]]).mean()  # the shorter one ends in this bucket
    assert found.sites[SITES[0]][3] == pytest.approx(float(expected), abs=1e-12)


def test_no_positions_unless_asked_for_or_known(sparse_llama: Any) -> None:
    with achieved_sparsity(sparse_llama) as meter:
        tiny.logits(sparse_llama)
    assert meter.positions is None
    mlp = sparse_llama.get_submodule(SITES[0])
    with achieved_sparsity(sparse_llama, positions=True) as meter, torch.no_grad():
        mlp(torch.randn(7, 32))  # tokens in a row, as an expert sees them
    assert meter.positions is None
    assert meter.sparsity > 0


def test_calibration_tokens_give_the_measured_sparsity(sparse_llama: Any, windows: Tensor) -> None:
    """On the text of calibration the first site, whose input is still dense, does as promised."""
    with achieved_sparsity(sparse_llama) as meter, torch.no_grad():
        sparse_llama(input_ids=windows, use_cache=False)
    promised = sparse_llama.catsparse.config.sites[SITES[0]].sparsity
    assert meter.sites[SITES[0]] == pytest.approx(promised, abs=0.02)


def mixed_sizes() -> Any:
    """Two layers whose MLPs differ in size: 48 and 96 neurons; all dropped, none dropped."""
    model = tiny.build(tiny.llama_config())
    model.model.layers[1].mlp = (
        tiny.build(tiny.llama_config(intermediate_size=96)).model.layers[1].mlp
    )
    sites = {
        SITES[0]: SiteConfig(1e30, 1.0, "silu", 32, 48),
        SITES[1]: SiteConfig(-1.0, 0.0, "silu", 32, 96),
    }
    return sparsify(model, SparsityConfig(sites=sites))


def test_formulas_with_sites_of_different_sizes() -> None:
    model = mixed_sizes()
    with achieved_sparsity(model) as meter:
        tiny.logits(model)
    assert meter.sites == {SITES[0]: 1.0, SITES[1]: 0.0}
    assert meter.sparsity == pytest.approx(48 / (48 + 96))
    # Up and down of dropped neurons are two thirds of an MLP's bytes.
    assert meter.bytes_skipped == pytest.approx(2 / 3 * 48 / (48 + 96))
    assert meter.bytes_skipped == pytest.approx(model.catsparse.config.bytes_skipped)


def test_bytes_skipped_is_two_thirds_of_the_sparsity(sparse_llama: Any) -> None:
    with achieved_sparsity(sparse_llama) as meter:
        tiny.logits(sparse_llama)
    assert meter.bytes_skipped == pytest.approx(2 / 3 * meter.sparsity)


def test_counting_does_not_change_the_result(sparse_llama: Any) -> None:
    for length in (tiny.SHORT, tiny.LONG):
        expected = tiny.logits(sparse_llama, length)
        with achieved_sparsity(sparse_llama):
            counted = tiny.logits(sparse_llama, length)
        torch.testing.assert_close(counted, expected, rtol=1e-3, atol=1e-3)


def test_read_inside_and_after(sparse_llama: Any) -> None:
    with achieved_sparsity(sparse_llama) as meter:
        tiny.logits(sparse_llama)
        inside = meter.sparsity
    assert meter.sparsity == inside
    tiny.logits(sparse_llama, seed=8)
    assert meter.sparsity == inside  # outside the block nothing is counted


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_nothing_is_left_behind(
    sparse_llama: Any, error: type[BaseException] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = pytest.raises(error) if error else contextlib.nullcontext()
    with expected, achieved_sparsity(sparse_llama):
        assert all(m.catsparse_counter for m in sparse_modules(sparse_llama).values())
        if error:
            raise error
    assert all(m.catsparse_counter is None for m in sparse_modules(sparse_llama).values())
    calls = []
    op = sparse_forward.gated_mlp
    monkeypatch.setattr(
        sparse_forward, "gated_mlp", lambda *a, **options: calls.append(1) or op(*a, **options)
    )
    tiny.logits(sparse_llama, tiny.SHORT)
    assert len(calls) == 2  # decode is back on the op


def test_no_token_yet(sparse_llama: Any) -> None:
    with achieved_sparsity(sparse_llama) as meter:
        assert meter.sites == {}
        for read in (lambda: meter.sparsity, lambda: meter.bytes_skipped):
            with pytest.raises(CatsparseError, match="no token") as caught:
                read()
            assert "\n" not in str(caught.value)


def test_dense_model(llama: Any) -> None:
    with pytest.raises(CatsparseError, match="not sparse"), achieved_sparsity(llama):
        pass


def test_meter_within_a_meter_is_refused(sparse_llama: Any) -> None:
    """Two would share one counter, and the outer one would count less than it says."""
    with achieved_sparsity(sparse_llama) as outer:
        tiny.logits(sparse_llama)
        counted = outer.sparsity
        with pytest.raises(CatsparseError), achieved_sparsity(sparse_llama):
            pass
        assert outer.sparsity == counted
        assert all(m.catsparse_counter for m in sparse_modules(sparse_llama).values())


def test_both_decisions_against_counting_by_hand(llama: Any, windows: Tensor) -> None:
    calibration = catsparse.calibrate(llama, windows, preview=4, products_at=0.4, progress=False)
    sparsify(llama, calibration, 0.4, down_sparsity=0.6)
    inputs: dict[str, Tensor] = {}
    for name, mlp in sparse_modules(llama).items():
        mlp.register_forward_pre_hook(
            lambda m, a, name=name: inputs.update({name: a[0].flatten(0, -2)})
        )
    with torch.no_grad(), achieved_sparsity(llama) as meter:
        tiny.logits(llama)
    shares = []
    for name, x in inputs.items():
        mlp = llama.get_submodule(name)
        packed, scale = make_preview(mlp.gate_proj.weight, 4)
        decides = F.silu(x @ dequantize(packed, scale, 32, x.dtype).t())
        h = F.silu(x @ mlp.gate_proj.weight.t()) * (x @ mlp.up_proj.weight.t())
        keep = decides.abs() > mlp.catsparse_threshold
        kept = keep & (h.abs() > mlp.catsparse_product_threshold)
        up, down = (1 - float(m.double().mean()) for m in (keep, kept))
        assert meter.sites[name] == pytest.approx(up, abs=2e-3)
        assert meter.down_sites[name] == pytest.approx(down, abs=2e-3)
        read = (packed.nbytes + scale.nbytes) / (3 * 48 * 32 * 4)  # of fp32 weights
        shares.append((up, down, (2 * up + down) / 3 - read))
        with_all_of_down = (2 * up) / 3 - read
        assert meter.site_bytes_skipped(name, down=False) == pytest.approx(
            with_all_of_down, abs=2e-3
        )
    for i, value in enumerate((meter.sparsity, meter.down_sparsity, meter.bytes_skipped)):
        assert value == pytest.approx(sum(share[i] for share in shares) / 2, abs=2e-3)
    assert meter.down_sparsity > meter.sparsity + 0.1


def test_product_of_the_preview_against_counting_by_hand(llama: Any, windows: Tensor) -> None:
    sparsify(llama, catsparse.calibrate(llama, windows, preview=4, progress=False), 0.6)
    inputs: dict[str, Tensor] = {}
    for name, mlp in sparse_modules(llama).items():
        mlp.register_forward_pre_hook(
            lambda m, a, name=name: inputs.update({name: a[0].flatten(0, -2)})
        )
    with torch.no_grad(), achieved_sparsity(llama) as meter:
        tiny.logits(llama)
    for name, x in inputs.items():
        mlp = llama.get_submodule(name)
        previews = [make_preview(getattr(mlp, c).weight, 4) for c in ("gate_proj", "up_proj")]
        gate, up = (x @ dequantize(*preview, 32, x.dtype).t() for preview in previews)
        dropped = (F.silu(gate) * up).abs() <= mlp.catsparse_threshold
        share = float(dropped.double().mean())
        assert meter.sites[name] == meter.down_sites[name] == pytest.approx(share, abs=2e-3)
        read = sum(t.nbytes for preview in previews for t in preview) / (3 * 48 * 32 * 4)
        skipped = meter.site_bytes_skipped(name)
        assert skipped == pytest.approx(share - read, abs=2e-3)
        assert meter.site_bytes_skipped(name, down=False) == pytest.approx(
            2 / 3 * share - read, abs=2e-3
        )
    assert meter.bytes_skipped == pytest.approx(meter.sparsity - read)
    assert meter.sparsity == meter.down_sparsity == pytest.approx(0.6, abs=0.05)


@pytest.mark.parametrize(("method", "rows"), [("energy", 2), ("product", 1)])
def test_preview_that_is_not_in_use_is_not_counted(
    llama: Any, windows: Tensor, method: str, rows: int
) -> None:
    """The exact gate must be read, for the exact product W_up as well."""
    calibration = catsparse.calibrate(llama, windows, preview=4, progress=False)
    sparsify(llama, calibration, method=method)
    for mlp in sparse_modules(llama).values():
        mlp.gate_proj.register_forward_hook(lambda *_: None)
    with torch.no_grad(), achieved_sparsity(llama) as meter:
        tiny.logits(llama)
    assert meter.down_sparsity == meter.sparsity
    assert meter.bytes_skipped == pytest.approx(rows / 3 * meter.sparsity)
