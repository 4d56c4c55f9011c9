"""``catsparse serve`` by OpenAI's own client: answers are those of ``catsparse.generate``."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

pytest.importorskip("fastapi", reason="the extra serve is not installed")
import openai

import catsparse
import serving
import tiny
from catsparse import hub
from serving import NAME, PROMPT, Running, expected, tokenizer, wait_for

PROMPTS = [PROMPT, "Then he said", "In the year 1805 the ship"]


@pytest.fixture(scope="module", params=[True, False], ids=["batching", "one by one"])
def running(request: pytest.FixtureRequest) -> Iterator[Running]:
    with serving.serving(batching=request.param) as made:
        yield made


def turn(text: str = PROMPT) -> list[Any]:
    return [{"role": "user", "content": text}]


def test_models(running: Running) -> None:
    (model,) = running.client().models.list().data
    assert (model.id, model.object, model.owned_by) == (NAME, "model", "catsparse")
    assert running.client().models.retrieve(NAME) == model
    with pytest.raises(openai.NotFoundError):
        running.client().models.retrieve("other")


def test_a_completion_is_that_of_generate(running: Running) -> None:
    made = running.client().completions.create(
        model=NAME, prompt=PROMPT, max_tokens=24, temperature=0
    )
    assert made.choices[0].text == expected(PROMPT, 24)
    assert made.choices[0].finish_reason == "length"
    assert made.usage is not None
    length = len(tokenizer()(PROMPT)["input_ids"])
    assert (made.usage.prompt_tokens, made.usage.completion_tokens) == (length, 24)
    assert made.usage.total_tokens == length + 24


def test_a_prompt_may_be_tokens(running: Running) -> None:
    ids = tokenizer()(PROMPT)["input_ids"]
    made = running.client().completions.create(model=NAME, prompt=ids, max_tokens=8, temperature=0)
    assert made.choices[0].text == expected(PROMPT, 8)


def test_a_chat_without_template_is_plain_text(running: Running) -> None:
    turns: list[Any] = [
        {"role": "system", "content": "A story."},
        *turn(),
        {"role": "assistant", "content": " up."},
        {"role": "user", "content": [{"type": "text", "text": "Then he"}]},
    ]
    made = running.client().chat.completions.create(
        model=NAME, messages=turns, max_completion_tokens=12, temperature=0
    )
    message = made.choices[0].message
    assert message.content == expected("A story.\nThe captain looked up.\nThen he", 12)
    assert message.role == "assistant"


def test_a_stream(running: Running) -> None:
    chunks = list(
        running.client().chat.completions.create(
            model=NAME,
            messages=turn(),
            max_tokens=24,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    pieces = [c.choices[0].delta.content or "" for c in chunks if c.choices]
    assert "".join(pieces) == expected(PROMPT, 24)
    assert len([piece for piece in pieces if piece]) > 12  # it came bit by bit
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 24
    assert len({c.id for c in chunks}) == 1


def test_a_stream_of_a_completion(running: Running) -> None:
    chunks = list(
        running.client().completions.create(
            model=NAME, prompt=PROMPT, max_tokens=8, temperature=0, stream=True
        )
    )
    assert "".join(c.choices[0].text for c in chunks) == expected(PROMPT, 8)
    assert chunks[-1].choices[0].finish_reason == "length"
    assert all(c.usage is None for c in chunks)


def test_the_asynchronous_client(running: Running) -> None:
    async def ask() -> str:
        async with openai.AsyncOpenAI(base_url=f"{running.url}/v1", api_key="none") as client:
            stream = await client.chat.completions.create(
                model=NAME, messages=turn(), max_tokens=8, temperature=0, stream=True
            )
            return "".join([c.choices[0].delta.content or "" async for c in stream])

    assert asyncio.run(ask()) == expected(PROMPT, 8)


def test_many_at_once_do_not_disturb_each_other(running: Running) -> None:
    """Greedy ones, dense ones and drawn ones, in one batch."""
    kinds: list[dict[str, Any]] = [
        {},
        {"temperature": 0.8, "seed": 3, "top_p": 0.9},
        {"extra_body": {"dense": True}},
    ]
    asks = [(prompt, kind) for prompt in PROMPTS for kind in kinds]

    def ask(one: tuple[str, dict[str, Any]]) -> str:
        prompt, kind = one
        return running.complete(prompt, 12, **kind)

    with ThreadPoolExecutor(len(asks)) as pool:
        together = list(pool.map(ask, asks))
    assert together == [ask(one) for one in asks]
    for (prompt, kind), text in zip(asks, together, strict=True):
        if "seed" not in kind:
            assert text == expected(prompt, 12, dense="extra_body" in kind)
    assert expected(PROMPT, 12, dense=True) != expected(PROMPT, 12)


def test_a_seed_means_what_it_means_for_generate(running: Running) -> None:
    torch.manual_seed(11)
    text = expected(PROMPT, 24, do_sample=True, temperature=0.9, top_p=0.95)
    one, other = (
        running.complete(PROMPT, 24, temperature=0.9, top_p=0.95, seed=seed) for seed in (11, 12)
    )
    assert one == text
    assert other != text


def test_without_a_seed_answers_differ(running: Running) -> None:
    texts = {running.complete(PROMPT, 24, temperature=1.5) for _ in range(3)}
    assert len(texts) > 1


def test_without_parameters_it_is_the_models_own(running: Running) -> None:
    """The bundled model's generation config draws."""
    texts = {
        running.client()
        .completions.create(model=NAME, prompt=PROMPT, max_tokens=24)
        .choices[0]
        .text
        for _ in range(3)
    }
    assert len(texts) > 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_ends_the_answer_before_it(running: Running, stream: bool) -> None:
    whole = expected(PROMPT, 48)
    for stop in (whole[9:13], [whole[20:30], "never there"]):
        first = stop if isinstance(stop, str) else stop[0]
        made: Any = running.client().completions.create(
            model=NAME, prompt=PROMPT, max_tokens=48, temperature=0, stop=stop, stream=stream
        )
        chunks = list(made) if stream else [made]
        assert "".join(c.choices[0].text for c in chunks) == whole[: whole.index(first)]
        assert chunks[-1].choices[0].finish_reason == "stop"
        if not stream:
            assert made.usage.completion_tokens < 48


