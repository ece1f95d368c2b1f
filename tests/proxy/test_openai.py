"""Generation requests: what is read of them, what is refused, and the one edit."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvplane_runtime.proxy.gate import Refusal
from kvplane_runtime.proxy.http1 import RequestHead
from kvplane_runtime.proxy.openai import (
    MAX_OUTPUTS,
    MAX_PROMPTS,
    MAX_TOKENS,
    Endpoint,
    Generation,
    Prompt,
    endpoint,
    parse,
    with_usage,
)

COMPLETION, CHAT = Endpoint.COMPLETION, Endpoint.CHAT


def body(**fields: object) -> bytes:
    return json.dumps(fields).encode()


def read(at: Endpoint = COMPLETION, **fields: object) -> Generation:
    generation = parse(at, body(**fields))
    assert isinstance(generation, Generation), generation
    return generation


def refused(data: bytes, at: Endpoint = COMPLETION) -> Refusal:
    refusal = parse(at, data)
    assert isinstance(refusal, Refusal), refusal
    assert refusal.status == 400
    return refusal


# Which requests generate.


@pytest.mark.parametrize(
    ("method", "target", "expected"),
    [
        (b"POST", b"/v1/completions", COMPLETION),
        (b"POST", b"/v1/chat/completions?beta=1", CHAT),
        (b"POST", b"/v1/chat/%63ompletions", CHAT),
        (b"POST", b"http://somewhere:8000/v1/completions", COMPLETION),
        (b"POST", b"/v1/responses", Endpoint.RESPONSES),
        (b"POST", b"/v1/messages", Endpoint.MESSAGES),
        (b"POST", b"/invocations", Endpoint.OTHER),
        (b"GET", b"/v1/completions", None),
        (b"POST", b"/v1/embeddings", None),
        (b"POST", b"/tokenize", None),
        (b"POST", b"/v1/completions/", None),
        (b"OPTIONS", b"*", None),
    ],
)
def test_requests_that_generate_are_known_by_their_path(
    method: bytes, target: bytes, expected: Endpoint | None
) -> None:
    head = RequestHead(method, target, "1.1", (), 2, chunked=False, keep_alive=True, expects_continue=False)
    assert endpoint(head) is expected


# What is read.


def test_a_completion() -> None:
    assert read(model="m", prompt="über", max_tokens=7, n=2, best_of=3, stream=True, temperature=0.5) == Generation(
        endpoint=COMPLETION,
        prompts=(Prompt(text_bytes=5),),
        outputs=3,
        max_tokens=7,
        media=0,
        stream=True,
        include_usage=None,
    )


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("", [Prompt(0)]),
        (["a", "bcd"], [Prompt(1), Prompt(3)]),
        ([1, 2, 3], [Prompt(0, tokens=3)]),
        ([[1, 2], [], "x"], [Prompt(0, tokens=2), Prompt(0, tokens=0), Prompt(1)]),
        ("\ud83d", [Prompt(3)]),
    ],
)
def test_prompts_are_text_or_token_ids_one_or_many(prompt: object, prompts: list[Prompt]) -> None:
    assert read(prompt=prompt).prompts == tuple(prompts)


def test_a_prompt_that_is_not_there_is_taken_as_large_as_the_body() -> None:
    data = body(prompt_embeds="AAAA")
    generation = parse(COMPLETION, data)
    assert isinstance(generation, Generation)
    assert generation.prompts == (Prompt(len(data)),)


def test_a_chat_counts_all_its_strings() -> None:
    plain = read(CHAT, messages=[{"role": "user", "content": "hello"}])
    assert plain.prompts == (Prompt(len("roleusercontenthello")),)
    parts = read(CHAT, messages=[{"role": "user", "content": [{"type": "text", "text": "hello"}]}])
    assert parts.prompts[0].text_bytes == len("roleusercontenttypetexttexthello")
    tools = read(CHAT, messages=[], tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}])
    assert tools.prompts[0].text_bytes == len("typefunctionfunctionnamefparameters")


def test_images_and_sounds_are_counted_and_not_measured() -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 1000}}
    sound = {"type": "input_audio", "input_audio": {"data": "A" * 1000, "format": "wav"}}
    generation = read(CHAT, messages=[{"role": "user", "content": [image, sound, {"type": "text", "text": "x"}]}])
    assert generation.media == 2
    assert generation.prompts[0].text_bytes < 40


@pytest.mark.parametrize(
    ("at", "fields", "max_tokens"),
    [
        (COMPLETION, {}, 16),
        (COMPLETION, {"max_tokens": None}, None),
        (COMPLETION, {"max_tokens": 0}, 0),
        (CHAT, {}, None),
        (CHAT, {"max_tokens": 5}, 5),
        (CHAT, {"max_tokens": 5, "max_completion_tokens": 9}, 9),
        (CHAT, {"max_tokens": 5, "max_completion_tokens": None}, 5),
        (Endpoint.RESPONSES, {"max_output_tokens": 3}, 3),
        (Endpoint.MESSAGES, {"max_tokens": MAX_TOKENS}, MAX_TOKENS),
    ],
)
def test_the_longest_output(at: Endpoint, fields: dict[str, Any], max_tokens: int | None) -> None:
    prompt: dict[str, Any] = {"messages": []} if at is CHAT else {"prompt": "x"}
    assert read(at, **prompt, **fields).max_tokens == max_tokens


def test_where_the_prompt_is_not_understood_it_is_the_whole_body() -> None:
    data = body(input="hello")
    generation = parse(Endpoint.RESPONSES, data)
    assert isinstance(generation, Generation)
    assert generation.prompts == (Prompt(len(data)),)


def test_unknown_fields_pass_whatever_they_hold() -> None:
    assert read(prompt="x", min_p=float(0), logit_bias={"1": -100}, extra=[{"n": "x"}], max_tokns=-1).outputs == 1


def test_null_is_absent() -> None:
    assert read(prompt="x", n=None, best_of=None, stream=None, stream_options=None).outputs == 1


# What is refused.


@pytest.mark.parametrize(
    ("data", "code", "words"),
    [
        (b"", "malformed_json", "Expecting value"),
        (b"{", "malformed_json", "correct it"),
        (b'{"prompt": "x",}', "malformed_json", "correct it"),
        (b'{"prompt": "x"} {}', "malformed_json", "Extra data"),
        (b"[]", "malformed_json", "a list of 0"),
        (b'"prompt"', "malformed_json", "a string"),
        (b'{"prompt": "x", "temperature": NaN}', "malformed_json", "NaN"),
        (b'{"prompt": "x", "temperature": -Infinity}', "malformed_json", "-Infinity"),
        (b'{"prompt": "a\nb"}', "malformed_json", "control character"),
        (b'{"prompt": "\xff"}', "malformed_json", "not UTF-8 (byte 12)"),
        ("\ufeff{}".encode(), "malformed_json", "correct it"),
        ('{"prompt": "x"}'.encode("utf-16"), "malformed_json", "not UTF-8"),
        (b'{"prompt": "x", "max_tokens": 1, "max_tokens": 2}', "malformed_json", "'max_tokens' is given twice"),
        (b'{"prompt": "x", "max\\u005ftokens": 1, "max_tokens": 2}', "malformed_json", "given twice"),
        (b'{"prompt": "x", "a": {"b": 1, "b": 1}}', "malformed_json", "'b' is given twice"),
        (b'{"prompt": ' + b"[" * 100_000, "malformed_json", "nested too deeply"),
        (b'{"prompt": "x", "a": ' + b'{"a":' * 100_000, "malformed_json", "nested too deeply"),
        (b'{"prompt": "x", "n": ' + b"9" * 10_000 + b"}", "malformed_json", "digits"),
    ],
)
def test_malformed_json_is_refused(data: bytes, code: str, words: str) -> None:
    refusal = refused(data)
    assert refusal.code == code
    assert words in refusal.message
    assert refusal.param is None


def test_of_many_keys_the_one_given_twice_is_found() -> None:
    """As many as take minutes to compare with each other."""
    keys = b", ".join(b'"%d": 0' % n for n in range(200_000))
    assert "'199999' is given twice" in refused(b'{%b, "199999": 0}' % keys).message


@pytest.mark.parametrize(
    ("at", "fields", "param", "code", "words"),
    [
        (COMPLETION, {"max_tokens": -1}, "max_tokens", "integer_below_min_value", f"from 0 to {MAX_TOKENS}, got -1;"),
        (COMPLETION, {"max_tokens": MAX_TOKENS + 1}, "max_tokens", "integer_above_max_value", "leave it out"),
        (COMPLETION, {"max_tokens": 10**100}, "max_tokens", "integer_above_max_value", "one of 333 bits"),
        (COMPLETION, {"max_tokens": 1.0}, "max_tokens", "invalid_type", "got 1.0"),
        (COMPLETION, {"max_tokens": True}, "max_tokens", "invalid_type", "got true"),
        (COMPLETION, {"max_tokens": "16"}, "max_tokens", "invalid_type", "got a string"),
        (COMPLETION, {"max_tokens": [16]}, "max_tokens", "invalid_type", "got a list of 1"),
        (CHAT, {"max_completion_tokens": -5}, "max_completion_tokens", "integer_below_min_value", "got -5"),
        (Endpoint.RESPONSES, {"max_output_tokens": {}}, "max_output_tokens", "invalid_type", "got an object"),
        (COMPLETION, {"n": 100}, "n", "integer_above_max_value", f"from 1 to {MAX_OUTPUTS}, got 100; send several"),
        (COMPLETION, {"n": 0}, "n", "integer_below_min_value", "got 0"),
        (COMPLETION, {"best_of": 100}, "best_of", "integer_above_max_value", "got 100"),
        (COMPLETION, {"stream": "yes"}, "stream", "invalid_type", "true or false"),
        (COMPLETION, {"stream": 1}, "stream", "invalid_type", "got 1"),
        (COMPLETION, {"stream_options": []}, "stream_options", "invalid_type", "an object"),
        (
            COMPLETION,
            {"stream_options": {"include_usage": 1}},
            "stream_options.include_usage",
            "invalid_type",
            "true or false",
        ),
        (COMPLETION, {"prompt": 5}, "prompt", "invalid_type", "list of token ids"),
        (COMPLETION, {"prompt": []}, "prompt", "invalid_type", "got a list of 0"),
        (COMPLETION, {"prompt": {"a": 1}}, "prompt", "invalid_type", "got an object"),
        (COMPLETION, {"prompt": [1, "a"]}, "prompt", "invalid_type", "got a list of 2"),
        (COMPLETION, {"prompt": [1, True]}, "prompt", "invalid_type", "got a list of 2"),
        (COMPLETION, {"prompt": [[1], [1.5]]}, "prompt", "invalid_type", "got a list of 1"),
        (COMPLETION, {"prompt": ["x"] * (MAX_PROMPTS + 1)}, "prompt", "array_above_max_length", "at most 2048 prompts"),
        (CHAT, {"messages": "hi"}, "messages", "invalid_type", "a list of objects, got a string"),
        (CHAT, {"messages": ["hi"]}, "messages", "invalid_type", "a list of objects"),
    ],
)
def test_a_wrong_field_is_refused_by_name_bound_value_and_cure(
    at: Endpoint, fields: dict[str, Any], param: str, code: str, words: str
) -> None:
    refusal = refused(body(**({"prompt": "x"} if at is COMPLETION else {}) | fields), at)
    assert (refusal.param, refusal.code) == (param, code)
    assert refusal.message.startswith(param)
    assert words in refusal.message


def test_a_refusal_does_not_repeat_the_prompt() -> None:
    assert "secret" not in refused(body(prompt={"secret": 1})).message
    assert len(refused(body(prompt="x", **{"k" * 9999: 1})[:-1] + b', "prompt": 1}').message) < 200


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
FIELDS = st.dictionaries(
    st.sampled_from(
        [
            "prompt",
            "messages",
            "tools",
            "n",
            "best_of",
            "max_tokens",
            "max_completion_tokens",
            "stream",
            "stream_options",
        ]
    ),
    JSON,
)


@given(at=st.sampled_from(Endpoint), fields=FIELDS, cut=st.integers(0, 400))
def test_any_json_is_read_or_refused(at: Endpoint, fields: dict[str, Any], cut: int) -> None:
    data = json.dumps(fields).encode()
    for document in (data, data[:cut]):
        parsed = parse(at, document)
        if isinstance(parsed, Generation):
            assert all(prompt.text_bytes <= 3 * len(document) for prompt in parsed.prompts)
            assert 1 <= parsed.outputs <= MAX_OUTPUTS
            assert parsed.max_tokens is None or 0 <= parsed.max_tokens <= MAX_TOKENS
        else:
            assert parsed.status == 400
            assert len(parsed.message) < 300


@given(at=st.sampled_from(Endpoint), data=st.binary(max_size=100))
def test_any_bytes_are_read_or_refused(at: Endpoint, data: bytes) -> None:
    parsed = parse(at, data)
    assert isinstance(parsed, Generation) or parsed.status == 400


# The edit.


def edited(data: bytes, at: Endpoint = COMPLETION) -> bytes | None:
    generation = parse(at, data)
    assert isinstance(generation, Generation), generation
    return with_usage(data, generation)


def test_usage_is_asked_for_where_nothing_is_said_of_it() -> None:
    assert edited(b' {"prompt":"x", "stream":true}') == (
        b' {"stream_options":{"include_usage":true},"prompt":"x", "stream":true}'
    )


def test_a_null_gives_its_place() -> None:
    assert edited(b'{"stream":true,"stream_options" : null,"prompt":"x"}') == (
        b'{"stream":true,"stream_options":{"include_usage":true},"prompt":"x"}'
    )


@pytest.mark.parametrize(
    "rest",
    [
        b'"prompt":"x","stream":true,"metadata":{"stream_options":null}}',
        b'"prompt":"x \\" {[","stream":true,"metadata":[{}, {"a":[1],"stream_options" : null}]}',
        b'"metadata":{"}}":{"stream_options":null}},"prompt":"x","stream":true}',
    ],
)
def test_a_null_of_another_object_stays(rest: bytes) -> None:
    assert edited(b"{" + rest) == b'{"stream_options":{"include_usage":true},' + rest


def test_a_null_behind_other_objects_gives_its_place() -> None:
    before = b'{"prompt":"x","metadata":{"a":[{"b":"}"}]},"stream":true,'
    assert edited(before + b'"stream_options":null}') == before + b'"stream_options":{"include_usage":true}}'


@pytest.mark.parametrize(
    "data",
    [
        b'{"prompt":"x"}',
        b'{"prompt":"x","stream":false}',
        b'{"prompt":"x","stream":true,"stream_options":{"include_usage":true}}',
        b'{"prompt":"x","stream":true,"stream_options":{"include_usage":false}}',
        b'{"prompt":"x","stream":true,"stream_options":{}}',
        b'{"prompt":"x","stream":true,"stream_options":null,"metadata":{"stream_options":null}}',
    ],
)
def test_else_the_body_goes_as_it_came(data: bytes) -> None:
    assert edited(data) is None


def test_other_endpoints_are_not_edited() -> None:
    assert edited(b'{"stream":true}', Endpoint.RESPONSES) is None


@given(
    fields=st.dictionaries(st.text(max_size=8), JSON, max_size=4),
    options=st.sampled_from([{}, {"stream_options": None}]),
    indent=st.sampled_from([None, 1]),
)
def test_the_edit_adds_one_member_and_changes_no_other(
    fields: dict[str, Any], options: dict[str, Any], indent: int | None
) -> None:
    fields = {"prompt": "x", "stream": True} | options | {f"_{name}": value for name, value in fields.items()}
    data = json.dumps(fields, indent=indent, allow_nan=True).encode()
    generation = parse(COMPLETION, data)
    if isinstance(generation, Refusal):
        assert "NaN" in generation.message or "Infinity" in generation.message
        return
    changed = with_usage(data, generation)
    assert changed is not None
    assert json.loads(changed) == fields | {"stream_options": {"include_usage": True}}
    if not options:
        assert changed.replace(b'"stream_options":{"include_usage":true},', b"", 1) == data
    again = parse(COMPLETION, changed)
    assert isinstance(again, Generation)
    assert again.include_usage is True
    assert again.prompts == generation.prompts
