"""Text to tokens and back: the tokenizer, the chat template, and the text of an output as it grows.

A token is not a piece of text: a character may need several, and what a token looks like depends on the one before. So the
text of an output is the difference of two decodings that begin a few tokens back, and what ends in half a character
waits (the method of Hugging Face's text-generation-inference). Text that may become a stop string waits too: what is
sent is never taken back.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Protocol

_HALF: Final = "\N{REPLACEMENT CHARACTER}"
"""How the beginning of a character of several tokens is decoded."""


class TemplateError(Exception):
    """The chat cannot be written as a prompt; the message says why."""


class Tokenizer(Protocol):
    """What is needed of a tokenizer."""

    def encode(self, text: str) -> list[int]:
        """The tokens of a prompt, with what the model expects at its beginning."""

    def chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """The tokens of a chat, ready for the answer; raises TemplateError."""

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens, without special ones."""

    def raw(self, token: int) -> bytes:
        """What one token stands for; where it is half a character, maybe the replacement character."""


class HuggingFaceTokenizer:
    """The tokenizer in a model's folder."""

    def __init__(self, tokenizer: Any) -> None:
        """For a tokenizer of transformers."""
        self._tokenizer = tokenizer

    def encode(self, text: str) -> list[int]:
        """See :class:`Tokenizer`."""
        return list(self._tokenizer.encode(text))

    def chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """See :class:`Tokenizer`."""
        if self._tokenizer.chat_template is None:
            raise TemplateError("The model has no chat template; use /v1/completions.")
        try:
            text = self._tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
            tokens = list(self._tokenizer.encode(text, add_special_tokens=False))
        except Exception as error:
            raise TemplateError(f"The model's chat template cannot write these messages: {error}.") from error
        return tokens

    def decode(self, tokens: Sequence[int]) -> str:
        """See :class:`Tokenizer`."""
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def raw(self, token: int) -> bytes:
        """See :class:`Tokenizer`."""
        return str(self._tokenizer.decode([token], clean_up_tokenization_spaces=False)).encode(errors="replace")


def load(folder: Path) -> HuggingFaceTokenizer | None:
    """The tokenizer of the model in ``folder``; None where it has none, and only token ids are understood."""
    if not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        return None
    from transformers import AutoTokenizer  # noqa: PLC0415  (takes seconds, and only rank 0 needs it)

    return HuggingFaceTokenizer(AutoTokenizer.from_pretrained(folder, local_files_only=True))


def stop_ids(folder: Path) -> frozenset[int]:
    """Tokens that end an output, by the model's generation_config.json, else its config.json."""
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        if path.exists():
            found = json.loads(path.read_text()).get("eos_token_id")
            if found is not None:
                return frozenset([found] if isinstance(found, int) else found)
    return frozenset()


class TextStream:
    """The text of one output, token by token."""

    def __init__(self, tokenizer: Tokenizer | None, *, stop: Sequence[str] = ()) -> None:
        """Without a tokenizer there is no text."""
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._tokens: list[int] = []
        self._context = 0
        """From here on tokens are decoded again, since the newest one's text depends on them."""
        self._read = 0
        """Tokens whose text was taken."""
        self._held_back = ""
        self.stopped = False
        """A stop string came; the text ended before it."""

    def push(self, token: int) -> str:
        """Takes in a token; the text that is certain now."""
        if self._tokenizer is None or self.stopped:
            return ""
        self._tokens.append(token)
        before = self._tokenizer.decode(self._tokens[self._context : self._read])
        now = self._tokenizer.decode(self._tokens[self._context :])
        if now.endswith(_HALF) or len(now) <= len(before):
            return ""
        self._context, self._read = self._read, len(self._tokens)
        return self._cut(now[len(before) :])

    def finish(self) -> str:
        """No token follows; the text that was held back."""
        if self._tokenizer is None or self.stopped:
            return ""
        before = self._tokenizer.decode(self._tokens[self._context : self._read])
        now = self._tokenizer.decode(self._tokens[self._context :])
        self._context = self._read = len(self._tokens)
        text = self._cut(now[len(before) :])
        if not self.stopped:
            text, self._held_back = text + self._held_back, ""
        return text

    def _cut(self, more: str) -> str:
        """What of the text held back and ``more`` can be sent: no stop string, and no beginning of one."""
        text = self._held_back + more
        found = [at for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held_back = True, ""
            return text[: min(found)]
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held_back = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` with which ``stop`` begins, the whole of it excepted."""
    longest = min(len(text), len(stop) - 1)
    return next((length for length in range(longest, 0, -1) if stop.startswith(text[len(text) - length :])), 0)
