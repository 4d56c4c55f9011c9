"""The artifact's dataclasses <-> ``catsparse.json`` (standard library only).

The file is strict: an unknown key at the same format version is an error, and a newer version
says what to upgrade. docs/file-format.md describes every field.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path

from .config_versions import FORMAT_VERSION, upgrade
from .errors import CatsparseError
from .footprint import bytes_skipped, weight_bytes
from .strict_json import build, parse_json, shorten

CONFIG_NAME = "catsparse.json"
CALIBRATION_NAME = "calibration.safetensors"
GATE_METHODS = ("cats", "chess", "energy")
PRODUCT = "product"
INPUT_METHODS = ("teal", "wina")
METHODS = (*GATE_METHODS, PRODUCT, *INPUT_METHODS)
SCOPES = ("mlp", "all")
DEFAULT_METHOD = "energy"  # of the gate's; with a preview it is PRODUCT
ALLOCATIONS = ("uniform", "greedy", "optimal")
PREFILL_POLICIES = ("masked", "dense")
ACTIVATIONS = ("silu", "gelu_tanh", "gelu", "relu")
PREVIEW_BITS = (4, 8)
WEIGHTS = ("int8", "fp8", "int4")
# The codes of a checkpoint that is quantized already; what is stored names their format.
OWN = "own"
GPTQ = "gptq"  # codes rounded with data
ROUNDINGS = ("nearest", GPTQ)
ROUNDING_TOKENS = 32_768
STORED_WEIGHTS = (*WEIGHTS, *(f"{source}-{name}" for source in (OWN, GPTQ) for name in WEIGHTS))
# A thousand sites take about 200 kB; anything near this limit is not one of our files.
MAX_CONFIG_BYTES = 16 * 2**20


@dataclass(frozen=True)
class BaseModel:
    """The dense model that an artifact belongs to."""

    name_or_path: str
    model_type: str
    revision: str | None = None


@dataclass(frozen=True)
class Provenance:
    """Where the calibration statistics came from.

    ``dtype`` is the model's, ``weights`` the format that its linear layers were packed in
    (:func:`catsparse.quantize_weights`), with ``own-`` before it for a checkpoint's own codes and
    ``gptq-`` for codes rounded with data, None for floats and for weights that another library's
    layers hold.
    """

    data: str
    tokens: int
    seq_len: int
    seed: int
    dtype: str
    weights: str | None = None

    def __post_init__(self) -> None:
        if self.weights is not None:
            check_choice("weights", self.weights, STORED_WEIGHTS)


@dataclass(frozen=True)
class SiteConfig:
    """One gated MLP.

    ``threshold`` is on the method's score scale: |g| for ``cats``, |g| sqrt(E[u^2]) for ``chess``
    (whose per-neuron thresholds are tensors), |g u| times the norm of the neuron's row of W_down
    for ``product``; negative keeps every neuron. ``sparsity`` is the fraction of neurons dropped on
    the calibration tokens. With a second decision,
    ``product_threshold`` is on the scale of |g u| times the norm of the neuron's row of W_down, and
    ``down_sparsity`` is the fraction of these rows not read, by either decision.
    """

    threshold: float
    sparsity: float
    act: str
    hidden_size: int
    intermediate_size: int
    product_threshold: float | None = None
    down_sparsity: float | None = None


@dataclass(frozen=True)
class InputConfig:
    """The input that one or several linear layers of a block share.

    ``linears`` are their module names. ``threshold`` is on |x| for ``teal``, on |x| times the norm
    of the input's weights for ``wina`` (whose thresholds are tensors, one an input); negative keeps
    every input. ``sparsity`` is the fraction of inputs dropped on the calibration tokens.
    """

    linears: tuple[str, ...]
    threshold: float
    sparsity: float
    in_features: int
    out_features: int


@dataclass(frozen=True)
class SparsityConfig:
    """Everything of a sparse model but its tensors; maps one to one to ``catsparse.json``.

    A config whose method is ``cats`` and which neither compensates nor decides a second time is
    complete by itself: ``sparsify(model, config)`` needs no calibration.

    ``preview`` is the bits of the preview that decides: of the gate, or with method ``product``,
    which needs one and leaves nothing to a second decision, of gate and up. ``down_sparsity`` is
    what was asked of the second decision. None stands for neither.

    ``inputs`` are thresholded inputs of linear layers, by the name of the first layer. With the
    methods ``teal`` and ``wina`` they take the place of ``sites``: those of the gated MLPs, and in
    ``scope`` ``all`` of the other layers of their blocks (attention), too. With the other methods
    and ``scope`` ``all`` they are those other layers', by ``teal``.

    Raises:
        CatsparseError: a field is out of its range.
    """

    sites: dict[str, SiteConfig]
    method: str = "cats"
    compensate: bool = False
    sparsity: float = 0.5
    measured_sparsity: float | None = None
    down_sparsity: float | None = None
    measured_down_sparsity: float | None = None
    preview: int | None = None
    prefill: str = "masked"
    base_model: BaseModel | None = None
    inputs: dict[str, InputConfig] = field(default_factory=dict)
    scope: str = "mlp"
    calibration: Provenance | None = None
    catsparse_version: str = ""
    format_version: int = field(default=FORMAT_VERSION)

    def __post_init__(self) -> None:
        check_choice("prefill", self.prefill, PREFILL_POLICIES)
        check_sparsity(self.sparsity)
        check_preview(self.preview)
        check_method(self.method, self.preview, self.down_sparsity)
        if self.down_sparsity is not None:
            check_down_sparsity(self.down_sparsity, self.sparsity)
        check_choice("scope", self.scope, SCOPES)
        of_inputs = self.method in INPUT_METHODS
        if not self.sites and not of_inputs:
            raise CatsparseError("the config lists no site; name at least one gated MLP")
        if (bool(self.sites), bool(self.inputs)) != (
            not of_inputs,
            of_inputs or self.scope == "all",
        ):
            raise CatsparseError(
                f"the config's sites and inputs do not go with method {self.method} and scope "
                f"{self.scope}; save it again"
            )
        for what in ("measured_sparsity", "measured_down_sparsity"):
            if (measured := getattr(self, what)) is not None:
                _check_fraction(what, measured)
        for name, site in self.sites.items():
            shown = shorten(name)
            check_choice(f"act of {shown}", site.act, ACTIVATIONS)
            if not math.isfinite(site.threshold):
                raise CatsparseError(
                    f"the threshold of {shown} is {site.threshold}; it must be a finite number"
                )
            _check_fraction(f"the sparsity of {shown}", site.sparsity)
            self._check_second_decision(shown, site)
            if site.hidden_size < 1 or site.intermediate_size < 1:
                raise CatsparseError(f"the sizes of {shown} must be at least 1")

        for name, part in self.inputs.items():
            shown = shorten(name)
            if not math.isfinite(part.threshold):
                raise CatsparseError(
                    f"the threshold of {shown} is {part.threshold}; it must be a finite number"
                )
            _check_fraction(f"the sparsity of {shown}", part.sparsity)
            if part.in_features < 1 or part.out_features < 1 or name not in part.linears:
                raise CatsparseError(
                    f"{shown} must have sizes of at least 1 and be among its linears; save it again"
                )

    def _check_second_decision(self, shown: str, site: SiteConfig) -> None:
        given = [v is not None for v in (site.product_threshold, site.down_sparsity)]
        if given != [self.down_sparsity is not None] * 2:
            raise CatsparseError(
                f"down_sparsity and product_threshold of {shown} must be given if the config has a "
                "down_sparsity, else be null"
            )
        if site.product_threshold is None or site.down_sparsity is None:
            return
        if not math.isfinite(site.product_threshold):
            raise CatsparseError(
                f"the product_threshold of {shown} is {site.product_threshold}; it must be a "
                "finite number"
            )
        if not site.sparsity <= site.down_sparsity <= 1.0:
            raise CatsparseError(
                f"the down_sparsity of {shown} is {site.down_sparsity}; it must lie between its "
                f"sparsity, {site.sparsity}, and 1"
            )

    @property
    def decided_on(self) -> str:
        """What is compared with the first threshold: ``gate`` or ``product``."""
        return "product" if self.method == PRODUCT else "gate"

    @property
    def described(self) -> str:
        """The method and what goes with it, in words."""
        words = [self.method]
        words += ["compensated"] if self.compensate else []
        words += [] if self.weight_format is None else [f"{self.weight_format} weights"]
        words += [] if self.preview is None else [f"{self.preview}-bit {self.decided_on} preview"]
        if self.down_sparsity is not None:
            words.append(f"{self.down_sparsity:.0%} of the down rows unread")
        if self.scope == "all":
            others = f"attention by {self.input_method}"
            words.append(others if self.sites else "attention too")
        return ", ".join(words)

    @property
    def input_method(self) -> str:
        """The method that decides on ``inputs``."""
        return self.method if self.method in INPUT_METHODS else INPUT_METHODS[0]

    def compensates(self, name: str) -> bool:
        """Whether a site or input has means: inputs only with a method of inputs."""
        return self.compensate and (name in self.sites or self.method in INPUT_METHODS)

    @property
    def weights(self) -> str:
        """Whose bytes are counted, in words."""
        return weights_of(self.scope)

    @property
    def weight_format(self) -> str | None:
        """The format of the weights that the thresholds belong to; None for floats."""
        return self.calibration.weights if self.calibration else None

    @property
    def input_sparsity(self) -> float | None:
        """Fraction of inputs dropped on the calibration tokens, by weight; None without inputs."""
        sizes = [part.in_features * part.out_features for part in self.inputs.values()]
        if not sizes:
            return None
        shares = [part.sparsity for part in self.inputs.values()]
        return sum(s * n for s, n in zip(shares, sizes, strict=True)) / sum(sizes)

    @property
    def bytes_skipped(self) -> float:
        """Fraction of the weight bytes of all sites and inputs that a decoded token does not read.

        A preview's bytes count as read, against weights of the calibration's dtype.
        """
        dtype = self.calibration.dtype if self.calibration else ""
        itemsize = weight_bytes(dtype, self.weight_format)
        of_products, skipped, total = self.method == PRODUCT, 0.0, 0
        for s in self.sites.values():
            sizes = (s.hidden_size, itemsize, of_products)
            part = bytes_skipped(s.sparsity, s.down_sparsity, self.preview, *sizes)
            skipped += part * 3 * s.hidden_size * s.intermediate_size
            total += 3 * s.hidden_size * s.intermediate_size
        for linear in self.inputs.values():
            skipped += linear.sparsity * linear.in_features * linear.out_features
            total += linear.in_features * linear.out_features
        return skipped / total

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str, source: str = CONFIG_NAME) -> SparsityConfig:
        """Parse and check ``catsparse.json``.

        Raises:
            CatsparseError: not JSON, a newer format, a missing or unknown key, a wrong type.
        """
        raw = parse_json(text, source)
        if not isinstance(raw, dict):
            raise CatsparseError(f"{source} must hold a JSON object")
        version = raw.get("format_version")
        if not isinstance(version, int) or isinstance(version, bool) or version < 1:
            raise CatsparseError(f"{source} has no format_version; it is not a catsparse file")
        if version > FORMAT_VERSION:
            raise CatsparseError(
                f"{source} has format version {version}, this catsparse reads up to "
                f"{FORMAT_VERSION}: upgrade with 'pip install -U catsparse'"
            )
        config: SparsityConfig = build(cls, upgrade(raw, version, source), source)
        return config

    @classmethod
    def from_file(cls, path: Path) -> SparsityConfig:
        """Read ``catsparse.json``; its size is checked before it is read."""
        try:
            if (size := path.stat().st_size) > MAX_CONFIG_BYTES:
                raise CatsparseError(
                    f"{path} has {size} bytes, more than the {MAX_CONFIG_BYTES} a catsparse.json "
                    "can need; it is not one of ours"
                )
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise CatsparseError(f"cannot read {path}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise CatsparseError(f"{path} is not UTF-8 text; save it again") from error
        return cls.from_json(text, str(path))


def check_choice(what: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise CatsparseError(f"{what} must be one of {', '.join(choices)}, not {shorten(value)!r}")


def weights_of(scope: str) -> str:
    """Whose bytes a scope counts, in words."""
    return "the MLPs'" if scope == "mlp" else "all linears'"


def check_sparsity(value: float) -> None:
    if not 0.0 <= value < 1.0:
        raise CatsparseError(f"sparsity must be at least 0 and below 1, not {value}")


def check_down_sparsity(value: float, sparsity: float) -> None:
    if not sparsity <= value < 1.0:
        raise CatsparseError(
            f"down_sparsity must be at least the sparsity, {sparsity}, and below 1, not {value}"
        )


def check_method(method: str, preview: int | None, down_sparsity: float | None) -> None:
    """Whether ``method`` is one, and goes with such a preview and second decision."""
    check_choice("method", method, METHODS)
    if method in INPUT_METHODS and (preview, down_sparsity) != (None, None):
        raise CatsparseError(
            f"method {method} decides on the inputs of linear layers, so it takes neither preview "
            f"nor down_sparsity; leave them out, or take one of {', '.join(GATE_METHODS)}"
        )
    if method != PRODUCT:
        return
    if preview is None:
        raise CatsparseError(
            "method product decides by a preview; calibrate with preview=4 (--preview 4), or take "
            f"one of {', '.join(GATE_METHODS)}"
        )
    if down_sparsity is not None:
        raise CatsparseError(
            "method product has decided on the product already, so it takes no down_sparsity; "
            f"leave that out, or take one of {', '.join(GATE_METHODS)}"
        )


def check_preview(bits: int | None) -> None:
    if bits is not None and (type(bits) is not int or bits not in PREVIEW_BITS):
        choices = " or ".join(map(str, PREVIEW_BITS))
        raise CatsparseError(f"preview must be {choices} bits or None, not {shorten(bits)}")


def _check_fraction(what: str, value: float) -> None:
    if not 0.0 <= value <= 1.0:
        raise CatsparseError(f"{what} is {value}; it must lie between 0 and 1")
