"""The report's page: its numbers are the calibration's own; what it holds is inert and its own."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open

import catsparse
import pages
import tiny
from catsparse import CatsparseError, hub
from catsparse.config import SparsityConfig
from catsparse.page import ASSETS, SCRIPTS, render, write_page
from catsparse.page.levels import POSITIONS, histograms
from catsparse.page.numbers import exact, portable, rounded
from catsparse.page.payload import gather, short_names
from command import run

# Ends of a script that need no ">", what makes a script swallow its own end, marks of the template.
HOSTILE = "</script ><script>alert(1)</script/x <img src=x onerror=alert(2)> {{data}}\u2028&amp;\"'"
HOSTILE += "<!-- <script "


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pages.make_folder(tmp_path_factory.mktemp("page"))


@pytest.fixture(scope="module")
def payload(folder: Path) -> dict[str, Any]:
    return gather(folder, progress=False)


@pytest.mark.parametrize(
    ("method", "preview", "scope"),
    [
        ("cats", None, "mlp"),
        ("chess", None, "mlp"),
        ("energy", None, "mlp"),
        ("product", 4, "mlp"),
        ("teal", None, "mlp"),
        ("wina", None, "all"),
        ("energy", None, "all"),
    ],
)
def test_the_slider_has_the_thresholds_of_the_calibration(
    tmp_path: Path, method: str, preview: int | None, scope: str
) -> None:
    made = pages.make_folder(
        tmp_path, method=method, preview=preview, table=False, sparsity=0.6, scope=scope
    )
    shown = gather(made, progress=False)
    config, _, calibration = hub.read_artifact(str(made))
    assert calibration is not None
    assert shown["levels"]["positions"] == [k / 100 for k in range(98)]
    for at in (0, 1, 33, 50, 97):
        found = calibration.thresholds(POSITIONS[at], method, scope=scope)
        for name, of in zip((*config.sites, *config.inputs), shown["levels"]["sites"], strict=True):
            expected = found[name]
            assert of["sparsity"][at] == pytest.approx(expected.sparsity, rel=1e-5)
            if at == 0:
                assert [of[key][at] for key in ("scalar", "low", "middle", "high")] == [None] * 4
                continue
            assert np.float32(of["scalar"][at]) == np.float32(expected.scalar)
            values = np.sort(np.atleast_1d(expected.threshold.numpy()))
            if method == "product":  # one threshold on scores, whatever the neuron's norm
                values = np.array([np.float32(expected.scalar)])
            for key, share in (("low", 0.1), ("middle", 0.5), ("high", 0.9)):
                # Exactly one of the thresholds, and at that rank.
                assert np.float32(of[key][at]) == values[round(share * (len(values) - 1))]


@pytest.mark.parametrize("scope", ["mlp", "all"])
def test_the_slider_has_the_sparse_models_bytes(tmp_path: Path, scope: str) -> None:
    folder = pages.make_folder(tmp_path, sparsity=0.5, scope=scope)
    shown = gather(folder, progress=False)["levels"]
    _, _, calibration = hub.read_artifact(str(folder))
    assert calibration is not None
    model = tiny.build(tiny.llama_config())
    for at in (0, 40, 90):
        config = catsparse.sparsify(model, calibration, POSITIONS[at], scope=scope).catsparse.config
        assert shown["bytes"][at] == pytest.approx(config.bytes_skipped, rel=1e-5)
        assert shown["dropped"][at] == pytest.approx(config.measured_sparsity, rel=1e-5)
        catsparse.densify(model)


def test_the_saved_thresholds_are_those_of_the_files(payload: dict[str, Any], folder: Path) -> None:
    config = SparsityConfig.from_file(folder / "catsparse.json")
    assert payload["start"] == 50
    with safe_open(folder / "calibration.safetensors", framework="numpy") as file:
        for layer in payload["layers"]:
            site = config.sites[layer["name"]]
            values = file.get_tensor(f"{layer['name']}.threshold")
            assert layer["saved"]["scalar"] == pytest.approx(site.threshold, rel=1e-6)
            assert np.float32(layer["saved"]["middle"]) in values
            assert layer["saved"]["sparsity"] == pytest.approx(site.sparsity, rel=1e-5)


def test_predicted_losses_are_the_tables(payload: dict[str, Any], folder: Path) -> None:
    _, _, calibration = hub.read_artifact(str(folder))
    assert calibration is not None
    table = calibration.sensitivities
    assert table is not None
    shown = payload["sensitivities"]
    assert shown["why_not"] is None
    assert shown["grid"] == list(pages.GRID)
    for k, name in enumerate(table.losses):
        curve = shown["predicted"][k]
        assert curve[0] == 0
        measured = np.maximum.accumulate(table.losses[name].numpy())
        for point, loss in zip(pages.GRID, measured, strict=True):  # through what was measured
            assert curve[round(100 * point)] == pytest.approx(loss, rel=1e-5)
        assert all(a <= b for a, b in pairwise(curve[:91]))
        assert curve[91:] == [None] * 7  # the table ends at 90%
    config = hub.read_artifact(str(folder))[0]
    saved = sum(
        float(table.curve(name, torch.tensor([site.sparsity], dtype=torch.float64)))
        for name, site in config.sites.items()
    )
    assert shown["saved"] == pytest.approx(saved, rel=1e-5)


def test_no_prediction_from_another_methods_table(tmp_path: Path) -> None:
    made = pages.make_folder(tmp_path)
    model = hub.load(made)
    calibration = model.catsparse.calibration
    catsparse.sparsify(catsparse.densify(model), calibration, 0.5, "cats", compensate=False)
    catsparse.save(model, tmp_path / "cats")
    shown = gather(tmp_path / "cats", progress=False)["sensitivities"]
    assert shown.keys() == {"why_not"}
    assert "measured with energy, compensated, not with cats, uncompensated" in shown["why_not"]


def test_a_saved_sparsity_beyond_the_table_predicts_nothing(tmp_path: Path) -> None:
    shown = gather(pages.make_folder(tmp_path, sparsity=0.95), progress=False)
    assert shown["sensitivities"]["saved"] is None


def test_a_second_decision_is_left_out_of_the_slider(tmp_path: Path) -> None:
    made = pages.make_folder(tmp_path, table=False, sparsity=0.5, down_sparsity=0.7)
    shown = gather(made, progress=False)
    assert shown["model"]["down_asked"] == 0.7
    # Two thirds of what the gate drops, and nothing else.
    at = shown["start"]
    assert shown["levels"]["bytes"][at] == pytest.approx(
        2 / 3 * shown["levels"]["dropped"][at], rel=1e-5
    )
    assert shown["model"]["bytes"] > shown["levels"]["bytes"][at] + 0.05


@torch.no_grad()
def test_histograms_against_the_activations(payload: dict[str, Any]) -> None:
    model = tiny.build(tiny.llama_config())
    seen: list[list[np.ndarray]] = []
    for layer in model.model.layers:
        seen.append([])
        layer.mlp.gate_proj.register_forward_hook(
            lambda m, a, out, into=seen[-1]: into.append(F.silu(out).abs().flatten().numpy())
        )
    model(input_ids=tiny.tokens(8, 32, seed=7), use_cache=False)
    edges = np.array(payload["histograms"]["edges"])
    assert (np.diff(edges) > 0).all()
    for k, parts in enumerate(seen):
        values = np.concatenate(parts)
        counts, _ = np.histogram(values, edges)
        # Batches of another size sum in another order: one value may cross an edge.
        near = {"abs": 1.5 / len(values), "rel": 1e-3}
        shown = payload["histograms"]["shares"][k]
        assert shown == pytest.approx(counts / len(values), **near)
        below, above = payload["histograms"]["below"][k], payload["histograms"]["above"][k]
        assert below == pytest.approx((values <= edges[0]).mean(), **near)
        assert above == pytest.approx((values > edges[-1]).mean(), abs=1.5 / len(values))
        assert sum(shown) + below + above == pytest.approx(1, abs=1e-3)


def test_histograms_of_products_are_of_scores(tmp_path: Path) -> None:
    made = pages.make_folder(tmp_path, method="product", preview=4, table=False, sparsity=0.6)
    config, _, calibration = hub.read_artifact(str(made))
    assert calibration is not None
    shown = histograms(config, calibration)
    edges = np.array(shown["edges"])
    for k, name in enumerate(config.sites):
        # Below the one threshold on scores lies what is dropped.
        site = config.sites[name]
        bar = int(np.searchsorted(edges, site.threshold))
        least = shown["below"][k] + sum(shown["shares"][k][: bar - 1])
        assert least - 1e-3 <= site.sparsity <= least + shown["shares"][k][bar - 1] + 1e-3


def test_inputs_of_linear_layers_beside_neurons(tmp_path: Path) -> None:
    made = pages.make_folder(tmp_path, sparsity=0.5, scope="all")
    config, _, calibration = hub.read_artifact(str(made))
    assert calibration is not None
    shown = gather(made, progress=False)
    names = [*config.sites, *config.inputs]
    assert [layer["name"] for layer in shown["layers"]] == names
    assert [layer["axis"] for layer in shown["layers"]] == ["gate"] * 2 + ["input"] * 4
    assert [layer["method"] for layer in shown["layers"]] == ["energy"] * 2 + ["teal"] * 4
    assert shown["layers"][2]["size"] == 32
    assert shown["model"]["weights"] == "all linears'"
    assert shown["sensitivities"]["why_not"] is None
    for name, shares in zip(names, shown["histograms"]["shares"], strict=True):
        statistics = calibration.statistics.get(name) or calibration.input_statistics[name]
        whole = statistics.histogram.double() / statistics.histogram.sum()
        # One bar by hand: the quarter octave below 1.
        bar = shown["histograms"]["edges"].index(exact(float(np.float32(1 - 2**-9))))
        low, high = (int(torch.tensor(v).bfloat16().view(torch.int16)) for v in (0.875, 1.0))
        assert shares[bar - 1] == pytest.approx(float(whole[low:high].sum()), rel=1e-3)


def test_relu_zeros_lie_below_the_axis(tmp_path: Path) -> None:
    made = pages.make_folder(
        tmp_path, method="cats", table=False, config=tiny.llama_config(hidden_act="relu")
    )
    shown = gather(made, progress=False)["histograms"]
    assert all(0.3 < below < 0.7 for below in shown["below"])
    assert shown["edges"][0] >= 0


def test_saved_without_statistics(tmp_path: Path) -> None:
    shown = gather(pages.make_folder(tmp_path, keep=False), progress=False)
    assert shown["levels"] is None
    assert shown["histograms"] is None
    assert "without its calibration" in shown["sensitivities"]["why_not"]
    assert shown["layers"][0]["saved"]["sparsity"] == pytest.approx(0.5, abs=0.02)
    assert "</html>" in render(shown)


class _Parts(HTMLParser):
    """The page's elements, and the text inside its scripts and its title."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.inside = ""
        self.texts: dict[str, list[str]] = {"script": [], "style": [], "title": []}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.inside = tag
        if tag in self.texts:
            self.texts[tag].append("")

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        if self.inside in self.texts:
            self.texts[self.inside][-1] += data


