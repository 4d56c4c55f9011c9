"""One rank's share of a sparse MLP, on weights that vLLM holds: W_gate over W_up, and W_down.

Neurons are cut as in :mod:`catsparse.shards`; the sum over ranks is vLLM's.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from .. import footprint
from ..config import PRODUCT, SiteConfig, SparsityConfig
from ..errors import CatsparseError
from ..kernels import ACTIVATIONS, MAX_OP_TOKENS
from ..methods import SiteThreshold
from ..modules import SparseMLP, add_sparsity
from ..shards import cut
from ..sites import Site
from ..strict_json import shorten


class _Shard(nn.Module):
    """The dense MLP that becomes sparse; its weights are the very tensors it is given."""

    def __init__(self, gate_up: Tensor, down: Tensor, act: str) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = _linear(gate_up), _linear(down)
        self.act = ACTIVATIONS[act]

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(self.act(gate) * up)  # type: ignore[no-any-return]


def _linear(weight: Tensor) -> nn.Linear:
    rows, columns = weight.shape
    layer = nn.Linear(columns, rows, bias=False, device="meta")
    layer.weight = nn.Parameter(weight.detach(), requires_grad=False)
    return layer


def check_config(config: SparsityConfig, source: str) -> None:
    """Refuse what vLLM's linear layers have no place for.

    Raises:
        CatsparseError: inputs of linear layers are dropped, or no neurons are; or the weights are
            packed.
    """
    if config.weight_format is not None:
        raise CatsparseError(
            f"{shorten(source)} belongs to {config.weight_format} weights, which vLLM's layers do "
            "not read; sparsify without --weights for vLLM"
        )
    if config.inputs or not config.sites:
        raise CatsparseError(
            f"{shorten(source)} drops inputs of linear layers, and in vLLM only MLPs' neurons can "
            "be dropped; sparsify with --scope mlp and another method than teal and wina"
        )


def find_site(prefix: str, sites: Iterable[str]) -> str | None:
    """The MLP that vLLM calls ``prefix``: of that name or, as models within models get other
    names, the only one that is alike from ``layers.`` on; None if there is none."""
    names = list(sites)
    if prefix in names:
        return prefix
    alike = [name for name in names if _tail(name) == _tail(prefix) and "layers." in prefix]
    return alike[0] if len(alike) == 1 else None


def _tail(name: str) -> str:
    return name[max(0, name.rfind("layers.")) :]


def make_shard(
    name: str,
    config: SparsityConfig,
    threshold: SiteThreshold,
    gate_up: Tensor,
    down: Tensor,
    rank: int = 0,
    ranks: int = 1,
) -> SparseMLP:
    """A rank's sparse MLP.

    Args:
        name: of the MLP in ``config``.
        threshold: what was read for it, of all neurons.
        gate_up: ``[2 I/R, H]``, the rank's rows of W_gate, then those of W_up.
        down: ``[H, I/R]``.
        rank, ranks: which of how many, R.

    Raises:
        CatsparseError: the weights are not those of the file's MLP.
    """
    site = config.sites[name]
    _check_sizes(name, site, gate_up, down, ranks)
    shard = _Shard(gate_up, down, site.act)
    found = Site(
        *(name, "gate_up_proj", None, site.act, None, "down_proj"),
        *(site.hidden_size, site.intermediate_size // ranks),
    )
    parts = [cut(v, rank, ranks) for v in (threshold.threshold, threshold.mean, threshold.product)]
    assert parts[0] is not None
    return add_sparsity(
        *(shard, found, parts[0], parts[1], config.prefill, parts[2]),
        preview=config.preview,
        of_products=config.method == PRODUCT,
    ).eval()


def mask_alone(shard: SparseMLP) -> None:
    """Make ``mask_and_project`` return what it would multiply by W_down, and let go of all that
    the kernels would need."""
    setattr(shard, shard.site_down, nn.Identity())


def sparse_tokens(config: SparsityConfig, name: str, shard: SparseMLP) -> int:
    """The most tokens of a step that run the sparse MLP rather than dense products.

    With the prefill policy ``masked`` all that the op takes. With ``dense`` as many as its kernel
    takes and still skips something for.
    """
    if config.prefill == "masked":
        return MAX_OP_TOKENS
    site, weight = config.sites[name], shard.raw_gate_up()[0]
    choice = shard.choose_backend(shard.catsparse_backend, shard.catsparse_down_copy)
    return footprint.sparse_tokens(
        *(choice.kernel_tokens, site.sparsity, site.down_sparsity, config.preview),
        *(site.hidden_size, weight.element_size(), config.method == PRODUCT),
    )


def _check_sizes(name: str, site: SiteConfig, gate_up: Tensor, down: Tensor, ranks: int) -> None:
    h, i = site.hidden_size, site.intermediate_size
    expected = (2 * i // ranks, h), (h, i // ranks)
    if i % ranks or (tuple(gate_up.shape), tuple(down.shape)) != expected:
        raise CatsparseError(
            f"{shorten(name)} has {h} inputs and {i} neurons in the catsparse directory, but "
            f"weights of {list(gate_up.shape)} and {list(down.shape)} on each of {ranks} ranks; is "
            "it of another model?"
        )
