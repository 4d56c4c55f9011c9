"""The decode loop against ``model.generate``, token for token, without graphs."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from torch import Tensor
from transformers import (
    BloomConfig,
    Gemma2Config,
    GemmaConfig,
    GenerationConfig,
    LogitsProcessorList,
    Mamba2Config,
    MistralConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    T5Config,
    T5ForConditionalGeneration,
    TextStreamer,
)
from transformers.generation.streamers import BaseStreamer

import catsparse
from catsparse import CatsparseError, decoding
from catsparse.decoding import graphs, loop
from catsparse.decoding.cache import WindowCache, bucket, why_no_cache
from catsparse.decoding.graphs import MAX_GRAPHS, Graphs, fingerprint
from catsparse.decoding.loop import run
from catsparse.decoding.request import Request, resolve
from catsparse.decoding.sampling import Rows, Sampler, Sampling
from catsparse.decoding.step import CompiledStep, ModelStep, State
from catsparse.modules import sparse_modules
from tiny import SMALL, VOCABULARY, build, calibrate, llama_config, tokens

NEW = 24
HYBRID = ["sliding_attention", "full_attention"]
CONFIGS: dict[str, Any] = {
    "llama": llama_config(),
    "mistral": MistralConfig(**SMALL, sliding_window=None),
    "mistral-sliding": MistralConfig(**SMALL, sliding_window=7),
    "qwen2": Qwen2Config(**SMALL),
    "qwen3": Qwen3Config(**SMALL, head_dim=8),
    "gemma": GemmaConfig(**SMALL, head_dim=8),
    "gemma2": Gemma2Config(**SMALL, head_dim=8, sliding_window=7, layer_types=HYBRID),
    "phi3": Phi3Config(**SMALL),
}


@pytest.fixture(autouse=True)
def nothing_kept() -> Iterator[None]:
    yield
    loop._KEPT.clear()
    decoding._WARNED.clear()


def request(model: Any, ids: Any, **kwargs: Any) -> Request:
    found = resolve(model, ids, kwargs)
    assert isinstance(found, Request), found
    return found


def check(
    model: Any, ids: Tensor, smallest: int = 4, lag: int = 4, chunk: int = 2048, **kwargs: Any
) -> Tensor:
    """Both ways from the same seed; they must agree."""
    torch.manual_seed(11)
    expected = model.generate(ids, **kwargs)
    asked = replace(request(model, ids, **kwargs), chunk=chunk)
    torch.manual_seed(11)
    found = run(asked, capture=False, smallest=smallest, lag=lag)
    assert found.dtype == torch.int64
    assert torch.equal(found, expected)
    return found


def padded(ids: Tensor, *starts: int) -> Tensor:
    return (torch.arange(ids.shape[1]) >= torch.tensor(starts)[:, None]).long()


def greedy(model: Any, ids: Tensor, count: int = NEW) -> Tensor:
    """The new tokens ``[B, count]``."""
    return model.generate(ids, max_new_tokens=count)[:, ids.shape[1] :]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_greedy_in_every_family(name: str, sparse: bool) -> None:
    model = build(CONFIGS[name])
    if sparse:
        catsparse.sparsify(model, calibrate(model), sparsity=0.5)
    ids = tokens(2, 9)
    check(model, ids, max_new_tokens=NEW)
    check(model, ids, attention_mask=padded(ids, 0, 4), max_new_tokens=NEW)


@pytest.mark.parametrize("length", [1, 2, 4, 5])
def test_short_prompts(llama: Any, length: int) -> None:
    check(llama, tokens(1, length), max_new_tokens=NEW)
    check(llama, tokens(1, length), max_new_tokens=1)


@pytest.mark.parametrize("smallest", [1, 2, 16, 256])
def test_windows(llama: Any, smallest: int) -> None:
    check(llama, tokens(2, 7), smallest=smallest, max_new_tokens=NEW)


@pytest.mark.parametrize("name", ["llama", "gemma2", "mistral-sliding"])
@pytest.mark.parametrize("chunk", [1, 4, 19])
def test_prefill_in_chunks(name: str, chunk: int) -> None:
    model, ids = build(CONFIGS[name]), tokens(2, 20)
    check(model, ids, chunk=chunk, max_new_tokens=6)
    check(model, ids, chunk=chunk, attention_mask=padded(ids, 9, 0), max_new_tokens=6)


def test_the_prompt_runs_in_chunks_of_the_asked_size(llama: Any) -> None:
    sizes = []
    llama.model.embed_tokens.forward = _spy(llama.model.embed_tokens.forward, sizes)
    asked = request(llama, tokens(1, 10), max_new_tokens=1, prefill_chunk_size=4)
    run(asked, capture=False)
    assert sizes == [4, 4, 2]
    assert request(llama, tokens(1, 10), max_new_tokens=1).chunk == 2048


def _spy(forward: Callable[[Tensor], Tensor], sizes: list[int]) -> Callable[[Tensor], Tensor]:
    def wrapped(ids: Tensor) -> Tensor:
        sizes.append(ids.shape[1])
        return forward(ids)

    return wrapped


@pytest.mark.parametrize("lag", [0, 1, 4])
def test_eos_ends_rows_one_by_one(llama: Any, lag: int) -> None:
    ids = tokens(3, 6)
    new = greedy(llama, ids)
    eos = [int(new[0, 3]), int(new[1, 8]), int(new[2, 5])]
    found = check(llama, ids, lag=lag, max_new_tokens=NEW, eos_token_id=eos)
    assert found.shape[1] < ids.shape[1] + NEW
    one = check(llama, ids[:1], lag=lag, max_new_tokens=NEW, eos_token_id=eos, pad_token_id=None)
    assert one[0, -1] in eos


def test_finished_rows_emit_pad(llama: Any) -> None:
    ids = tokens(2, 6)
    new = greedy(llama, ids)
    eos = next(int(one) for one in new[0] if one not in new[1])
    found = check(llama, ids, max_new_tokens=NEW, eos_token_id=eos, pad_token_id=7)
    assert found[0, -1] == 7
    # Without a pad token it is the first eos.
    llama.generation_config.pad_token_id = None
    mask = torch.ones_like(ids)
    found = check(llama, ids, attention_mask=mask, max_new_tokens=NEW, eos_token_id=[eos, 1])
    assert found[0, -1] == eos


def test_the_least_length(llama: Any) -> None:
    ids = tokens(2, 6)
    new = greedy(llama, ids)
    options = {"max_new_tokens": NEW, "eos_token_id": new[:, :3].flatten().tolist()}
    short = check(llama, ids, **options)
    assert short.shape[1] <= 9
    assert check(llama, ids, **options, min_new_tokens=10).shape[1] >= 16
    assert check(llama, ids, **options, min_length=14).shape[1] >= 14
    check(llama, ids, max_new_tokens=NEW, min_new_tokens=4)  # no eos to rule out


@pytest.mark.parametrize("penalty", [1.3, 3.0])
@pytest.mark.parametrize("smallest", [4, 256])
def test_repetition_penalty(llama: Any, penalty: float, smallest: int) -> None:
    ids = tokens(2, 9)
    options: dict[str, Any] = {"max_new_tokens": NEW, "repetition_penalty": penalty}
    check(llama, ids, smallest, **options)
    ids[1, :4] = 0
    mask = padded(ids, 0, 4)
    check(llama, ids, smallest, attention_mask=mask, **options)
    # The pad token itself is penalised or not as transformers has it.
    check(llama, (ids + 5) % VOCABULARY, smallest, attention_mask=mask, **options)


def test_the_penalty_of_an_earlier_call_is_gone(llama: Any) -> None:
    for seed in (1, 2):
        check(llama, tokens(1, 9, seed), max_new_tokens=NEW, repetition_penalty=2.0)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.6},
        {"top_k": 5},
        {"top_k": 0, "top_p": 0.7},
        {"top_k": 0, "min_p": 0.1},
        {"temperature": 1.4, "top_k": 20, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.4},
        {"num_return_sequences": 3},
        {"eos_token_id": [5, 6, 7, 8, 9, 10], "min_new_tokens": 3},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_sampling_draws_the_same(llama: Any, options: dict[str, Any]) -> None:
    ids = tokens(2, 9)
    for mask in (padded(ids, 0, 0), padded(ids, 3, 0)):
        check(llama, ids, lag=0, attention_mask=mask, do_sample=True, max_new_tokens=NEW, **options)


def test_random_numbers_go_on_as_after_generate(llama: Any) -> None:
    check(llama, tokens(1, 9), lag=0, do_sample=True, max_new_tokens=NEW)
    after = torch.rand(1)
    torch.manual_seed(11)
    llama.generate(tokens(1, 9), do_sample=True, max_new_tokens=NEW)
    assert torch.equal(after, torch.rand(1))


def test_a_sampling_and_its_equal_share_graphs(llama: Any) -> None:
    asked = [
        request(llama, tokens(1, 4), do_sample=True, max_new_tokens=2, top_p=p).sampling
        for p in (0.5, 0.5, 0.6)
    ]
    assert asked[0] == asked[1] != asked[2]
    assert hash(asked[0]) == hash(asked[1])
    assert Sampling(False) != Sampling(True)


def test_the_sampler_on_its_own() -> None:
    rows = Rows.empty(2, 8, torch.device("cpu"))
    rows.seen.copy_(torch.tensor([[1], [2]]))
    rows.least.fill_(4)
    asked = Sampling(False, eos=(3, 5), pad=6, penalty=4.0, has_least=True)
    sampler = Sampler(asked, 8, torch.device("cpu"))
    logits = torch.tensor([[0.0, 4, 0, 3, 2, 0, 0, 0], [0.0, 0, 4, 0, 2, 3, 0, 0]])
    before = logits.clone()
    # The penalty takes 1 and 2 away, the least length 3 and 5; then 4 is seen as well.
    assert sampler(logits, rows, torch.tensor([3])).tolist() == [4, 4]
    assert sampler(logits, rows, torch.tensor([4])).tolist() == [3, 5]
    assert rows.finished.all()
    assert sampler(logits, rows, torch.tensor([5])).tolist() == [6, 6]
    assert rows.seen.tolist() == [[1, 1, 1, 4, 3, 6, 1, 1], [2, 2, 2, 4, 5, 6, 2, 2]]
    assert torch.equal(logits, before)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Every token is one character."""
    vocabulary = {chr(ord("0") + one): one for one in range(VOCABULARY)}
    inner = Tokenizer(models.BPE(vocabulary, merges=[]))
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=inner)


