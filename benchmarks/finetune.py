"""Quality won back by fine-tuning, and loss against steps beside dense and ReLU -> rows and a plot.

    python benchmarks/finetune.py MODEL [MODEL ...] --data FILE --heldout FILE [--device cuda]

A row for each setting, then those of the curves; a run that was interrupted goes on from the last
row, and within a setting from its last checkpoint. It trains on --data only and measures on
--heldout only. The figures in docs/finetuning.md were made by this script.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from catsparse import calibrate, hub, load, sparsify
from catsparse.config import SparsityConfig
from catsparse.curves import loss_figure
from catsparse.data import load_windows
from catsparse.evaluate import Evaluation, Perplexity, evaluate
from catsparse.files import write_atomic
from catsparse.finetune import (
    Examples,
    FinetuneOptions,
    bytes_skipped_at,
    finetune,
    run_baseline,
    windows_as_examples,
)
from catsparse.report import save_figures

ROOT = Path(__file__).parent


@dataclass(frozen=True)
class Setting:
    """What is made sparse, and whether it is distilled; ``curve`` asks for its losses by step."""

    name: str
    method: str
    sparsity: float | None = None
    bytes_skipped: float | None = None
    preview: int | None = None
    compensate: bool = True
    distill: bool = True
    curve: bool = False


SETTINGS = (
    Setting("product 33.3%", "product", bytes_skipped=0.333, preview=4),
    Setting("product 46.7%", "product", bytes_skipped=0.467, preview=4),
    Setting("cats 50%", "cats", sparsity=0.5, compensate=False),
    Setting("cats 50%, text", "cats", sparsity=0.5, compensate=False, distill=False, curve=True),
)
BASELINES = ("relu", "dense")  # trained on text as the last setting is


def main() -> None:
    args = _arguments()
    for name in args.models:
        run = Run(args, name)
        for setting in SETTINGS:
            run.once(setting.name, partial(run.tune, setting))
        for kind in BASELINES:
            run.once(kind, partial(run.baseline, kind))
        print(run.table())
        print(run.plot())


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("models", nargs="+", help="folder or Hub name; 'default' is bundled")
    parser.add_argument("--data", default=str(hub.bundled_text("calibration")))
    parser.add_argument("--heldout", default=str(hub.bundled_text("heldout")))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--learning-rate", type=float, default=FinetuneOptions().learning_rate)
    parser.add_argument("--every", type=int, default=20, help="steps between rows of the curves")
    parser.add_argument("--tokens", type=int, default=100_000, help="measured on, at most")
    parser.add_argument("--curve-tokens", type=int, default=32_768, help="measured on at steps")
    parser.add_argument("--calibration-tokens", type=int, default=100_000)
    parser.add_argument("--work", type=Path, default=Path("out/finetune-bench"))
    parser.add_argument("--results", type=Path, default=ROOT / "results")
    parser.add_argument("--images", type=Path, default=ROOT.parent / "docs" / "images")
    return parser.parse_args()


class Run:
    """Everything of one model, and its file of rows."""

    def __init__(self, args: argparse.Namespace, name: str) -> None:
        self.args, self.name = args, name
        self.label = Path(name).name
        self.path = args.results / f"finetune-{self.label}.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        self.rows: list[dict[str, Any]] = [json.loads(line) for line in kept if line.strip()]
        self._texts: tuple[Examples, Tensor] | None = None
        self._dense: Perplexity | None = None

    def once(self, setting: str, measure: Callable[[], list[dict[str, Any]]]) -> None:
        """Do it unless its rows are there; they are added together."""
        if any(row["setting"] == setting for row in self.rows):
            return
        start = time.perf_counter()
        new = measure()
        seconds = time.perf_counter() - start
        common = {
            "model": self.label,
            "setting": setting,
            "data": Path(self.args.data).name,
            "heldout": Path(self.args.heldout).name,
            "steps": self.args.steps,
            "tokens_a_step": self.args.batch_size * self.args.seq_len,
            "learning_rate": self.args.learning_rate,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "machine": _machine(self.args.device),
            "seconds": round(seconds, 1),
        }
        self.rows += [common | row for row in new]
        text = "".join(json.dumps(row) + "\n" for row in self.rows)
        write_atomic(self.path, lambda path: _write(path, text))
        print(f"{self.label}, {setting}: {seconds:.0f} s", flush=True)

    def model(self) -> tuple[Any, torch.dtype]:
        """In fp32 for training and measuring, and the dtype that it is stored in."""
        model = hub.load_dense_model(self.name).to(self.args.device)
        dtype = model.dtype
        return model.float(), dtype

    def texts(self) -> tuple[Examples, Tensor]:
        """Windows to train on, and to measure on."""
        if self._texts is None:
            args, tokenizer = self.args, hub.load_tokenizer(self.name)
            tokens = args.steps * args.batch_size * args.seq_len
            windows = load_windows(args.data, tokenizer, tokens=tokens, seq_len=args.seq_len)
            heldout = load_windows(
                args.heldout, tokenizer, tokens=args.tokens, seq_len=args.seq_len, seed=None
            )
            self._texts = windows_as_examples(windows, Path(args.data).name), heldout
        return self._texts

    def options(self, distill: bool) -> FinetuneOptions:
        args = self.args
        return FinetuneOptions(
            steps=args.steps,
            batch_size=args.batch_size,
            learning_rate=args.learning_rate,
            distill=distill,
            log_every=args.every,
            eval_every=args.every,
            calibration_tokens=args.calibration_tokens,
            bf16=args.device != "cpu",
        )

    def on_the_way(self) -> Examples:
        """What losses are measured on at steps: the beginning of the held-out text."""
        windows = self.texts()[1][: max(1, self.args.curve_tokens // self.args.seq_len)]
        return windows_as_examples(windows, Path(self.args.heldout).name)

    def tune(self, setting: Setting) -> list[dict[str, Any]]:
        model, dtype = self.model()
        examples, heldout = self.texts()
        part = examples.first(self.args.calibration_tokens)
        calibration = calibrate(model, part.windows(), preview=setting.preview)
        stored = str(dtype).removeprefix("torch.")  # what bytes are counted of
        calibration.provenance = replace(calibration.provenance, dtype=stored)
        sparsify(
            *(model, calibration, setting.sparsity, setting.method, setting.compensate),
            bytes_skipped=setting.bytes_skipped,
        )
        asked = model.catsparse.config
        before = evaluate(model, heldout, self.args.batch_size, dense=self._dense)
        self._dense = before.dense_perplexity
        folder = self.args.work / self.label / setting.name.replace(" ", "-").replace("%", "")
        tuned = finetune(
            *(model, None, examples, self.on_the_way(), self.options(setting.distill), folder),
            dtype=dtype,
        )
        after = evaluate(tuned.model, heldout, self.args.batch_size, dense=self._dense)
        moved = [tuned.drifted[name] - value for name, value in tuned.asked.items()]
        sites = [after.sites[name] - value for name, value in tuned.asked.items()]
        row = {
            "what": "result",
            "method": setting.method,
            "compensate": setting.compensate,
            "preview": setting.preview,
            "distill": setting.distill,
            "tokens": after.tokens,
            "dense_perplexity": self._dense.value,
            "asked": asked.measured_sparsity,
            "asked_bytes": asked.bytes_skipped,
            **_measured("before", asked, before),
            **_measured("after", tuned.config, after),
            "moved_most": max(moved, key=abs),
            "moved": sum(moved) / len(moved),
            "site_off_most": max(sites, key=abs),
            "merged_difference": self._merged_difference(tuned.model, folder, heldout),
        }
        curve = tuned.rows if setting.curve else []
        return [row, *_curve(curve)]

    @torch.no_grad()
    def _merged_difference(self, tuned: Any, folder: Path, heldout: Tensor) -> float:
        """Largest |logit| by which the saved model, loaded and merged, differs, over the largest
        logit; both in fp32."""
        merged = load(folder, base_model=self.name, merge_adapter=True, dtype=torch.float32)
        merged.to(self.args.device)
        ids = heldout[:4].to(self.args.device)
        one, other = tuned(ids).logits, merged(ids).logits
        return float((one - other).abs().max() / one.abs().max())

    def baseline(self, kind: str) -> list[dict[str, Any]]:
        model, _ = self.model()
        examples, _ = self.texts()
        folder = self.args.work / self.label / kind
        options = self.options(distill=False)
        return _curve(run_baseline(model, kind, examples, self.on_the_way(), options, folder))

    def table(self) -> str:
        """Rise over dense before and after, in Markdown."""
        lines = [
            "| setting | MLP bytes skipped | neurons dropped | untrained | fine-tuned |",
            "|---|---|---|---|---|",
        ]
        lines += [
            f"| {r['setting']} | {r['after_bytes_skipped']:.1%} | {r['after_sparsity']:.1%} "
            f"| {r['before_rise']:+.1%} ± {r['before_rise_se']:.1%} "
            f"| {r['after_rise']:+.1%} ± {r['after_rise_se']:.1%} |"
            for r in self.rows
            if r["what"] == "result"
        ]
        return "\n".join(lines)

    def plot(self) -> Path:
        """Loss on held-out text against steps, of all curves."""
        rows = [r for r in self.rows if r["what"] == "curve"]
        name = f"finetune-{self.label}"
        paths = save_figures({name: loss_figure(rows)}, self.args.images, ("svg",))
        return paths[0]


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _measured(when: str, config: SparsityConfig, e: Evaluation) -> dict[str, float]:
    return {
        f"{when}_perplexity": e.perplexity.value,
        f"{when}_rise": e.rise,
        f"{when}_rise_se": e.rise_standard_error,
        f"{when}_sparsity": e.sparsity,
        # Of the weights as they are stored; they are in fp32 here.
        f"{when}_bytes_skipped": bytes_skipped_at(config, e.sites, e.down_sites),
    }


def _curve(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {"what": "curve", **{k: row[k] for k in ("variant", "step", "eval_loss")}}
        for row in rows
        if "eval_loss" in row
    ]


def _machine(device: str) -> str:
    on_gpu = torch.device(device).type == "cuda"
    return torch.cuda.get_device_name() if on_gpu else f"CPU, {platform.machine()}"


if __name__ == "__main__":
    main()
