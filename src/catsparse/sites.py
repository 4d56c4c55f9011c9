"""Find where a threshold can go: gated MLPs, recognised by what their forward does.

Every candidate's own ``forward`` is traced with torch.fx, its children as leaves, and must be
exactly ``down(act(gate(x)) * up(x))``: separate projections, or one fused projection chunked in
two, gate first. Names do not matter; a module that does more (a multiplier, a norm, a clamp, a
dropout) is refused and the reason kept.
"""

from __future__ import annotations

import functools
import operator
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from .errors import CatsparseError
from .kernels import ACTIVATIONS


@dataclass(frozen=True)
class Site:
    """A gated MLP of a model.

    Attributes:
        name: the module's path in the model.
        gate: child computing the gate, or gate and up at once (gate rows first) if ``up`` is None.
        up: child computing the up projection, or None where it is fused with the gate.
        act: kind of activation, a key of :data:`catsparse.kernels.ACTIVATIONS`.
        act_child: child that applies the activation, or None where the forward calls a function.
        down: child computing the down projection.
        hidden_size: H, the MLP's input size.
        intermediate_size: I, the number of neurons.
    """

    name: str
    gate: str
    up: str | None
    act: str
    act_child: str | None
    down: str
    hidden_size: int
    intermediate_size: int


@dataclass(frozen=True)
class NearMiss:
    """A module that looks like a gated MLP but is not one, and why."""

    name: str
    kind: str
    reason: str


class _Mismatch(Exception):
    """Why a forward is not that of a gated MLP."""


class _ChildrenAreLeaves(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def find_sites(model: nn.Module) -> tuple[list[Site], list[NearMiss]]:
    """List the gated MLPs of ``model`` in module order, and the near misses with their reasons."""
    sites: list[Site] = []
    misses: list[NearMiss] = []
    inside: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(prefix) for prefix in inside):
            continue
        try:
            if not _is_candidate(module):
                continue
            sites.append(match_gated_mlp(module, name))
            inside.append(f"{name}.")
        except _Mismatch as mismatch:
            misses.append(NearMiss(name, type(module).__name__, str(mismatch)))
    return sites, misses


def describe(misses: list[NearMiss], limit: int = 5) -> str:
    """One line for each distinct refusal, with the first module it applies to."""
    groups: dict[tuple[str, str], list[str]] = {}
    for miss in misses:
        groups.setdefault((miss.kind, miss.reason), []).append(miss.name)
    lines = [
        f"{kind} ({names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}): {reason}"
        for (kind, reason), names in groups.items()
    ]
    return "; ".join(lines[:limit]) + ("; ..." if len(lines) > limit else "")


def require_sites(model: nn.Module) -> list[Site]:
    """The model's sites.

    Raises:
        CatsparseError: there is none, with what was looked for and why near misses were refused.
    """
    if any(hasattr(module, "catsparse_threshold") for module in model.modules()):
        raise CatsparseError("the model is already sparse; call catsparse.densify(model) first")
    sites, misses = find_sites(model)
    if not sites:
        raise CatsparseError(_nothing_found(model, misses))
    return sites


def _nothing_found(model: nn.Module, misses: list[NearMiss]) -> str:
    looked_for = "down(act(gate(x)) * up(x)), separate or fused gate and up"
    near = describe(misses) if misses else "no module comes near"
    return f"{type(model).__name__} has no gated MLP: looked for {looked_for}; {near}"


