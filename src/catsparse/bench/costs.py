"""The simulator's constants, how they are fitted on measured dense rows, and how it is judged.

Sparse rows are only predicted. One constant is of sparse rows, :attr:`Costs.preview`: it is fitted
on rows of single MLPs, and rows of whole models are held out.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import CatsparseError
from ..kernels import MAX_OP_TOKENS
from ..rows import read_lines
from ..strict_json import shorten
from .shapes import SHAPES
from .simulate import Costs, Machine, simulate
from .traffic import WEIGHTS, Setting, head_bytes, layer_bytes, sparse_tokens

# bytes/s: the fastest pass of bench's probe over the runs of decode-cuda-h200.jsonl and
# decode-cuda-h100.jsonl.
BANDWIDTH = {"h100": 3.145e12, "h200": 4.674e12}
# Other cards of these names have another memory.
_DEVICES = {"NVIDIA H100 80GB HBM3": "h100", "NVIDIA H200": "h200"}
# A sum over ranks in one server and NVLink in one direction, both assumed: nothing here was
# measured on several GPUs. docs/scale.md has the sources and what other values change.
LINK_LATENCY, LINK_BANDWIDTH = 10e-6, 370e9

# Seconds an MLP that a preview takes beside its bytes: the median over the previews' rows of
# gated-mlp-cuda-h200.jsonl, the only constant of rows that drop anything.
_PREVIEW = 2.24e-6
# Fitted on dense rows of decode-cuda-h200.jsonl: up to four sequences; eight and sixteen. They
# stand for an H100, too, with its own bandwidth.
_FEW = Costs(0.974, 0.0397, 16.07e-6, 0.665, _PREVIEW)
_MANY = Costs(0.974, 0.0144, 96.63e-6, 0.665, _PREVIEW)
# On those of vllm-cuda.jsonl, of one shape on an H100; how fast bytes stream is the line above's.
_VLLM = Costs(0.974, 0.00218, 50.16e-6, 0.665, _PREVIEW)
# Of one MLP, called alone: on the rows of gated-mlp-cuda-h200.jsonl that keep every neuron.
_OP_FEW = Costs(0.998, 0.0351, 5.494e-6, preview=_PREVIEW)
_OP_MANY = Costs(0.932, 0.000106, 15.13e-6, preview=_PREVIEW)
COSTS = {
    "catsparse": (_FEW, _MANY),
    "vllm": (_VLLM, _VLLM),
    "op": (_OP_FEW, _OP_MANY),
}


def machine(engine: str, bandwidth: float) -> Machine:
    """``engine``, or ``op`` for one MLP called alone, on a GPU of that bandwidth in bytes/s."""
    few, many = COSTS[engine]
    return Machine(engine, bandwidth, few, many, LINK_LATENCY, LINK_BANDWIDTH)


def fitted_machine(rows: Sequence[Measured], engine: str, bandwidth: float | None) -> Machine:
    """``engine`` with the time of a layer beside its bytes as the dense rows have it.

    Args:
        rows: of ``bench decode`` or of vLLM, on one GPU.
        bandwidth: bytes/s; None for what the rows' runs probed.

    Raises:
        CatsparseError: there is no such row, or no bandwidth.
    """
    bandwidth = probed(rows) if bandwidth is None else bandwidth
    if bandwidth is None:
        raise CatsparseError("the rows to fit have no byte limit; give the GPU's --bandwidth")
    usual = machine(engine, bandwidth)
    dense = [row for row in rows if row.engine == engine and not row.setting.sparsity]
    few = [row for row in dense if _few(row)]
    if not few:
        raise CatsparseError(
            f"there is no dense row of {engine} to fit; 'catsparse bench decode' writes some"
        )
    costs = fit(few, bandwidth, usual.few, ("layer",))
    many = [row for row in dense if not _few(row)]
    rest = fit(many, bandwidth, usual.many, ("layer",)) if many else usual.many
    return replace(usual, few=costs, many=costs if engine == "vllm" else rest)


def _few(row: Measured) -> bool:
    """Whether the step, or call, is one of few tokens."""
    return row.engine == "vllm" or row.setting.batch <= sparse_tokens(row.setting, "catsparse")


@dataclass(frozen=True)
class Measured:
    """A measured row that the simulator can say something about.

    Attributes:
        what: ``op`` (one MLP), ``decode`` or ``vllm``.
        seconds: of a call or a step.
        vs_dense: speedup over the best dense of the same run.
        bandwidth: as probed in the run; None if it was not.
    """

    what: str
    device: str
    setting: Setting
    seconds: float
    vs_dense: float
    bandwidth: float | None

    @property
    def gpu(self) -> str | None:
        """Its name in :data:`BANDWIDTH`, if it is there."""
        return _DEVICES.get(self.device)

    @property
    def engine(self) -> str:
        return {"decode": "catsparse"}.get(self.what, self.what)


def read_measured(paths: Iterable[Path]) -> tuple[list[Measured], int]:
    """The rows of benchmarks' files that can be simulated, and the number of those that cannot.

    Left out are peers and transformers' loop, torch's own MLP, dropped inputs, CPUs, fp32, shapes
    without a name, and more sequences than our step takes.

    Raises:
        CatsparseError: a file cannot be read, or a row lacks a number that it should have.
    """
    found: list[Measured] = []
    left_out = 0
    for path in paths:
        if not path.is_file():
            raise CatsparseError(f"there is no file {shorten(path)}; give one that bench wrote")
        for row, where in read_lines(path):
            measured = _measured(row, where)
            left_out += measured is None
            found += [] if measured is None else [measured]
    return found, left_out


def _measured(row: object, where: str) -> Measured | None:
    if not isinstance(row, dict):
        raise CatsparseError(f"{where} is no row of a benchmark; give a file that bench wrote")
    what, shape = row.get("what"), SHAPES.get(str(row.get("name")))
    impl, device = str(row.get("impl")), row.get("device")
    method = _method(what, impl, row)
    if (
        shape is None
        or method is None
        or row.get("dtype") not in ("bfloat16", "float16")
        or not isinstance(device, str)
        or row.get("threads")  # a CPU's
    ):
        return None
    sparsity = _number(row, "sparsity", where, 0, 0.9999)
    tokens = int(_number(row, "tokens", where, 1, 4096, int))
    if what == "decode" and tokens > MAX_OP_TOKENS:
        return None
    context = 0 if what == "op" else int(_number(row, "context", where, 0, 2**24, int))
    p50 = _number(row, "p50", where, 1e-9, 1e12)
    preview, products = method if sparsity else (None, False)
    named = row.get("weights")
    weights = named if named in WEIGHTS else "bf16"  # rows of before there were formats have none
    setting = Setting(shape, sparsity, tokens, context, weights, preview, products)
    bandwidth = None
    if what == "decode" and sparsity == 0 and "limit" in row:
        layer = layer_bytes(setting, 0)
        read = shape.layers * (layer.attention + layer.mlp + layer.cache)
        read += head_bytes(setting)
        bandwidth = _number(row, "limit", where, 1e-9, 1e12) / tokens * read
    vs_dense = _number(row, "vs_dense", where, 1e-9, 1e9)
    seconds = p50 * 1e-6 if what == "op" else tokens / p50
    return Measured(str(what), device, setting, seconds, vs_dense, bandwidth)


def _method(what: object, impl: str, row: dict[str, Any]) -> tuple[int | None, bool] | None:
    """(bits of the preview, whether it is of products); None for what cannot be simulated."""
    if what not in ("op", "decode", "vllm") or (what == "op" and impl == "dense"):
        return None
    known: dict[str, tuple[int | None, bool]] = {"dense": (None, False)}
    for name, products in (("preview", False), ("product", True)):
        known |= {f"catsparse_{name}{bits}": (bits, products) for bits in (4, 8)}
    if what == "vllm":
        known |= dict.fromkeys(("cats", "chess", "energy"), (None, False))
        known |= {f"product{bits}": (bits, True) for bits in (4, 8)}
        known |= {f"{name}{bits}": (bits, False) for bits in (4, 8) for name in ("cats", "energy")}
    else:
        bits = row.get("preview")
        known["catsparse"] = (bits if bits in (4, 8) else None, row.get("method") == "product")
    return known.get(impl)


def _number(
    row: dict[str, Any], key: str, where: str, least: float, most: float, kind: type = float
) -> float:
    value: Any = row.get(key)
    if type(value) not in (int, kind) or not least <= value <= most:
        raise CatsparseError(
            f"{where} has {shorten(repr(value))} for {key}; give rows as bench wrote them"
        )
    return float(value)


def probed(rows: Sequence[Measured]) -> float | None:
    """bytes/s: the fastest probe of the rows' runs; None if there is none."""
    return max((row.bandwidth for row in rows if row.bandwidth is not None), default=None)


