"""Text as it grows: never taken back, whole characters, stop strings."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvplane_runtime.ring.tokens import HuggingFaceTokenizer, TemplateError, TextStream, stop_ids
from tests.ring.bytes_tokenizer import BytesTokenizer

TOKENIZER = BytesTokenizer()


def streamed(text: str, stop: Sequence[str] = ()) -> tuple[str, bool]:
    stream = TextStream(TOKENIZER, stop=stop)
    sent = ""
    for token in text.encode():
        sent += stream.push(token)
        if stream.stopped:
            return sent, True
    return sent + stream.finish(), stream.stopped


@given(st.text(st.characters(codec="utf-8"), max_size=60))
def test_the_pieces_are_the_text(text: str) -> None:
    assert streamed(text) == (text, False)


@given(st.text("aéb", max_size=30), st.lists(st.text("aéb", min_size=1, max_size=4), max_size=3))
def test_the_text_ends_before_the_first_stop_string(text: str, stop: list[str]) -> None:
    # The first stop string is the one that is complete first; of those, what is before the one that begins first.
    ends = [at + len(word) for word in stop if (at := text.find(word)) >= 0]
    if not ends:
        assert streamed(text, stop) == (text, False)
        return
    until = text[: min(ends)]
    begin = min(at for word in stop if (at := until.find(word)) >= 0)
    assert streamed(text, stop) == (text[:begin], True)


def test_half_a_character_waits() -> None:
    stream = TextStream(TOKENIZER)
    first, second = "é".encode()
    assert [stream.push(first), stream.push(second)] == ["", "é"]


def test_what_may_become_a_stop_string_waits() -> None:
    stream = TextStream(TOKENIZER, stop=("END",))
    assert [stream.push(token) for token in b"xENx"] == ["x", "", "", "ENx"]


def test_without_a_tokenizer_there_is_no_text() -> None:
    stream = TextStream(None)
    assert [stream.push(5), stream.finish()] == ["", ""]


class Templated:
    """As a tokenizer of transformers whose template writes the names of who speaks."""

    chat_template = "{{ messages }}"

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]], **_: Any) -> str:
        return "".join(f"<{message['role']}>{message['content']}" for message in messages)

    def encode(self, text: str, **_: Any) -> list[int]:
        return list(text.encode())


def test_a_chat_that_is_no_text_once_it_is_written_is_its_clients_fault() -> None:
    tokenizer = HuggingFaceTokenizer(Templated())
    assert bytes(tokenizer.chat([{"role": "user", "content": "hi"}])) == b"<user>hi"
    with pytest.raises(TemplateError, match="cannot write these messages"):
        tokenizer.chat([{"role": "\ud800", "content": "hi"}])


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"generation_config.json": '{"eos_token_id": [1, 2]}', "config.json": '{"eos_token_id": 3}'}, {1, 2}),
        ({"generation_config.json": "{}", "config.json": '{"eos_token_id": 3}'}, {3}),
        ({"config.json": '{"eos_token_id": null}'}, set()),
        ({}, set()),
    ],
)
def test_stop_tokens_are_the_models(tmp_path: Any, files: Mapping[str, str], expected: set[int]) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert stop_ids(tmp_path) == expected