def match_gated_mlp(module: nn.Module, name: str = "") -> Site:
    """Match one module; see :class:`Site`.

    Raises:
        _Mismatch: with the reason, if the module's forward is anything else.
    """
    _check_instance(module)
    try:
        graph = _ChildrenAreLeaves().trace(module)
    except Exception as error:
        first = str(error).split("\n")[0][:120]
        raise _Mismatch(f"its forward cannot be traced ({first})") from error
    # An unused placeholder is an argument ignored; any other unused node may act in place.
    nodes = [n for n in graph.nodes if n.users or n.op != "placeholder"]
    inputs = [n for n in nodes if n.op == "placeholder"]
    if len(inputs) != 1:
        raise _Mismatch(f"its forward uses {len(inputs)} inputs, not one")
    x = inputs[0]

    identities: set[fx.Node] = set()
    down_node = _through_idle_dropout(module, nodes[-1].args[0], identities)
    down = _linear_call(module, down_node, "its output")
    assert isinstance(down_node, fx.Node)
    product = _through_idle_dropout(module, down_node.args[0], identities)
    if not _is_mul(product):
        raise _Mismatch(f"{down}'s input is {_show(product)}, not act(gate) * up")
    left, right = product.args
    if _activation(module, left) is None:
        left, right = right, left
    activation = _activation(module, left)
    if activation is None:
        raise _Mismatch(
            f"neither factor before {down} is one of the activations {', '.join(ACTIVATIONS)}"
        )
    act, act_child = activation
    assert isinstance(left, fx.Node)
    gate_node, up_node = left.args[0], right

    fused = _fused_halves(module, gate_node, up_node, x)
    expected = {x, down_node, product, left, gate_node, up_node, nodes[-1], *identities}
    if fused is not None:
        gate, up = fused, None
        chunk = gate_node.args[0]  # type: ignore[union-attr]
        expected |= {chunk, chunk.args[0]}  # type: ignore[union-attr]
    else:
        gate = _linear_call(module, gate_node, "the activation's input", x)
        up = _linear_call(module, up_node, "the factor beside the activation", x)
    if extra := [n for n in nodes if n not in expected]:
        raise _Mismatch(f"its forward also computes {_show(extra[0])}")

    hidden, rows = _features(module, gate)
    intermediate = rows // 2 if up is None else rows
    if up is not None and _features(module, up) != (hidden, intermediate):
        raise _Mismatch(f"{gate} and {up} differ in shape")
    if _features(module, down)[0] != intermediate:
        raise _Mismatch(f"{down} does not take {intermediate} neurons")
    return Site(name, gate, up, act, act_child, down, hidden, intermediate)


def _is_candidate(module: nn.Module) -> bool:
    """Cheap filter before tracing.

    Raises:
        _Mismatch: for experts held as 3-D parameters, which need no tracing to be recognised.
    """
    if _holds_experts(module):
        raise _Mismatch("experts (3-D weights): not yet")
    children = dict(module.named_children())
    linears = [c for c in children.values() if _is_linear(c)]
    if not 2 <= len(linears) <= 3 or len(children) > 8:
        return False
    if any(not _is_linear(c) and any(True for _ in c.children()) for c in children.values()):
        return False  # a whole layer
    # An MLP maps H to I and back; attention does too, but has no activation between.
    sizes = [_sizes(c) for c in linears]
    returns = any(a[0] == b[1] and a is not b for a in sizes for b in sizes)
    has_act = any(_looks_like_activation(c) for c in children.values())
    return returns and (has_act or len(children) == len(linears) == 3)


def _holds_experts(module: nn.Module) -> bool:
    """Gate and up ``[E, 2I, H]`` (or apart) with down ``[E, H, I]``, or each of them transposed."""
    shapes = [tuple(p.shape) for p in module.parameters(recurse=False) if p.dim() == 3]
    return any(
        up[0] == down[0]
        and (
            (up[2] == down[1] and up[1] in (down[2], 2 * down[2]))
            or (up[1] == down[2] and up[2] in (down[1], 2 * down[1]))
        )
        for i, up in enumerate(shapes)
        for down in shapes[i + 1 :]
    )


def _check_instance(module: nn.Module) -> None:
    replaced = module.__dict__.get("forward")
    own = isinstance(replaced, types.MethodType) and replaced.__func__ is type(module).forward
    if replaced is not None and not own and "_old_forward" not in module.__dict__:
        raise _Mismatch(
            "its forward was replaced on the instance by "
            f"{getattr(replaced, '__qualname__', type(replaced).__name__)}"
        )


def _is_linear(module: nn.Module) -> bool:
    """A linear, or what wraps or stands in for one (LoRA, quantized)."""
    return isinstance(getattr(module, "in_features", None), int) and isinstance(
        getattr(module, "out_features", None), int
    )


def _features(module: nn.Module, child: str) -> tuple[int, int]:
    return _sizes(module.get_submodule(child))


def _sizes(linear: nn.Module) -> tuple[int, int]:
    # Where a weight is spread over processes PEFT's layer has the rank's sizes, its base all.
    base = getattr(linear, "base_layer", linear)
    whole = base if isinstance(base, nn.Module) and _is_linear(base) else linear
    return whole.in_features, whole.out_features  # type: ignore[return-value]


def _linear_call(module: nn.Module, node: object, what: str, x: fx.Node | None = None) -> str:
    """The child called by ``node``, which must be a linear (of ``x``, if given)."""
    if not _is_module_call(node) or not _is_linear(module.get_submodule(str(node.target))):
        raise _Mismatch(f"{what} is {_show(node)}, not a linear layer of it")
    if x is not None and node.args[0] is not x:
        raise _Mismatch(f"{node.target} is given {_show(node.args[0])}, not the MLP's input")
    return str(node.target)


