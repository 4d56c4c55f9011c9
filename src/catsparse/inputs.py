"""Find the inputs that linear layers can be thresholded on.

The linears of a gated MLP's block, which is the item of the model's list of layers that holds it.
Those that are given the very same tensor (q, k and v, say, or gate and up) share an input; which
they are is seen in one forward pass of two tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .config import INPUT_METHODS
from .errors import CatsparseError
from .sites import Site
from .strict_json import shorten
from .weights import why_no_matrix


@dataclass(frozen=True)
class InputSite:
    """The input that one or several linear layers share.

    Attributes:
        name: the module's path of the first of them.
        linears: the paths of all, in module order.
        of_mlp: whether they belong to a gated MLP.
        in_features: H, inputs.
        out_features: of all these layers together.
    """

    name: str
    linears: tuple[str, ...]
    of_mlp: bool
    in_features: int
    out_features: int


def find_inputs(model: nn.Module, sites: Sequence[Site]) -> list[InputSite]:
    """The inputs of all linears in the blocks of ``sites``, in module order.

    Runs two tokens through the model, which stays unchanged.

    Raises:
        CatsparseError: a layer there is no plain linear, or the model does not run on token ids.
    """
    inside = {f"{site.name}.": site for site in sites}
    linears = _linears(model, sites)
    given = _inputs_given(model, linears)
    groups: list[tuple[Tensor | None, bool, list[str]]] = []
    for name in linears:
        x = given.get(name)
        of_mlp = any(name.startswith(prefix) for prefix in inside)
        for other, kind, names in groups:
            if x is not None and x is other and kind == of_mlp:
                names.append(name)
                break
        else:
            groups.append((x, of_mlp, [name]))
    found = []
    for _, of_mlp, names in groups:
        sizes = [_sizes(model.get_submodule(name)) for name in names]
        rows = sum(out_features for _, out_features in sizes)
        found.append(InputSite(names[0], tuple(names), of_mlp, sizes[0][0], rows))
    return found


def select_parts(
    sites: Mapping[str, Site], inputs: Mapping[str, InputSite], method: str, scope: str
) -> dict[str, Site | InputSite]:
    """What ``method`` decides on in ``scope``, of gated MLPs and inputs: by name, MLPs first.

    Methods of inputs decide on those of the MLPs, all others on their neurons; in the scope ``all``
    inputs of other layers come with either.
    """
    of_inputs = method in INPUT_METHODS
    found: dict[str, Site | InputSite] = {} if of_inputs else {**sites}
    for name, site in inputs.items():
        if of_inputs if site.of_mlp else scope == "all":
            found[name] = site
    return found


def inputs_needed(method: str, scope: str) -> str | None:
    """What to give :func:`catsparse.calibrate` as ``inputs`` for ``method`` in ``scope``."""
    if method in INPUT_METHODS:
        return scope
    return "attention" if scope == "all" else None


def weight_norm(model: nn.Module, site: InputSite) -> Tensor:
    """``[H]`` fp32: the norm of each input's weights in all layers of ``site``."""
    total = None
    for name in site.linears:
        weight: Any = model.get_submodule(name).weight
        # By pieces: a whole fp32 copy would be 235 MB at 7B.
        squares = torch.stack([r.detach().float().square().sum(0) for r in weight.split(1024)])
        part = squares.sum(0)
        total = part if total is None else total + part.to(total.device)
    assert total is not None
    return total.sqrt()


def block_of(model: nn.Module, name: str) -> str:
    """The path of the item of the outermost ModuleList that holds ``name``; without one, of the
    module around it."""
    parts = name.split(".")
    for end in range(1, len(parts)):
        if isinstance(model.get_submodule(".".join(parts[: end - 1])), nn.ModuleList):
            return ".".join(parts[:end])
    return ".".join(parts[:-1])


def _linears(model: nn.Module, sites: Sequence[Site]) -> list[str]:
    found = []
    for block in dict.fromkeys(block_of(model, site.name) for site in sites):
        for name, module in model.get_submodule(block).named_modules(prefix=block):
            if not isinstance(getattr(module, "in_features", None), int):
                continue
            reason = why_no_matrix(name, module)
            if reason is not None:
                raise CatsparseError(
                    f"the input of a linear layer cannot be thresholded: {reason}; take scope mlp "
                    "and a method of the gate"
                )
            found.append(name)
    return list(dict.fromkeys(found))


def _inputs_given(model: nn.Module, linears: Sequence[str]) -> dict[str, Tensor]:
    """What each linear is called with; those that are not called are left out."""
    given: dict[str, Tensor] = {}
    handles = []

    def note(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            given[name] = args[0]

        return hook

    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        for name in linears:
            handles.append(model.get_submodule(name).register_forward_pre_hook(note(name)))
        device = getattr(model, "device", None) or next(model.parameters()).device
        device = torch.device("cpu") if device.type == "meta" else device
        ids = torch.zeros(1, 2, dtype=torch.int64, device=device)
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)
    except (TypeError, ValueError, RuntimeError) as error:
        raise CatsparseError(
            f"the model does not run on two tokens ({shorten(error)}); take scope mlp and a method "
            "of the gate"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
        for module in training:
            module.training = True
    return given


def _sizes(linear: Any) -> tuple[int, int]:
    return linear.in_features, linear.out_features
