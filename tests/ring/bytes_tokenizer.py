"""A tokenizer whose tokens are the bytes of UTF-8."""

from collections.abc import Mapping, Sequence
from typing import Any

from kvplane_runtime.ring.tokens import TemplateError


class BytesTokenizer:
    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        if messages[0]["role"] == "alien":
            raise TemplateError("The model's chat template knows no role 'alien'.")
        return self.encode("".join(f"<{message['role']}>{message['content']}" for message in messages) + "<assistant>")

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(tokens).decode(errors="replace")

    def raw(self, token: int) -> bytes:
        return bytes([token])