def text(ids: Tensor) -> str:
    return "".join(chr(ord("0") + int(one)) for one in ids)


@pytest.mark.parametrize("lag", [0, 4])
def test_stop_strings(llama: Any, tokenizer: Any, lag: int) -> None:
    ids = tokens(2, 6)
    new = greedy(llama, ids)
    stops = [text(new[0, 4:6]), text(new[1, 9:12])]
    options = {"max_new_tokens": NEW, "stop_strings": stops, "tokenizer": tokenizer}
    found = check(llama, ids, lag=lag, **options)
    assert found.shape[1] < ids.shape[1] + NEW
    # With an eos about, stopped rows are padded; without, they go on.
    check(llama, ids, lag=lag, **options, eos_token_id=int(new[1, 10]), pad_token_id=7)
    check(llama, ids[:1], lag=lag, **(options | {"stop_strings": stops[0]}))


class Recorder(BaseStreamer):
    def __init__(self) -> None:
        self.calls: list[Any] = []

    def put(self, value: Tensor) -> None:
        assert value.device.type == "cpu"
        self.calls.append(value.tolist())

    def end(self) -> None:
        self.calls.append("end")


@pytest.mark.parametrize("rows", [1, 2])
def test_streamers_get_the_same(llama: Any, tokenizer: Any, rows: int) -> None:
    ids = tokens(rows, 6)
    new = greedy(llama, ids)
    options: dict[str, Any] = {
        "max_new_tokens": NEW,
        "eos_token_id": int(new[0, 7]),
        "stop_strings": text(new[-1, 3:5]),
        "tokenizer": tokenizer,
    }
    theirs, ours = Recorder(), Recorder()
    llama.generate(ids, streamer=theirs, **options)
    run(request(llama, ids, streamer=ours, **options), capture=False)
    assert ours.calls == theirs.calls
    assert ours.calls[-1] == "end"
    assert ours.calls.count("end") == 1


