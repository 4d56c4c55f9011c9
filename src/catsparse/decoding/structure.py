"""Whether a model is a plain decoder that the fused step can run, by its parts and weights.

Names lead to the parts, and every parameter of the model must be accounted for; whether the parts
are put together as the fused step does it, is then found out by running both (fused.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..checkpoints import quantized_by
from ..kernels import ACTIVATIONS, FORMATS, MAX_OP_TOKENS, Backend
from ..kernels.attention import why_not_attention
from ..kernels.cuda import why_not_cuda, why_not_sizes
from ..kernels.formats import columns_of
from ..kernels.linear import why_not_linear
from ..kernels.sparse_linear_cuda import why_not_sparse_linear
from ..kernels.stream import PIECE, Norm, group_size, rms_norm, whole_pieces
from ..linears import SparseLinear
from ..modules import SparseMLP
from ..quantized_linear import QuantizedLinear
from ..sites import find_sites
from ..weights import Weights

# Parts of a config's keys: what changes results in ways that may not show where they are compared.
_UNUSUAL = ("softcap", "clip_qkv", "temperature_tuning", "scaling_beta", "no_rope")


class NotPlain(Exception):
    """The fused step cannot run the model; the message says why."""


class Matrix(NamedTuple):
    """A linear layer's weight, or some of its rows, and its bias; packed weights have scales."""

    weight: Tensor
    bias: Tensor | None
    scale: Tensor | None = None


@dataclass(frozen=True)
class Mlp:
    """A gated MLP's weights; ``module`` holds thresholds, where it is sparse. ``down`` is the
    parameter that down_t is a transposed view of, where nobody keeps a copy."""

    weights: Weights
    act: str
    module: SparseMLP | None
    down: Tensor | None = None


@dataclass(frozen=True)
class Layer:
    """One decoder layer: x += o(attention(qkv(norm x))), x += mlp(norm x)."""

    qkv: tuple[Matrix, ...]
    o: Matrix
    norm: Norm
    mlp_norm: Norm
    q_norm: Norm | None
    k_norm: Norm | None
    scale: float
    window: int
    mlp: Mlp
    owners: tuple[Tensor | None, ...]  # the parameters that qkv and its biases are, or lie in
    # The layers themselves, where their input is thresholded.
    qkv_sparse: tuple[SparseLinear, ...] = ()
    o_sparse: tuple[SparseLinear, ...] = ()


@dataclass(frozen=True)
class Decoder:
    """All that decode reads of a model."""

    embed: nn.Module
    layers: tuple[Layer, ...]
    layer_modules: tuple[nn.Module, ...]  # to be hooked while the step is checked
    norm: Norm
    head: Matrix
    rotary: nn.Module
    heads: int
    kv_heads: int
    head_size: int

    @property
    def dtype(self) -> torch.dtype:
        """Of activations: embeddings are not packed."""
        dtype: torch.dtype = next(self.embed.parameters()).dtype
        return dtype

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    @property
    def few(self) -> int:
        """The most sequences that our products take at once; more are torch's."""
        sizes = []
        for layer in self.layers:
            weights = layer.qkv[0].weight, layer.o.weight, layer.mlp.weights.gate
            sizes += [columns_of(w) for w in weights]
            sizes += [sum(m.out_features for m in s) for s in (layer.qkv_sparse, layer.o_sparse)]
        return min(group_size(size * self.dtype.itemsize) for size in sizes if size)


@torch.no_grad()
def find_decoder(model: Any, sliding: Sequence[bool], batch: int) -> Decoder:
    """The model's parts.

    Args:
        sliding: for each layer, whether it sees a window only. batch: tokens a step.

    Raises:
        NotPlain: it is built otherwise, or the kernels do not take its sizes.
    """
    unusual = [k for k in _set_keys(vars(model.config)) if any(u in k for u in _UNUSUAL)]
    if unusual:
        raise NotPlain(f"its config has {unusual[0]}")
    base = _part(model, model.base_model_prefix)
    layers = list(_part(base, "layers"))
    if len(layers) != len(sliding):
        raise NotPlain(f"it has {len(layers)} layers, its cache {len(sliding)}")
    head = _matrix(model.get_output_embeddings(), "output layer")
    norm = _norm(_part(base, "norm"))
    dtype = next(model.get_input_embeddings().parameters()).dtype
    device = head.weight.device
    reason = why_not_cuda(device) or why_not_linear([head.weight], dtype)
    if reason:
        raise NotPlain(reason)
    window = getattr(model.config, "sliding_window", None) or 0
    attention = _part(layers[0], "self_attn")
    head_size = int(_part(attention, "head_dim"))
    heads = int(model.config.num_attention_heads)
    kv_heads = int(getattr(model.config, "num_key_value_heads", None) or heads)
    reason = why_not_attention(dtype, heads, kv_heads, head_size)
    if reason:
        raise NotPlain(f"no attention kernel for {reason}")
    decoder = Decoder(
        embed=model.get_input_embeddings(),
        layers=tuple(
            _layer(layer, window if slides else 0, (heads, kv_heads, head_size), dtype)
            for layer, slides in zip(layers, sliding, strict=True)
        ),
        layer_modules=tuple(layers),
        norm=norm,
        head=head,
        rotary=_part(base, "rotary_emb"),
        heads=heads,
        kv_heads=kv_heads,
        head_size=head_size,
    )
    known = {id(tensor) for tensor in _tensors(decoder)}
    for tensor in _tensors(decoder):
        if tensor is None:
            continue
        if tensor.dtype != decoder.dtype and tensor.dtype not in FORMATS.values():
            raise NotPlain(f"it has weights of {tensor.dtype} and of {decoder.dtype}")
        turned = tensor.dim() == 2 and tensor.t().is_contiguous()  # a sparse layer's
        if not (tensor.is_contiguous() or turned) or tensor.data_ptr() % PIECE:
            raise NotPlain("its weights are not contiguous, or start between pieces")
    for name, parameter in model.named_parameters():
        if id(parameter) not in known:
            raise NotPlain(f"it has a {name}")
    if batch > MAX_OP_TOKENS:
        raise NotPlain(f"{batch} sequences are more than {MAX_OP_TOKENS}")
    return decoder


