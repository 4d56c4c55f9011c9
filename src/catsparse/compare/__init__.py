"""Methods compared on the same data at equal bytes skipped -> rows, which a later run goes on from.

Gate methods are decided by the exact gate, method ``product`` by a preview of gate and up: two
calibrations on the same tokens. Methods of inputs share the first. Packed weights are calibrated
by themselves. All else is the same for every row.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from rich.progress import Progress, TaskID
from torch import Tensor

from .._version import __version__
from ..calibration import Calibration
from ..errors import CatsparseError
from ..evaluate import Perplexity, evaluate, perplexity, rise_of
from ..inputs import inputs_needed
from ..judge import progress_bar, while_it_fits
from ..observation import calibrate
from ..probing import TOKENS, measure_sensitivities, split_windows
from ..quantized import quantized
from ..quantized_linear import weights_name
from ..rows import add_row, key_of, model_name, tokens_digest, weights_digest
from ..sensitivities import Sensitivities
from ..surgery import densify, sparsify
from ..tasks import Task
from .rows import CompareRow, CompareTaskRow, Comparison, best_rows, read_rows, read_task_rows
from .settings import BYTES_SKIPPED, DENSE, Setting, check_settings, make_settings
from .tasks import TASKS_FILE_NAME, TaskScores
from .traffic import Traffic

__all__ = [
    "BYTES_SKIPPED",
    "DENSE",
    "FILE_NAME",
    "TASKS_FILE_NAME",
    "CompareRow",
    "CompareTaskRow",
    "Comparison",
    "Setting",
    "Text",
    "best_rows",
    "check_settings",
    "compare",
    "make_settings",
    "read_rows",
    "read_task_rows",
]

T = TypeVar("T")

FILE_NAME = "compare.jsonl"


@dataclass(frozen=True, eq=False)
class Text:
    """Token ids ``[N, L]`` and the name they go by in rows."""

    name: str
    windows: Tensor


def compare(
    model: Any,
    calibration: Text,
    heldout: Sequence[Text],
    settings: Sequence[Setting],
    *,
    tasks: Sequence[Task] = (),
    batch_size: int = 4,
    output: str | Path | None = None,
    progress: bool = True,
) -> Comparison:
    """Perplexity, and accuracy on zero-shot tasks, of ``model`` made sparse in every one of
    ``settings``, dense beside it.

    Every token is thresholded. The dense model in its own weights, which all is compared with, is
    scored once a text and task; a calibration is made once for the exact gate and once for the
    preview, and again for each format of packed weights, each only if a setting left to run needs
    it. Allocations by sensitivities hold out the last windows of the calibration text (2,560
    tokens, at most half of it) to measure them on, for all settings alike; that costs as much as
    30 evaluations of 20,000 tokens for each method and compensation.

    Args:
        model: a dense model; dense again afterwards, whatever happens, and its weights its own.
        calibration: text that thresholds come from.
        heldout: texts to measure on, the first perhaps like ``calibration``, others unlike it.
        settings: see :func:`make_settings`.
        tasks: see :func:`catsparse.tasks.prepare_tasks`, which needs this very model.
        batch_size: windows a forward pass, halved for as long as memory is too small; that of
            tasks is found.
        output: a folder, whose ``compare.jsonl`` (of tasks ``tasks.jsonl``) each row is added to as
            soon as it is known. What that holds already for the same weights, tokens or task, and
            setting is not run again.
        progress: show a progress bar on stderr.

    Returns:
        The rows of both.

    Raises:
        CatsparseError: a budget cannot be reached, two texts are the same, a file in ``output``
            holds something else, or what calibration and evaluation refuse.
    """
    check_settings(model, settings)
    run = _Run(model, calibration, heldout, settings, tasks, batch_size, output, progress)
    with progress_bar(progress) as bar:
        run.run(bar)
    return Comparison(
        rows=[run.known[run.key(s, text)] for s in settings for text in heldout],
        tasks=run.tasks.rows([run.setting_key(s) for s in settings]),
    )


class _Run:
    """One comparison under way: what is known already, calibrations, dense results."""

    def __init__(
        self,
        model: Any,
        calibration: Text,
        heldout: Sequence[Text],
        settings: Sequence[Setting],
        tasks: Sequence[Task],
        batch_size: int,
        output: str | Path | None,
        progress: bool,
    ) -> None:
        self.model, self.text, self.heldout = model, calibration, heldout
        self.settings, self.batch_size, self.progress = settings, batch_size, progress
        self.folder = None if output is None else Path(output)
        windows = calibration.windows
        probing = any(s.allocation != "uniform" for s in settings)
        held_out = max(1, TOKENS // windows.shape[1]) if probing else 0
        self.windows, self.probe = split_windows(windows, held_out)
        self.probe_digest = tokens_digest(self.probe)
        self.digests = [tokens_digest(text.windows) for text in heldout]
        if len({*self.digests}) < len(heldout) or len({text.name for text in heldout}) < len(
            heldout
        ):
            raise CatsparseError("two of the texts to measure on are the same; name another")
        self.of_all = [weights_digest(model), tokens_digest(self.windows)]
        self.run_key = key_of(*self.of_all, self.probe_digest)
        rows = [] if self.folder is None else read_rows(self.folder / FILE_NAME)
        own = Traffic.of(model)
        self.known = {row.key: _counted(row, own) for row in rows}
        provenance = (calibration.name, self.windows.numel())
        self.tasks = TaskScores(model, tasks, self.of_all[0], provenance, self.folder)
        self.dense: dict[str, Perplexity] = {}
        # Of the weights that the model holds just now.
        self.traffic: Traffic | None = None
        self.calibrations: dict[int | None, Calibration] = {}
        self.tables: dict[tuple[str, bool, str], Sensitivities] = {}

    def key(self, s: Setting, text: Text) -> str:
        digest = self.digests[self.heldout.index(text)]
        return key_of(*self.of_all, digest, *self._parts(s))

    def setting_key(self, s: Setting) -> str:
        """Of what makes the model sparse, whatever it is measured on."""
        return key_of(*self.of_all, *self._parts(s))

    def _parts(self, s: Setting) -> tuple[object, ...]:
        probe = None if s.allocation == "uniform" else self.probe_digest
        setting = (s.method, s.compensate, s.preview, s.allocation, s.bytes_skipped, s.scope)
        return (probe, *setting, *[s.weights] * (s.weights is not None))

    def left(self, settings: Sequence[Setting]) -> list[tuple[Setting, list[Text], list[Task]]]:
        """The settings not known on every text and task, with those where they are not."""
        found = [
            (
                s,
                [text for text in self.heldout if self.key(s, text) not in self.known],
                self.tasks.left(self.setting_key(s)),
            )
            for s in settings
        ]
        return [(s, texts, tasks) for s, texts, tasks in found if texts or tasks]

    def run(self, bar: Progress) -> None:
        left = self.left(self.settings)
        needed = [text for text in self.heldout if any(text in texts for _, texts, _ in left)]
        dense_tasks = self.tasks.left(None)
        evaluated = [*needed, *itertools.chain.from_iterable(texts for _, texts, _ in left)]
        scored = [*dense_tasks, *itertools.chain.from_iterable(tasks for *_, tasks in left)]
        total = sum(text.windows.numel() for text in evaluated) + sum(map(_tokens, scored))
        line = bar.add_task("comparing", total=total)
        for text in needed:
            self.dense[text.name] = self._fitting(
                partial(perplexity, self.model, text.windows, progress=False)
            )
            bar.advance(line, text.windows.numel())
        for task in dense_tasks:
            self.tasks.score_dense(task, bar)
            bar.advance(line, _tokens(task))
        for weights in dict.fromkeys(s.weights for s, *_ in left):
            with quantized(self.model, weights):
                self._run_on_weights(
                    [work for work in left if work[0].weights == weights], bar, line
                )
        # Also of settings that an earlier, interrupted run finished.
        for checkpoint in [] if self.folder is None else self.folder.glob(f".*-{self.run_key}-*"):
            checkpoint.unlink(missing_ok=True)

    def _run_on_weights(
        self, left: list[tuple[Setting, list[Text], list[Task]]], bar: Progress, line: TaskID
    ) -> None:
        """What is left to do on the weights that the model holds now."""
        self.traffic = Traffic.of(self.model)
        self.calibrations, self.tables = {}, {}
        sparse = [s for s, *_ in left if s.method != DENSE]
        for preview in dict.fromkeys(s.preview for s in sparse):
            asked = {inputs_needed(s.method, s.scope) for s in sparse if s.preview == preview}
            kinds = asked - {None}
            inputs = kinds.pop() if len(kinds) == 1 else "all" if kinds else None
            self._calibrate(bar, preview, inputs, left[0][0].weights)
        for s, texts, tasks in left:
            on = f" on {s.weights}" if s.weights else ""
            if s.method == DENSE:
                bar.update(line, description=f"dense{on}")
                self._measure(s, texts, tasks, bar, line)
                continue
            bar.update(line, description=f"{s.method} at {s.bytes_skipped:.1%} bytes{on}")
            calibration = self.calibrations[s.preview]
            if s.allocation != "uniform":
                calibration = replace(calibration, sensitivities=self._table(bar, s))
            sparsify(
                self.model,
                calibration,
                method=s.method,
                compensate=s.compensate,
                bytes_skipped=s.bytes_skipped,
                allocation=s.allocation,
                scope=s.scope,
            )
            try:
                self._measure(s, texts, tasks, bar, line)
            finally:
                densify(self.model)

    def _calibrate(
        self, bar: Progress, preview: int | None, inputs: str | None, weights: str | None
    ) -> None:
        # Kept until the last row is there: an interrupted run then only reads it.
        checkpoint = self._checkpoint("calibration", preview, inputs, weights)
        bar.stop()  # it has a bar of its own
        self.calibrations[preview] = calibrate(
            self.model,
            self.windows,
            batch_size=self.batch_size,
            data_name=self.text.name,
            checkpoint=checkpoint,
            progress=self.progress,
            preview=preview,
            keep_checkpoint=True,
            inputs=inputs,
        )
        bar.start()

    def _table(self, bar: Progress, s: Setting) -> Sensitivities:
        """Measured when the first setting needs it, so that rows come as early as they can."""
        kind = (s.method, s.compensate, s.scope)
        if kind not in self.tables:
            bar.stop()
            self.tables[kind] = measure_sensitivities(
                self.model,
                self.calibrations[s.preview],
                self.probe,
                *kind,
                checkpoint=self._checkpoint("sensitivities", s.preview, *kind, s.weights),
                progress=self.progress,
            )
            bar.start()
        return self.tables[kind]

    def _checkpoint(self, what: str, *parts: object) -> Path | None:
        """Named after its run, so that another run's is never in the way."""
        if self.folder is None:
            return None
        key = key_of(self.batch_size, *parts)
        return self.folder / f".{what}-{self.run_key}-{key}.partial.safetensors"

    def _measure(
        self, s: Setting, texts: list[Text], tasks: list[Task], bar: Progress, line: TaskID
    ) -> None:
        """Of the model as it is now."""
        for text in texts:
            row = self._row(s, text)
            self.known[row.key] = row
            if self.folder is not None:
                add_row(self.folder / FILE_NAME, row)
            bar.advance(line, text.windows.numel())
        for task in tasks:
            self.tasks.score(task, s, self.setting_key(s), bar)
            bar.advance(line, _tokens(task))

    def _fitting(self, work: Callable[[int], T]) -> T:
        def attempt(size: int) -> T:
            self.batch_size = size  # what did not fit once is not tried again
            return work(size)

        return while_it_fits(self.batch_size, attempt)

    def _row(self, s: Setting, text: Text) -> CompareRow:
        dense, windows = self.dense[text.name], text.windows
        skipped = dropped = 0.0
        if s.method != DENSE:
            e = self._fitting(partial(evaluate, self.model, windows, progress=False, dense=dense))
            found, skipped, dropped = e.perplexity, e.bytes_skipped, e.sparsity
        elif s.weights is None:
            found = dense
        else:
            found = self._fitting(partial(perplexity, self.model, windows, progress=False))
        rise, rise_error = rise_of(found, dense)
        return CompareRow(
            model=model_name(self.model),
            dtype=str(self.model.dtype).removeprefix("torch."),
            device=self.model.device.type,
            method=s.method,
            compensate=s.compensate,
            preview=s.preview,
            allocation=s.allocation,
            scope=s.scope,
            target=s.bytes_skipped,
            bytes_skipped=skipped,
            sparsity=dropped,
            perplexity=found.value,
            perplexity_se=_finite(found.standard_error),
            dense_perplexity=dense.value,
            dense_perplexity_se=_finite(dense.standard_error),
            rise=rise,
            rise_se=_finite(rise_error),
            tokens=windows.shape[0] * (windows.shape[1] - 1),
            heldout=text.name,
            calibration=self.text.name,
            calibration_tokens=self.windows.numel(),
            seq_len=windows.shape[1],
            prefill="masked",
            key=self.key(s, text),
            versions={
                "catsparse": __version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
            weights=weights_name(self.model),
            bytes_read=self.traffic.read(skipped, s.scope) if self.traffic else None,
        )


def _counted(row: CompareRow, own: Traffic | None) -> CompareRow:
    """A row of before there were formats, of the model's own weights, with its bytes."""
    if row.bytes_read is not None or own is None:
        return row
    return replace(row, bytes_read=own.read(row.bytes_skipped, row.scope))


def _tokens(task: Task) -> int:
    """For the progress bar: what the harness alone knows counts nothing."""
    return task.total or 0


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
