"""``catsparse finetune``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import catsparse
import catsparse.finetune as finetune_package
from catsparse import hub
from catsparse.finetune.trainer import SparseTrainer
from command import call, run
from test_finetune_examples import PLAIN, TALK

SMALL = [
    *("--steps", "4", "--batch-size", "2", "--seq-len", "64", "--rank", "4"),
    *("--heldout-tokens", "512", "--log-every", "2", "--eval-every", "2", "--save-every", "2"),
]


def result(capsys: pytest.CaptureFixture[str], *args: object) -> dict[str, Any]:
    code, out, stderr = run(capsys, "finetune", *args, "--json")
    assert code == 0, stderr
    return dict(json.loads(out))


def test_the_bundled_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As a user types it, with shorter sequences."""
    found = result(
        capsys,
        *("default", "--steps", "20", "--seq-len", "128", "--distill", "--heldout-tokens", "2048"),
        *("--sparsity", "0.7", "--no-compensate", "--method", "cats", "-o", tmp_path / "out"),
    )
    before, after = found["before"], found["after"]
    # From +18% to +15%.
    assert after["rise"] < before["rise"] - 0.01
    assert after["dense_perplexity"] == before["dense_perplexity"]
    assert found["steps"] == 20
    assert found["eval_loss"]["cats"]["last"] < found["eval_loss"]["cats"]["first"]
    assert found["sparsity"] == pytest.approx(0.7, abs=0.005)
    assert after["sparsity"] == pytest.approx(0.7, abs=0.02)
    assert found["bytes_skipped"] == pytest.approx(2 * found["sparsity"] / 3)
    assert found["sites"].keys() == found["asked"].keys() == found["drifted"].keys()
    assert {Path(p).name for p in found["plots"]} >= {"loss.png", "drift.png"}
    assert (tmp_path / "out" / "loss.png").stat().st_size > 1000

    # The folder serves every other command, adapter and all.
    code, out, _ = run(capsys, "generate", tmp_path / "out", "-p", "The sea", "-n", "3", "--json")
    assert code == 0
    assert json.loads(out)
    code, out, _ = run(capsys, "evaluate", tmp_path / "out", "--tokens", "1024", "--json")
    assert code == 0
    assert json.loads(out)["method"] == "cats"
    code, out, _ = run(capsys, "sparsify", tmp_path / "out", "-o", tmp_path / "less",
                       "--sparsity", "0.3", "--json")  # fmt: skip
    assert code == 0
    kept = [load_file(tmp_path / d / "adapter_model.safetensors") for d in ("out", "less")]
    assert all(bool((kept[0][name] == kept[1][name]).all()) for name in kept[0])
    # Once more from there would lose the first adapter.
    code, _, stderr = run(capsys, "finetune", tmp_path / "out", *SMALL, "-o", tmp_path / "twice")
    assert code == 2
    assert "--merge" in stderr


def test_a_folder_merged_and_with_baselines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("sparsify", "default", "-o", tmp_path / "half", "--tokens", "2048",
                "--seq-len", "128", "--preview", "4") == 0  # fmt: skip
    capsys.readouterr()
    args = [tmp_path / "half", *SMALL, "--merge", "--baselines", "-o", tmp_path / "out"]
    found = result(capsys, *args)
    assert list(found["eval_loss"]) == ["product", "dense", "relu"]
    losses = found["eval_loss"]
    assert losses["dense"]["first"] < losses["product"]["first"] < losses["relu"]["first"]
    merged = catsparse.load(tmp_path / "out")
    assert merged.dtype == hub.load_dense_model("default").dtype  # as the checkpoint
    provenance = merged.catsparse.config.calibration
    assert provenance.dtype == "bfloat16"
    assert (provenance.data, provenance.seq_len) == ("the bundled calibration text", 64)
    assert not (tmp_path / "out" / "adapter_config.json").exists()
    assert (tmp_path / "out" / "tokenizer.json").exists()
    again = [tmp_path / "out", *SMALL, "-o", tmp_path / "twice"]  # a merged folder can be trained
    assert result(capsys, *again)["steps"] == 4
    code, _, stderr = run(capsys, "finetune", *again, "--sparsity", "0.3")
    assert code == 2
    assert "--sparsity does nothing here" in stderr


def test_interrupted_in_the_baselines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run before them is not made again, and all checkpoints go at the end."""
    args = ["default", *SMALL, "--baselines", "-o", tmp_path / "out"]
    real = finetune_package.run_baseline

    def interrupted(model: Any, kind: str, *rest: Any, **options: Any) -> Any:
        if kind == "relu":
            raise KeyboardInterrupt
        return real(model, kind, *rest, **options)

    with monkeypatch.context() as patch:
        patch.setattr(finetune_package, "run_baseline", interrupted)
        code, _, stderr = run(capsys, "finetune", *args)
    assert code == 130
    assert "goes on from the last checkpoint" in stderr
    steps = []
    step = SparseTrainer.training_step

    def counting(self: Any, *given: Any, **options: Any) -> Any:
        steps.append(self.state.global_step)
        return step(self, *given, **options)

    monkeypatch.setattr(SparseTrainer, "training_step", counting)
    assert list(result(capsys, *args)["eval_loss"]) == ["energy", "dense", "relu"]
    assert steps == [0, 1, 2, 3]  # of the last one
    assert not list((tmp_path / "out").rglob("checkpoints"))


def test_text_for_people(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "finetune", "default", *SMALL, "-o", tmp_path / "out")
    assert code == 0
    for words in ("fine-tuned", "held-out loss, energy", "moved by at most", "catsparse evaluate"):
        assert words in " ".join(out.split()), words


def test_conversations(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a model whose tokenizer has a chat template; a part of the rows is held out."""
    base = tmp_path / "base"
    hub.load_dense_model("default").save_pretrained(base)
    tokenizer = hub.load_tokenizer("default")
    tokenizer.chat_template = PLAIN
    tokenizer.save_pretrained(base)
    data = tmp_path / "talks.jsonl"
    rows = [{"messages": TALK[:2] if i % 2 else TALK} for i in range(24)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = result(capsys, base, *SMALL, "--seq-len", "128", "--data", data, "-o", tmp_path / "out")
    assert found["before"] is None
    assert found["eval_loss"]["energy"]["last"] < found["eval_loss"]["energy"]["first"]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--data", "empty.txt"], "holds 0 tokens"),
        (["--data", "columns.jsonl"], "has no column 'text'"),
        (["--data", "talk.jsonl", "--seq-len", "8"], "no chat template"),
        (["--data", "nothing.txt"], "there is no file"),
        (["--seq-len", "4096"], "context of"),
        (["--steps", "0"], "steps must be at least 1"),
        (["--distill", "--full"], "full fine-tuning"),
        (["--method", "product"], "--preview 4"),
        (["--sparsity", "0.5", "--bytes-skipped", "0.3"], "bytes_skipped"),
        (["--learning-rate", "1e30", "--weight-decay", "0", "--save-every", "0"], "not finite"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_one_clear_sentence(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    args: list[str],
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").write_text("")
    Path("columns.jsonl").write_text(json.dumps({"body": "text"}) + "\n")
    Path("talk.jsonl").write_text(json.dumps({"messages": TALK}) + "\n")
    code, out, stderr = run(capsys, "finetune", "default", *SMALL, *args, "-o", "out")
    assert code == 2, stderr
    assert out == ""
    line = [x for x in stderr.strip().split("\n") if x.startswith("error:")]
    assert len(line) == 1
    assert words in line[0]
    assert "Traceback" not in stderr
