"""Many answers at a time: transformers' continuous batching."""

from __future__ import annotations

import math
import os
import queue
from collections.abc import Callable
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, LogitsProcessorList
from transformers.generation.continuous_batching import ContinuousBatchingManager

from ..errors import CatsparseError
from ..kernels import MAX_OP_TOKENS
from .engine import context_of
from .generation import Generation
from .sampling import PerRequest

PAGE = 32  # tokens; small, so that short answers waste little


class Batching:
    """Answers share forward passes, each token a row of the batch.

    The cache is as large as ``max_batch`` full contexts, or as a share of the free memory allows;
    what does not fit waits.
    """

    together = True

    def __init__(self, model: Any, max_batch: int | None) -> None:
        if not hasattr(ContinuousBatchingManager, "pause"):
            raise RuntimeError("it needs transformers 5.20 or newer")
        self.model = model
        on_gpu = model.device.type != "cpu"
        batch = max_batch or (64 if on_gpu else MAX_OP_TOKENS)
        blocks, self.context = _cache_size(model, batch)
        self._sampling = PerRequest()
        self._manager: Any = None
        self._config = ContinuousBatchingConfig(
            page_size=PAGE,
            num_blocks=blocks,
            max_batch_tokens=max(2048 if on_gpu else 512, batch),
            max_requests_per_batch=batch,
            # Keys and values of the sparse model are not those of the dense one.
            allow_block_sharing=False,
            # The rows' own parameters are read on the host in every step.
            use_cuda_graph=False,
            use_async_batching=False,
            # A kernel would be fetched behind anyone's back.
            auto_switch_to_flash=False,
        )

    @property
    def steps(self) -> int:
        return self._sampling.steps

    def start(self) -> None:
        if self._manager is not None:
            self._manager.stop(block=True, timeout=1)
        plain = GenerationConfig(do_sample=False, max_new_tokens=1, eos_token_id=-1)
        manager = self.model.init_continuous_batching(
            generation_config=plain, continuous_batching_config=self._config
        )
        hook = manager.logit_processor
        hook.logits_processor = LogitsProcessorList([self._sampling])
        hook.tensors_required, hook.do_processing = 1, True
        manager.output_router.output_queue = _Nowhere()
        manager.start()
        manager._generation_thread.name = "catsparse-worker"
        self._manager = manager

    def why_dead(self) -> str | None:
        if self._manager is None:
            return "it was never started"
        error = self._manager.background_thread_status.fatal_error
        if error is not None:
            return f"{type(error).__name__}: {error}"
        return None if self._manager.is_running() else "its thread ended"

    def submit(self, generation: Generation) -> None:
        job, attempt = generation.job, generation.attempt
        ident, before = f"{generation.ident}.{attempt}", len(generation.tokens)

        def deliver(output: Any) -> None:
            if output.error is not None:
                generation.give_up(attempt, output.error)
            else:
                new = output.generated_tokens[len(generation.tokens) - before :]
                generation.deliver(attempt, new, output.is_finished())

        # First the handler: a short answer may be there before add_request has returned.
        self._sampling.samplers[ident] = generation.sampler
        self._manager.register_result_handler(ident, deliver)
        self._manager.add_request(
            job.ids + generation.tokens,
            request_id=ident,
            max_new_tokens=job.max_tokens - before,
            streaming=True,
            eos_token_id=job.config.eos_token_id,
        )

    def cancel(self, generation: Generation) -> None:
        ident = f"{generation.ident}.{generation.attempt}"
        if not generation.is_written:
            self._manager.cancel_request(ident)
        self._sampling.samplers.pop(ident, None)
        # Of a cancelled request nothing more is delivered, so its handler would stay for ever.
        router = self._manager.output_router
        with router._lock:
            router.result_handlers.pop(ident, None)

    def exclusive(self, call: Callable[[], Any]) -> Any:
        with self._manager.pause():
            return call()

    def stop(self, seconds: float) -> bool:
        if self._manager is None:
            return True
        self._manager.stop(block=True, timeout=seconds, hard_stop=True)
        return not self._manager.is_running()


class _Nowhere(queue.SimpleQueue[Any]):
    """For what is still delivered of cancelled answers, which would pile up."""

    def put(self, item: Any, block: bool = True, timeout: float | None = None) -> None:
        pass


def _cache_size(model: Any, batch: int) -> tuple[int, int | None]:
    """Blocks of the cache, and the context that one answer can have in it."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    token = 2 * config.num_hidden_layers * heads * width * model.dtype.itemsize
    affordable = int(_free_bytes(model.device) * 0.4) // (token * PAGE)
    context = context_of(model)
    wanted = affordable if context is None else batch * math.ceil(context / PAGE) + batch
    blocks = min(wanted, affordable)
    if blocks < 4:
        raise CatsparseError(
            "there is no memory left for the keys and values of one answer; free some, or serve "
            "with --no-continuous-batching"
        )
    most = (blocks - 2) * PAGE
    return blocks, most if context is None else min(context, most)


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):  # not on Linux
        return 4 << 30