def test_a_bias_forbids_a_token(running: Running) -> None:
    text = expected(PROMPT, 8)
    first = tokenizer()(text)["input_ids"][0]
    made = running.client().chat.completions.create(
        model=NAME, messages=turn(), max_tokens=8, temperature=0, logit_bias={str(first): -100}
    )
    content = made.choices[0].message.content
    assert content is not None
    assert tokenizer()(content)["input_ids"][0] != first


def test_the_longest_answer_that_fits(running: Running) -> None:
    """Nothing is asked, so all that the context has room for, and not a token more."""
    ids = [7] * 500
    made = running.client().completions.create(
        model=NAME, prompt=ids, temperature=0, logit_bias=None
    )
    assert made.usage is not None
    assert made.usage.total_tokens <= 512
    assert made.usage.completion_tokens == 12 or made.choices[0].finish_reason == "stop"


def test_what_is_written_is_counted(running: Running) -> None:
    def counted() -> list[float]:
        names = ("prompt_tokens_total", "first_token_seconds_count")
        values = [running.metric(name) for name in names]
        values.append(running.metric("generated_tokens_total", mode="sparse"))
        labels = {"endpoint": "/v1/completions", "status": "200"}
        values.append(running.metric("requests_total", **labels))
        return [value or 0.0 for value in values]

    # An answer before this test's may have been sent and not counted yet.
    wait_for(lambda: running.metric("requests_in_flight") == 0)
    before = counted()
    running.complete(PROMPT, 16)
    length = len(tokenizer()(PROMPT)["input_ids"])
    # The last of them is counted when the answer has been sent.
    wait_for(lambda: counted()[-1] > before[-1])
    assert [b - a for a, b in zip(before, counted(), strict=True)] == [length, 1, 16, 1]
    text = running.http().get("/metrics")
    assert text.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert "catsparse_requests_in_flight 0.0" in text.text
    assert "process_resident_memory_bytes" in text.text


