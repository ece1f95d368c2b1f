"""Counting tokens and reading usage: the same for every split of the bytes."""

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvplane_runtime.proxy.http1 import Framing, ResponseHead
from kvplane_runtime.proxy.openai import Endpoint
from kvplane_runtime.proxy.sse import AnswerMeter, StreamMeter, Usage, meter

ROLE = (
    b'data: {"id":"c","object":"chat.completion.chunk","choices":[{"index":0,"delta":{"role":"assistant","content":""},'
    b'"logprobs":null,"finish_reason":null}]}\n\n'
)
TOKEN = b'data: {"id":"c","choices":[{"index":0,"delta":{"content":" a"},"logprobs":null,"finish_reason":null}]}\n\n'
LAST = b'data: {"id":"c","choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n'
USAGE = (
    b'data: {"id":"c","choices":[],"usage":{"prompt_tokens":5,"total_tokens":7,"completion_tokens":2,'
    b'"prompt_tokens_details":{"cached_tokens":4}}}\n\n'
)
DONE = b"data: [DONE]\n\n"
CHAT = [ROLE, TOKEN, LAST, USAGE, DONE]


class Reading:
    """A meter that has read a stream, piece by piece."""

    def __init__(self, *pieces: bytes, drop_usage: bool = False, at: Endpoint = Endpoint.CHAT) -> None:
        self.first_tokens: list[int] = []
        """After how many pieces the first token was told."""
        self.passed: list[bytes] = []
        self.meter = StreamMeter(
            at, drop_usage=drop_usage, on_first_token=lambda: self.first_tokens.append(len(self.passed))
        )
        for piece in pieces:
            self.passed.append(self.meter.feed(piece))
        self.passed.append(self.meter.finish())

    def outcome(self) -> tuple[bytes, int, Usage | None, int]:
        return b"".join(self.passed), self.meter.token_events, self.meter.usage(), len(self.first_tokens)


def test_a_chat_is_counted_and_its_usage_read() -> None:
    reading = Reading(*CHAT)
    assert reading.outcome() == (b"".join(CHAT), 2, Usage(5, 2), 1)
    assert reading.first_tokens == [1]


def test_the_usage_event_alone_is_dropped() -> None:
    reading = Reading(*CHAT, drop_usage=True)
    assert reading.outcome() == (ROLE + TOKEN + LAST + DONE, 2, Usage(5, 2), 1)
    assert reading.passed == [ROLE, TOKEN, LAST, b"", DONE, b""]


def test_several_events_may_come_at_once() -> None:
    reading = Reading(ROLE + ROLE + TOKEN + TOKEN, TOKEN + LAST + USAGE + DONE, drop_usage=True)
    assert reading.outcome() == (ROLE + ROLE + TOKEN + TOKEN + TOKEN + LAST + DONE, 4, Usage(5, 2), 1)


def test_an_event_with_several_choices_or_tokens_is_one() -> None:
    event = b'data: {"choices":[{"index":0,"text":"a b c"},{"index":1,"text":"d"}]}\n\n'
    assert Reading(event, event, at=Endpoint.COMPLETION).meter.token_events == 2