def test_a_text_streamer(llama: Any, tokenizer: Any, capsys: Any) -> None:
    ids = tokens(1, 6)
    run(request(llama, ids, streamer=TextStreamer(tokenizer), max_new_tokens=5), capture=False)
    ours = capsys.readouterr().out
    llama.generate(ids, streamer=TextStreamer(tokenizer), max_new_tokens=5)
    assert ours == capsys.readouterr().out != ""


@pytest.mark.parametrize(("eos", "steps"), [(False, NEW - 1), (True, 8)])
def test_no_more_steps_than_the_lag_past_the_end(llama: Any, eos: bool, steps: int) -> None:
    counting = CountingStep(llama)
    options: dict[str, Any] = {"max_new_tokens": NEW}
    if eos:
        new = greedy(llama, tokens(1, 6)).tolist()[0]
        assert new[4] not in new[:4]
        options |= {"eos_token_id": new[4]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "FACTORIES", (lambda *_: counting,))
        found = run(request(llama, tokens(1, 6), **options), capture=False, lag=4)
    assert counting.calls == steps
    assert found.shape[1] == 6 + (5 if eos else NEW)


def test_no_step_is_built_without_a_free_slot(llama: Any, monkeypatch: Any) -> None:
    """A factory may try its step out at the slot after the prompt."""
    free = []

    def build(model: Any, cache: WindowCache, batch: int) -> ModelStep:
        free.append(cache.slots - int(cache.cursor.position))
        assert cache.cursor.window == cache.slots
        assert batch == 2
        return ModelStep(model)

    monkeypatch.setattr(loop, "FACTORIES", (build,))
    for count in (1, 2):
        check(llama, tokens(2, 16), max_new_tokens=count)
    assert free == [16]


class CountingStep(ModelStep):
    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.calls = 0

    def __call__(self, ids: Tensor, state: State) -> Tensor:
        self.calls += 1
        return super().__call__(ids, state)


# How a call may be put


def test_the_ways_to_give_the_prompt(llama: Any) -> None:
    ids = tokens(2, 6)
    expected = llama.generate(ids, max_new_tokens=5)
    for inputs, kwargs in ((ids, {}), (None, {"input_ids": ids}), (ids.int(), {})):
        asked = request(llama, inputs, max_new_tokens=5, **kwargs)
        assert torch.equal(run(asked, capture=False), expected)


def test_a_generation_config(llama: Any) -> None:
    ids = tokens(2, 6)
    config = GenerationConfig(max_new_tokens=5, do_sample=True, top_k=7, pad_token_id=0)
    check(llama, ids, lag=0, generation_config=config)
    before = config.to_dict()
    llama.generation_config.max_new_tokens = 7
    assert check(llama, ids).shape[1] == 13
    assert config.to_dict() == before


