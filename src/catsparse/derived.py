"""What follows from a sparse MLP's weights, and is made anew when they change.

That is the compensation's bias, the preview, the transposed copy of W_down and the choice of
backend. They are made at first use, and in neither the state dict nor a pickle.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .kernels import Backend, Choice, Decisions, PreviewKind
from .weights import Children, Key

if TYPE_CHECKING:
    from typing_extensions import Self


class Derived(Children):
    """A gated MLP that keeps what follows from its weights until they change.

    A weight's version tells, but for what is written past it: a LoRA merge swaps the child, which
    is noticed, and after a forward with gradients nothing is kept, as an optimizer may step.
    """

    catsparse_mean: Tensor | None
    catsparse_bias: Tensor | None
    catsparse_preview: Tensor | None
    catsparse_preview_scale: Tensor | None
    catsparse_preview_bits: int | None
    catsparse_of_products: bool
    catsparse_product_threshold: Tensor | None
    catsparse_backend: Backend
    catsparse_down_copy: bool
    _catsparse_key: Key | None
    _catsparse_choice: Choice | None
    _catsparse_left_out: bool  # whether there is no preview though one was asked for
    _catsparse_down_t: Tensor | None

    def decisions(self) -> Decisions:
        bits, second = self.catsparse_preview_bits, self.catsparse_product_threshold is not None
        kind = None if bits is None else PreviewKind(bits, self.catsparse_of_products)
        return Decisions(kind, second or self.catsparse_of_products)

    def why_not_preview(self) -> str | None:
        """Why the exact weights decide; None if a preview does.

        It is left out in every path, masked and trained as well, where the kernel that decodes does
        not take it: so all decide alike.
        """
        if self.catsparse_preview_bits is None:
            return "there is no preview"
        if (reason := self.why_not_effective()) is not None:
            return reason
        if torch.compiler.is_compiling():
            return None  # what has been left out is not there
        return self.choose_backend(self.catsparse_backend, self.catsparse_down_copy).without_preview

    def fresh_preview(self) -> tuple[Tensor | None, Tensor | None]:
        """The preview of the weights as they are, and its scales; (None, None) where it cannot be
        made: in a compiled forward that has none, or with gradients. There must be one."""
        compiling = torch.compiler.is_compiling()
        if torch.is_grad_enabled():  # an optimizer may step past the weights' versions: keep none
            bits = self.catsparse_preview_bits
            if compiling or bits is None:
                return None, None
            return self.make_preview(bits, self.catsparse_of_products)
        self._is_ready()
        return self.catsparse_preview, self.catsparse_preview_scale

    def _is_ready(self) -> bool:
        """Whether what follows from the weights is there; makes it again after a merge or a step.

        A compiled forward can only look: it masks between the children if the bias is missing.
        """
        if not torch.compiler.is_compiling() and self._catsparse_key != self._key():
            self.refresh()
        return self.catsparse_mean is None or self.catsparse_bias is not None

    def _key(self) -> Key:
        return self.weights_key(self.catsparse_preview_bits is not None, self.catsparse_of_products)

    @torch.no_grad()
    def refresh(self) -> None:
        """Choose the backend, compute the compensation's bias, w_down @ mean; make the preview."""
        raw = self.why_not_raw() is None
        if not raw and self.why_not_preview() is not None:
            self._forget()  # nothing is known of the weights
            return
        key, old = self._key(), self._catsparse_key
        choice = self.choose_backend(self.catsparse_backend, self.catsparse_down_copy)
        left_out, bias = choice.without_preview is not None, None
        if raw and self.catsparse_mean is not None:
            bias = self.make_bias(self.catsparse_mean)
        preview, scale = self.catsparse_preview, self.catsparse_preview_scale
        bits, had = self.catsparse_preview_bits, not self._catsparse_left_out
        if bits is not None and left_out:
            preview = scale = None
        elif bits is not None and (old is None or old[1:] != key[1:] or not had):
            preview, scale = self.make_preview(bits, self.catsparse_of_products)
        # The key last, and nothing None in between: other threads may be decoding.
        self._catsparse_choice = choice if raw else None
        self._catsparse_down_t, self.catsparse_bias = None, bias
        self._catsparse_left_out = left_out
        self.catsparse_preview, self.catsparse_preview_scale = preview, scale
        self._catsparse_key = key

    def adopt_preview(
        self, stored: Callable[[Tensor, Tensor], tuple[Tensor, Tensor] | None]
    ) -> None:
        """Before the first :meth:`refresh`: take the preview that ``stored`` has of w_gate and
        w_up, which must be of these very weights; none where the exact weights decide."""
        if self.why_not_preview() is not None:
            return
        found = stored(*self.effective_gate_up())
        if found is not None:
            self.catsparse_preview, self.catsparse_preview_scale = found
            self._catsparse_key = self._key()

    def set_backend(self, backend: Backend, down_copy: bool) -> None:
        """Choose how few-token calls run; see :func:`catsparse.set_backend`."""
        self.catsparse_backend, self.catsparse_down_copy = backend, down_copy
        self.refresh()

    def prepare_decode(self) -> None:
        """Make what few-token calls need of the weights, before a forward that cannot."""
        if self.why_not_raw() is None and self._is_ready():
            choice = self._catsparse_choice
            if choice is not None and choice.op_tokens and self.catsparse_down_copy:
                self.down_transposed()

    def down_transposed(self) -> Tensor:
        """w_down^T ``[I, H]`` with contiguous rows: the copy that the kernels read, made once, or
        what is packed that way."""
        if self.packed is not None:
            return self.weight_of(self.site_down)
        down_t = self._catsparse_down_t  # read once: other threads may be decoding
        if down_t is None:
            weight = self.weight_of(self.site_down)
            down_t = self._catsparse_down_t = weight.detach().t().contiguous()
        return down_t

    def train(self, mode: bool = True) -> Self:
        stepped = self.training and not mode
        super().train(mode)
        if stepped:
            self._forget()
        if not mode and (self.why_not_raw() is None or self.why_not_preview() is None):
            self._is_ready()  # here, as a compiled forward cannot notice changed weights
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        if name in (self.site_down, self.site_gate, self.site_up):
            # A LoRA merge writes through .data, unseen by the version counter, but always swaps
            # the child out and in.
            self._forget()
        super().__setattr__(name, value)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._forget()

    def _forget(self) -> None:
        """The weights may change: make what follows from them again before it is used."""
        self._catsparse_key, self.catsparse_bias = None, None
        self._catsparse_choice, self._catsparse_down_t = None, None
        self.catsparse_preview, self.catsparse_preview_scale = None, None
