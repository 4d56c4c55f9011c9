"""The weights of a gated MLP's children: what can be read, is made of them, and changes."""

from __future__ import annotations

from itertools import chain
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from .checkpoints import quantized_by
from .footprint import PACKED_BYTES
from .kernels import (
    Backend,
    Choice,
    Decisions,
    choose_backend,
    dequantize_weight,
    format_of,
    make_preview,
)
from .quantized_linear import QuantizedLinear

Version = tuple[StorageWeakRef, int, int]
Key = tuple[Version, ...]


class Weights(NamedTuple):
    """What the gated MLP's op takes of an MLP: gate and up ``[I, H]``, down_t ``[I, H_out]``, in
    floats or packed with their scales; see :func:`catsparse.kernels.gated_mlp`."""

    gate: Tensor
    up: Tensor
    down_t: Tensor
    gate_scale: Tensor | None = None
    up_scale: Tensor | None = None
    down_scale: Tensor | None = None

    @property
    def format(self) -> str | None:
        """Of packed ones; None for floats."""
        return format_of(self.gate)

    def floats(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """(gate, up, down_t) in ``dtype``."""
        pairs = zip(self[:3], self[3:], strict=True)
        gate, up, down_t = (dequantize_weight(w.detach(), s, dtype).to(dtype) for w, s in pairs)
        return gate, up, down_t


class Children(nn.Module):
    """A gated MLP that knows its children's names, constant for torch.compile."""

    site_gate: ClassVar[str]
    site_up: ClassVar[str | None]
    site_act: ClassVar[str]
    site_act_child: ClassVar[str | None]
    site_down: ClassVar[str]

    def raw_weights(self, dtype: torch.dtype) -> Weights | None:
        """What the op takes, or None if unreadable. down_t is a transposed view, or packed."""
        if self.why_not_raw(dtype) is not None:
            return None
        gate, up = self.raw_gate_up()
        down = self.weight_of(self.site_down)
        scales = [self.scale_of(name) for name in self._children()]
        if scales[0] is None:
            return Weights(gate, up, down.t())
        if self.site_up is None:
            half = gate.shape[0]
            scales = [scales[0][:half], scales[0][half:], scales[1]]
        return Weights(gate, up, down, *scales)

    def raw_gate_up(self) -> tuple[Tensor, Tensor]:
        """(w_gate, w_up), each ``[I, H]``, which must be readable; packed ones as they are."""
        gate = self.weight_of(self.site_gate)
        if self.site_up is not None:
            return gate, self.weight_of(self.site_up)
        half = gate.shape[0] // 2
        return gate[:half], gate[half:]

    def scale_of(self, name: str) -> Tensor | None:
        """The scales of a child whose weight is packed; None for floats."""
        child = getattr(self, name)
        return child.weight_scale if isinstance(child, QuantizedLinear) else None

    @property
    def output_scale(self) -> Tensor | None:
        """fp32 ``[H]``, what the op's result is still to be multiplied by; None for nothing."""
        down = getattr(self, self.site_down)
        return down.output_scale if isinstance(down, QuantizedLinear) else None

    @property
    def packed(self) -> str | None:
        """The format of the children's weights, adapters aside; None for floats."""
        child = _base_of(getattr(self, self.site_down))
        return child.weights if isinstance(child, QuantizedLinear) else None

    def weight_of(self, name: str) -> Tensor:
        """The weight of a child that :meth:`why_not_child` says can be read."""
        weight: Tensor = getattr(self, name).weight
        return weight

    @property
    def weight_bytes(self) -> float:
        """Bytes of a weight."""
        if (packed := self.packed) is not None:
            return PACKED_BYTES[packed]
        weight = getattr(getattr(self, self.site_down), "weight", None)
        return 2 if weight is None else weight.dtype.itemsize  # another library's may have none

    @property
    def own_neurons(self) -> int:
        """Neurons that this module decides on."""
        rows: int = getattr(self, self.site_gate).out_features
        return rows if self.site_up is not None else rows // 2

    @torch.no_grad()
    def effective_gate_up(self) -> tuple[Tensor, Tensor]:
        """(w_gate, w_up), each ``[I, H]``, as :meth:`raw_gate_up` would give them were LoRA
        adapters merged; :meth:`why_not_effective` must be None."""
        gate = effective_weight(getattr(self, self.site_gate))
        if self.site_up is not None:
            return gate, effective_weight(getattr(self, self.site_up))
        half = gate.shape[0] // 2
        return gate[:half], gate[half:]

    def make_preview(self, bits: int, of_products: bool) -> tuple[Tensor, Tensor]:
        """The preview and its scales, of w_gate or, for products, of w_gate and w_up, with LoRA
        adapters as if merged; see :func:`catsparse.kernels.preview.make_preview`."""
        gate, up = self.effective_gate_up()
        return make_preview(gate, bits, up if of_products else None)

    def why_not_effective(self) -> str | None:
        """Why what gate and up multiply by is unknown, so that there can be no preview of it; None
        if it is known. Unlike for :meth:`why_not_raw` it may be a sum with LoRA adapters."""
        if (reason := self._why_act_hooked()) is not None:
            return reason
        for name in self._children():
            child = getattr(self, name)
            if why_not_plain_lora(child) is None:
                reason = _why_hooked(name, child)
            else:
                reason = why_not_readable(name, child)
            if reason is not None:
                return reason
        return None

    def _why_act_hooked(self) -> str | None:
        act = getattr(self, self.site_act_child) if self.site_act_child else None
        if act is not None and (act._forward_hooks or act._forward_pre_hooks):
            return f"{self.site_act_child} is hooked"
        return None

    def _children(self) -> list[str]:
        names = (self.site_gate, self.site_up, self.site_down)
        return [name for name in names if name is not None]

    def why_not_raw(self, dtype: torch.dtype | None = None) -> str | None:
        """Why the children must be called instead of reading their weights; None if they can be."""
        if (reason := self._why_act_hooked()) is not None:
            return reason
        for name in self._children():
            reason = self.why_not_child(name, dtype)
            if reason is not None:
                return reason
        return self._why_not_alike()

    def _why_not_alike(self) -> str | None:
        """Why weights that are packed do not go into one call; None if they do."""
        packed = [getattr(self, name) for name in self._children()]
        kinds = {c.weights if isinstance(c, QuantizedLinear) else None for c in packed}
        if len(kinds) > 1:
            return "its weights are of several formats"
        if kinds == {None}:
            return None
        by_input = [c.by_input for c in packed]
        return None if by_input == [False] * (len(packed) - 1) + [True] else "they lie otherwise"

    def why_not_child(self, name: str, dtype: torch.dtype | None = None) -> str | None:
        """Why a child must be called instead of reading its weight; None if it need not."""
        return why_not_readable(name, getattr(self, name), dtype)

    def make_bias(self, mean: Tensor) -> Tensor:
        """w_down @ mean, fp32 ``[H]``, before :attr:`output_scale`; w_down must be readable, mean
        is fp32 ``[I]``."""
        weight = self.weight_of(self.site_down)
        mean = mean.to(weight.device)
        # By pieces: a whole fp32 copy of w_down would be 235 MB at 7B.
        if (scale := self.scale_of(self.site_down)) is not None:
            parts = zip(weight.split(1024), scale.split(1024), mean.split(1024), strict=True)
            bias = [m @ dequantize_weight(w, s, torch.float32) for w, s, m in parts]
            return torch.stack(bias).sum(0)
        return torch.cat([rows.float() @ mean for rows in weight.split(1024)])

    def choose_backend(self, asked: Backend, down_copy: bool) -> Choice:
        """What this layer would run if ``asked`` to; its weights must be readable, or sums of such
        ones with adapters."""
        gate, down = (_base_of(getattr(self, name)) for name in (self.site_gate, self.site_down))
        packed, device = self.packed, down.weight.device
        dtype = down.weight.dtype if packed is None else down.compute_dtype
        sizes = gate.in_features, down.in_features, down.out_features
        if packed is None:  # of a model spread over processes these are the rank's
            sizes = gate.weight.shape[1], down.weight.shape[1], down.weight.shape[0]
        choice = choose_backend(asked, device, dtype, sizes, self.decisions(), packed)
        if packed is None and choice.backend in (Backend.CUDA, Backend.TRITON) and not down_copy:
            reason = f"the {choice.backend.value} kernel needs the copy of the down projection"
            return Choice(Backend.TORCH, 0, reason)
        return choice

    def decisions(self) -> Decisions:
        """What decides beside the exact gate."""
        return Decisions()

    def weights_key(self, gate: bool, up: bool) -> Key:
        """Versions of w_down, and of w_gate and w_up, adapters included, if asked for."""
        key: list[Version] = [version_of(self.weight_of(self.site_down))]
        for name, wanted in ((self.site_gate, gate), (self.site_up, up)):
            if wanted and name is not None:
                child = getattr(self, name)
                key.append(version_of(self.weight_of(name)))
                for adapter in _adapters(child):
                    key += [version_of(m[adapter].weight) for m in (child.lora_A, child.lora_B)]
        return tuple(key)


def _base_of(child: Any) -> Any:
    """A layer below its adapters."""
    return getattr(child, "base_layer", child)


def why_not_readable(
    name: str, child: nn.Module, dtype: torch.dtype | None = None, spread: bool = False
) -> str | None:
    """Why ``child`` must be called instead of multiplying by its weight; None if it need not.

    Args:
        name: of the child, for the reason.
        dtype: of its input; None for its own.
        spread: whether its weight may be spread over processes, and its forward replaced for that.
    """
    packed = type(child) is QuantizedLinear
    reason = why_no_matrix(name, child, QuantizedLinear if packed else nn.Linear, spread)
    if reason is not None:
        return reason
    if child.bias is not None:
        return f"{name} has a bias"
    if (reason := _why_hooked(name, child, spread)) is not None:
        return reason
    if dtype is not None and not packed and child.weight.dtype != dtype:
        return f"{name} is {child.weight.dtype}, its input {dtype}"
    return None


def _why_hooked(name: str, child: nn.Module, replaced: bool = False) -> str | None:
    if child._forward_hooks or child._forward_pre_hooks:
        return f"{name} is hooked"
    if not replaced and "forward" in child.__dict__ and not _is_own_forward(child):
        return f"{name} is hooked"
    return None


def _is_own_forward(child: Any) -> bool:
    """Whether the forward set on the instance is that of its class, or accelerate's around it where
    that only moves inputs to the device of a weight that stays there (a device map's)."""
    forward, hook = child.__dict__["forward"], child.__dict__.get("_hf_hook")
    if hook is not None:
        if type(hook).__name__ != "AlignDevicesHook" or hook.offload:
            return False
        if hook.execution_device is None or torch.device(hook.execution_device) != device_of(child):
            return False
        forward = child.__dict__.get("_old_forward")
    own = getattr(forward, "__func__", None) is type(child).forward
    return own and forward.__self__ is child


def why_not_plain_lora(child: Any) -> str | None:
    """Why ``child`` is not PEFT's LoRA on a plain linear without bias; None if it is, so that what
    it multiplies by is a sum of matrices. PEFT itself is not imported."""
    if not type(child).__module__.startswith("peft.tuners.lora"):
        return "it is no LoRA layer"
    base = getattr(child, "base_layer", None)
    if base is None or why_not_readable("base_layer", base) is not None:
        return "its base is no plain linear without bias"
    if getattr(child, "lora_variant", None) or getattr(child, "fan_in_fan_out", False):
        return "it is a variant of LoRA"
    biased = any(b.bias is not None for b in child.lora_B.values())
    return "its adapter has a bias" if biased else None


def _adapters(child: Any) -> list[str]:
    """Names of the adapters that a LoRA layer adds to its input's product."""
    if not hasattr(child, "lora_A") or child.disable_adapters or child.merged:
        return []
    return [name for name in child.active_adapters if name in child.lora_A]


@torch.no_grad()
def effective_weight(child: Any) -> Tensor:
    """What ``child``, a linear or a plain LoRA layer on one, multiplies by: the base's dtype, and
    bit for bit what merging the adapters would leave there; a packed one in floats."""
    base = _base_of(child)
    if isinstance(base, QuantizedLinear):
        weight = base.dequantized(base.compute_dtype)
    else:
        weight = child.weight.detach()
    for name in _adapters(child):
        weight = (weight + child.get_delta_weight(name)).to(weight.dtype)
    return weight


def is_spread(weight: object) -> bool:
    """Whether a weight is spread over processes, a DTensor; nothing is imported to tell."""
    return type(weight).__name__ == "DTensor"


def why_no_matrix(
    name: str, child: nn.Module, plain: type[nn.Module] = nn.Linear, spread: bool = False
) -> str | None:
    """Why ``child``, which must be of the class ``plain``, has no weight that is a plain matrix
    here, or with ``spread`` a part of one; None if it has."""
    if (library := quantized_by(child)) is not None:
        return f"{name} is quantized by {library}"
    if type(child) is not plain:
        kind = type(child)  # LoRA's linear is called Linear too: say whose it is
        return f"{name} is {kind.__module__.split('.')[0]}'s {kind.__name__}"
    if is_spread(child.weight):
        return None if spread else f"{name} is spread over processes"
    if type(child.weight) is not nn.Parameter:
        return f"{name} holds {type(child.weight).__name__}"
    return f"{name} is offloaded" if child.weight.device.type == "meta" else None


def version_of(weight: Tensor) -> Version:
    """Changes with the weight. The storage is told by a weak reference, as an address serves again
    once its memory is freed."""
    version = 0 if weight.is_inference() else weight._version
    return StorageWeakRef(weight.untyped_storage()), weight.data_ptr(), version


def may_copy(weight: Tensor) -> bool:
    """Not while a graph is made: a copy would be captured instead of done."""
    if torch.compiler.is_compiling():
        return False
    return not (weight.is_cuda and torch.cuda.is_current_stream_capturing())


def device_of(module: nn.Module) -> torch.device:
    """Where the module computes; for offloaded weights the device their hook runs on."""
    # A GPTQ or AWQ layer has buffers only.
    tensor = next(chain(module.parameters(), module.buffers()), None)
    if tensor is None:
        return torch.device("cpu")
    if tensor.device.type != "meta":
        return tensor.device
    for child in module.modules():
        hook = getattr(child, "_hf_hook", None)
        device = getattr(hook, "execution_device", None)
        if device is not None:
            return torch.device(device)
    return torch.device("cpu")