def parts(page: str) -> _Parts:
    found = _Parts()
    found.feed(page)
    return found


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    made = pages.make_folder(tmp_path)
    config = hub.read_artifact(str(made))[0]
    assert config.base_model is not None
    assert config.calibration is not None
    shown = gather(made, progress=False)
    tags = [tag for tag, _ in parts(render(shown)).tags]
    shown["model"]["name"] = shown["calibration"]["data"] = shown["folder"] = HOSTILE
    shown["layers"][0]["name"] = HOSTILE
    page = render(shown)
    found = parts(page)
    assert [tag for tag, _ in found.tags] == tags  # no element more
    assert json.loads(found.texts["script"][0]) == shown  # and not a character lost
    assert found.texts["title"][0].startswith(HOSTILE)
    assert HOSTILE not in page
    assert len(found.texts["script"]) == 2


def test_hostile_names_from_the_files(tmp_path: Path) -> None:
    made = pages.make_folder(tmp_path, keep=False, table=False, method="cats", compensate=False)
    path = made / "catsparse.json"
    raw = json.loads(path.read_text())
    raw["base_model"]["name_or_path"] = "owner/<b>x</b>\x1b[31m\u202e" + "y" * 5000
    path.write_text(json.dumps(raw))
    shown = gather(made, progress=False)
    name = shown["model"]["name"]
    assert name.startswith("owner/<b>x</b>")
    assert name.isprintable()
    assert len(name) < 150
    assert "<b>x" not in render(shown)