def test_lengths(llama: Any) -> None:
    ids = tokens(1, 6)
    assert check(llama, ids, max_length=9).shape[1] == 9
    assert check(llama, ids).shape[1] == 26  # the default is 20 new tokens
    assert check(llama, ids, max_length=9, max_new_tokens=5).shape[1] == 11


def test_padding_told_from_the_pad_token(llama: Any) -> None:
    ids = tokens(2, 6)
    ids[0, :3] = 0
    check(llama, ids, max_new_tokens=5)
    assert request(llama, ids, max_new_tokens=5).starts.tolist() == [3, 0]


def test_what_generate_refuses_has_a_reason(llama: Any, served: Any) -> None:
    ids = tokens(1, 6)
    for kwargs in (
        {"max_length": 6},
        {"do_sample": True, "temperature": -1.0},
        {"num_return_sequences": 2},
        {"stop_strings": "a"},
        {"max_new_tokens": 2, "tempratur": 1},
        {"max_new_tokens": 2, "input_ids": ids},
    ):
        assert isinstance(resolve(llama, ids, kwargs), str)
        with pytest.raises(ValueError):  # noqa: PT011
            llama.generate(ids, **kwargs)
        with pytest.raises(ValueError), pytest.warns(match="runs this call"):  # noqa: PT011
            served(llama, ids, **kwargs)
        decoding._WARNED.clear()


REASONS: dict[str, tuple[dict[str, Any], str]] = {
    "beams": ({"num_beams": 2}, "beam search"),
    "assistant": ({"assistant_model": build(llama_config())}, "assistant_model"),
    "lookup": ({"prompt_lookup_num_tokens": 2}, "assisted"),
    "contrastive": ({"penalty_alpha": 0.5, "top_k": 4}, "contrastive"),
    "processor": ({"logits_processor": LogitsProcessorList([lambda i, s: s])}, "logits_processor"),
    "criteria": ({"stopping_criteria": [lambda i, s: False]}, "stopping_criteria"),
    "prefix": ({"prefix_allowed_tokens_fn": lambda b, i: [1]}, "prefix_allowed_tokens_fn"),
    "dict": ({"return_dict_in_generate": True}, "return_dict_in_generate"),
    "scores": ({"output_scores": True}, "output_scores"),
    "logits": ({"output_logits": True}, "output_logits"),
    "hidden": ({"output_hidden_states": True}, "output_hidden_states"),
    "attentions": ({"output_attentions": True}, "output_attentions"),
    "embeds": ({"inputs_embeds": torch.zeros(1, 6, 32)}, "inputs_embeds"),
    "past": ({"past_key_values": object()}, "past_key_values"),
    "positions": ({"position_ids": torch.arange(6)[None]}, "position_ids"),
    "pixels": ({"pixel_values": torch.zeros(1)}, "pixel_values"),
    "types": ({"token_type_ids": torch.zeros(1, 6)}, "token_type_ids"),
    "ngram": ({"no_repeat_ngram_size": 2}, "no_repeat_ngram_size"),
    "bad": ({"bad_words_ids": [[5]]}, "bad_words_ids"),
    "bias": ({"sequence_bias": [[[5], 1.0]]}, "sequence_bias"),
    "normal": ({"renormalize_logits": True}, "renormalize_logits"),
    "typical": ({"typical_p": 0.5}, "typical_p"),
    "epsilon": ({"epsilon_cutoff": 0.1}, "epsilon_cutoff"),
    "eta": ({"eta_cutoff": 0.1}, "eta_cutoff"),
    "top-h": ({"top_h": 0.5}, "top_h"),
    "guidance": ({"guidance_scale": 2.0}, "guidance_scale"),
    "negative": ({"negative_prompt_ids": torch.ones(1, 6)}, "negative_prompt_ids"),
    "mark": ({"watermarking_config": {"bias": 2.0}}, "watermarking_config"),
    "suppress": ({"suppress_tokens": [5]}, "suppress_tokens"),
    "begin": ({"begin_suppress_tokens": [5]}, "begin_suppress_tokens"),
    "forced-bos": ({"forced_bos_token_id": 5}, "forced_bos_token_id"),
    "forced-eos": ({"forced_eos_token_id": 5}, "forced_eos_token_id"),
    "decay": ({"exponential_decay_length_penalty": (1, 1.1)}, "exponential_decay"),
    "invalid": ({"remove_invalid_values": True}, "remove_invalid_values"),
    "encoder": ({"encoder_repetition_penalty": 1.1}, "encoder_repetition_penalty"),
    "time": ({"max_time": 1.0}, "max_time"),
    "healing": ({"token_healing": True}, "token_healing"),
    "no-cache": ({"use_cache": False}, "use_cache"),
    "offloaded": ({"cache_implementation": "offloaded"}, "cache_implementation"),
    "gpus": ({"synced_gpus": True}, "synced_gpus"),
    "custom": ({"custom_generate": "somewhere"}, "custom_generate"),
    "right-padding": ({"attention_mask": torch.tensor([[1, 1, 1, 1, 1, 0]])}, "left padding"),
    "holes": ({"attention_mask": torch.tensor([[0, 1, 1, 0, 1, 1]])}, "left padding"),
    "long-mask": ({"attention_mask": torch.ones(1, 7)}, "shape"),
}


