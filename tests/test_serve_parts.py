"""The server's parts by themselves: turns, stops, streamed text, settings, the cache's size."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed")
import torch
from hypothesis import given
from hypothesis import strategies as st

import serving
import tiny
from catsparse import CatsparseError
from catsparse.prompts import encode_turns, plain_text
from catsparse.serve import Settings, batching
from catsparse.serve.generation import _Cut
from catsparse.serve.sampling import Sampler
from catsparse.serve.turns import Turns
from catsparse.text_stream import TextStream


def play(story: Callable[[Turns, list[str]], Awaitable[None]]) -> list[str]:
    said: list[str] = []

    def switch(dense: bool) -> None:
        said.append("dense" if dense else "sparse")

    asyncio.run(story(Turns(switch), said))  # type: ignore[arg-type]
    return said


def test_turns_of_one_kind_run_together() -> None:
    async def story(turns: Turns, said: list[str]) -> None:
        async def one(name: str, dense: bool) -> None:
            async with turns.take(dense):
                said.append(f"+{name}")
                await asyncio.sleep(0.01)
                said.append(f"-{name}")

        await asyncio.gather(*(one(name, name.isupper()) for name in "abCDe"))

    # e is of a's kind, but came after C: it waits, or C might wait for ever.
    assert play(story) == (
        ["+a", "+b", "-a", "-b", "dense", "+C", "+D", "-C", "-D", "sparse", "+e", "-e"]
    )


def test_a_turn_that_is_given_up_keeps_nobody_waiting() -> None:
    """While it waits, while it runs, and at the very moment at which it is admitted."""

    async def story(turns: Turns, said: list[str]) -> None:
        async def one(dense: bool, seconds: float = 0.0) -> None:
            async with turns.take(dense):
                await asyncio.sleep(seconds)

        running = asyncio.create_task(one(False, 10))
        await asyncio.sleep(0)
        waiting = asyncio.create_task(one(True, 10))
        behind = asyncio.create_task(one(False))
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait_for(behind, 1)  # nothing of the other kind is before it any more
        admitted = asyncio.create_task(one(True, 10))
        await asyncio.sleep(0)
        running.cancel()
        await asyncio.sleep(0)  # its place is free, and taken
        admitted.cancel()
        await asyncio.gather(running, waiting, admitted, return_exceptions=True)
        await asyncio.wait_for(one(False), 1)
        assert turns._running == 0
        assert not turns._waiting

    assert play(story)[-1:] in (["sparse"], [])


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 4), st.booleans()), max_size=12))
def test_turns_never_mix(plan: list[tuple[bool, int, bool]]) -> None:
    async def story(turns: Turns, said: list[str]) -> None:
        inside: list[bool] = []

        async def one(dense: bool, steps: int) -> None:
            async with turns.take(dense):
                inside.append(dense)
                try:
                    for _ in range(steps):
                        await asyncio.sleep(0)
                        assert len(set(inside)) == 1
                        assert turns.dense == dense
                finally:
                    inside.remove(dense)

        tasks = []
        for dense, steps, cancel in plan:
            tasks.append(asyncio.create_task(one(dense, steps)))
            await asyncio.sleep(0)
            if cancel:
                tasks[len(tasks) // 2].cancel()
        done = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 5)
        assert not [one for one in done if isinstance(one, AssertionError)]
        assert turns._running == 0

    play(story)


@given(
    st.text("ab", max_size=24),
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    st.lists(st.integers(0, 24), max_size=6),
)
def test_a_cut_text_does_not_depend_on_its_pieces(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    ends = [text.find(stop) for stop in stops if stop in text]
    cut, places = _Cut(tuple(stops)), sorted({0, len(text), *(c for c in cuts if c < len(text))})
    got = "".join(cut.add(text[a:b]) for a, b in itertools.pairwise(places)) + cut.rest()
    if not ends:
        assert (got, cut.found) == (text, False)
    else:
        # The stop that is complete first ends it: a longer one may have begun before it.
        assert cut.found
        assert text.startswith(got)
        assert any(text.startswith(stop, len(got)) for stop in stops)


def test_nothing_of_a_stop_is_shown_early() -> None:
    cut = _Cut(("END",))
    assert [cut.add(piece) for piece in ("a", "bE", "N", "x", "EN", "D", "more")] == (
        ["a", "b", "", "ENx", "", "", ""]
    )
    assert cut.found


@given(st.text(max_size=30))
def test_streamed_text_is_the_whole_text(text: str) -> None:
    """Characters of several tokens, too."""
    tokenizer = serving.tokenizer()
    ids = tokenizer(text)["input_ids"]
    stream = TextStream(tokenizer)
    pieces = [stream.add([one]) for one in ids] + [stream.rest()]
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True)


def test_prompts_without_a_template() -> None:
    turns = [
        {"role": "system", "content": "A.\n\n"},
        {"role": "user", "content": " b "},
        {"role": "assistant", "content": "c"},
        {"role": "user", "content": "d"},
    ]
    assert plain_text(turns) == "A.\n b c\nd"
    tokenizer = serving.tokenizer()
    assert encode_turns(tokenizer, turns) == tokenizer("A.\n b c\nd")["input_ids"]


@pytest.mark.parametrize(
    ("host", "local"),
    [
        ("127.0.0.1", True),
        ("127.1.2.3", True),
        ("localhost", True),
        ("::1", True),
        ("0.0.0.0", False),
        ("::", False),
        ("192.168.0.1", False),
        ("localhost.example", False),
    ],
)
def test_which_addresses_are_this_machine(host: str, local: bool) -> None:
    assert Settings("m", host=host).is_local is local


def test_the_cache_holds_a_batch_or_what_there_is_room_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny.build(tiny.llama_config())  # a context of 128, 4 pages
    blocks, context = batching._cache_size(model, 16)
    assert (blocks, context) == (16 * 4 + 16, 128)
    page = 2 * 2 * 2 * 8 * 4 * batching.PAGE  # k and v, layers, heads, width, bytes
    monkeypatch.setattr(batching, "_free_bytes", lambda device: int(5.1 * page / 0.4))
    assert batching._cache_size(model, 16) == (5, 96)
    monkeypatch.setattr(batching, "_free_bytes", lambda device: 3 * page)
    with pytest.raises(CatsparseError, match="no memory left"):
        batching._cache_size(model, 16)


def test_a_sampler_goes_on_after_another_worker() -> None:
    """Which may have got further, or takes the text so far for its prompt."""
    seen: list[list[int]] = []

    def processors(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        seen.append(ids[0].tolist())
        return scores

    model: Any = SimpleNamespace(
        device=torch.device("cpu"), _get_logits_processor=lambda *args, **options: processors
    )
    sampler = Sampler(model, SimpleNamespace(do_sample=False), 2, 4, None)
    scores = torch.zeros(1, 8)
    for prompt, new in (([5, 6], []), ([5, 6], [1]), ([5, 6], [1, 2]), ([5, 6, 1], []),
                        ([5, 6, 1], [3]), ([5, 6, 1], [3, 4])):  # fmt: skip
        sampler.choose(prompt, new, scores)
        assert seen[-1] == prompt + new