def test_the_page_names_no_other_place(payload: dict[str, Any]) -> None:
    page = render(payload)
    # The name of SVG's namespace, which nobody fetches, is the only address in it.
    assert set(re.findall(r"\w+://[^\s\"'<)]*", page)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(
        r"@import|url\((?!#)|import\(|fetch\(|XMLHttpRequest|WebSocket|sendBeacon", page
    )
    found = parts(page)
    for tag, attributes in found.tags:
        assert not {"src", "srcset", "style", "action"} & attributes.keys(), tag
        assert not any(name.startswith("on") for name in attributes), tag
        if "href" in attributes:
            assert re.match(r"#|data:,$", attributes["href"] or ""), attributes


def test_the_policy_allows_just_this_style_and_script(payload: dict[str, Any]) -> None:
    found = parts(render(payload))
    policy = next(a["content"] for _, a in found.tags if "http-equiv" in a) or ""
    assert policy.startswith("default-src 'none'; ")
    for text in (found.texts["style"][0], found.texts["script"][1]):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy
    assert "unsafe" not in policy


def test_the_same_page_twice(folder: Path, tmp_path: Path) -> None:
    write_page(folder, tmp_path / "a.html", progress=False)
    write_page(folder, tmp_path / "b.html", progress=False)
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.html", "b.html"]


def test_the_page_of_32_layers_is_below_2_megabytes(tmp_path: Path) -> None:
    config = tiny.llama_config(num_hidden_layers=32)
    made = pages.make_folder(tmp_path, table=False, config=config)
    calibration = hub.read_artifact(str(made))[2]
    assert calibration is not None
    names = list(calibration.sites)
    calibration.sensitivities = catsparse.Sensitivities(
        "energy", True, None, 64, pages.GRID,
        {n: torch.tensor([0.0123456, 0.123456, 1.23456], dtype=torch.float64) for n in names},
    )  # fmt: skip
    model = hub.load_dense_model(str(tmp_path / "tiny"))
    catsparse.save(catsparse.sparsify(model, calibration, 0.5), made)
    path, shown = write_page(made, progress=False)
    assert len(shown["sensitivities"]["predicted"]) == 32
    assert path == made / "report.html"
    assert path.stat().st_size < 500_000


def test_short_names() -> None:
    assert short_names(["model.layers.0.mlp", "model.layers.11.mlp"]) == ["0", "11"]
    assert short_names(["a.0.b", "a.0.c"]) == ["b", "c"]
    assert short_names(["l.0.e.0.m", "l.0.e.1.m", "l.1.e.0.m"]) == ["0.e.0", "0.e.1", "1.e.0"]
    assert short_names(["model.layers.0.mlp"]) == ["0"]
    assert short_names(["mlp"]) == ["mlp"]
    assert short_names(["same", "same.more"]) == ["same", "same.more"]


def test_numbers_and_names() -> None:
    assert rounded(0.123456789) == 0.123457
    assert exact(0.1) == 0.1
    assert np.float32(exact(float(np.float32(1 / 3)))) == np.float32(1 / 3)
    assert exact(1e300) == pytest.approx(3.4028235e38)
    assert portable("/home/somebody/models/mine/") == "mine"
    assert portable("C:\\models\\mine") == "mine"
    assert portable("~/mine") == "mine"
    assert portable("owner/name") == "owner/name"
    assert portable("a\nb") == "a b"


def test_the_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "page.html"
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps(pages.compare_row()) + "\n" + json.dumps(pages.bench_row()) + "\n")
    code, text, _ = run(capsys, "report", folder, "-o", output, "--rows", rows, "--json")
    assert code == 0
    assert json.loads(text) == {
        "page": str(output),
        "bytes": output.stat().st_size,
        "layers": 2,
        "rows": {"compare": 1, "tasks": 0, "evaluate": 0, "bench": 1},
        "predicts": True,
    }
    code, text, _ = run(capsys, "report", folder)
    assert (code, text) == (0, f"{folder / 'report.html'}\n")