@pytest.mark.parametrize("name", REASONS)
def test_reasons_of_a_call(llama: Any, name: str) -> None:
    kwargs, reason = REASONS[name]
    found = resolve(llama, tokens(1, 6), {"max_new_tokens": 2, "do_sample": False} | kwargs)
    assert isinstance(found, str)
    assert reason in found


def test_arguments_that_change_nothing_are_served(llama: Any) -> None:
    absent = {"logits_processor": None, "stopping_criteria": [], "synced_gpus": False}
    check(llama, tokens(1, 6), max_new_tokens=2, cache_implementation="dynamic", **absent)
    assert request(llama, tokens(1, 6), max_new_tokens=2, cache_implementation="static")


@pytest.mark.parametrize(
    "ids", [None, [[1, 2]], torch.ones(3, dtype=torch.int64), torch.ones(1, 2), tokens(1, 0)]
)
def test_prompts_that_are_none(llama: Any, ids: Any) -> None:
    assert isinstance(resolve(llama, ids, {"max_new_tokens": 2}), str)


def _hooked(model: Any) -> None:
    model.model.layers[0].mlp.register_forward_hook(lambda *_: None)


def _counted(model: Any) -> None:
    next(iter(sparse_modules(model).values())).catsparse_counter = lambda keep, kept: None


MODELS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "training": (lambda model: model.train(), "training"),
    "hook": (_hooked, "layers.0.mlp has a hook"),
    "meter": (_counted, "meter"),
    "patched": (lambda model: setattr(model, "forward", model.forward), "patched"),
    "compiled": (lambda model: model.compile(), "compiled"),
    "flash": (
        lambda model: setattr(model.config, "_attn_implementation", "flash_attention_2"),
        "flash_attention_2",
    ),
    "rope": (
        lambda model: model.config.rope_parameters.update(rope_type="dynamic"),
        "rotary embedding is dynamic",
    ),
    "spread": (lambda model: model.lm_head.to("meta"), "not on one device"),
}


@pytest.mark.parametrize("name", MODELS)
def test_reasons_of_a_model(sparse_llama: Any, name: str) -> None:
    change, reason = MODELS[name]
    change(sparse_llama)
    found = resolve(sparse_llama, tokens(1, 6), {"max_new_tokens": 2})
    assert isinstance(found, str)
    assert reason in found


