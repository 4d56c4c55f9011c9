"""Tasks of lm-evaluation-harness on the model in memory; an optional package and its data."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ..errors import CatsparseError
from ..judge import standard_error
from ..strict_json import first_sentence, shorten
from .rows import Outcome
from .scoring import Batch, context_window, is_truncated, loglikelihoods

# What the harness calls a task of ours.
_NAMES = {"lambada": "lambada_openai"}
# The metric to compare by, in this order; else the first one reported.
_FIRST = ("acc", "exact_match,flexible-extract", "exact_match,strict-match", "exact_match")


def why_not_harness() -> str | None:
    """Why no task can be taken from lm-evaluation-harness; None if one can."""
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        return f"lm-eval is not here ({first_sentence(error)}); pip install 'catsparse[eval]'"
    return None


def harness_version() -> str:
    return metadata.version("lm-eval")


def task_manager(folder: Path | None) -> Any:
    """The harness's own tasks, and those that ``folder`` describes in ``.yaml`` files."""
    from lm_eval.tasks import TaskManager

    own = folder is not None and any(folder.glob("*.yaml"))
    with _quiet():
        return TaskManager(include_path=str(folder) if own else None)


def check_name(name: str, manager: Any) -> None:
    """Refuse a name that the harness does not know."""
    if _NAMES.get(name, name) not in manager.all_tasks:
        raise CatsparseError(
            f"lm-eval has no task named {shorten(name)!r}; 'lm_eval ls tasks' lists its tasks"
        )


def run_task(
    model: Any,
    tokenizer: Any,
    name: str,
    manager: Any,
    limit: int | None,
    batch: Batch,
    advance: Callable[[int], object],
) -> Outcome:
    """Let the harness run task ``name``, with its log-likelihoods computed by :mod:`scoring`.

    Args:
        model: the model as it is in memory; it is in evaluation mode.
        limit: at most so many examples of each of the task's parts.
        batch: how much goes through the model at once; texts are generated ``batch.rows`` at a
            time, one by one if that is None.
        advance: told the tokens of each finished batch.

    Raises:
        CatsparseError: the task's data cannot be had, or it reports no number.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    truncated = 0

    class InMemory(HFLM):  # type: ignore[misc]
        """Without padding, so that a meter counts the texts' own tokens only; in fp32."""

        def _loglikelihood_tokens(
            self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None
        ) -> list[tuple[float, bool]]:
            nonlocal truncated
            pairs = [(list(context), list(rest)) for _, context, rest in requests]
            window = context_window(model, tokenizer)
            truncated += sum(is_truncated(pair, window) for pair in pairs)
            scores = loglikelihoods(model, pairs, window, batch, advance)
            return [(score.logprob, score.greedy) for score in scores]

    known = _NAMES.get(name, name)
    with _quiet(), _reaching(name):
        found = lm_eval.simple_evaluate(
            model=InMemory(pretrained=model, tokenizer=tokenizer, batch_size=batch.rows or 1),
            tasks=[known],
            task_manager=manager,
            limit=limit,
            log_samples=True,
            bootstrap_iters=100,  # only for what is no mean
        )
    return _outcome(known, found, truncated)


def _outcome(name: str, found: Any, truncated: int) -> Outcome:
    metrics = {
        key.removesuffix(",none"): float(value)
        for key, value in found["results"].get(name, {}).items()
        if "," in key and isinstance(value, (int, float)) and math.isfinite(value)
    }
    # A filter's name comes last, after that of the standard error.
    metrics = {_stderr_last(key): value for key, value in metrics.items()}
    samples = [
        sample
        for task in sorted(found["samples"])
        for sample in sorted(found["samples"][task], key=lambda sample: sample["doc_id"])
    ]
    candidates = [key for key in metrics if not key.endswith("_stderr")] or ["acc"]
    metric = next((key for key in _FIRST if key in candidates), candidates[0])
    values = _by_example(samples, metric)
    if values and metric not in metrics:  # a tag, for which the harness has no common figure
        tensor = torch.tensor(values, dtype=torch.float64)
        metrics = {metric: float(tensor.mean())}
        if math.isfinite(error := standard_error(tensor)):
            metrics[f"{metric}_stderr"] = error
    if metric not in metrics:
        raise CatsparseError(f"lm-eval reports no number for the task {shorten(name)!r}")
    ids = {(sample["doc_hash"], sample["doc_id"]) for sample in samples}
    return Outcome(metric, metrics, values, len(values) if values else len(ids), truncated)


def _stderr_last(key: str) -> str:
    metric, _, chosen = key.partition(",")
    if not chosen or not metric.endswith("_stderr"):
        return key
    return f"{metric.removesuffix('_stderr')},{chosen}_stderr"


def _by_example(samples: list[Any], metric: str) -> list[float] | None:
    name, _, chosen = metric.partition(",")
    mine = [sample for sample in samples if sample.get("filter", "none") == (chosen or "none")]
    values = [sample.get(name) for sample in mine]
    if not values or not all(isinstance(value, (int, float)) for value in values):
        return None
    return [float(value) for value in values if value is not None]


@contextmanager
def _reaching(name: str) -> Iterator[None]:
    """Turn the many errors of an unreachable hub into one sentence."""
    try:
        yield
    except CatsparseError:
        raise
    except Exception as error:
        library = type(error).__module__.split(".")[0]
        network = ("httpx", "requests", "urllib3", "huggingface_hub", "datasets")
        if not isinstance(error, OSError) and library not in network:
            raise
        raise CatsparseError(
            f"cannot get the data of the task {shorten(name)} ({first_sentence(error)}); check the "
            "network, or give jsonl files with --tasks-data"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
