"""Whether a model is a plain decoder that the fused step can run, by its parts and weights.

Names lead to the parts, and every parameter of the model must be accounted for; whether the parts
are put together as the fused step does it, is then found out by running both (fused.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels import ACTIVATIONS, MAX_OP_TOKENS, Backend
from ..kernels.attention import why_not_attention
from ..kernels.cuda import why_not_cuda, why_not_sizes
from ..kernels.linear import why_not_linear
from ..kernels.sparse_linear_cuda import why_not_sparse_linear
from ..kernels.stream import PIECE, Norm, group_size, rms_norm, whole_pieces
from ..linears import SparseLinear
from ..modules import SparseMLP
from ..sites import find_sites

# Parts of a config's keys: what changes results in ways that may not show where they are compared.
_UNUSUAL = ("softcap", "clip_qkv", "temperature_tuning", "scaling_beta", "no_rope")


class NotPlain(Exception):
    """The fused step cannot run the model; the message says why."""


@dataclass(frozen=True)
class Mlp:
    """A gated MLP's weights; ``module`` holds thresholds, where it is sparse."""

    gate: Tensor
    up: Tensor
    down: Tensor
    act: str
    module: SparseMLP | None


@dataclass(frozen=True)
class Layer:
    """One decoder layer: x += o(attention(qkv(norm x))), x += mlp(norm x)."""

    qkv: tuple[Tensor, ...]
    qkv_bias: tuple[Tensor | None, ...]
    o: Tensor
    o_bias: Tensor | None
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
    head: Tensor
    head_bias: Tensor | None
    rotary: nn.Module
    heads: int
    kv_heads: int
    head_size: int

    @property
    def dtype(self) -> torch.dtype:
        return self.head.dtype

    @property
    def few(self) -> int:
        """The most sequences that our products take at once; more are torch's."""
        sizes = []
        for layer in self.layers:
            sizes += [w.shape[1] for w in (layer.qkv[0], layer.o, layer.mlp.gate)]
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
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear:
        raise NotPlain(f"its output layer is a {type(head).__name__}")
    reason = why_not_cuda(head.weight.device) or why_not_linear([head.weight])
    if reason:
        raise NotPlain(reason)
    window = getattr(model.config, "sliding_window", None) or 0
    attention = _part(layers[0], "self_attn")
    head_size = int(_part(attention, "head_dim"))
    heads = int(model.config.num_attention_heads)
    kv_heads = int(getattr(model.config, "num_key_value_heads", None) or heads)
    reason = why_not_attention(head.weight.dtype, heads, kv_heads, head_size)
    if reason:
        raise NotPlain(f"no attention kernel for {reason}")
    decoder = Decoder(
        embed=model.get_input_embeddings(),
        layers=tuple(
            _layer(layer, window if slides else 0, (heads, kv_heads, head_size))
            for layer, slides in zip(layers, sliding, strict=True)
        ),
        layer_modules=tuple(layers),
        norm=_norm(_part(base, "norm")),
        head=head.weight,
        head_bias=head.bias,
        rotary=_part(base, "rotary_emb"),
        heads=heads,
        kv_heads=kv_heads,
        head_size=head_size,
    )
    known = {id(tensor) for tensor in _tensors(decoder)}
    for tensor in _tensors(decoder):
        if tensor is None:
            continue
        if tensor.dtype != decoder.dtype:
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