def predict(row: Measured, on: Machine) -> float:
    """Seconds that the simulator gives for a row."""
    if row.what != "op":
        return simulate(row.setting, on).latency
    setting, costs = row.setting, on.few if _few(row) else on.many
    layer = layer_bytes(setting, sparse_tokens(setting, "catsparse"))
    speed = costs.efficiency * on.bandwidth / (1 + costs.token * (setting.batch - 1))
    return layer.mlp / speed + costs.layer + costs.preview * layer.by_preview


def fit(rows: Sequence[Measured], bandwidth: float, base: Costs, free: Sequence[str]) -> Costs:
    """Costs under which the times of dense rows come out best, by least squares of their errors.

    Args:
        rows: measured with nothing dropped, all by the same kernels.
        bandwidth: bytes/s, as probed.
        base: what is kept of the constants that are not ``free``.
        free: names of :class:`Costs`; ``token`` or ``layer``, or both with ``efficiency``.
    """
    columns = {"efficiency": 0, "token": 1, "cache_efficiency": 2, "layer": 3}
    chosen = [columns[name] for name in free]
    known = np.array(
        [
            1 / (base.efficiency * bandwidth),
            base.token / (base.efficiency * bandwidth),
            1 / (base.cache_efficiency * bandwidth),
            base.layer,
        ]
    )
    table = np.array([_amounts(row) for row in rows])
    table /= np.array([row.seconds for row in rows])[:, None]
    rest = 1 - np.delete(table, chosen, axis=1) @ np.delete(known, chosen)
    known[chosen] = np.maximum(np.linalg.lstsq(table[:, chosen], rest, rcond=None)[0], 0)
    return replace(
        base,
        efficiency=float(1 / known[0] / bandwidth),
        token=float(known[1] / known[0]),
        cache_efficiency=float(1 / known[2] / bandwidth),
        layer=float(known[3]),
    )


