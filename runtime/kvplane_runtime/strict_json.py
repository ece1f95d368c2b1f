"""JSON that a client sends, read strictly, and values as an error message may show them.

Readers of JSON differ on what is wrong but often passed over: NaN, bytes that are no UTF-8, a key that is given twice. Where
two of them read one body, the one that admits a request and the one that serves it, each must take it for the same; so what
they could take for different things is refused.
"""

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any, Final

TOO_DEEP: Final = "The request body is nested too deeply; send it flatter."


class MalformedJsonError(Exception):
    """The bytes are no JSON object, in a whole sentence."""


def decode(body: bytes | bytearray) -> dict[str, Any]:
    """The object in ``body``; raises MalformedJsonError."""
    try:
        value = _DECODER.decode(body.decode())
    except UnicodeDecodeError as error:
        raise MalformedJsonError(f"The request body is not UTF-8 (byte {error.start}); encode it so.") from error
    except ValueError as error:
        reason = str(error).rstrip(".")
        raise MalformedJsonError(f"The request body is not valid JSON: {reason}; correct it.") from error
    except RecursionError:
        raise MalformedJsonError(TOO_DEEP) from None
    if not isinstance(value, dict):
        raise MalformedJsonError(f"The request body must be a JSON object, got {shown(value)}.")
    return value


def shown(value: object) -> str:
    """A value as a message shows it: short, and without the content of prompts."""
    if value is None or isinstance(value, bool | float):
        return json.dumps(value)
    if isinstance(value, int):
        return str(value) if value.bit_length() < 64 else f"one of {value.bit_length()} bits"
    if isinstance(value, str):
        return "a string"
    return f"a list of {len(value)}" if isinstance(value, Sequence) else "an object"


def _unique(members: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(members)
    if len(found) != len(members):
        times = Counter(name for name, _ in members)
        twice = next(name for name in times if times[name] > 1)
        raise MalformedJsonError(f"The key {twice[:64]!r} is given twice in one object; give it once.")
    return found


def _refuse_constant(name: str) -> object:
    raise ValueError(f"{name} is no JSON value")


_DECODER: Final = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse_constant)