def _fused_halves(module: nn.Module, gate: object, up: object, x: fx.Node) -> str | None:
    """The child whose output is chunked into (gate, up), or None if they are not such halves."""
    if not _is_item(gate, 0) or not _is_item(up, 1):
        if _is_item(gate, 1) and _is_item(up, 0):
            raise _Mismatch("the fused projection holds up before gate")
        return None
    chunk, other = gate.args[0], up.args[0]
    if chunk is not other or not _is_call(chunk, "chunk", torch.chunk):
        raise _Mismatch(f"gate and up come from {_show(chunk)}, not from one chunk(2)")
    dim = chunk.kwargs.get("dim", chunk.args[2] if len(chunk.args) > 2 else 0)
    parts = chunk.kwargs.get("chunks", chunk.args[1] if len(chunk.args) > 1 else None)
    if (parts, dim) != (2, -1):
        raise _Mismatch(f"the fused projection is cut by chunk({parts}, dim={dim})")
    return _linear_call(module, chunk.args[0], "the chunked tensor", x)


def _activation(module: nn.Module, node: object) -> tuple[str, str | None] | None:
    """(kind, child) if ``node`` applies a supported activation to one tensor."""
    if not isinstance(node, fx.Node):
        return None
    if _is_module_call(node):
        child = module.get_submodule(str(node.target))
        if not _looks_like_activation(child):
            return None
        kind = activation_kind(child)
        if kind is None:
            raise _Mismatch(
                f"its activation {type(child).__name__} is none of {', '.join(ACTIVATIONS)}"
            )
        return kind, str(node.target)
    if node.op == "call_function" and callable(node.target) and len(node.args) == 1:
        function = functools.partial(node.target, **dict(node.kwargs))
        if node.target in (F.silu, F.gelu, F.relu, torch.relu):
            kind = activation_kind(function)
            return None if kind is None else (kind, None)
    return None


def activation_kind(act: Callable[[Tensor], Tensor]) -> str | None:
    """Recognise an activation by its values, whatever its class is called."""
    grid = torch.linspace(-12.0, 12.0, 481, dtype=torch.float32)
    try:
        with torch.no_grad():
            values = act(grid.clone())
    except Exception:
        return None
    if not isinstance(values, Tensor) or values.shape != grid.shape:
        return None
    for kind, reference in ACTIVATIONS.items():
        # 2e-6: the tanh and erf forms of GELU differ by up to 5e-4.
        if torch.allclose(values.cpu(), reference(grid), rtol=2e-6, atol=2e-6):
            return kind
    return None


def _looks_like_activation(module: nn.Module) -> bool:
    """Parameter-free, elementwise, and not the identity (as a dropout is in eval mode)."""
    if _is_linear(module) or isinstance(module, nn.modules.dropout._DropoutNd):
        return False
    return not any(True for _ in module.parameters()) and not any(True for _ in module.children())


def _through_idle_dropout(module: nn.Module, node: object, passed: set[fx.Node]) -> object:
    """Step through a dropout whose probability is 0, adding it to ``passed``."""
    if not isinstance(node, fx.Node) or not node.args:
        return node
    if _is_module_call(node):
        child = module.get_submodule(str(node.target))
        p: object = child.p if isinstance(child, nn.modules.dropout._DropoutNd) else None
    else:
        p = node.kwargs.get("p", node.args[1] if len(node.args) > 1 else 0.5)
        p = p if _is_call(node, "", F.dropout) else None
    if p != 0:
        return node
    passed.add(node)
    return node.args[0]


def _is_module_call(node: object) -> TypeGuard[fx.Node]:
    return (
        isinstance(node, fx.Node)
        and node.op == "call_module"
        and len(node.args) == 1
        and not node.kwargs
    )


def _is_mul(node: object) -> TypeGuard[fx.Node]:
    return _is_call(node, "mul", operator.mul, torch.mul) and all(
        isinstance(a, fx.Node) for a in node.args
    )


def _is_call(node: object, method: str, *functions: object) -> TypeGuard[fx.Node]:
    if not isinstance(node, fx.Node):
        return False
    if node.op == "call_method":
        return node.target == method
    return node.op == "call_function" and node.target in functions


def _is_item(node: object, index: int) -> TypeGuard[fx.Node]:
    return _is_call(node, "__getitem__", operator.getitem) and bool(node.args[1] == index)


def _show(node: object) -> str:
    """A traced value as a reader of the forward would write it."""
    if not isinstance(node, fx.Node):
        return repr(node)
    name = getattr(node.target, "__name__", str(node.target))
    if node.op == "placeholder":
        return "the input"
    return f"{name}({', '.join(_show_short(a) for a in node.args)})"


def _show_short(value: object) -> str:
    if not isinstance(value, fx.Node):
        return repr(value)
    return (
        f"{value.target}(...)" if value.op == "call_module" else getattr(value, "name", "") or "..."
    )