def test_events_as_pythons_json_writes_them() -> None:
    events = [
        {"choices": [{"index": 0, "text": "a"}]},
        {"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 1, "prompt_tokens_details": None}},
    ]
    first, last = (b"data: " + json.dumps(event).encode() + b"\n\n" for event in events)
    assert Reading(first, last, drop_usage=True).outcome() == (first, 1, Usage(1, 1), 1)


def test_what_a_text_says_is_not_counted() -> None:
    text = json.dumps('"choices":[{"usage":{"prompt_tokens":1}} \n\n data: [DONE]').encode()
    event = b'data: {"choices":[{"index":0,"text":%b}],"usage":null}\n\n' % text
    assert Reading(event, event, drop_usage=True).outcome() == (event + event, 2, None, 1)


@pytest.mark.parametrize(
    "first",
    [
        TOKEN,
        b'data: {"choices":[{"delta":{"role":"assistant","content":"a"}}]}\n\n',
        b'data: {"choices":[{"delta":{"role":"assistant","content":null,"reasoning_content":"a"}}]}\n\n',
        b'data: {"choices":[{"delta":{"role":"assistant","tool_calls":[{"function":{"name":"f"}}]}}]}\n\n',
        b'data: {"choices":[{"delta":{"role":"assistant","content":""},"finish_reason":"length"}]}\n\n',
    ],
)
def test_the_first_token_comes_with_the_first_event_that_says_more_than_a_role(first: bytes) -> None:
    reading = Reading(ROLE, ROLE, first, TOKEN)
    assert reading.first_tokens == [2]
    assert reading.meter.token_events == 2


@pytest.mark.parametrize(
    ("at", "event"),
    [
        (
            Endpoint.RESPONSES,
            b'event: response.output_text.delta\ndata: {"delta":"a","type":"response.output_text.delta"}',
        ),
        (
            Endpoint.MESSAGES,
            b'event: content_block_delta\ndata: {"type":"content_block_delta","delta":{"type":"text_delta","text":"a"}}',
        ),
        (Endpoint.OTHER, TOKEN[:-2]),
    ],
)
def test_the_tokens_of_other_endpoints_are_counted(at: Endpoint, event: bytes) -> None:
    assert Reading(event + b"\n\n", event + b"\n\n", DONE, at=at).meter.token_events == 2


def test_the_usage_of_other_endpoints_is_read() -> None:
    event = (
        b'event: response.completed\ndata: {"response":{"usage":{"input_tokens":3,"input_tokens_details":'
        b'{"cached_tokens":1},"output_tokens":2}},"type":"response.completed"}\n\n'
    )
    reading = Reading(event, at=Endpoint.RESPONSES, drop_usage=True)
    assert reading.outcome() == (event, 0, Usage(3, 2), 0)


def test_usage_that_comes_with_every_event_is_not_dropped() -> None:
    event = b'data: {"choices":[{"text":"a"}],"usage":{"prompt_tokens":5,"completion_tokens":%d}}\n\n'
    events = [event % number for number in range(1, 4)]
    assert Reading(*events, drop_usage=True).outcome() == (b"".join(events), 3, Usage(5, 3), 1)


@pytest.mark.parametrize(
    "usage",
    [
        b'{"prompt_tokens":5}',
        b'{"prompt_tokens":-5,"completion_tokens":1}',
        b'{"prompt_tokens":5,"completion_tokens":1.5}',
        b'{"prompt_tokens":true,"completion_tokens":1}',
        b'{"prompt_tokens":99999999999999999999,"completion_tokens":1}',
        b'{"prompt_tokens":5,"completion_tokens"',
        b'{"a":' + b"[" * 3000,
        b'{"\xff',
    ],
)
def test_usage_that_is_none_is_unknown(usage: bytes) -> None:
    event = b'data: {"choices":[],"usage":%b}\n\n' % usage
    assert Reading(TOKEN, event).outcome() == (TOKEN + event, 1, None, 1)


def test_an_event_that_is_not_complete_is_held_back_only_to_drop_usage() -> None:
    assert Reading(TOKEN[:9], TOKEN[9:]).passed == [TOKEN[:9], TOKEN[9:], b""]
    assert Reading(TOKEN[:9], TOKEN[9:], drop_usage=True).passed == [b"", TOKEN, b""]
    assert Reading(TOKEN, TOKEN[:9], drop_usage=True).passed == [TOKEN, b"", TOKEN[:9]]
    assert Reading(TOKEN, USAGE[:-2], drop_usage=True).passed == [TOKEN, b"", b""]


def test_a_stream_without_events_is_held_back_no_further_than_one_long_event() -> None:
    reading = Reading(*[b"x" * 1000] * 40, drop_usage=True)
    assert sum(map(len, reading.passed)) == 40_000
    assert len(b"".join(reading.passed[:17])) == 17_000


@pytest.mark.parametrize("newline", [b"\r\n", b"\r"])
def test_other_line_ends_are_understood(newline: bytes) -> None:
    events = [event.replace(b"\n", newline) for event in CHAT]
    kept = b"".join(event for event in events if b"usage" not in event)
    for size in (1, 2, 7, 10_000):
        pieces = [b"".join(events)[at : at + size] for at in range(0, sum(map(len, events)), size)]
        assert Reading(*pieces, drop_usage=True).outcome() == (kept, 2, Usage(5, 2), 1)


# Any split, any bytes.

LONG = b'data: {"choices":[{"text":"' + b"x" * 20_000 + b'"}],"usage":{"prompt_tokens":1,"completion_tokens":1}}\n\n'
PIECES = st.sampled_from(
    [
        *CHAT,
        LONG,
        USAGE[:-1],
        USAGE.replace(b"\n", b"\r\n"),
        TOKEN[:-2],
        b": ping\n\n",
        b"\n",
        b"\r",
        b"\r\n",
        b"data: ",
        b'"choices":[{',
        b'"choices":[]',
        b'"usage":{',
        b'"prompt_tokens":1,"completion_tokens":2}',
        b"\x00\xff",
        b"x" * 16_400,
    ]
)
STREAMS = st.lists(PIECES | st.binary(max_size=8), max_size=10).map(b"".join)
CUTS = st.lists(st.integers(0, 70_000), max_size=12)


def split(data: bytes, cuts: list[int]) -> list[bytes]:
    bounds = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    return [data[a:b] for a, b in itertools.pairwise(bounds)]


@given(data=STREAMS, cuts=CUTS, at=st.sampled_from(Endpoint))
def test_any_split_passes_every_byte_at_once_and_counts_the_same(data: bytes, cuts: list[int], at: Endpoint) -> None:
    pieces = split(data, cuts)
    reading = Reading(*pieces, at=at)
    assert reading.passed == [*pieces, b""]
    assert reading.outcome() == Reading(data, at=at).outcome()


@given(data=STREAMS, cuts=CUTS)
def test_any_split_drops_the_same(data: bytes, cuts: list[int]) -> None:
    whole = Reading(data, drop_usage=True)
    assert Reading(*split(data, cuts), drop_usage=True).outcome() == whole.outcome()
    assert whole.outcome()[1:] == Reading(data).outcome()[1:]


@given(events=st.lists(st.sampled_from([*CHAT, LONG, b": ping\n\n"]), max_size=12), cuts=CUTS)
def test_dropping_leaves_all_other_events_as_they_came(events: list[bytes], cuts: list[int]) -> None:
    passed = Reading(*split(b"".join(events), cuts), drop_usage=True).outcome()[0]
    assert passed == b"".join(event for event in events if event is not USAGE)


# An answer in one piece.


def answer_usage(*pieces: bytes) -> Usage | None:
    reading = AnswerMeter()
    assert [reading.feed(piece) for piece in pieces] == list(pieces)
    assert reading.finish() == b""
    return reading.usage()


ANSWER = (
    b'{"choices":[{"text":"\\"usage\\":{\\"prompt_tokens\\":9}"}],"usage":{"prompt_tokens":5,"completion_tokens":2,'
    b'"prompt_tokens_details":null},"kv_transfer_params":null,"prompt_token_ids":[' + b"1," * 5000 + b"1]}"
)


@given(cuts=CUTS)
def test_the_usage_of_an_answer_is_read_whatever_the_split(cuts: list[int]) -> None:
    assert answer_usage(*split(ANSWER, cuts)) == Usage(5, 2)


@given(data=STREAMS, cuts=CUTS)
def test_any_answer_gives_the_same_usage_whatever_the_split(data: bytes, cuts: list[int]) -> None:
    assert answer_usage(*split(data, cuts)) == answer_usage(data)


@pytest.mark.parametrize(
    "answer", [b"", b"{}", b"null", b'{"usage":null}', b'{"usage":{', b'{"usage": {"prompt_tokens"']
)
def test_an_answer_without_usage_has_none(answer: bytes) -> None:
    assert answer_usage(answer) is None


# Which answers are read.


def metered(status: int = 200, framing: Framing = Framing.CHUNKED, **fields: bytes) -> StreamMeter | AnswerMeter | None:
    headers = tuple((name.replace("_", "-").encode(), value) for name, value in fields.items())
    head = ResponseHead(status, b"OK", headers, framing, 0, keep_alive=True)
    return meter(head, Endpoint.CHAT, drop_usage=True, on_first_token=lambda: None)


def test_the_content_type_says_what_is_read() -> None:
    assert isinstance(metered(content_type=b"text/event-stream; charset=utf-8"), StreamMeter)
    assert isinstance(metered(Content_Type=b"application/json"), AnswerMeter)
    assert metered(content_type=b"text/plain") is None
    assert metered() is None
    assert metered(500, content_type=b"application/json") is None
    assert metered(content_type=b"application/json", content_encoding=b"gzip") is None
    assert metered(content_type=b"application/json", content_encoding=b"identity") is not None


def test_where_the_length_is_announced_nothing_is_dropped() -> None:
    counted = metered(framing=Framing.COUNTED, content_type=b"text/event-stream")
    assert counted is not None
    assert counted.feed(USAGE) == USAGE
