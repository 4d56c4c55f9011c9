"""Log-likelihoods against a plain loop, and the split of texts into tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from catsparse import CatsparseError, hub
from catsparse.tasks.scoring import (
    Batch,
    Score,
    context_window,
    count_tokens,
    encode_pairs,
    is_truncated,
    loglikelihoods,
)
from letters import Letters
from tiny import build, llama_config

WINDOW = 128


@torch.no_grad()
def by_plain_loop(model: Any, pairs: Any, window: int = WINDOW) -> list[Score]:
    """One pair, then one token at a time, each from a forward pass of its own."""
    scores = []
    for context, continuation in pairs:
        logprob, greedy = 0.0, True
        ids = list(context)
        for token in continuation:
            seen = ids[-window:] if len(ids) > window else ids
            row = model(input_ids=torch.tensor([seen]), use_cache=False).logits[0, -1].double()
            logprob += float(row.log_softmax(-1)[token])
            greedy &= int(row.argmax()) == token
            ids.append(token)
        scores.append(Score(logprob, greedy))
    return scores


def random_pairs(count: int = 23, longest: int = 12) -> list[tuple[list[int], list[int]]]:
    generator = torch.Generator().manual_seed(4)

    def some(most: int) -> list[int]:
        length = int(torch.randint(1, most, (), generator=generator))
        return torch.randint(3, 64, (length,), generator=generator).tolist()

    return [(some(longest), some(6)) for _ in range(count)]


@pytest.mark.parametrize("batch", [Batch(rows=1), Batch(rows=3), Batch(tokens=20), Batch(1000)])
def test_scores_are_those_of_a_plain_loop(llama: Any, batch: Batch) -> None:
    pairs = random_pairs()
    found = loglikelihoods(llama, pairs, WINDOW, batch)
    for mine, expected in zip(found, by_plain_loop(llama, pairs), strict=True):
        assert mine.logprob == pytest.approx(expected.logprob, rel=1e-4)
        assert mine.greedy == expected.greedy


def test_greedy_is_what_the_model_would_write(llama: Any) -> None:
    context = [5, 9, 20]
    written = llama.generate(torch.tensor([context]), max_new_tokens=4, do_sample=False)[0, 3:]
    right = written.tolist()
    wrong = [*right[:-1], (right[-1] + 1) % 64]
    pairs = [(context, right), (context, wrong), (context, right[:2])]
    found = loglikelihoods(llama, pairs, WINDOW, Batch(rows=2))
    assert [score.greedy for score in found] == [True, False, True]


def test_equal_inputs_run_once(llama: Any) -> None:
    """Two choices of one token after the same context; also cut at different places."""
    pairs = [([4, 5, 6], [7]), ([4, 5, 6], [8]), ([4, 5], [6, 9]), ([4, 5], [7])]
    sizes = []
    llama.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(tuple(kwargs["input_ids"].shape)),
        with_kwargs=True,
    )
    found = loglikelihoods(llama, pairs, WINDOW, Batch(tokens=100))
    assert sizes == [(1, 3), (1, 2)]
    assert count_tokens(pairs, WINDOW) == 5
    for mine, expected in zip(found, by_plain_loop(llama, pairs), strict=True):
        assert mine.logprob == pytest.approx(expected.logprob, rel=1e-4)


def test_batches_hold_equal_lengths_the_longest_first(llama: Any) -> None:
    pairs, sizes, told = random_pairs(60), [], []
    llama.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(tuple(kwargs["input_ids"].shape)),
        with_kwargs=True,
    )
    loglikelihoods(llama, pairs, WINDOW, Batch(tokens=24), told.append)
    assert [length for _, length in sizes] == sorted((n for _, n in sizes), reverse=True)
    assert all(rows == 1 or rows * length <= 24 for rows, length in sizes)
    assert told == [rows * length for rows, length in sizes]
    assert sum(told) == count_tokens(pairs, WINDOW)


def test_a_model_that_gives_all_logits(llama: Any) -> None:
    """As wrappers do that hide ``logits_to_keep``."""

    class Wrapped(torch.nn.Module):
        device = torch.device("cpu")

        def forward(self, **kwargs: Any) -> Any:
            return llama(**kwargs)

    pairs = random_pairs()
    expected = loglikelihoods(llama, pairs, WINDOW, Batch(rows=4))
    for one, other in zip(
        loglikelihoods(Wrapped(), pairs, WINDOW, Batch(rows=4)), expected, strict=True
    ):
        assert one.logprob == pytest.approx(other.logprob, rel=1e-5)


def test_bf16_logits_are_scored_in_fp32(llama: Any) -> None:
    pairs = [(context, rest[:1]) for context, rest in random_pairs()]
    found = loglikelihoods(llama.bfloat16(), pairs, WINDOW, Batch(rows=4))
    values = torch.tensor([score.logprob for score in found], dtype=torch.float64)
    assert not torch.equal(values.bfloat16().double(), values)


def test_what_is_too_long_loses_its_beginning() -> None:
    model = build(llama_config())
    long = torch.randint(3, 64, (40,)).tolist()
    for window in (8, 16):
        pairs = [(long, [5, 6, 7]), (long[: window - 2], [5, 6, 7]), (long[: window - 1], [5] * 3)]
        found = loglikelihoods(model, pairs, window, Batch(rows=2))
        # The last `window` tokens before the final one.
        inputs = [([*c, *k][-(window + 1) :][: -len(k)], k) for c, k in pairs]
        for mine, expected in zip(found, by_plain_loop(model, inputs, 1000), strict=True):
            assert mine.logprob == pytest.approx(expected.logprob, rel=1e-4)
        assert [is_truncated(pair, window) for pair in pairs] == [True, False, True]


def test_a_continuation_longer_than_the_window(llama: Any) -> None:
    with pytest.raises(CatsparseError, match=r"9 tokens .* window, 8"):
        loglikelihoods(llama, [([4], [5] * 9)], 8, Batch(rows=1))
    assert len(loglikelihoods(llama, [([4], [5] * 8)], 8, Batch(rows=1))) == 1


def test_logits_that_are_not_finite(llama: Any) -> None:
    with torch.no_grad():
        llama.lm_head.weight[7] = torch.nan
    with pytest.raises(CatsparseError, match="not finite"):
        loglikelihoods(llama, random_pairs(3), WINDOW, Batch(rows=1))


def test_nothing_to_score(llama: Any) -> None:
    assert loglikelihoods(llama, [], WINDOW, Batch(rows=1)) == []


# -- texts into tokens


def test_the_whole_text_is_encoded_and_cut() -> None:
    """``ab`` + ``bc`` has the double letter ``bb``, which belongs to neither part."""
    tokenizer = Letters()
    whole = tokenizer.encode("abbcd")
    assert len(whole) == 4
    assert encode_pairs([("ab", "bcd")], tokenizer) == [(tokenizer.encode("ab"), whole[2:])]


def test_spaces_at_the_end_of_the_context_move() -> None:
    tokenizer = Letters()
    expected = (tokenizer.encode("ab"), tokenizer.encode(" cd"))
    assert encode_pairs([("ab ", "cd"), ("ab", " cd")], tokenizer) == [expected, expected]


def test_special_tokens_are_the_tokenizers_own() -> None:
    [(context, continuation)] = encode_pairs([("ab", "cd")], Letters(begins=True))
    assert context == [1, *Letters().encode("ab")]
    assert continuation == Letters().encode("cd")


def test_a_text_that_begins_with_the_special_token_gets_no_second() -> None:
    [(context, continuation)] = encode_pairs([("<s>ab", "cd")], Letters(begins=True))
    assert context == [1, *Letters().encode("ab")]
    assert continuation == Letters().encode("cd")


@pytest.mark.parametrize("begins", [False, True])
def test_an_empty_context_is_the_first_special_token(begins: bool) -> None:
    tokenizer = Letters(begins)
    assert encode_pairs([("", "abc")], tokenizer) == [([1], Letters().encode("abc"))]
    assert encode_pairs([("", "<s>abc")], tokenizer) == [([1], Letters().encode("abc"))]
    tokenizer.bos_token_id = None
    assert encode_pairs([("", "abc")], tokenizer) == [([2], Letters().encode("abc"))]
    tokenizer.eos_token_id = None
    with pytest.raises(CatsparseError, match="neither a bos nor an eos"):
        encode_pairs([("", "abc")], tokenizer)


@pytest.mark.parametrize("pair", [("a", "a"), ("", "")])
def test_a_continuation_without_a_token_of_its_own(pair: tuple[str, str]) -> None:
    with pytest.raises(CatsparseError, match="nothing to score"):
        encode_pairs([pair], Letters())


def test_the_bundled_tokenizer() -> None:
    tokenizer = hub.load_tokenizer("default")
    pairs = [("The door", " opened, and"), ("The door ", "opened, and"), ("The", " door")]
    for (context, continuation), (start, rest) in zip(
        pairs, encode_pairs(pairs, tokenizer), strict=True
    ):
        whole = tokenizer.encode(context.rstrip() + " " + continuation.lstrip())
        assert start == tokenizer.encode(context.rstrip())
        assert start + rest == whole


@pytest.mark.parametrize(
    ("config", "limit", "window"),
    [
        ({"max_position_embeddings": 77}, 50, 77),
        ({"n_positions": 33, "max_position_embeddings": 77}, 50, 33),
        ({"text_config": {"max_position_embeddings": 44}, "max_position_embeddings": 9}, 50, 44),
        ({}, 50, 50),
        ({}, 10**30, 2048),
        ({}, None, 2048),
    ],
)
def test_context_window(config: dict[str, Any], limit: int | None, window: int) -> None:
    def named(values: dict[str, Any]) -> Any:
        return type(
            "Config", (), {k: named(v) if k == "text_config" else v for k, v in values.items()}
        )

    model = type("Model", (), {"config": named(config)})
    tokenizer = type("Tokenizer", (), {"model_max_length": limit})
    assert context_window(model, tokenizer) == window