def _layer(layer: nn.Module, window: int, sizes: tuple[int, int, int], dtype: torch.dtype) -> Layer:
    attention = _part(layer, "self_attn")
    heads, kv_heads, size = sizes
    rows = [heads * size, kv_heads * size, kv_heads * size]
    names = ["qkv_proj"] if hasattr(attention, "qkv_proj") else ["q_proj", "k_proj", "v_proj"]
    qkv_sparse, o_sparse = _sparse(attention, names), _sparse(attention, ["o_proj"])
    if len(names) == 1:
        whole = _linear(attention, "qkv_proj")
        if whole.weight.shape[0] != sum(rows):
            raise NotPlain("its attention has other sizes than its config")
        parts = [(None,) * 3 if t is None else t.split(rows) for t in whole]
        qkv = tuple(Matrix(*part) for part in zip(*parts, strict=True))
        owners: tuple[Tensor | None, ...] = whole[:2]
    else:
        qkv = tuple(_linear(attention, name) for name in names)
        owners = tuple(t for matrix in qkv for t in matrix[:2])
    o = _linear(attention, "o_proj")
    if [m.weight.shape[0] for m in qkv] != rows or columns_of(o.weight) != rows[0]:
        raise NotPlain("its attention has other sizes than its config")
    for matrices, sparse in ((qkv, qkv_sparse), ([o], o_sparse)):
        reason = None if sparse else why_not_linear([m.weight for m in matrices], dtype)
        if reason:
            raise NotPlain(reason)
    found = Layer(
        qkv=qkv,
        o=o,
        norm=_norm(_part(layer, "input_layernorm")),
        mlp_norm=_norm(_part(layer, "post_attention_layernorm")),
        q_norm=_norm(attention.q_norm) if hasattr(attention, "q_norm") else None,
        k_norm=_norm(attention.k_norm) if hasattr(attention, "k_norm") else None,
        scale=float(getattr(attention, "scaling", size**-0.5)),
        window=window,
        mlp=_mlp(layer, dtype),
        owners=owners,
        qkv_sparse=qkv_sparse,
        o_sparse=o_sparse,
    )
    for norm in (found.q_norm, found.k_norm):
        if norm is not None and norm.weight.shape != (size,):
            raise NotPlain("its query and key norms go over all heads")
    return found


def _mlp(layer: nn.Module, dtype: torch.dtype) -> Mlp:
    module = _part(layer, "mlp")
    sparse = module if isinstance(module, SparseMLP) else None
    to_copy: Tensor | None = None
    if sparse is not None:
        found = sparse.raw_weights(dtype)
        if found is None:
            raise NotPlain(f"an MLP's {sparse.why_not_raw(dtype)}")
        if sparse.output_scale is not None:
            raise NotPlain("an MLP's down projection has the checkpoint's scales by output")
        weights = found
        choice = sparse.choose_backend(sparse.catsparse_backend, sparse.catsparse_down_copy)
        runs = sparse.catsparse_enabled or not sparse.catsparse_down_copy
        if runs and choice.backend is not Backend.CUDA:
            raise NotPlain(f"its MLPs run in {choice.backend.value}: {choice.reason}")
        act = sparse.site_act
    else:
        sites = [site for site in find_sites(layer)[0] if site.name == "mlp"]
        if not sites:
            raise NotPlain("its MLPs are not gated")
        site = sites[0]
        gate, down = _linear(module, site.gate), _linear(module, site.down, by_input=True)
        if site.up is None:
            half = gate.weight.shape[0] // 2
            parts = [(None, None) if t is None else (t[:half], t[half:]) for t in gate]
            gate, up = (Matrix(*part) for part in zip(*parts, strict=True))
        else:
            up = _linear(module, site.up)
        if any(m.bias is not None for m in (gate, up, down)):
            raise NotPlain("its MLPs have biases")
        down_t = down.weight
        if down.scale is None:
            down_t, to_copy = down.weight.t(), down.weight
        weights = Weights(gate.weight, up.weight, down_t, gate.scale, up.scale, down.scale)
        act = site.act
    rows, sizes = weights.gate, (columns_of(weights.gate), len(weights.gate))
    reason = why_not_sizes(
        *(rows.device, dtype, *sizes, columns_of(weights.down_t), None, weights.format)
    )
    if reason or act not in ACTIVATIONS or not all(map(whole_pieces, weights[:2])):
        raise NotPlain(reason or "its MLPs' rows are not whole pieces")
    return Mlp(weights, act, sparse, to_copy)