def _amounts(row: Measured) -> list[float]:
    """What a row has of each: bytes of weights, the same for each further token, cache, layers."""
    setting, shape = row.setting, row.setting.shape
    layer = layer_bytes(setting.dense, 0)
    if row.what == "op":
        return [layer.mlp, layer.mlp * (setting.batch - 1), 0, 1]
    weights = shape.layers * (layer.attention + layer.mlp) + head_bytes(setting)
    return [weights, weights * (setting.batch - 1), shape.layers * layer.cache, shape.layers]


@dataclass(frozen=True)
class Check:
    """A measured row beside its prediction; errors are predicted over measured, less one."""

    row: Measured
    seconds: float
    vs_dense: float
    error: float
    vs_dense_error: float


def check(rows: Sequence[Measured], machine_of: Callable[[Measured], Machine]) -> list[Check]:
    """Every row beside what the simulator says of it."""
    found = []
    for row in rows:
        on = machine_of(row)
        seconds = predict(row, on)
        ratio = predict(replace(row, setting=row.setting.dense), on) / seconds
        # Of speeds, not times: tokens/s of a model, calls/s of an op.
        error = row.seconds / seconds - 1
        found.append(Check(row, seconds, ratio, error, ratio / row.vs_dense - 1))
    return found


@dataclass(frozen=True)
class Group:
    """Errors of rows of one kind: the medians of their sizes, and the ones largest in size."""

    name: str
    rows: int
    error: float
    worst: float
    vs_dense_error: float
    vs_dense_worst: float


def kind_of(setting: Setting) -> str:
    """What decides, in words."""
    if not setting.sparsity:
        return "dense"
    if setting.preview is None:
        return "exact gate"
    return f"{setting.preview}-bit {'product' if setting.products else 'gate'} preview"


def groups(checks: Sequence[Check]) -> list[Group]:
    """By device, number of tokens, and what decides."""
    kinds: dict[str, list[Check]] = {}
    for one in checks:
        setting = one.row.setting
        many = f"{setting.batch} token{'s' * (setting.batch > 1)}"
        kinds.setdefault(
            f"{one.row.what} on {one.row.device}, {many}, {kind_of(setting)}", []
        ).append(one)
    return [
        Group(
            name,
            len(part),
            statistics.median(abs(c.error) for c in part),
            max((c.error for c in part), key=abs),
            statistics.median(abs(c.vs_dense_error) for c in part),
            max((c.vs_dense_error for c in part), key=abs),
        )
        for name, part in kinds.items()
    ]