def test_reasons_of_a_class(llama: Any) -> None:
    sizes = {"hidden_size": 32, "num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 1}
    others = {
        "inputs in its own way": build(Mamba2Config(**sizes, num_hidden_layers=1, vocab_size=64)),
        "encoder": T5ForConditionalGeneration(
            T5Config(d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8, vocab_size=64)
        ).eval(),
        "no transformers model": torch.nn.Linear(2, 2),
    }
    for reason, model in others.items():
        assert reason in str(resolve(model, tokens(1, 6), {}))
    bloom = build(BloomConfig(hidden_size=32, n_layer=1, n_head=2, vocab_size=64))
    assert isinstance(resolve(bloom, tokens(1, 6), {}), str)

    class Own(type(llama)):  # type: ignore[misc]
        def generate(self, *args: Any, **kwargs: Any) -> None: ...

    llama.__class__ = Own
    assert "its own way" in str(resolve(llama, tokens(1, 6), {}))


def test_autocast_is_a_reason(llama: Any) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert resolve(llama, tokens(1, 6), {"max_new_tokens": 2}) == "autocast is on"


def test_layers_without_such_a_cache() -> None:
    assert why_no_cache(llama_config()) is None
    for change, reason in (
        ({"layer_types": ["full_attention", "linear_attention"]}, "linear_attention"),
        ({"num_kv_shared_layers": 1}, "share"),
        ({"attention_chunk_size": 8}, "chunked"),
    ):
        config = Qwen2Config(**SMALL)
        for name, value in change.items():
            setattr(config, name, value)
        assert reason in str(why_no_cache(config))


def test_hidden_states_asked_for_earlier_do_not_count_as_hooks(llama: Any) -> None:
    with torch.no_grad():
        llama(tokens(1, 6), output_hidden_states=True)
    assert any(module._forward_hooks for module in llama.modules())
    check(llama, tokens(1, 6), max_new_tokens=4)


# The public function


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """``decoding.generate`` as if this were a GPU, without graphs."""
    monkeypatch.setattr(decoding, "_is_on_cpu", lambda model: False)
    monkeypatch.setattr(decoding, "run", lambda asked, **how: run(asked, **how, capture=False))
    return decoding.generate


def test_generate_runs_the_loop(llama: Any, served: Any, monkeypatch: Any) -> None:
    ids = tokens(1, 6)
    expected = llama.generate(ids, max_new_tokens=4)
    assert torch.equal(served(llama, ids, max_new_tokens=4), expected)
    assert len(kept(llama)) == 1
    monkeypatch.setattr(decoding, "run", None)
    assert torch.equal(served(llama, ids, step="plain", max_new_tokens=4), expected)


def test_generate_warns_once_for_each_reason(llama: Any, served: Any) -> None:
    ids = tokens(1, 6)
    for kwargs in ({"num_beams": 2}, {"no_repeat_ngram_size": 2}):
        expected = llama.generate(ids, max_new_tokens=4, **kwargs)
        with pytest.warns(UserWarning, match=r"model\.generate runs this call") as caught:
            found = served(llama, ids, max_new_tokens=4, **kwargs)
        assert torch.equal(found, expected)
        assert caught[0].filename == __file__
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            served(llama, ids, max_new_tokens=4, **kwargs)


def test_a_cpu_model_is_served_by_generate_without_a_word(llama: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(decoding, "run", None)
    ids = tokens(1, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = decoding.generate(llama, ids, max_new_tokens=4, num_beams=2)
    assert torch.equal(found, llama.generate(ids, max_new_tokens=4, num_beams=2))
    assert decoding.why_plain(llama, ids, max_new_tokens=4) == "the model is on a CPU"
    assert "beam" in str(decoding.why_plain(llama, ids, num_beams=2))


def test_an_unknown_step(llama: Any) -> None:
    with pytest.raises(CatsparseError, match="auto, compile, plain"):
        decoding.generate(llama, tokens(1, 6), step="fast")


# What is kept between calls


def kept(model: Any) -> list[loop.Workspace]:
    return list(loop._KEPT[model].workspaces.values())


def test_buffers_are_reused(llama: Any) -> None:
    check(llama, tokens(2, 9), smallest=64, max_new_tokens=NEW)
    (first,) = kept(llama)
    pointers = [layer.keys.data_ptr() for layer in first.state.cache.layers]
    for seed in (2, 3):
        ids = tokens(2, 20, seed)
        check(llama, ids, smallest=64, attention_mask=padded(ids, 5, 0), max_new_tokens=NEW)
        check(llama, tokens(2, 3, seed), smallest=64, max_new_tokens=NEW)
    assert kept(llama) == [first]
    assert pointers == [layer.keys.data_ptr() for layer in first.state.cache.layers]
    check(llama, tokens(2, 60), smallest=64, max_new_tokens=NEW)  # too long for them
    (second,) = kept(llama)
    assert second.state.cache.slots == 128


def test_what_is_kept_is_bounded_and_counted(llama: Any) -> None:
    assert decoding.memory_bytes(llama) == 0
    for rows in (1, 2, 3):
        check(llama, tokens(rows, 9), smallest=64, max_new_tokens=NEW)
    assert [one.state.tokens.shape[0] for one in kept(llama)] == [2, 3]
    slots, layers, heads, dim = 64, 2, 2, 8
    cache = 2 * layers * heads * slots * dim * 4
    rest = 8 + slots + 8 + 8 * (slots + 1) + 1
    assert decoding.memory_bytes(llama) == 5 * (cache + rest) + 2 * 16
    decoding.forget(llama)
    assert decoding.memory_bytes(llama) == 0


def test_nothing_keeps_the_model_alive() -> None:
    model = build(llama_config())
    run(request(model, tokens(1, 6), max_new_tokens=4), capture=False)
    assert len(loop._KEPT) == 1
    del model
    gc.collect()
    assert len(loop._KEPT) == 0


def test_stale_values_do_not_come_through(llama: Any) -> None:
    check(llama, tokens(1, 9), smallest=64, max_new_tokens=NEW)
    for layer in kept(llama)[0].state.cache.layers:
        layer.keys.fill_(torch.nan)
        layer.values.fill_(torch.nan)
    check(llama, tokens(1, 9), smallest=64, max_new_tokens=NEW)


def test_inference_mode_and_after(llama: Any) -> None:
    ids = tokens(1, 6)
    expected = llama.generate(ids, max_new_tokens=4)
    for _ in range(2):
        with torch.inference_mode():
            inside = run(request(llama, ids, max_new_tokens=4), capture=False)
        outside = run(request(llama, ids, max_new_tokens=4), capture=False)
        assert torch.equal(inside, expected)
        assert torch.equal(outside, expected)
        assert not outside.requires_grad


def _new_threshold(model: Any) -> None:
    module = next(iter(sparse_modules(model).values()))
    module.set_threshold(module.catsparse_threshold + 1, module.catsparse_mean)


def _threshold_in_place(model: Any) -> None:
    next(iter(sparse_modules(model).values())).catsparse_threshold.add_(1)


def _new_weight(model: Any) -> None:
    layer = model.model.layers[0].self_attn.q_proj
    layer.weight = torch.nn.Parameter(layer.weight.detach() * 1.5)


def _weight_in_place(model: Any) -> None:
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1.5)


def _dense(model: Any) -> None:
    for module in sparse_modules(model).values():
        module.catsparse_enabled = False


def _backend(model: Any) -> None:
    catsparse.set_backend(model, "torch")


def _no_copy(model: Any) -> None:
    catsparse.set_backend(model, down_copy=False)


def _merge(model: Any) -> None:
    """As LoRA merges: behind the version counter, but with the child swapped."""
    mlp = model.model.layers[0].mlp
    mlp.down_proj.weight.data *= 1.5
    mlp.down_proj = mlp.down_proj


CHANGES = [
    _new_threshold,
    _threshold_in_place,
    _new_weight,
    _weight_in_place,
    _dense,
    _backend,
    _no_copy,
    _merge,
    catsparse.densify,
]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("compensated", [True, False])
def test_a_changed_model_gets_a_new_step(
    sparse_llama: Any, change: Any, compensated: bool, monkeypatch: Any
) -> None:
    if not compensated:
        for module in sparse_modules(sparse_llama).values():
            module.set_threshold(module.catsparse_threshold, None)
    built = []
    cleared = []
    monkeypatch.setattr(loop, "FACTORIES", (lambda *_: None, lambda m, *_: built.append(m) or S(m)))
    monkeypatch.setattr(Graphs, "clear", lambda self: cleared.append(self))

    class S(ModelStep): ...

    ids = tokens(1, 4)
    for _ in range(3):
        check(sparse_llama, ids, max_new_tokens=6)
    assert len(built) == 1
    cleared.clear()
    change(sparse_llama)
    # Ours first: a forward makes anew what follows from the weights, at the same address perhaps.
    asked = request(sparse_llama, ids, max_new_tokens=6)
    found = run(asked, capture=False, smallest=4)
    assert len(built) == 2
    assert len(cleared) == 1
    assert torch.equal(found, sparse_llama.generate(ids, max_new_tokens=6))
    run(asked, capture=False, smallest=4)
    assert len(built) == 2


def test_an_interrupted_call_leaves_nothing_behind(llama: Any) -> None:
    class Broken(Recorder):
        def put(self, value: Tensor) -> None:
            super().put(value)
            if len(self.calls) == 3:
                raise KeyboardInterrupt

    check(llama, tokens(1, 6), smallest=256, max_new_tokens=NEW)
    with pytest.raises(KeyboardInterrupt):
        run(request(llama, tokens(1, 6), streamer=Broken(), max_new_tokens=NEW), capture=False)
    assert kept(llama)[0]._fingerprint is None  # the next call starts anew
    check(llama, tokens(1, 6), max_new_tokens=NEW)


def test_fingerprint(sparse_llama: Any) -> None:
    sparse_llama.generate(tokens(1, 4), max_new_tokens=2)
    before = fingerprint(sparse_llama)
    assert fingerprint(sparse_llama) == before
    module = next(iter(sparse_modules(sparse_llama).values()))
    for name, value in {
        "catsparse_enabled": False,
        "catsparse_backend": catsparse.kernels.Backend.TORCH,
        "catsparse_down_copy": False,
        "catsparse_prefill": "dense",
        "_catsparse_down_t": torch.zeros(48, 32),
    }.items():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, name, value)
            assert fingerprint(sparse_llama) != before, name
    assert fingerprint(sparse_llama) == before


def test_the_reader_takes_random_numbers_back() -> None:
    offsets = iter([4, 8, 12])
    back: list[int] = []
    reader = loop._Reader(2, 2, torch.device("cpu"), draws=True)
    reader._generator = SimpleNamespace(get_offset=lambda: next(offsets), set_offset=back.append)
    for one in range(3):
        reader.push(torch.full((2, 1), one))
    assert [reader.pop(), reader.pop()] == [[0, 0], [1, 1]]
    assert not reader.has_arrived()  # a CPU has no events
    reader.rewind()
    assert back == [8]
    reader.pop()
    reader.rewind()  # nothing was drawn in vain
    assert back == [8]


# The cache


def test_sliding_layers_are_told_from_full_ones() -> None:
    cache = WindowCache(CONFIGS["gemma2"], 16, torch.device("cpu"))
    assert cache.is_sliding == [True, False]
    assert [layer.max_cache_len for layer in cache.layers] == [16, 16]


@pytest.mark.parametrize(
    ("used", "window"),
    [(1, 256), (256, 256), (257, 512), (513, 1024), (8192, 8192), (8193, 16384), (16385, 24576)],
)
def test_bucket(used: int, window: int) -> None:
    assert bucket(used) == window
    assert bucket(used) >= used


def test_the_cache_shows_its_window() -> None:
    cache = WindowCache(llama_config(), 16, torch.device("cpu"))
    assert (cache.is_compileable, cache.get_max_length(), cache.nbytes) == (True, 16, 0)
    states = torch.randn(2, 2, 3, 8)
    cache.cursor.start, cache.cursor.window = 0, 3
    keys, values = cache.update(states, 2 * states, 0)
    assert torch.equal(keys, states)
    assert torch.equal(values, 2 * states)
    assert cache.get_seq_length() == 0
    cache.cursor.start, cache.cursor.window = None, 8
    cache.cursor.position.fill_(3)
    for layer in (0, 1):  # both write at the same slot: only the caller moves on
        keys, _ = cache.update(states[:, :, :1], states[:, :, :1], layer)
        assert torch.equal(keys[:, :, 3], states[:, :, 0])
    assert keys.shape == (2, 2, 8, 8)
    assert not keys[:, :, 4:].any()
    assert keys.data_ptr() == cache.layers[1].keys.data_ptr()
    assert int(cache.get_seq_length()) == 3
    assert cache.get_mask_sizes(1, 0) == (8, 0)
    assert cache.nbytes == 2 * 2 * (2 * 2 * 16 * 8 * 4)


def test_decode_reads_only_its_window(llama: Any, monkeypatch: Any) -> None:
    windows = []

    class Spy(ModelStep):
        def __call__(self, ids: Tensor, state: State) -> Tensor:
            used = int(state.position) + 1
            window = state.cache.cursor.window
            windows.append(window)
            assert used <= window <= 2 * used
            hidden = [layer.keys[:, :, window:] for layer in state.cache.layers]
            for keys in hidden:
                keys.fill_(torch.nan)
            logits = super().__call__(ids, state)
            for keys in hidden:
                keys.zero_()
            return logits

    monkeypatch.setattr(loop, "FACTORIES", (lambda m, *_: Spy(m),))
    check(llama, tokens(1, 6), max_new_tokens=NEW)
    assert windows == [8] * 2 + [16] * 8 + [32] * 13


# Graphs, with stand-ins for CUDA's


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    done: list[str] = []

    def captured(self: Graphs, body: Callable[[], None]) -> Any:
        done.append("capture")
        return SimpleNamespace(replay=body)

    def aside(self: Graphs, body: Callable[[], None]) -> None:
        done.append("aside")
        body()

    monkeypatch.setattr(Graphs, "_captured", captured)
    monkeypatch.setattr(Graphs, "_run_aside", aside)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: done.append("wait"))
    return done