def test_the_command_says_why_it_predicts_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = pages.make_folder(tmp_path, table=False)
    code, _, errors = run(capsys, "report", made)
    assert code == 0
    assert "no predicted loss: the calibration holds no table" in errors


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda made: (made / "catsparse.json").unlink(), "holds no catsparse.json"),
        (lambda made: (made / "calibration.safetensors").unlink(), "calibration.safetensors"),
        (lambda made: edit(made, '"sparsity": 0.5', '"sparsity": NaN'), "NaN is not a number"),
        (lambda made: edit(made, '"sparsity": 0.5', '"sparsity": 1e999'), "not a finite number"),
        (lambda made: edit(made, '"format_version": ', '"format_version": 9'), "upgrade"),
        (lambda made: edit(made, '"prefill": "masked"', '"prefill": "x"'), "prefill must be"),
        (lambda made: edit(made, "{", "{" + " " * (17 * 2**20)), "not one of ours"),
        (lambda made: edit(made, "energy", "chess"), "do not belong together"),
        (lambda made: cut(made / "calibration.safetensors"), "damaged"),
    ],
)
def test_hostile_folders(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Any, words: str
) -> None:
    made = pages.make_folder(tmp_path, table=False)
    damage(made)
    capsys.readouterr()
    code, text, errors = run(capsys, "report", made)
    assert code == 2
    assert text == ""
    assert words in errors
    assert errors.count("\n") == 1
    assert not (made / "report.html").exists()


