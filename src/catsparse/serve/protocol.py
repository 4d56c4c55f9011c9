"""OpenAI's two endpoints: what a request asks, and the forms of an answer.

Parsing of parameters, chunks and answers are those of transformers' own server, whose handlers
these are. Its loading of models by name, its limits and its way of waiting are not used.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from openai.types import Completion, CompletionChoice, CompletionUsage
from openai.types.chat import ChatCompletionChunk
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.utils import GenerationState, Modality

from ..prompts import encode_turns
from ..strict_json import first_sentence
from . import fields
from .errors import ApiError, bad_request
from .fields import Body

_ALIKE = {
    "model", "max_tokens", "temperature", "top_p", "seed", "stop", "stream", "stream_options",
    "frequency_penalty", "logit_bias", "user", "n", "logprobs", "presence_penalty", "dense",
}  # fmt: skip
# Of no effect on the answer's text.
_IGNORED = {
    "metadata", "store", "service_tier", "parallel_tool_calls", "prediction", "reasoning_effort",
    "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "verbosity",
}  # fmt: skip
_CHAT_ONLY = {
    "messages", "max_completion_tokens", "top_logprobs", "response_format", "tools", "tool_choice",
    "functions", "function_call", "modalities", "audio", "web_search_options",
}  # fmt: skip
_UNSERVED: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "web_search_options": (),
    "suffix": ("",),
    "echo": (False,),
    "best_of": (1,),
}


@dataclass(frozen=True)
class Asked:
    """A request whose fields have been checked.

    Attributes:
        prompt: turns, a text or token ids.
        parameters: of sampling, as transformers' handlers read them.
        max_tokens: None for as many as are allowed.
        include_usage: whether a stream ends with the number of tokens.
        dense: run the dense model for this answer.
    """

    prompt: Any
    parameters: Body
    max_tokens: int | None
    stops: tuple[str, ...]
    seed: int | None
    stream: bool
    include_usage: bool
    dense: bool


def _check_alike(body: Body) -> Body:
    fields.refuse(body, _UNSERVED)
    numbers = {
        "temperature": fields.number(body, "temperature", 0, 2),
        "top_p": fields.number(body, "top_p", 0, 1, above=True),
        # The handlers make it a factor of 1 and this, which must be above 0.
        "frequency_penalty": fields.number(body, "frequency_penalty", -1, 2, above=True) or None,
    }
    return {name: value for name, value in numbers.items() if value is not None}


def _asked(body: Body, prompt: Any, parameters: Body, max_tokens: int | None) -> Asked:
    options = body.get("stream_options")
    if options is not None and not isinstance(options, dict):
        raise bad_request("stream_options must be an object", "stream_options")
    return Asked(
        prompt,
        parameters,
        max_tokens,
        fields.stops(body),
        fields.whole(body, "seed", -(2**63), 2**63 - 1),
        fields.boolean(body, "stream"),
        fields.boolean(options or {}, "include_usage"),
        fields.boolean(body, "dense"),
    )


class _Handler:
    """What both endpoints share; put before a handler of transformers."""

    name: str  # the model's, in answers
    vocabulary: int

    def __init__(self, name: str, vocabulary: int) -> None:
        # No model manager: the one model that is served was loaded before.
        super().__init__(None, GenerationState())  # type: ignore[call-arg]
        self.name, self.vocabulary = name, vocabulary

    def generation_config(self, asked: Asked, model: Any) -> Any:
        """Of one answer: the model's own, changed as asked, as ``model.generate`` completes it."""
        config = self._build_generation_config(asked.parameters, model.generation_config)  # type: ignore[attr-defined]
        if asked.parameters.get("temperature") or "top_p" in asked.parameters:
            config.do_sample = asked.parameters.get("temperature") != 0
        # One sequence, token by token, whatever the model's own file says.
        config.update(
            num_beams=1, num_return_sequences=1, min_length=0, min_new_tokens=None,
            guidance_scale=None, max_length=None, max_time=None, stop_strings=None,
        )  # fmt: skip
        completed, _ = model._prepare_generation_config(config)
        return completed


