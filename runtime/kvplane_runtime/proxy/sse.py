"""Tokens counted and usage read while an answer passes, by scans for bytes that JSON cannot have inside a string.

A quote inside a JSON string is escaped, so ``"choices":[{`` in an event is the key and not somebody's text: no event has
to be parsed. Each engine step of a sequence is one such event; how many tokens an event carries is not known here (one
may have several, or several choices), but usage over events tells it, and usage is parsed once, at the end.

Guarantees, tested for every split of the bytes: the counts and the bytes passed on are the same; without ``drop_usage``
the bytes passed on are the bytes that came, at once; with it only events that have usage and no choices are missing, and
nothing is held back but an event that is not yet complete, at most ``_MAX_EVENT_BYTES``. What is no event stream passes.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from kvplane_runtime.proxy.http1 import Framing, ResponseHead
from kvplane_runtime.proxy.openai import Endpoint

_MAX_EVENT_BYTES: Final = 16 * 1024
"""Of a longer event only this much is looked at, and it is never dropped: usage has some 200 bytes."""
_MAX_USAGE_BYTES: Final = 4096
_MAX_COUNT: Final = 2**53

_BLANK_LINE: Final = re.compile(rb"(?:\n\n|\n\r\n|\r\r)[\r\n]*")
_CARRIES: Final = re.compile(
    rb'"(?:content|reasoning|reasoning_content|refusal|name|arguments|finish_reason)"\s*:\s*"[^"]'
)

# Each in the two spellings that engines use: without spaces, and as Python's json writes.
_CHOICES: Final = (b'"choices":[{', b'"choices": [{')
_NO_CHOICES: Final = (b'"choices":[]', b'"choices": []')
_USAGE: Final = (b'"usage":{', b'"usage": {')
_IN_USAGE: Final = b'_tokens":'
"""In every usage, however it is spelled, and in hardly any other event: ``"usage":null`` may be in all."""
_MARKS: Final = {
    Endpoint.RESPONSES: (b'"delta":"', b'"delta": "'),
    Endpoint.MESSAGES: (b'"type":"content_block_delta"', b'"type": "content_block_delta"'),
}
"""What each event with tokens has once, where that is not ``_CHOICES``."""


@dataclass(frozen=True, slots=True)
class Usage:
    """What the engine says that a request took, all its outputs together."""

    prompt_tokens: int
    completion_tokens: int


class StreamMeter:
    """Reads one event stream."""

    def __init__(self, endpoint: Endpoint, *, drop_usage: bool, on_first_token: Callable[[], None]) -> None:
        """``drop_usage``: the client did not ask for usage, so it does not get that event."""
        self._marks = _MARKS.get(endpoint, _CHOICES)
        self._mark = b""
        """The spelling of the first event with tokens, which the others are counted by."""
        self._drop_usage = drop_usage
        self._on_first_token = on_first_token
        self._partial = b""
        """What came of an incomplete event; of one that is too long to wait for its end, the last bytes."""
        self._too_long = False
        """Whether that event was taken already."""
        self._usage_event = b""
        self.token_events = 0
        """Events that carry tokens. A chat's first events, which carry nothing but a role, are none."""

    def feed(self, data: bytes) -> bytes:
        """Takes the next bytes; returns what the client gets of them, and of those that were held back."""
        if (
            self._mark
            and not self._partial
            and data[-2:] == b"\n\n"
            and len(data) <= _MAX_EVENT_BYTES
            and _IN_USAGE not in data
        ):  # nearly always: whole events, neither the first nor the last
            self.token_events += data.count(self._mark)
            return data
        passed = self._feed_events(data)
        return passed if self._drop_usage else data

    def finish(self) -> bytes:
        """Takes the end for the end of the last event; returns what was held back of it."""
        last, self._partial = self._partial, b""
        if not last or self._too_long:
            return b""
        passes = self._take(last)
        return last if passes and self._drop_usage else b""

    def usage(self) -> Usage | None:
        """The last usage that came; None where none came, or none that can be understood."""
        return _read_usage(self._usage_event)

    def _feed_events(self, data: bytes) -> bytes:
        """Takes each event that is complete; returns the bytes that may pass now."""
        known = len(self._partial)
        buffer = self._partial + data
        passed: list[bytes] = []
        begin = known if self._too_long else 0  # what is before it passed already
        if not known:
            begin = len(buffer) - len(buffer.lstrip(b"\r\n"))  # belongs to the blank line before
            passed.append(buffer[:begin])
        for blank_line in _BLANK_LINE.finditer(buffer, max(begin, known) - min(known, 2)):
            end = blank_line.end()
            if self._too_long or self._take(buffer[begin:end]):
                passed.append(buffer[begin:end])
            self._too_long = False
            begin = end
        rest = buffer[begin:]
        if self._too_long or _is_too_long(rest):
            if not self._too_long:
                self._take(rest)
                self._too_long = True
            passed.append(rest)
            rest = buffer[-2:]
        self._partial = rest
        return b"".join(passed)

    def _take(self, event: bytes) -> bool:
        """Counts one event, complete or too long; returns whether the client gets it."""
        if too_long := _is_too_long(event):
            event = event[:_MAX_EVENT_BYTES]
        if self._mark:
            self.token_events += event.count(self._mark)
        elif b'"role"' not in event or _CARRIES.search(event):
            self._mark = next((mark for mark in self._marks if mark in event), b"")
            if self._mark:
                self.token_events = event.count(self._mark)
                self._on_first_token()
        if too_long or _IN_USAGE not in event or not any(mark in event for mark in _USAGE):
            return True
        self._usage_event = event
        return not (self._drop_usage and any(mark in event for mark in _NO_CHOICES))


