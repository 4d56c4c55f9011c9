"""Conversations, and ``catsparse chat`` with its input from a pipe."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import catsparse
from catsparse import CatsparseError, cli, hub
from catsparse import chat as chat_module
from catsparse.chat import Chat
from catsparse.data import load_windows
from catsparse.dropped import measure
from catsparse.text import TextGenerator

COMMAND = sys.modules["catsparse.cli.chat"]  # by that name the package holds the function
ONE, TWO = "The captain looked", "Then he said"
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
STRICT = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('No system.') }}{% endif %}x"

Make = Callable[..., Chat]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def sparse() -> Any:
    """The bundled model at 50%."""
    model, tokenizer = hub.load_dense_model("default"), hub.load_tokenizer("default")
    windows = load_windows(hub.bundled_text("calibration"), tokenizer, tokens=4096, seq_len=256)
    return catsparse.sparsify(model, catsparse.calibrate(model, windows, progress=False))


@pytest.fixture(scope="module")
def artifact(sparse: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat") / "half"
    catsparse.save(sparse, folder)
    return folder


@pytest.fixture
def make(sparse: Any) -> Make:
    """A chat with the sparse model, greedy."""

    def build(tokens: int = 6, system: str | None = None, template: str | None = None) -> Chat:
        tokenizer = hub.load_tokenizer("default")
        tokenizer.chat_template = template
        return Chat(TextGenerator(sparse, tokenizer, tokens, greedy=True), system)

    return build


def prompt_of(chat: Chat, answer: chat_module.Answer) -> str:
    return str(chat.writer.tokenizer.decode(answer.written.ids[: answer.written.prompt_tokens]))


def roles(chat: Chat) -> list[str]:
    return [turn["role"] for turn in chat.messages]


def test_plain_conversation_grows(make: Make) -> None:
    chat = make(system="A tale.")
    shown: list[str] = []
    first = chat.say(ONE, shown.append)
    assert "".join(shown) == first.text != ""
    assert prompt_of(chat, first) == f"A tale.\n{ONE}"
    context = chat.context
    assert context == len(first.written.ids)
    second = chat.say(TWO)
    assert prompt_of(chat, second) == f"A tale.\n{ONE}{first.text}\n{TWO}"
    assert chat.context > context
    assert roles(chat) == ["system", "user", "assistant", "user", "assistant"]
    assert chat.messages[-1]["content"] == second.text


def test_template_is_used(make: Make) -> None:
    chat = make(system="Be brief.", template=TEMPLATE)
    first, second = chat.say(ONE), chat.say(TWO)
    assert first.text == first.text.strip()
    assert prompt_of(chat, second) == (
        f"<system>Be brief.</><user>{ONE}</><assistant>{first.text}</><user>{TWO}</><assistant>"
    )


def test_clear_forgets_all_but_the_system_text(make: Make) -> None:
    chat = make(system="A tale.")
    first = chat.say(ONE)
    chat.say(TWO)
    chat.clear()
    assert (roles(chat), chat.context) == (["system"], 0)
    assert torch.equal(chat.say(ONE).written.ids, first.written.ids)


def test_dense_and_sparse_answers(make: Make, sparse: Any) -> None:
    chat = make(tokens=30)
    half = chat.say(ONE)
    chat.clear()
    chat.dense = True
    dense = chat.say(ONE)
    assert dense.dropped is None
    plain = TextGenerator(hub.load_dense_model("default"), chat.writer.tokenizer, 30, greedy=True)
    assert dense.text == plain.write(ONE).text != half.text
    chat.clear()
    chat.dense = False
    assert chat.say(ONE).text == half.text


def test_dropped_is_counted_on_the_conversation(make: Make, sparse: Any) -> None:
    chat = make()
    chat.say(ONE)
    answer = chat.say(TWO)
    assert answer.dropped == measure(sparse, answer.written.ids)
    assert answer.dropped is not None
    assert 0.3 < answer.dropped.lowest < answer.dropped.sparsity < answer.dropped.highest < 0.7


def test_the_count_does_not_run_while_the_answer_is_written(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    monkeypatch.setattr(chat_module, "measure", lambda *args: order.append("count"))
    make().say(ONE, order.append)
    assert order.index("count") == len(order) - 1 > 0


def interrupt_after(pieces: int) -> Callable[[str], None]:
    seen: list[str] = []

    def show(text: str) -> None:
        seen.append(text)
        if len(seen) == pieces:
            raise KeyboardInterrupt

    return show


def test_ctrl_c_keeps_the_part(make: Make) -> None:
    chat = make(tokens=20)
    whole = chat.say(ONE).text
    chat.clear()
    answer = chat.say(ONE, interrupt_after(3))
    assert answer.written.interrupted
    assert whole.startswith(answer.text)
    assert 0 < len(answer.text) < len(whole)
    assert chat.messages[-1] == {"role": "assistant", "content": answer.text}
    assert answer.text in prompt_of(chat, chat.say(TWO))


def test_ctrl_c_before_the_first_token_keeps_nothing(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = make()
    chat.say(ONE)
    before, context = chat.messages, chat.context

    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("catsparse.text._generate", interrupted)
    answer = chat.say(TWO)
    assert (answer.written.tokens, answer.dropped) == (0, None)
    assert (chat.messages, chat.context) == (before, context)


def test_ctrl_c_during_the_count_keeps_the_answer(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(chat_module, "measure", interrupted)
    chat = make()
    answer = chat.say(ONE)
    assert answer.dropped is None
    assert not answer.written.interrupted
    assert len(chat.turns) == 2


def test_overflow_forgets_the_oldest_but_never_the_system_text(make: Make) -> None:
    chat = make(system="A tale.")
    chat.limit = 60
    kept: list[list[str]] = []
    forgotten = []
    for number in range(6):
        answer = chat.say(f"{number}: the captain looked at the sea")
        forgotten.append(answer.forgotten)
        assert chat.context <= 60
        assert prompt_of(chat, answer).startswith("A tale.\n")
        kept.append([t["content"][0] for t in chat.turns if t["role"] == "user"])
    assert forgotten[0] == 0
    assert set(forgotten) == {0, 2}
    assert kept[-1][-1] == "5"
    assert kept[-1] == [str(n) for n in range(6 - len(kept[-1]), 6)]  # the oldest went first
    assert len(kept[-1]) < 6
    assert chat.messages[0]["role"] == "system"


def test_a_long_message_gets_a_shorter_answer_or_none(make: Make) -> None:
    chat = make(tokens=20)
    chat.say(ONE)
    before = chat.messages
    long = " the sea" * 20
    length = len(chat.writer.tokenizer(long)["input_ids"])
    chat.limit = length
    with pytest.raises(CatsparseError, match="send less"):
        chat.say(long)
    assert chat.messages == before
    chat.limit = length + 3
    answer = chat.say(long)
    assert (answer.written.tokens, answer.forgotten) == (3, 2)


def test_what_cannot_work_is_refused_at_once(make: Make) -> None:
    with pytest.raises(CatsparseError, match="--tokens"):
        make(tokens=512)
    with pytest.raises(CatsparseError, match="leave out --system"):
        make(system="Be brief.", template=STRICT)
    with pytest.raises(CatsparseError, match="send less"):
        make(system="word " * 600)
    with pytest.raises(CatsparseError, match="empty"):
        make().say("  ")


@pytest.fixture
def run(artifact: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Exit code, stdout and stderr of ``catsparse chat`` with these lines as its input."""

    def start(lines: list[str], *options: str, model: str | None = None) -> tuple[int, str, str]:
        arguments = ["catsparse", "chat", model or str(artifact), "--greedy", "-n", "5", *options]
        monkeypatch.setattr(sys, "argv", arguments)
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        with pytest.raises(SystemExit) as stop:
            cli.main()
        captured = capsys.readouterr()
        return int(stop.value.code or 0), captured.out, captured.err

    return start