def test_graphs_capture_on_second_use(fake: list[str]) -> None:
    runner, ran = Graphs(torch.device("cpu"), True), []
    for _ in range(4):
        runner.run("a", lambda: ran.append(1), None)
    assert fake == ["aside", "capture"]
    assert len(ran) == 4  # each run is one step
    assert len(runner) == 1
    runner.clear()
    assert (fake[-1], len(runner)) == ("wait", 0)


def test_graphs_keep_the_last_used(fake: list[str]) -> None:
    runner = Graphs(torch.device("cpu"), True)
    for key in range(MAX_GRAPHS):
        for _ in range(2):
            runner.run(key, lambda: None, None)
    runner.run(0, lambda: None, None)
    runner.run("new", lambda: None, None)
    assert len(runner) == MAX_GRAPHS - 1
    fake.clear()
    runner.run(0, lambda: None, None)  # used lately
    assert fake == []
    runner.run(1, lambda: None, None)  # the oldest is gone
    assert fake == ["aside", "wait"]


def test_windows_and_samplings_have_graphs_of_their_own(llama: Any, fake: list[str]) -> None:
    ids = tokens(1, 6)
    run(request(llama, ids, max_new_tokens=NEW), smallest=8)
    assert fake == ["aside", "capture"] * 3
    fake.clear()
    run(request(llama, ids, max_new_tokens=NEW), smallest=8)
    assert fake == []
    run(request(llama, ids, max_new_tokens=NEW, repetition_penalty=1.5), smallest=8)
    assert fake == ["aside", "capture"] * 3


