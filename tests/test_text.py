"""Text generation: what is shown is what was generated, its times, and what is dropped on it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import catsparse
import tiny
from catsparse import achieved_sparsity, hub, set_backend
from catsparse.dropped import measure
from catsparse.kernels.cpu import cpu_library
from catsparse.text import TextGenerator, Written, _Stream

PROMPT = "The captain looked"


@pytest.fixture(scope="module")
def bundled() -> tuple[Any, Any]:
    return hub.load_dense_model("default"), hub.load_tokenizer("default")


def test_the_text_is_what_generate_gives(bundled: tuple[Any, Any]) -> None:
    model, tokenizer = bundled
    shown: list[str] = []
    written = TextGenerator(model, tokenizer, 12, greedy=True).write(PROMPT, shown.append)
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    expected = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False,
        temperature=None, top_p=None,
    )  # fmt: skip
    assert torch.equal(written.ids, expected[0])
    assert written.prompt_tokens == ids.shape[1]
    assert written.tokens == len(written.times) == 12
    assert written.text == tokenizer.decode(expected[0, ids.shape[1] :])
    assert "".join(shown) == written.text
    assert len(shown) > 6  # as it comes
    assert 0 < written.times[0] < written.times[-1] <= written.seconds
    assert not written.interrupted


def test_the_seed_decides(bundled: tuple[Any, Any]) -> None:
    one, same, other = (
        TextGenerator(*bundled, 12, temperature=1.0, seed=s).write(PROMPT).text for s in (3, 3, 4)
    )
    assert one == same != other


def test_rates_by_hand() -> None:
    written = Written("", torch.zeros(9), 5, 4.0, (2.0, 3.0, 3.25, 3.5))
    assert written.tokens == 4
    assert written.tokens_per_second == 1.0
    assert written.seconds_to_first_token == 2.0
    assert written.decode_tokens_per_second == 4.0  # from the second token on
    two = Written("", torch.zeros(7), 5, 4.0, (2.0, 3.0))
    assert two.decode_tokens_per_second is None
    assert Written("", torch.zeros(5), 5, 4.0, ()).seconds_to_first_token is None


def stream(decode: Any, prompt: list[int], new: list[int]) -> tuple[_Stream, list[str]]:
    shown: list[str] = []
    one = _Stream(SimpleNamespace(decode=decode), prompt, shown.append)
    one.put(torch.tensor([prompt]))
    for token in new:
        one.put(torch.tensor([token]))
    return one, shown


def from_bytes(ids: list[int], skip_special_tokens: bool) -> str:
    assert skip_special_tokens
    return bytes(ids).decode("utf-8", errors="replace")


def test_characters_are_shown_whole() -> None:
    prompt, text = list("ä, ".encode()), "😀 naïve 漢字 and more"
    one, shown = stream(from_bytes, prompt, list(text.encode()))
    assert shown == list(text)
    cut, shown = stream(from_bytes, prompt, list("né".encode())[:-1])
    assert shown == ["n"]
    cut.flush()
    assert shown == cut.pieces == ["n", "\ufffd"]
    assert len(one.ids) == len(prompt) + len(one.times) == len(("ä, " + text).encode())


def test_spaces_of_a_tokenizer_that_strips_them() -> None:
    """Sentencepiece decodes the first token without its space."""

    def words(ids: list[int], skip_special_tokens: bool) -> str:
        return "".join(f" w{i}" for i in ids)[1:]

    _, shown = stream(words, list(range(3)), list(range(3, 20)))
    assert shown == [f" w{i}" for i in range(3, 20)]


def test_several_tokens_at_once() -> None:
    one, shown = stream(from_bytes, [65], [])
    one.put(torch.tensor([66, 67]))
    assert (shown, len(one.times), one.ids) == (["BC"], 2, [65, 66, 67])


def test_ctrl_c_is_raised_or_keeps_the_part(bundled: tuple[Any, Any]) -> None:
    writer = TextGenerator(*bundled, 12, greedy=True)
    ids = bundled[1](PROMPT, return_tensors="pt")["input_ids"]
    whole = writer.write_ids(ids)
    shown: list[str] = []

    def show(text: str) -> None:
        shown.append(text)
        if len(shown) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        writer.write_ids(ids, show)
    shown.clear()
    part = writer.write_ids(ids, show, keep_partial=True)
    assert part.interrupted
    assert part.text == "".join(shown)
    assert 0 < part.tokens < whole.tokens
    assert torch.equal(part.ids, whole.ids[: len(part.ids)])


@pytest.mark.parametrize("prefill", ["masked", "dense"])
def test_measure_counts_every_token(
    llama: Any, calibration: catsparse.Calibration, prefill: str
) -> None:
    ids = tiny.tokens(1, tiny.LONG, seed=3)
    catsparse.sparsify(llama, calibration, 0.6)
    with achieved_sparsity(llama) as meter:
        tiny.logits(llama)
    catsparse.sparsify(catsparse.densify(llama), calibration, 0.6, prefill=prefill)
    dropped = measure(llama, ids[0])
    assert dropped.sparsity == pytest.approx(meter.sparsity)
    assert [dropped.lowest, dropped.highest] == pytest.approx(sorted(meter.sites.values()))
    assert dropped.lowest < dropped.highest


def test_measured_bytes_are_those_of_the_path(sparse_llama: Any) -> None:
    ids: Tensor = tiny.tokens(1, tiny.LONG)[0]
    set_backend(sparse_llama, "torch")
    assert measure(sparse_llama, ids).bytes_skipped == 0
    if cpu_library().handle is None:
        pytest.skip("no C compiler")
    set_backend(sparse_llama, "c")
    dropped = measure(sparse_llama, ids)
    assert dropped.bytes_skipped == pytest.approx(2 / 3 * dropped.sparsity)
    set_backend(sparse_llama, "c", down_copy=False)
    assert measure(sparse_llama, ids).bytes_skipped == pytest.approx(dropped.bytes_skipped / 2)


def test_measured_bytes_with_preview_and_second_decision(llama: Any, windows: Tensor) -> None:
    calibration = catsparse.calibrate(llama, windows, preview=4, products_at=0.4, progress=False)
    sparse = catsparse.sparsify(llama, calibration, 0.4, down_sparsity=0.6)
    ids: Tensor = tiny.tokens(1, tiny.LONG)[0]
    set_backend(sparse, "torch")
    assert measure(sparse, ids).bytes_skipped == 0
    if cpu_library().handle is None:
        pytest.skip("no C compiler")
    set_backend(sparse, "c")
    both = measure(sparse, ids)
    set_backend(sparse, "c", down_copy=False)
    up = measure(sparse, ids)
    preview = 48 / (3 * 32 * 4)  # bytes a neuron, of fp32 weights of H = 32
    assert up.bytes_skipped == pytest.approx(2 / 3 * up.sparsity - preview)
    assert both.bytes_skipped > up.bytes_skipped + both.sparsity / 3 + 0.03


def test_measured_bytes_of_method_product(llama: Any, windows: Tensor) -> None:
    sparse = catsparse.sparsify(llama, catsparse.calibrate(llama, windows, preview=4), 0.6)
    ids: Tensor = tiny.tokens(1, tiny.LONG)[0]
    if cpu_library().handle is None:
        pytest.skip("no C compiler")
    set_backend(sparse, "c")
    previews = 2 * 48 / (3 * 32 * 4)
    found = measure(sparse, ids)
    assert found.bytes_skipped == pytest.approx(found.sparsity - previews)
    set_backend(sparse, "c", down_copy=False)
    found = measure(sparse, ids)
    assert found.bytes_skipped == pytest.approx(found.sparsity * 2 / 3 - previews)