class AnswerMeter:
    """Reads one answer that is a single JSON document."""

    def __init__(self) -> None:
        self._end = b""
        self._usage = b""

    def feed(self, data: bytes) -> bytes:
        """Takes the next bytes; returns them."""
        window = self._end + data
        begin = max(map(window.rfind, _USAGE))
        if begin >= 0:
            self._usage = window[begin : begin + _MAX_USAGE_BYTES]
        elif self._usage:
            self._usage += data[: _MAX_USAGE_BYTES - len(self._usage)]
        self._end = window[1 - len(_USAGE[1]) :]
        return data

    def finish(self) -> bytes:
        """Nothing is ever held back."""
        return b""

    def usage(self) -> Usage | None:
        """The last usage that came; None where none came, or none that can be understood."""
        return _read_usage(self._usage)


def meter(
    head: ResponseHead, endpoint: Endpoint, *, drop_usage: bool, on_first_token: Callable[[], None]
) -> StreamMeter | AnswerMeter | None:
    """Reads the body that follows ``head``; None where nothing can be told of it: an error, a coded body, another type."""
    if head.status != 200 or (head.value(b"content-encoding") or b"identity").lower() != b"identity":
        return None
    match (head.value(b"content-type") or b"").partition(b";")[0].strip().lower():
        case b"text/event-stream":
            # An announced length must be kept: such a stream, which no engine is known to send, shows its usage.
            drop_usage = drop_usage and head.framing is not Framing.COUNTED
            return StreamMeter(endpoint, drop_usage=drop_usage, on_first_token=on_first_token)
        case b"application/json":
            return AnswerMeter()
        case _:
            return None


def _is_too_long(event: bytes) -> bool:
    return len(event) > _MAX_EVENT_BYTES and len(event.rstrip(b"\r\n")) > _MAX_EVENT_BYTES


def _read_usage(text: bytes) -> Usage | None:
    """The usage object behind the last mark in ``text``, by OpenAI's names of the fields."""
    begin = max(map(text.rfind, _USAGE))
    if begin < 0:
        return None
    try:
        found, _ = _DECODER.raw_decode(text[text.index(b"{", begin) :].decode(errors="replace"))
    except (ValueError, RecursionError):
        return None
    prompt = _count(found, "prompt_tokens", "input_tokens")
    completion = _count(found, "completion_tokens", "output_tokens")
    if prompt is None or completion is None:
        return None
    return Usage(prompt, completion)


_DECODER: Final = json.JSONDecoder()


def _count(fields: dict[str, object], *names: str) -> int | None:
    value = next((fields[name] for name in names if name in fields), None)
    return value if type(value) is int and 0 <= value <= _MAX_COUNT else None