def test_a_step_that_cannot_be_captured_runs_all_the_same(monkeypatch: Any) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("not permitted\nwhen capturing")

    monkeypatch.setattr(graphs.Graphs, "_run_aside", lambda self, body: body())
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", refuse)
    runner, ran = Graphs(torch.device("cpu"), True), []
    runner.run("a", lambda: ran.append(1), None)
    with pytest.warns(UserWarning, match="cannot be captured and runs uncaptured: not permitted$"):
        runner.run("a", lambda: ran.append(1), None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        runner.run("b", lambda: ran.append(1), None)
    assert len(ran) == 3


@pytest.mark.parametrize("sparse", [False, True])
def test_the_compiled_step(sparse: bool) -> None:
    """Two calls of one size are compiled once."""
    model = build(llama_config())
    if sparse:
        catsparse.sparsify(model, calibrate(model))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for seed in (1, 2):
        ids = tokens(2, 9, seed)
        expected = model.generate(ids, max_new_tokens=6)
        found = run(request(model, ids, max_new_tokens=6), compiled=True, capture=False)
        assert torch.equal(found, expected)
    (workspace,) = loop._KEPT[model].workspaces.values()
    assert isinstance(workspace.step, CompiledStep)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_no_compiled_step_on_a_cpu() -> None:
    with pytest.raises(CatsparseError, match="needs a GPU"):
        decoding.generate(build(llama_config()), tokens(1, 3), step="compile")


def test_a_cache_that_does_not_fit(
    llama: Any, served: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(State, "empty", full)
    ids = tokens(1, 6)
    with pytest.warns(match="no memory for a cache of 1 x"):
        found = served(llama, ids, max_new_tokens=3)
    assert torch.equal(found, llama.generate(ids, max_new_tokens=3))


def test_compiled_steps_have_code_objects_of_their_own(llama: Any) -> None:
    """Else torch counts their compilations together, and runs the ninth as it is."""
    state = State.empty(llama.config, 1, 8, llama.device)
    steps = [CompiledStep.try_build(llama, state.cache, 1) for _ in range(2)]
    codes = {id(step._forward._torchdynamo_orig_callable.__code__) for step in steps}
    assert len(codes) == 2