class Chat(_Handler, ChatCompletionHandler):  # type: ignore[misc]
    """``/v1/chat/completions``."""

    prefix = "chatcmpl-"

    def parse(self, body: Body) -> Asked:
        """
        Raises:
            ApiError: a field is wrong or not served.
        """
        fields.refuse_unknown(body, _ALIKE | _IGNORED | _CHAT_ONLY)
        parameters = _check_alike(body)
        if (bias := fields.biases(body, self.vocabulary)) is not None:
            parameters["logit_bias"] = bias
        turns = self.get_processor_inputs_from_messages(fields.messages(body), Modality.LLM)
        most = fields.whole(body, "max_completion_tokens", 1)
        old = fields.whole(body, "max_tokens", 1)
        return _asked(body, turns, parameters, old if most is None else most)

    def encode(self, asked: Asked, tokenizer: Any) -> list[int]:
        """The prompt's tokens."""
        try:
            return encode_turns(tokenizer, asked.prompt)
        except TemplateError as error:
            raise bad_request(
                f"the model's chat template refuses the conversation: {first_sentence(error)}",
                "messages",
            ) from None

    def opening(self, ident: str) -> str:
        return str(self._build_chunk_sse(ident, content="", role="assistant", model=self.name))

    def chunk(self, ident: str, text: str | None, finish: str | None = None) -> str:
        made = self._build_chunk_sse(ident, content=text, finish_reason=finish, model=self.name)
        return str(made)

    def usage_chunk(self, ident: str, usage: CompletionUsage) -> str:
        chunk = ChatCompletionChunk(
            id=ident,
            created=int(time.time()),
            model=self.name,
            object="chat.completion.chunk",
            choices=[],
            usage=usage,
        )
        return str(self.chunk_to_sse(chunk))

    def answer(self, ident: str, text: str, finish: str, usage: CompletionUsage) -> Body:
        made: Body = self._build_completion(ident, text, self.name, finish, usage)
        return made


class Completions(_Handler, CompletionHandler):  # type: ignore[misc]
    """``/v1/completions``."""

    prefix = "cmpl-"

    def parse(self, body: Body) -> Asked:
        """
        Raises:
            ApiError: a field is wrong or not served.
        """
        fields.refuse_unknown(body, _ALIKE | {"prompt", "suffix", "echo", "best_of"})
        parameters = _check_alike(body)
        if body.get("logit_bias"):  # transformers' handler does not read it here
            raise bad_request("logit_bias is for chat only here", "logit_bias")
        prompt = fields.prompt(body, self.vocabulary)
        return _asked(body, prompt, parameters, fields.whole(body, "max_tokens", 1))

    def encode(self, asked: Asked, tokenizer: Any) -> list[int]:
        """The prompt's tokens."""
        if isinstance(asked.prompt, list):
            return asked.prompt
        ids: list[int] = tokenizer(asked.prompt)["input_ids"]
        return ids

    def opening(self, ident: str) -> str:
        return ""

    def chunk(self, ident: str, text: str | None, finish: str | None = None) -> str:
        return str(self._build_chunk_sse(ident, self.name, text or "", finish_reason=finish))

    def usage_chunk(self, ident: str, usage: CompletionUsage) -> str:
        chunk = Completion.model_construct(
            id=ident,
            created=int(time.time()),
            model=self.name,
            object="text_completion",
            choices=[],
            usage=usage,
        )
        return str(self.chunk_to_sse(chunk))

    def answer(self, ident: str, text: str, finish: str, usage: CompletionUsage) -> Body:
        choice = CompletionChoice(text=text, index=0, logprobs=None, finish_reason=finish)  # type: ignore[arg-type]
        made = Completion(
            id=ident,
            created=int(time.time()),
            model=self.name,
            choices=[choice],
            object="text_completion",
            usage=usage,
        )
        return made.model_dump(exclude_none=True)


Endpoint = Chat | Completions


def usage_of(prompt: int, new: int) -> CompletionUsage:
    return CompletionUsage(prompt_tokens=prompt, completion_tokens=new, total_tokens=prompt + new)


def check_model(body: Body, name: str) -> None:
    """Only the served model answers; a request never loads another one."""
    asked = body.get("model")
    if asked is None:
        return
    if fields.text(asked, "model") != name:
        raise no_such_model(asked)


def no_such_model(asked: str) -> ApiError:
    return ApiError(404, f"there is no model {asked[:200]!r} here", "model_not_found", "model")
