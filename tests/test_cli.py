"""The command line, run in-process on the bundled model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from catsparse import Calibration, cli
from catsparse.cli.common import summarize_paths
from catsparse.explanation import model_paths
from catsparse.kernels import Backend
from catsparse.text import Written
from command import call, run

SMALL = ["--tokens", "4096", "--seq-len", "256"]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model at 50%, made by the command itself."""
    directory = tmp_path_factory.mktemp("cli") / "half"
    assert call("sparsify", "-o", directory, *SMALL) == 0
    return directory


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    from catsparse import __version__

    assert run(capsys, "--version")[:2] == (0, f"{__version__}\n")
    code, text, _ = run(capsys, "--help")
    assert code == 0
    assert "report" in text
    for command in ("sparsify", "evaluate", "compare", "generate", "chat", "info", "plot", "demo"):
        assert command in text


def test_sparsify_writes_an_artifact_and_no_weights(artifact: Path) -> None:
    names = {path.name for path in artifact.iterdir()}
    assert names == {"catsparse.json", "calibration.safetensors", "README.md"}
    config = json.loads((artifact / "catsparse.json").read_text())
    assert config["base_model"]["name_or_path"] == "default"
    assert config["calibration"]["tokens"] == 4096


def test_evaluate_json_has_the_promised_keys(
    artifact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, text, _ = run(capsys, "evaluate", artifact, *SMALL, "--json")
    result = json.loads(text)
    assert code == 0
    assert {"perplexity", "dense_perplexity", "sparsity", "bytes_skipped", "sites"} <= set(result)
    assert len(result["sites"]) == 7
    assert result["perplexity"] > result["dense_perplexity"]
    assert abs(result["sparsity"] - 0.5) < 0.03
    assert result["bytes_skipped"] == pytest.approx(2 / 3 * result["sparsity"], abs=1e-6)
    assert (result["base_model"], result["seq_len"]) == ("default", 256)
    config = json.loads((artifact / "catsparse.json").read_text())
    assert result["expected_sites"] == {n: s["sparsity"] for n, s in config["sites"].items()}
    assert result["positions"]["starts"] == [0, 1, 2, 4, 8, 16, 32, 64, 128]
    assert result["positions"]["sites"].keys() == result["sites"].keys()


def test_evaluation_of_one_window_is_json(
    artifact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a single window there is no standard error, and JSON has no NaN."""
    one = ["--tokens", "256", "--seq-len", "256", "--json"]
    for model in (artifact, "default"):
        code, text, _ = run(capsys, "evaluate", model, *one)
        assert code == 0
        assert json.loads(text, parse_constant=pytest.fail)["perplexity_se"] is None


def test_report_of_the_bundled_model(
    artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The rows of evaluate are those that report takes."""
    _, text, _ = run(capsys, "evaluate", artifact, *SMALL, "--json")
    (tmp_path / "evaluate.json").write_text(text)
    code, text, _ = run(
        capsys, "report", artifact, "-o", tmp_path / "page.html",
        "--rows", tmp_path / "evaluate.json", "--json",
    )  # fmt: skip
    assert code == 0
    assert json.loads(text)["rows"]["evaluate"] == 1
    assert '"own":true' in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_evaluate_table_and_dense_model(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, text, _ = run(capsys, "evaluate", artifact, *SMALL)
    assert code == 0
    assert "model.layers.6.mlp" in text
    code, text, _ = run(capsys, "evaluate", *SMALL, "--json")
    assert code == 0
    assert set(json.loads(text)) >= {"perplexity", "perplexity_se", "tokens"}


def test_zero_sparsity_is_the_dense_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(capsys, "sparsify", "-o", tmp_path / "zero", "--sparsity", 0, *SMALL)[0] == 0
    _, text, _ = run(capsys, "evaluate", tmp_path / "zero", *SMALL, "--json")
    result = json.loads(text)
    assert result["perplexity"] == result["dense_perplexity"]
    assert result["sparsity"] == 0


def test_new_sparsity_from_a_saved_calibration(
    artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, text, _ = run(
        capsys, "sparsify", artifact, "-o", tmp_path / "more", "--sparsity", 0.7, "--json",
        "--method", "cats", "--no-compensate",
    )  # fmt: skip
    result = json.loads(text)
    assert code == 0
    assert result["calibration_tokens"] == 4096
    assert result["sparsity"] == pytest.approx(0.7, abs=0.005)
    assert result["method"] == "cats"


def test_merge_writes_a_whole_model(
    artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    merged = tmp_path / "merged"
    assert run(capsys, "sparsify", artifact, "-o", merged, "--merge")[0] == 0
    names = {path.name for path in merged.iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "catsparse.json"} <= names
    assert json.loads((merged / "config.json").read_text())["quantization_config"] == {
        "quant_method": "cats"
    }
    _, one, _ = run(capsys, "evaluate", artifact, *SMALL, "--json")
    _, two, _ = run(capsys, "evaluate", merged, *SMALL, "--json")
    assert json.loads(one)["perplexity"] == json.loads(two)["perplexity"]


def test_store_preview(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    merged = tmp_path / "merged"
    options = [*SMALL[:2], "--preview", 4, "--merge", "--store-preview"]
    assert run(capsys, "sparsify", "default", "-o", merged, *options)[0] == 0
    assert (merged / "previews.safetensors").is_file()
    monkeypatch.setattr("catsparse.derived.Derived.make_preview", None)  # calling it would fail
    assert run(capsys, "generate", merged, "-p", "The", "-n", "2", "--greedy")[0] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--preview", 4, "--store-preview"], "give --merge as well"),
        (["--merge", "--store-preview"], "give --preview 4 as well"),
    ],
)
def test_store_preview_needs_both(
    options: list[Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Said before anything is calibrated."""
    code, _, errors = run(capsys, "sparsify", "default", "-o", tmp_path / "out", *options)
    assert code == 2
    assert message in errors
    assert not (tmp_path / "out").exists()


def test_generate_streams_and_compares(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompt = ["-p", "The captain looked", "-n", "12", "--greedy"]
    code, text, _ = run(capsys, "generate", artifact, *prompt, "--compare", "--json")
    result = json.loads(text)
    assert code == 0
    assert result["tokens"] <= 12
    assert result["text"]
    assert result["dense_text"]
    code, streamed, _ = run(capsys, "generate", artifact, *prompt)
    assert code == 0
    assert streamed.strip() == ("The captain looked" + result["text"]).strip()
    _, dense, _ = run(capsys, "generate", "default", *prompt, "--json")
    assert json.loads(dense)["text"] == result["dense_text"]


def test_generate_stats(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompt = ["-p", "The captain looked", "-n", "12", "--greedy"]
    _, text, _ = run(capsys, "generate", artifact, *prompt, "--stats", "--compare", "--json")
    result = json.loads(text)
    assert result["prompt_tokens"] == 4
    assert result["tokens"] == 12
    assert 0 < result["seconds_to_first_token"] < 12 / result["tokens_per_second"]
    assert result["decode_tokens_per_second"] > 0
    assert result["dense_decode_tokens_per_second"] > 0
    assert 0.3 < result["sparsity_min"] < result["sparsity"] < result["sparsity_max"] < 0.7
    # Gate, up and down of 7 layers are 6,021,120 of the 9.5M weights that a step reads.
    assert result["bytes_skipped_of_all"] < result["bytes_skipped"]
    assert result["bytes_skipped"] in (pytest.approx(2 / 3 * result["sparsity"]), 0)
    if result["bytes_skipped"]:
        share = result["bytes_skipped_of_all"] / result["bytes_skipped"]
        assert share == pytest.approx(6_021_120 / 9_479_360, rel=0.01)
    assert json.loads(run(capsys, "info", artifact, "--json")[1])["decode"]["bfloat16"] in (
        result["decode"].removesuffix(", reading kept rows of up and down")
    )
    shown = run(capsys, "generate", artifact, *prompt, "--stats")[1]
    assert shown.startswith("The captain looked" + result["text"] + "\n")
    for part in (
        "4 tokens, first token after",
        "by layer)",
        "of all that a step reads",
        "they run by",
    ):
        assert part in shown


def test_generate_stats_of_a_dense_model(capsys: pytest.CaptureFixture[str]) -> None:
    code, text, _ = run(capsys, "generate", "-p", "The", "-n", "2", "--stats", "--json")
    result = json.loads(text)
    assert code == 0
    assert "sparsity" not in result
    assert result["decode_tokens_per_second"] is None  # of two tokens one is the prefill's
    assert "too few" in run(capsys, "generate", "-p", "The", "-n", "2", "--stats")[1]


def test_stats_of_experts_give_no_share_of_all(
    sparse_llama: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """A token reads a few experts only, so what a step reads is not known."""
    command = sys.modules["catsparse.cli.generate"]
    found = Written("", tiny.tokens(1, 6)[0], 4, 1.0, (0.5, 0.75))
    assert 0 <= command._measured(sparse_llama, found, True)["bytes_skipped_of_all"] < 1
    sparse_llama.register_parameter("experts", torch.nn.Parameter(torch.zeros(2, 3, 4)))
    stats = command._measured(sparse_llama, found, True)
    assert stats["bytes_skipped_of_all"] is None
    command._show_stats({"tokens": 2} | stats)
    assert "of all" not in capsys.readouterr().out


def test_paths_are_told_apart_where_they_differ(sparse_llama: Any) -> None:
    paths = model_paths(sparse_llama)
    one = paths["model.layers.0.mlp"].words
    assert summarize_paths(paths) == one
    sparse_llama.model.layers[1].mlp.set_backend(Backend.TORCH, True)
    told = summarize_paths(model_paths(sparse_llama))
    assert told == f"{one} in 1 of 2 layers; torch, dense matmuls (asked for) in 1 of 2 layers"


def test_info_of_artifact_and_of_dense_model(
    artifact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, text, _ = run(capsys, "info", artifact, "--json")
    assert code == 0
    assert json.loads(text)["method"] == "energy"
    assert set(json.loads(text)["decode"]) == {"float32", "bfloat16", "float16"}
    shown = run(capsys, "info", artifact)[1]
    assert "model.layers.0.mlp" in shown
    assert "decode here in bfloat16: by " in shown
    assert "dense gated MLP (silu)" in run(capsys, "info")[1]


def test_plot_writes_png_and_svg(
    artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib", reason="plots need matplotlib")
    code, text, _ = run(capsys, "plot", artifact, "-o", tmp_path, "--layers", "0,6", "--json")
    assert code == 0
    paths = [Path(path) for path in json.loads(text)["plots"]]
    assert sorted(p.name for p in paths) == [
        "histograms.png", "histograms.svg", "sparsity.png", "sparsity.svg",
    ]  # fmt: skip
    assert paths[0].read_bytes().startswith(b"\x89PNG")
    assert b"<svg" in paths[1].read_bytes()


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["sparsify", "-o", "OUT", "--sparsity", "1.5"], "below 1"),
        (["sparsify", "-o", "OUT", "--method", "magic"], "cats, chess"),
        (["sparsify", "-o", "OUT", "--data", "absent.txt"], "absent.txt"),
        (["sparsify", "-o", "OUT", "--tokens", "100"], "window"),
        (["sparsify", "-o", "OUT", "--device", "nonsense"], "device"),
        (["sparsify", "/nowhere/at/all", "-o", "OUT"], "/nowhere/at/all"),
        (["evaluate", "OUT"], "catsparse.json"),
        (["plot", "OUT"], "catsparse.json"),
        (["generate", "-p", "x", "--compare"], "dense"),
        (["generate", "-p", "x", "--temperature", "0"], "temperature"),
        (["generate", "-p", ""], "prompt"),
        (["sparsify", "-o", "OUT", "--sparsity", "0.5", "--bytes-skipped", "0.3"], "not both"),
        (["sparsify", "-o", "OUT", "--bytes-skipped", "0.7"], "below 0.667"),
        (["sparsify", "-o", "OUT", "--bytes-skipped", "-0.1"], "0.000 to"),
        (["sparsify", "-o", "OUT", "--bytes-skipped", "nan"], "0.000 to"),
        (["sparsify", "-o", "OUT", "--bytes-skipped", "0.66", "--allocation", "greedy"], "0.647"),
        (["sparsify", "-o", "OUT", "--bytes-skipped", "0.95", "--preview", "4"], "4-bit preview"),
        (["sparsify", "-o", "OUT", "--allocation", "optimal"], "needs bytes_skipped"),
        (["sparsify", "-o", "OUT", "--bytes-skipped", "0.3", "--allocation", "best"], "greedy"),
        (
            ["sparsify", "-o", "OUT", "--bytes-skipped", "0.3", "--down-sparsity", "0.7"],
            "second decision",
        ),
    ],
)
def test_bad_input_is_one_sentence_and_exit_2(
    args: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    args = [str(tmp_path / "out") if arg == "OUT" else arg for arg in args]
    code, text, error = run(capsys, *args)
    assert code == 2
    assert text == ""
    assert says in error
    assert "Traceback" not in error
    assert error.count("\n") == 1


def test_usage_error_is_exit_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "sparsify", "--sparsity", "half", "-o", "x")[0] == 2
    assert run(capsys, "no-such-command")[0] == 2


def test_internal_error_is_exit_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*args: object) -> None:
        raise RuntimeError("boom")

    monkeypatch.setattr("catsparse.hub.load_skeleton", broken)
    code, _, error = run(capsys, "info")
    assert code == 1
    assert "boom" in error
    assert "--debug" in error
    monkeypatch.setattr(sys, "argv", ["catsparse", "--debug", "info"])
    with pytest.raises(RuntimeError, match="boom"):
        cli.main()


def test_interrupt_keeps_the_calibration_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from catsparse import observation

    monkeypatch.setattr(observation, "_SAVE_SECONDS", 0.0)
    step, calls = observation.Run.step, []

    def interrupted(self: observation.Run, batch: observation.Batch) -> None:
        if len(calls) == 1:
            raise KeyboardInterrupt
        calls.append(1)
        step(self, batch)

    args = ["sparsify", "-o", tmp_path, *SMALL, "--json"]
    with monkeypatch.context() as patch:
        patch.setattr(observation.Run, "step", interrupted)
        code, _, error = run(capsys, *args)
    partial = tmp_path / ".calibration.partial.safetensors"
    assert code == 130
    assert "goes on" in error
    assert partial.exists()
    code, text, _ = run(capsys, *args)
    assert code == 0
    assert json.loads(text)["calibration_tokens"] == 4096
    assert not partial.exists()


@pytest.fixture(scope="module")
def short_probes() -> Iterator[None]:
    """Two sparsities on one window: the measurement in a second."""
    from catsparse import probing

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probing, "GRID", (0.5, 0.9))
        patch.setattr(probing, "TOKENS", 256)
        # The signature has taken its default before.
        defaults = {**probing.measure_sensitivities.__kwdefaults__, "sparsities": (0.5, 0.9)}
        patch.setattr(probing.measure_sensitivities, "__kwdefaults__", defaults)
        yield


BUDGET = ["--bytes-skipped", "0.4", "--allocation", "optimal"]


@pytest.fixture(scope="module")
def allocated(short_probes: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("cli") / "allocated"
    assert call("sparsify", "-o", directory, *SMALL, *BUDGET) == 0
    return directory


def test_allocation_of_a_budget(
    allocated: Path, artifact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {path.name for path in allocated.iterdir()}
    assert names == {"catsparse.json", "calibration.safetensors", "README.md"}
    code, text, _ = run(capsys, "info", allocated, "--json")
    result = json.loads(text)
    assert code == 0
    assert result["bytes_skipped"] == pytest.approx(0.4, abs=0.005)
    assert result["sparsity"] == pytest.approx(0.6, abs=1e-6)
    # The windows held out come on top: the calibration is what it would be without them.
    assert result["calibration"]["tokens"] == 4096
    shares = [site["sparsity"] for site in result["sites"].values()]
    assert max(shares) > min(shares) + 0.05
    one, two = (Calibration.load(d / "calibration.safetensors") for d in (artifact, allocated))
    for name, statistics in one.statistics.items():
        assert torch.equal(statistics.histogram, two.statistics[name].histogram)


def test_another_budget_needs_no_model_pass(
    allocated: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("catsparse.probing.measure_sensitivities", None)
    found = {}
    for allocation in ("uniform", "greedy", "optimal"):
        code, text, _ = run(
            capsys, "sparsify", allocated, "-o", tmp_path / allocation, "--bytes-skipped", 0.3,
            "--allocation", allocation, "--json",
        )  # fmt: skip
        assert code == 0
        found[allocation] = json.loads(text)
        assert found[allocation]["allocation"] == allocation
        assert found[allocation]["bytes_skipped"] == pytest.approx(0.3, abs=0.005)
    shares = list(found["uniform"]["sites"].values())
    assert max(shares) < min(shares) + 0.02
    # What was written takes a budget again; and says what its layers are.
    code, text, _ = run(
        capsys, "sparsify", tmp_path / "uniform", "-o", tmp_path / "x", "--bytes-skipped", 0.3,
        "--allocation", "optimal",
    )  # fmt: skip
    assert code == 0
    assert "of neurons dropped (" in text


@pytest.mark.parametrize("how", [["--method", "chess"], ["--no-compensate"]])
def test_sensitivities_of_another_method_are_refused(
    allocated: Path, tmp_path: Path, how: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, error = run(capsys, "sparsify", allocated, "-o", tmp_path / "x", *BUDGET, *how)
    assert code == 2
    assert "sensitivities were measured with energy, compensated" in error
    assert error.count("\n") == 1


def test_artifact_without_sensitivities(
    artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, error = run(capsys, "sparsify", artifact, "-o", tmp_path / "x", *BUDGET)
    assert code == 2
    assert "was not calibrated with sensitivities" in error
    args = ["sparsify", artifact, "-o", tmp_path / "x", "--bytes-skipped", 0.4]
    assert run(capsys, *args)[0] == 0


@pytest.mark.usefixtures("short_probes")
def test_interrupted_measurement_goes_on(
    allocated: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from catsparse import observation, probing

    monkeypatch.setattr(probing, "_SAVE_SECONDS", -1.0)
    divergence, calls = probing.divergence, []

    def interrupted(*logits: Any) -> float:
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(1)
        return divergence(*logits)

    args = ["sparsify", "-o", tmp_path, *SMALL, *BUDGET]
    with monkeypatch.context() as patch:
        patch.setattr(probing, "divergence", interrupted)
        code, _, error = run(capsys, *args)
    assert code == 130
    assert "goes on" in error
    assert {path.name for path in tmp_path.iterdir()} == {
        ".calibration.partial.safetensors", ".sensitivities.partial.safetensors",
    }  # fmt: skip

    def counting(*logits: Any) -> float:
        calls.append(1)
        return divergence(*logits)

    # Nothing is calibrated again: the statistics count no further token.
    monkeypatch.setattr(observation.Run, "count", None)
    monkeypatch.setattr(probing, "divergence", counting)
    assert run(capsys, *args)[0] == 0
    assert len(calls) == 7 * 2
    assert {path.name for path in tmp_path.iterdir()} == {p.name for p in allocated.iterdir()}
    again, whole = (
        Calibration.load(d / "calibration.safetensors").sensitivities for d in (tmp_path, allocated)
    )
    assert again is not None
    assert whole is not None
    for name, losses in whole.losses.items():
        assert torch.equal(again.losses[name], losses)


def test_options_without_effect_are_refused(
    artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, error = run(capsys, "sparsify", artifact, "-o", tmp_path / "x", "--tokens", 999)
    assert code == 2
    assert "--tokens" in error


def test_shell_completion() -> None:
    command = Path(sys.executable).with_name("catsparse")
    if not command.exists():
        pytest.skip("the catsparse command is not installed beside this Python")
    done = subprocess.run(
        [str(command)],
        env={**os.environ, "_CATSPARSE_COMPLETE": "source_bash"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0
    assert "complete" in done.stdout


def test_bench_op_prints_rows_and_keeps_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    options = ["--shape", "512,1024", "--sparsity", "0.5", "--rounds", "1", "-o", tmp_path]
    code, text, _ = run(capsys, "bench", "op", *options, "--json", "--plot", "--device", "cpu")
    rows = json.loads(text)["rows"]
    assert code == 0
    assert [(row["impl"], row["sparsity"]) for row in rows] == [
        ("dense", 0.0),
        ("catsparse", 0.0),
        ("catsparse", 0.5),
    ]
    kept = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert kept == rows
    plots = {f"{name}.{kind}" for name in ("speed", "latency") for kind in ("png", "svg")}
    assert {path.name for path in tmp_path.iterdir()} == {"rows.jsonl", *plots}
    code, text, _ = run(capsys, "bench", "op", *options, "--tokens", "2", "--backend", "torch")
    assert code == 0
    assert "vs dense" in text
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 6


def test_bench_decode_of_an_artifact(
    artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--rounds", "1", "--new-tokens", "3", "--prompt-tokens", "5", "-o", tmp_path]
    code, text, _ = run(capsys, "bench", "decode", artifact, *options, "--json")
    rows = json.loads(text)["rows"]
    assert code == 0
    assert [row["sparsity"] for row in rows] == [0.0, 0.0, 0.5, 0.7]
    assert rows[3]["bytes_skipped"] > rows[2]["bytes_skipped"] > 0.2
    assert {row["what"] for row in rows} == {"decode"}
    options = ["--rounds", "1", "--new-tokens", "10", "--sparsity", "0.5", "-o", tmp_path]
    options += ["--prompt-tokens", "4,5", "--batch", "1,2", "--json"]
    code, text, _ = run(capsys, "bench", "decode", artifact, *options)
    rows = json.loads(text)["rows"]
    assert code == 0
    sizes = dict.fromkeys((row["tokens"], row["context"]) for row in rows)
    assert list(sizes) == [(1, 4), (1, 5), (2, 4), (2, 5)]


def test_bench_decode_by_a_method(
    artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--rounds", "1", "--new-tokens", "3", "--sparsity", "0.9", "-o", tmp_path, "--json"]
    options += ["--preview", "4", "--method", "product"]
    code, text, _ = run(capsys, "bench", "decode", "default", *options)
    assert code == 0
    names = [(row["impl"], row["sparsity"]) for row in json.loads(text)["rows"]]
    assert names == [("dense", 0.0), ("catsparse", 0.0), ("catsparse_product4", 0.9)]
    code, _, problem = run(capsys, "bench", "decode", artifact, "--method", "cats", "-o", tmp_path)
    assert (code, "leave --method out" in problem.replace("\n", " ")) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        (["op", "--shape", "nothing"], "llama-2-7b"),
        (["op", "--dtype", "int8"], "bfloat16"),
        (["op", "--sparsity", "half"], "0.5,0.7"),
        (["op", "--sparsity", "1.0"], "below 1"),
        (["op", "--tokens", "17"], "1 to 16"),
        (["op", "--tokens", "0"], "1 to 16"),
        (["op", "--device", "nowhere"], "device"),
        (["op", "--peer", "missing.py"], "--peer takes"),
        (["op", "--shape", "16,16"], "larger"),
        (
            ["op", "--shape", "1024,2048", "--backend", "triton", "--device", "cpu"],
            "no kernel for cpu",
        ),
        (["decode"], "--config"),
        (["decode", "default", "--batch", "0"], "--batch takes"),
        (["decode", "default", "--compile", "--device", "cpu"], "needs a GPU"),
        (["decode", "default", "--prompt-tokens", "1"], "from 2 on"),
        (["decode", "default", "--batch", "40", "--prompt-tokens", "5000"], "smaller --batch"),
        (["decode", "default", "--config", "llama-3.2-1b"], "either"),
        (["decode", "--config", "64,96"], "MLP"),
        (["decode", "default", "--method", "product"], "--preview 4"),
        (["decode", "default", "--method", "wanda"], "energy"),
    ],
)
def test_bench_refuses_bad_input(
    arguments: list[str], remedy: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code, text, problem = run(capsys, "bench", *arguments, "-o", tmp_path)
    assert (code, text) == (2, "")
    assert remedy in problem.replace("\n", " ")
    assert not list(tmp_path.iterdir())


# Preview and second decision


@pytest.fixture(scope="module")
def twice(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model: a 4-bit preview drops half, 65% of the down rows are unread."""
    directory = tmp_path_factory.mktemp("cli") / "twice"
    assert (
        call("sparsify", "-o", directory, *SMALL, "--preview", "4", "--down-sparsity", "0.65") == 0
    )
    return directory


def test_preview_and_second_decision_are_said(
    twice: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = "4-bit gate preview, 65% of the down rows unread"
    assert words in (twice / "README.md").read_text()
    text = " ".join(run(capsys, "info", twice)[1].split())
    assert words in text
    assert "of down rows unread on the calibration tokens" in text
    told = json.loads(run(capsys, "info", twice, "--json")[1])
    assert (told["preview"], told["down_sparsity"], told["format_version"]) == (4, 0.65, 4)
    assert told["measured_down_sparsity"] == pytest.approx(0.65, abs=0.01)
    assert told["bytes_skipped"] == pytest.approx((1 + 0.65) / 3 - 0.5625 / 6, abs=0.02)


def test_evaluate_tells_both_shares(twice: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = json.loads(run(capsys, "evaluate", twice, *SMALL, "--json")[1])
    assert result["preview"] == 4
    assert result["sparsity"] == pytest.approx(0.5, abs=0.03)
    assert result["down_sparsity"] == pytest.approx(0.65, abs=0.03)
    assert result["down_sites"].keys() == result["sites"].keys()
    text = run(capsys, "evaluate", twice, *SMALL)[1]
    assert "4-bit preview of the gate decides" in " ".join(text.split())
    assert "down" in text


def test_new_down_sparsity_from_a_saved_calibration(
    twice: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, text, _ = run(
        capsys, "sparsify", twice, "-o", tmp_path / "more", "--down-sparsity", 0.8, "--json",
    )  # fmt: skip
    result = json.loads(text)
    assert code == 0
    assert result["preview"] == 4
    assert result["down_sparsity"] == pytest.approx(0.8, abs=0.01)
    _, text, _ = run(
        capsys, "sparsify", twice, "-o", tmp_path / "less", "--sparsity", 0.7, "--json"
    )
    result = json.loads(text)
    assert (result["preview"], result["down_sparsity"]) == (4, None)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--preview", 8), "8-bit preview"),
        (("--preview", 5), "preview must be 4 or 8"),
        (("--down-sparsity", 0.8, "--sparsity", 0.6), "second decision behind energy at 60.0%"),
        (("--down-sparsity", 0.8, "--method", "chess"), "second decision behind chess at 50.0%"),
        (("--down-sparsity", 0.4), "down_sparsity must be at least"),
    ],
)
def test_what_the_saved_calibration_has_not(
    twice: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: tuple[Any, ...],
    says: str,
) -> None:
    code, _, error = run(capsys, "sparsify", twice, "-o", tmp_path / "out", *options)
    assert code == 2
    assert says in " ".join(error.split())
    assert not (tmp_path / "out").exists()
    if "must be" not in says:
        assert "name the dense model to calibrate again" in " ".join(error.split())


# Method product


@pytest.fixture(scope="module")
def products(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model: a 4-bit preview of the product drops 60%, asked for by --preview alone."""
    directory = tmp_path_factory.mktemp("cli") / "products"
    assert call("sparsify", "-o", directory, *SMALL, "--preview", "4", "--sparsity", "0.6") == 0
    return directory


def test_method_product_is_said(products: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = "product, compensated, 4-bit product preview"
    assert words in (products / "README.md").read_text()
    assert words in " ".join(run(capsys, "info", products)[1].split())
    told = json.loads(run(capsys, "info", products, "--json")[1])
    assert (told["method"], told["preview"], told["down_sparsity"]) == ("product", 4, None)
    assert told["measured_sparsity"] == pytest.approx(0.6, abs=0.01)
    assert told["bytes_skipped"] == pytest.approx(0.6 - 2 * 0.5625 / 6, abs=0.02)
    result = json.loads(run(capsys, "evaluate", products, *SMALL, "--json")[1])
    assert result["method"] == "product"
    assert result["sparsity"] == result["down_sparsity"] == pytest.approx(0.6, abs=0.03)
    text = run(capsys, "evaluate", products, *SMALL)[1]
    assert "4-bit preview of the product decides" in " ".join(text.split())
    assert "down rows" not in text


@pytest.mark.parametrize(
    ("options", "method"),
    [((), "product"), (("--method", "energy"), "energy"), (("--method", "cats"), "cats")],
)
def test_methods_from_a_saved_calibration_with_a_preview(
    products: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: tuple[str, ...],
    method: str,
) -> None:
    arguments = ("sparsify", products, "-o", tmp_path / "out", "--sparsity", 0.5, *options)
    result = json.loads(run(capsys, *arguments, "--json")[1])
    assert (result["method"], result["preview"]) == (method, 4)
    assert result["sparsity"] == pytest.approx(0.5, abs=0.02)
    text = " ".join(run(capsys, *arguments)[1].split())
    on = "product" if method == "product" else "gate"
    assert f"of neurons dropped by a 4-bit {on} preview" in text


def test_second_decision_with_a_preview_of_the_gate(
    twice: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert json.loads(run(capsys, "info", twice, "--json")[1])["method"] == "energy"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--method", "product"), "calibrate with preview=4 (--preview 4)"),
        (
            ("--method", "product", "--preview", 4, "--down-sparsity", 0.7),
            "takes no down_sparsity",
        ),
        (("--method", "magic"), "method must be one of cats, chess, energy, product"),
    ],
)
@pytest.mark.parametrize("saved", [False, True], ids=["calibrating", "saved"])
def test_method_product_that_cannot_be(
    artifact: Path,
    products: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: tuple[Any, ...],
    says: str,
    saved: bool,
) -> None:
    source = (products if "--preview" in options else artifact) if saved else "default"
    code, text, error = run(capsys, "sparsify", source, "-o", tmp_path / "out", *options)
    assert (code, text) == (2, "")
    assert says in " ".join(error.split())
    assert not (tmp_path / "out").exists()