def edit(made: Path, old: str, new: str) -> None:
    path = made / "catsparse.json"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def test_statistics_with_nan_are_refused(tmp_path: Path) -> None:
    made = pages.make_folder(tmp_path, table=False)
    model = hub.load(made)
    for name, statistics in model.catsparse.calibration.statistics.items():
        broken = replace(statistics, gate_square=statistics.gate_square * torch.nan)
        model.catsparse.calibration.statistics[name] = broken
    catsparse.save(model, made)
    with pytest.raises(CatsparseError, match="damaged"):
        gather(made, progress=False)


def test_a_place_that_cannot_be_written(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CatsparseError, match="cannot write"):
        write_page(folder, tmp_path / "file" / "page.html", progress=False)


def test_every_asset_is_used() -> None:
    found = {path.name for path in ASSETS.iterdir()}
    assert found == {*SCRIPTS, "page.html", "style.css"}
    for name in found:
        assert len((ASSETS / name).read_text(encoding="utf-8").splitlines()) <= 400
    # None may end its own element early.
    assert not any("</" in (ASSETS / name).read_text(encoding="utf-8") for name in SCRIPTS)


# Machado, Oliveira and Fernandes, IEEE TVCG 15 (2009): full dichromacy, linear RGB.
DICHROMATS = {
    "none": np.eye(3),
    "protan": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
         [-0.003882, -0.048116, 1.051998]]
    ),
    "deutan": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
         [-0.011820, 0.042940, 0.968881]]
    ),
    "tritan": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602],
         [0.004733, 0.691367, 0.303900]]
    ),
}  # fmt: skip


def linear(color: str) -> np.ndarray:
    c = np.array([int(color[k : k + 2], 16) / 255 for k in (1, 3, 5)])
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def lab(rgb: np.ndarray) -> np.ndarray:
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    xyz = np.array(to_xyz) @ np.clip(rgb, 0, 1) / np.array([0.9505, 1, 1.089])
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("theme", [0, 1])
@pytest.mark.parametrize("eyes", DICHROMATS)
def test_colours_keep_apart_and_stand_out(theme: int, eyes: str) -> None:
    style = (ASSETS / "style.css").read_text(encoding="utf-8")
    pairs = re.findall(r"--(\w+): light-dark\((#\w{6}), (#\w{6})\)", style)
    colors = {name: both[theme] for name, *both in pairs}
    page = linear(colors["page"]) @ [0.2126, 0.7152, 0.0722]

    def contrast(name: str) -> float:
        own = linear(colors[name]) @ [0.2126, 0.7152, 0.0722]
        low, high = sorted([own, page])
        return float((high + 0.05) / (low + 0.05))

    for name in ("ink", "soft", "mark"):  # WCAG's AA for text
        assert contrast(name) >= 4.5
    series = ["c0", "c1", "c2", "c3", "c4", "mark"]
    for k, name in enumerate(series):
        assert contrast(name) >= 2.95  # and for what is drawn
        for other in series[:k]:
            one, two = (lab(DICHROMATS[eyes] @ linear(colors[n])) for n in (name, other))
            assert np.linalg.norm(one - two) > 15, (name, other)