def _norm(module: nn.Module) -> Norm:
    """What kind of RMS norm a module is, found by running it."""
    weight = getattr(module, "weight", None)
    names = ("variance_epsilon", "eps", "norm_eps")
    eps = next((getattr(module, name) for name in names if hasattr(module, name)), None)
    if not isinstance(weight, Tensor) or weight.dim() != 1 or eps is None:
        raise NotPlain(f"its {type(module).__name__} is no RMS norm")
    x = torch.linspace(-3, 2.5, 2 * weight.numel(), device=weight.device).to(weight.dtype)
    x = x.view(2, -1)
    y = module(x)
    tolerance = 4 * torch.finfo(x.dtype).eps
    for offset in (0.0, 1.0):
        norm = Norm(weight, float(eps), offset)
        mine = rms_norm(x, norm).float()
        if y.shape == mine.shape and torch.allclose(
            y.float(), mine, rtol=tolerance, atol=tolerance
        ):
            return norm
    raise NotPlain(f"its {type(module).__name__} is no RMS norm")


def _sparse(parent: nn.Module, names: Sequence[str]) -> tuple[SparseLinear, ...]:
    """The layers of these names if their input is thresholded, laid out for the kernel; none if
    they are dense."""
    layers = [_part(parent, name) for name in names]
    sparse = tuple(layer for layer in layers if isinstance(layer, SparseLinear))
    if not sparse:
        return ()
    if len(sparse) != len(layers) or not all(_same_input(sparse[0], other) for other in sparse):
        raise NotPlain(f"its {' and '.join(names)} do not share their thresholds")
    for name, layer in zip(names, sparse, strict=True):
        choice = layer.choose_backend(layer.catsparse_backend, layer.catsparse_down_copy)
        if choice.backend is not Backend.CUDA:
            raise NotPlain(f"its {name} runs in {choice.backend.value}: {choice.reason}")
        layer.prepare_decode()
        if layer.rows_by_input() is None:
            raise NotPlain(f"its {name} is not laid out by input")
    columns = [layer.out_features for layer in sparse]
    weight = sparse[0].weight
    reason = why_not_sparse_linear(weight.device, weight.dtype, weight.shape[1], columns)
    if reason:
        raise NotPlain(reason)
    return sparse


def _same_input(one: SparseLinear, other: SparseLinear) -> bool:
    """Whether both leave out the same inputs, and put the same in their place."""
    if one.catsparse_enabled != other.catsparse_enabled:
        return False
    pairs = (
        (one.catsparse_threshold, other.catsparse_threshold),
        (one.catsparse_mean, other.catsparse_mean),
    )
    return all(a is b or (a is not None and b is not None and torch.equal(a, b)) for a, b in pairs)


def _linear(parent: nn.Module, name: str, by_input: bool = False) -> Matrix:
    """The weight of a child; a packed one must lie ``by_input`` or not."""
    return _matrix(_part(parent, name), name, by_input)


def _matrix(child: Any, name: str, by_input: bool = False) -> Matrix:
    if (library := quantized_by(child)) is not None:  # a plain module may hold codes, or round
        raise NotPlain(f"its {name} is quantized by {library}")
    plain = type(child) in (nn.Linear, SparseLinear, QuantizedLinear)
    if not plain or type(child.weight) is not nn.Parameter:
        raise NotPlain(f"its {name} is a {type(child).__name__}")
    if not isinstance(child, QuantizedLinear):
        return Matrix(child.weight, child.bias)
    if child.by_input is not by_input:
        raise NotPlain(f"its {name} is packed by the other axis")
    if child.output_scale is not None:
        raise NotPlain(f"its {name} has the checkpoint's scales by output")
    return Matrix(child.weight, child.bias, child.weight_scale)


def _part(parent: Any, name: str) -> Any:
    if not name or not hasattr(parent, name):
        raise NotPlain(f"its {type(parent).__name__} has no {name or 'base model'}")
    return getattr(parent, name)


def _set_keys(config: dict[str, Any]) -> Iterator[str]:
    """Keys of a config that are set to anything, those of its parts as well."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _set_keys(value)
        elif value:
            yield str(key)


def _tensors(decoder: Decoder) -> Iterator[Tensor | None]:
    yield from decoder.embed.parameters()
    yield from (decoder.norm.weight, *decoder.head[:2])
    for layer, module in zip(decoder.layers, decoder.layer_modules, strict=True):
        yield from layer.owners
        yield from (*layer.o[:2], layer.norm.weight, layer.mlp_norm.weight)
        yield from (norm.weight for norm in (layer.q_norm, layer.k_norm) if norm is not None)
        yield from _part(module, "mlp").parameters()