def _layer(layer: nn.Module, window: int, sizes: tuple[int, int, int]) -> Layer:
    attention = _part(layer, "self_attn")
    heads, kv_heads, size = sizes
    rows = [heads * size, kv_heads * size, kv_heads * size]
    names = ["qkv_proj"] if hasattr(attention, "qkv_proj") else ["q_proj", "k_proj", "v_proj"]
    qkv_sparse, o_sparse = _sparse(attention, names), _sparse(attention, ["o_proj"])
    if len(names) == 1:
        weight, bias = _linear(attention, "qkv_proj")
        if weight.shape[0] != sum(rows):
            raise NotPlain("its attention has other sizes than its config")
        qkv = weight.split(rows)
        biases = (None,) * 3 if bias is None else tuple(bias.split(rows))
        owners: tuple[Tensor | None, ...] = (weight, bias)
    else:
        pairs = [_linear(attention, name) for name in names]
        qkv, biases = tuple(w for w, _ in pairs), tuple(b for _, b in pairs)
        owners = (*qkv, *biases)
    o, o_bias = _linear(attention, "o_proj")
    if [w.shape[0] for w in qkv] != rows or o.shape[1] != rows[0]:
        raise NotPlain("its attention has other sizes than its config")
    for weights, sparse in ((qkv, qkv_sparse), ([o], o_sparse)):
        reason = None if sparse else why_not_linear(weights)
        if reason:
            raise NotPlain(reason)
    found = Layer(
        qkv=tuple(qkv),
        qkv_bias=biases,
        o=o,
        o_bias=o_bias,
        norm=_norm(_part(layer, "input_layernorm")),
        mlp_norm=_norm(_part(layer, "post_attention_layernorm")),
        q_norm=_norm(attention.q_norm) if hasattr(attention, "q_norm") else None,
        k_norm=_norm(attention.k_norm) if hasattr(attention, "k_norm") else None,
        scale=float(getattr(attention, "scaling", size**-0.5)),
        window=window,
        mlp=_mlp(layer),
        owners=owners,
        qkv_sparse=qkv_sparse,
        o_sparse=o_sparse,
    )
    for norm in (found.q_norm, found.k_norm):
        if norm is not None and norm.weight.shape != (size,):
            raise NotPlain("its query and key norms go over all heads")
    return found


def _mlp(layer: nn.Module) -> Mlp:
    module = _part(layer, "mlp")
    sparse = module if isinstance(module, SparseMLP) else None
    if sparse is not None:
        weights = sparse.raw_weights(next(sparse.parameters()).dtype)
        if weights is None:
            raise NotPlain(f"an MLP's {sparse.why_not_raw()}")
        choice = sparse.choose_backend(sparse.catsparse_backend, sparse.catsparse_down_copy)
        runs = sparse.catsparse_enabled or not sparse.catsparse_down_copy
        if runs and choice.backend is not Backend.CUDA:
            raise NotPlain(f"its MLPs run in {choice.backend.value}: {choice.reason}")
        gate, up, down = weights
        act = sparse.site_act
    else:
        sites = [site for site in find_sites(layer)[0] if site.name == "mlp"]
        if not sites:
            raise NotPlain("its MLPs are not gated")
        site = sites[0]
        (gate, bias), (down, down_bias) = _linear(module, site.gate), _linear(module, site.down)
        up_bias = None
        if site.up is None:
            half = gate.shape[0] // 2
            gate, up = gate[:half], gate[half:]
        else:
            up, up_bias = _linear(module, site.up)
        if any(b is not None for b in (bias, up_bias, down_bias)):
            raise NotPlain("its MLPs have biases")
        act = site.act
    neurons, hidden = gate.shape
    reason = why_not_sizes(gate.device, gate.dtype, hidden, neurons, down.shape[0])
    if reason or act not in ACTIVATIONS or not (whole_pieces(gate) and whole_pieces(up)):
        raise NotPlain(reason or "its MLPs' rows are not whole pieces")
    return Mlp(gate, up, down, act, sparse)


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


def _linear(parent: nn.Module, name: str) -> tuple[Tensor, Tensor | None]:
    child = _part(parent, name)
    plain = type(child) in (nn.Linear, SparseLinear)
    if not plain or type(child.weight) is not nn.Parameter:
        raise NotPlain(f"its {name} is a {type(child).__name__}")
    return child.weight, child.bias


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
    yield from (decoder.norm.weight, decoder.head, decoder.head_bias)
    for layer, module in zip(decoder.layers, decoder.layer_modules, strict=True):
        yield from layer.owners
        yield from (layer.o, layer.o_bias, layer.norm.weight, layer.mlp_norm.weight)
        yield from (norm.weight for norm in (layer.q_norm, layer.k_norm) if norm is not None)
        yield from _part(module, "mlp").parameters()
