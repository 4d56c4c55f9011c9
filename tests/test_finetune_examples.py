"""Text and conversations as sequences to train on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from catsparse import CatsparseError, hub
from catsparse.finetune import Example, Examples, chat_example, load_examples, windows_as_examples
from catsparse.finetune.examples import IGNORED, collate
from test_hub import one_line

# As ChatML writes turns; the second marks what the assistant generates.
PLAIN = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
MARKED = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content }}</assistant>{% endgeneration %}{% else %}{{ m.content }}</{{ m.role }}>"
    "{% endif %}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
# What an assistant thought is left out of earlier turns, as reasoning models' templates do.
FORGETFUL = (
    "{% for m in messages %}<{{ m.role }}>"
    "{{ m.content if loop.last else m.content.split('|')[-1] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
REFUSING = "{{ raise_exception('roles must alternate') }}"
TALK = [
    {"role": "user", "content": "What is the sea?"},
    {"role": "assistant", "content": "Water, and much of it."},
    {"role": "user", "content": "And the shore?"},
    {"role": "assistant", "content": "Where it ends."},
]


@pytest.fixture
def tokenizer() -> Any:
    tokenizer = hub.load_tokenizer("default")
    tokenizer.chat_template = PLAIN
    return tokenizer


def counted(tokenizer: Any, example: Example) -> str:
    return tokenizer.decode(example.ids[example.labels != IGNORED])


@pytest.mark.parametrize("template", [PLAIN, MARKED], ids=["by turns", "marked"])
def test_only_answers_count(tokenizer: Any, template: str) -> None:
    tokenizer.chat_template = template
    example = chat_example(tokenizer, TALK, "here")
    written = tokenizer.apply_chat_template(TALK, tokenize=False)
    assert tokenizer.decode(example.ids) == written
    told = counted(tokenizer, example)
    assert "Water, and much of it.</assistant>" in told
    assert "Where it ends.</assistant>" in told
    assert "sea" not in told
    assert "shore" not in told
    assert "<assistant>" not in told
    kept = example.labels != IGNORED
    assert torch.equal(example.labels[kept], example.ids[kept])


def test_a_conversation_that_the_assistant_begins(tokenizer: Any) -> None:
    example = chat_example(tokenizer, TALK[1:3], "here")
    assert "Water" in counted(tokenizer, example)
    assert "shore" not in counted(tokenizer, example)


BAD = [
    (None, "must be a list"),
    ([], "must be a list"),
    ("text", "must be a list"),
    ([{"role": "user"}], "must be a list"),
    ([{"role": "user", "content": [{"type": "image"}]}], "must be a list"),
    (TALK[:1], "no answer"),
]


@pytest.mark.parametrize(("messages", "match"), BAD, ids=[m for _, m in BAD])
def test_bad_messages(tokenizer: Any, messages: object, match: str) -> None:
    with pytest.raises(CatsparseError, match=match) as caught:
        chat_example(tokenizer, messages, "talks.jsonl, line 3")
    assert "talks.jsonl, line 3" in one_line(caught.value)


def test_templates_that_cannot_be_used(tokenizer: Any) -> None:
    tokenizer.chat_template = REFUSING
    with pytest.raises(CatsparseError, match="roles must alternate") as caught:
        chat_example(tokenizer, TALK, "line 1")
    one_line(caught.value)
    tokenizer.chat_template = FORGETFUL
    thinking = [*TALK[:1], {"role": "assistant", "content": "Hm.|Water."}, *TALK[2:]]
    with pytest.raises(CatsparseError, match=r"turn 2 otherwise .*generation") as caught:
        chat_example(tokenizer, thinking, "line 1")
    one_line(caught.value)


def write(path: Path, *rows: object) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def load(source: str, tokenizer: Any, **changes: Any) -> Examples:
    given: dict[str, Any] = {"tokens": 200, "seq_len": 64, "seed": 0, "column": "text"}
    return load_examples(source, tokenizer, **(given | changes))


def test_a_table_with_messages_is_conversations(tokenizer: Any, tmp_path: Path) -> None:
    source = write(tmp_path / "talks.jsonl", {"messages": TALK[:2]}, {"messages": TALK[2:]})
    examples = load(source, tokenizer)
    assert examples.table
    assert len(examples) == 2
    assert "Water" in counted(tokenizer, examples[0])
    assert "ends" in counted(tokenizer, examples[1])
    # As many as are asked for, whole.
    assert len(load(source, tokenizer, tokens=5)) == 1


def test_parquet_with_messages(tokenizer: Any, tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    table = pa.Table.from_pylist([{"messages": TALK[:2]}, {"messages": TALK[2:]}])
    pyarrow.parquet.write_table(table, tmp_path / "talks.parquet")
    examples = load(str(tmp_path / "talks.parquet"), tokenizer)
    assert [len(e.ids) for e in examples] == [
        len(chat_example(tokenizer, t, "").ids) for t in (TALK[:2], TALK[2:])
    ]


def test_a_text_column_goes_before_messages(tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"text": "The sea is wide. " * 30, "messages": TALK[:2]}] * 3
    source = write(tmp_path / "both.jsonl", *rows)
    assert not load(source, tokenizer).table
    assert load(source, tokenizer, column="messages").table


def test_text_is_windows_in_which_every_token_counts(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("The sea is wide, and the shore is far. " * 40)
    examples = load(str(tmp_path / "a.txt"), tokenizer)
    assert not examples.table
    assert [len(e.ids) for e in examples] == [64, 64, 64]
    assert all(torch.equal(e.ids, e.labels) for e in examples)
    assert torch.equal(examples.windows()[1], examples[1].ids)


def refused(match: str, source: str, tokenizer: Any, **changes: Any) -> None:
    with pytest.raises(CatsparseError, match=match) as caught:
        load(source, tokenizer, **changes)
    one_line(caught.value)


def test_bad_data(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    refused("holds 0 tokens", str(tmp_path / "empty.txt"), tokenizer)
    (tmp_path / "empty.jsonl").write_text("\n")
    refused("holds no row", str(tmp_path / "empty.jsonl"), tokenizer)
    source = write(tmp_path / "other.jsonl", {"body": "text"})
    refused("has no column 'text'", source, tokenizer)
    source = write(tmp_path / "mixed.jsonl", {"messages": TALK[:2]}, {"text": "no talk"})
    refused("line 2 has no column 'messages'", source, tokenizer)
    source = write(tmp_path / "list.jsonl", [1, 2])
    refused("no JSON object", source, tokenizer)
    refused("there is no file", str(tmp_path / "none.jsonl"), tokenizer)


def test_a_conversation_longer_than_the_context(tokenizer: Any, tmp_path: Path) -> None:
    long = [TALK[0], {"role": "assistant", "content": "Water. " * 90}]
    source = write(tmp_path / "talks.jsonl", {"messages": TALK[:2]}, {"messages": long})
    refused(r"line 2 has \d+ tokens, more than the 64", source, tokenizer)
    assert len(load(source, tokenizer, seq_len=1000, tokens=1000)) == 2


def test_no_chat_template(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.chat_template = None
    refused("no chat template", write(tmp_path / "t.jsonl", {"messages": TALK}), tokenizer)


def test_collating_pads_at_the_end() -> None:
    one = Example(torch.tensor([5, 6, 7]), torch.tensor([IGNORED, 6, 7]))
    other = Example(torch.tensor([8, 9]), torch.tensor([8, 9]))
    batch = collate([one, other])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 0]]
    assert batch["labels"].tolist() == [[IGNORED, 6, 7], [IGNORED, 9, IGNORED]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert "attention_mask" not in collate([one, one])


def test_parts() -> None:
    examples = windows_as_examples(torch.arange(30).view(5, 6), "numbers")
    train, heldout = examples.split(2)
    assert (len(train), len(heldout), train.tokens) == (3, 2, 18)
    assert torch.equal(heldout.windows(), torch.arange(18, 30).view(2, 6))
    assert [len(examples.first(n)) for n in (1, 6, 7, 999)] == [1, 1, 2, 5]
    assert [b["input_ids"].shape[0] for b in examples.batches(2)] == [2, 2, 1]
    assert "labels" not in examples.batches(2)[0]
    with pytest.raises(CatsparseError, match="too few to hold 5"):
        examples.split(5)
