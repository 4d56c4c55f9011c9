"""What a call of ``generate`` asks for, or the reason why only ``model.generate`` can serve it.

transformers resolves the generation config, the special tokens, the lengths and the logits
processors, by the very methods ``generate`` calls. Arguments it would refuse get a reason, so that
``model.generate`` raises its own error.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.logits_process import (
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.stopping_criteria import StopStringCriteria

from .sampling import Sampling
from .support import why_no_model

CHUNK = 2048  # prompt tokens in one forward pass

# Fields of a generation config: what is served, and what does nothing in greedy decoding and
# sampling. Any other must be at its default.
_SERVED = {
    "max_length",
    "max_new_tokens",
    "min_length",
    "min_new_tokens",
    "stop_strings",
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "num_return_sequences",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "use_cache",
    "cache_implementation",
    "prefill_chunk_size",
}
_IDLE = {
    "compile_config",
    "disable_compile",
    "max_cache_len",
    "early_stopping",
    "length_penalty",
    "num_beam_groups",
    "diversity_penalty",
    "low_memory",
    "decoder_start_token_id",
    "num_assistant_tokens",
    "num_assistant_tokens_schedule",
    "assistant_confidence_threshold",
    "max_matching_ngram_size",
    "assistant_lookbehind",
    "target_lookbehind",
    "assistant_ensemble_weight",
    "continuous_batching_config",
    "transformers_version",
}
_MODES = ("greedy_search", "sample")
_MINIMA = (MinLengthLogitsProcessor, MinNewTokensLengthLogitsProcessor)
_WARPERS = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper)


@dataclass(frozen=True)
class Request:
    """A call that the captured step serves.

    Args:
        model: the model.
        ids: ``[B, T]`` prompts on the host, repeated for ``num_return_sequences``, left-padded.
        starts: ``[B]`` on the host, tokens of padding.
        seen: ``[B, T]`` on the host, what the repetition penalty counts of the prompts.
        new_tokens: at most.
        least: tokens of prompt and answer before which no eos may come.
        sampling: what is done to the logits.
        stop: matches stop strings at the end of token sequences on the host.
        streamer: gets the prompt and every column of tokens.
        chunk: prompt tokens in one forward pass.
    """

    model: Any
    ids: Tensor
    starts: Tensor
    seen: Tensor
    new_tokens: int
    least: int
    sampling: Sampling
    stop: StopStringCriteria | None
    streamer: Any
    chunk: int

    @property
    def padded(self) -> bool:
        return bool(self.starts.any())


def resolve(model: Any, inputs: Any, kwargs: dict[str, Any]) -> Request | str:
    """The request that ``model.generate(inputs, **kwargs)`` is, or why it is none."""
    reason = why_no_model(model)
    if reason is not None:
        return reason
    try:
        return _resolve(model, inputs, dict(kwargs))
    except (TypeError, ValueError):
        return "transformers refuses its arguments"


def _resolve(model: Any, inputs: Any, kwargs: dict[str, Any]) -> Request | str:
    given: GenerationConfig | None = kwargs.pop("generation_config", None)
    streamer, tokenizer = kwargs.pop("streamer", None), kwargs.pop("tokenizer", None)
    has_default = {
        name: all(
            one is None
            for one in (
                kwargs.get(name),
                getattr(given, name, None),
                getattr(model.generation_config, name),
            )
        )
        for name in ("max_length", "min_length")
    }
    config, left = model._prepare_generation_config(given, **kwargs)
    ids, mask = left.pop("input_ids", None), left.pop("attention_mask", None)
    # Arguments left at what they mean when absent: None, False, an empty list of processors.
    others = sorted(name for name, value in left.items() if not _is_absent(value))
    if others:
        return f"{others[0]} is given"
    reason = _why_no_config(config)
    if reason is not None:
        return reason
    if (inputs is None) == (ids is None):
        return "it needs input_ids, once"
    ids = inputs if ids is None else ids
    reason = _why_no_prompt(ids, mask)
    if reason is not None:
        return reason
    if config.stop_strings is not None and tokenizer is None:
        return "stop_strings come without the tokenizer"

    ids = ids.to("cpu", torch.int64)
    batch, length = ids.shape
    model._prepare_special_tokens(config, mask is not None, device="cpu", batch_size=batch)
    if mask is None:
        mask = model._prepare_attention_mask_for_generation(ids, config, {})
    mask = mask.to("cpu") != 0
    starts = (~mask).sum(1)
    if not torch.equal(mask, torch.arange(length) >= starts[:, None]) or not mask[:, -1].all():
        return "the attention mask is not one of left padding"
    config = model._prepare_generated_length(
        generation_config=config,
        has_default_max_length=has_default["max_length"],
        has_default_min_length=has_default["min_length"],
        model_input_name="input_ids",
        input_ids_length=length,
        inputs_tensor=ids,
    )
    model._validate_generated_length(config, length, has_default["max_length"])
    copies = config.num_return_sequences or 1
    ids, mask = (one.repeat_interleave(copies, 0) for one in (ids, mask))
    starts = starts.repeat_interleave(copies, 0)
    processors = model._get_logits_processor(
        generation_config=config,
        input_ids_seq_length=length,
        device="cpu",
        model_kwargs={"attention_mask": None if mask.all() else mask},
    )
    sampling, skips_padding = _sampling(config, processors)
    if isinstance(sampling, str):
        return sampling
    stop = config.stop_strings
    return Request(
        model=model,
        ids=ids,
        starts=starts,
        seen=torch.where(mask, ids, ids[:, -1:]) if skips_padding else ids,
        new_tokens=config.max_length - length,
        least=config.min_length or 0,
        sampling=sampling,
        stop=None if stop is None else StopStringCriteria(tokenizer, stop),
        streamer=streamer,
        chunk=min(CHUNK, config.prefill_chunk_size or CHUNK),
    )


def _is_absent(value: Any) -> bool:
    return value is None or value is False or (isinstance(value, list) and not value)


def _why_no_config(config: Any) -> str | None:
    mode = config.get_generation_mode()
    if mode not in _MODES:
        return f"it decodes by {str(getattr(mode, 'value', mode)).replace('_', ' ')}"
    if config.use_cache is False:
        return "use_cache is off"
    if config.cache_implementation not in (None, "dynamic", "static"):
        return f"cache_implementation is {config.cache_implementation}"
    defaults = config._get_default_generation_params()
    for name in sorted(vars(GenerationConfig())):
        if name.startswith("_") or name in _SERVED | _IDLE:
            continue
        value = getattr(config, name)
        if not _is_absent(value) and value != defaults.get(name):
            return f"{name} is set"
    return None


def _why_no_prompt(ids: Any, mask: Any) -> str | None:
    if not isinstance(ids, Tensor) or ids.ndim != 2:
        return "input_ids are not a tensor [batch, tokens]"
    if ids.dtype not in (torch.int32, torch.int64) or not ids.numel():
        return "input_ids hold no token ids"
    if mask is not None and (not isinstance(mask, Tensor) or mask.shape != ids.shape):
        return "the attention mask is not of the shape of input_ids"
    return None


def _sampling(config: Any, processors: list[Any]) -> tuple[Sampling | str, bool]:
    """What is done to the logits, and whether the penalty leaves out the padding.

    Newer transformers do leave it out.
    """
    penalty, skips_padding, has_least = None, False, False
    warpers = []
    for one in processors:
        if type(one) is RepetitionPenaltyLogitsProcessor:
            penalty = one.penalty
            skips_padding = isinstance(one.prompt_ignore_length, Tensor)
        elif type(one) in _MINIMA:
            has_least = True
        elif type(one) in _WARPERS:
            warpers.append(one)
        else:
            return f"it needs a {type(one).__name__}", False
    eos, pad = config._eos_token_tensor, config._pad_token_tensor
    sampling = Sampling(
        do_sample=bool(config.do_sample),
        eos=() if eos is None else tuple(eos.tolist()),
        pad=None if pad is None else int(pad),
        penalty=penalty,
        has_least=has_least,
        warpers=tuple(warpers),
    )
    return sampling, skips_padding