def test_what_is_dropped_is_counted() -> None:
    """As the model's own meter counts it on the same text."""
    model = serving.sparse_model()
    with serving.serving() as running:
        text = running.complete(PROMPT, 32)
        wait_for(lambda: bool(running.metric("measured_tokens_total")))
        found = running.metric("achieved_sparsity"), running.metric("bytes_skipped_ratio")
        assert running.metric("measured_tokens_total") == len(
            tokenizer()(PROMPT + text)["input_ids"]
        )
    ids = tokenizer()(PROMPT + text, return_tensors="pt")["input_ids"]
    dropped = catsparse.dropped.measure(model, ids[0])
    assert found == (pytest.approx(dropped.sparsity), pytest.approx(dropped.bytes_skipped))


def test_a_template_makes_the_prompt() -> None:
    tokens = hub.load_tokenizer("default")
    tokens.chat_template = (
        "{% if messages[0]['content'] == 'no' %}{{ raise_exception('Not that.') }}{% endif %}"
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    )
    with serving.serving(tokens=tokens) as running:
        chat = running.client().chat.completions
        made = chat.create(model=NAME, messages=turn("Hello"), max_tokens=8, temperature=0)
        assert made.choices[0].message.content == expected("user: Hello\n", 8)
        with pytest.raises(openai.BadRequestError, match="refuses the conversation: Not that"):
            chat.create(model=NAME, messages=turn("no"))


def test_the_dense_model() -> None:
    """Served as such, and a sparse one that is to run dense."""
    dense = hub.load_dense_model("default", dtype=torch.float32)
    for options in ({"model": dense}, {"dense": True}):
        with serving.serving(**options) as running:
            assert running.complete(PROMPT, 12) == expected(PROMPT, 12, dense=True)
            both = running.complete(PROMPT, 12, extra_body={"dense": True})
            assert both == expected(PROMPT, 12, dense=True)
            assert running.metric("generated_tokens_total", mode="dense") == 24
            assert running.metric("achieved_sparsity") is None


def test_an_end_of_text_ends_the_answer() -> None:
    """Its token is counted, and not shown."""
    model = serving.sparse_model()
    ids = tokenizer()(PROMPT, return_tensors="pt")["input_ids"]
    written = catsparse.generate(serving.sparse_model(), ids, do_sample=False, max_new_tokens=9)
    model.generation_config.eos_token_id = [1, int(written[0, -1])]
    with serving.serving(model=model) as running:
        made = running.client().completions.create(
            model=NAME, prompt=PROMPT, max_tokens=40, temperature=0
        )
        assert made.choices[0].finish_reason == "stop"
        assert made.usage is not None
        assert made.usage.completion_tokens == 9


def test_other_families_batch_as_they_generate() -> None:
    """A random Qwen-like model, whose tokens have no text of their own."""
    model = tiny.build(tiny.llama_config(num_hidden_layers=3, attention_bias=True))
    calibration = tiny.calibrate(model)
    catsparse.sparsify(model, calibration, sparsity=0.5)
    prompt = tiny.tokens(1, 9)
    with torch.no_grad():
        written = model.generate(prompt, do_sample=False, max_new_tokens=20)[0, 9:].tolist()

    class Letters:
        chat_template = None

        def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
            return "".join(chr(65 + i) for i in ids)

        def __call__(self, text: str) -> dict[str, list[int]]:
            return {"input_ids": [3] * len(text)}

    with serving.serving(model=model, tokens=Letters()) as running:
        text = running.complete(prompt[0].tolist(), 20)  # type: ignore[arg-type]
    assert text == "".join(chr(65 + i) for i in written)