def test_json_lines(run: Run, make: Make) -> None:
    code, text, error = run([ONE, "", "/clear", ONE, "/dense", TWO], "--json")
    assert code == 0
    rows = [json.loads(line) for line in text.splitlines()]
    assert [set(row) for row in rows] == [
        {"text", "tokens", "tokens_per_second", "seconds_to_first_token", "sparsity"}
        | {"bytes_skipped", "context", "context_limit"}
    ] * 3
    assert rows[0]["text"] == rows[1]["text"] == make(tokens=5).say(ONE).text
    assert rows[0]["context"] == rows[1]["context"] < rows[2]["context"]
    assert rows[0]["tokens"] == 5
    assert rows[0]["context_limit"] == 512
    assert rows[0]["tokens_per_second"] > 0
    assert 0.3 < rows[0]["sparsity"] < 0.7
    assert rows[2]["sparsity"] is None
    assert error.count("no chat template") == 1


def test_piped_text_and_notes(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    code, text, error = run([ONE, "/stats", f"/save {file}", "/help", "/exit", TWO])
    assert code == 0
    saved = json.loads(file.read_text())["messages"]
    assert [turn["role"] for turn in saved] == ["user", "assistant"]
    assert text == saved[1]["content"] + "\n"
    assert "\x1b" not in text + error
    for part in ("5 tokens, ", "tokens/s, the first after ", "context ", "of 512, "):
        assert part in error
    assert error.count(" dropped, ") == 2  # the status and /stats
    assert "decode " in error
    assert "/save FILE" in error


def test_a_slash_after_a_space_is_a_message(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    code, _, _ = run([" /clear", f"/save {file}"])
    assert code == 0
    assert json.loads(file.read_text())["messages"][0]["content"] == " /clear"


def test_forgetting_is_said_once(run: Run) -> None:
    lines = [("the sea " * 60).strip()] * 8
    code, _, error = run(lines)
    assert code == 0
    assert error.count("forgotten from now on") == 1


def test_ctrl_c_in_a_pipe_ends_it(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(COMMAND, "_show", interrupt_after(2))
    code, _, error = run([ONE, TWO])
    assert code == 130
    assert error.count("(stopped)") == 1


def test_in_a_terminal_errors_and_ctrl_c_go_on(
    run: Run, monkeypatch: pytest.MonkeyPatch, artifact: Path
) -> None:
    monkeypatch.setattr(COMMAND, "_show", interrupt_after(2))
    lines = iter([ONE, "/nonsense", KeyboardInterrupt, TWO, EOFError])

    def typed(prompt: str) -> str:
        line = next(lines)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("builtins.input", typed)
    monkeypatch.setattr(COMMAND, "_is_terminal", lambda: True)
    code, _, error = run([])
    assert code == 0
    assert error.count("(stopped)") == 1
    assert error.count("tokens/s") + error.count("the first after") >= 2
    assert "there is no command /nonsense" in error
    assert "Ctrl-D or /exit leaves" in error


@pytest.mark.parametrize(
    ("lines", "options", "says"),
    [
        ([], ["--temperature", "0"], "--greedy"),
        ([], ["--top-p", "2"], "top-p"),
        ([], ["-n", "512"], "--tokens"),
        ([], ["--system", "word " * 600], "send less"),
        ([], ["--device", "nowhere"], "device"),
        (["/nonsense"], [], "/help"),
        (["/clear all"], [], "/help"),
        (["/save"], [], "needs a file"),
        (["/save /proc/nowhere/at/all"], [], "name another file"),
        (["word " * 600], [], "send less"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_2(
    run: Run, lines: list[str], options: list[str], says: str
) -> None:
    code, text, error = run(lines, *options)
    assert (code, text) == (2, "")
    problems = [line for line in error.splitlines() if "no chat template" not in line]
    assert len(problems) == 1
    assert says in problems[0]


def test_a_dense_model_has_nothing_to_switch(run: Run) -> None:
    code, text, _ = run([ONE], "--json", model="default")
    assert (code, json.loads(text)["sparsity"]) == (0, None)
    code, _, error = run(["/sparse"], model="default")
    assert code == 2
    assert "made by sparsify" in error
