"""What a body may say, and in which words the rest is refused."""

import json
from typing import Any

import pytest

from kvplane_runtime.ring.openai import Asked, BadRequestError, ServedModel, parse
from kvplane_runtime.ring.sampling import Sampling
from tests.ring.bytes_tokenizer import BytesTokenizer

MODEL = ServedModel("tiny", vocabulary=256, tokenizer=BytesTokenizer(), stop_ids=frozenset((0,)))
BARE = ServedModel("tiny", vocabulary=256, tokenizer=None, stop_ids=frozenset())
BASE = {"model": "tiny", "prompt": "hi"}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}


def completion(served: ServedModel = MODEL, /, **fields: Any) -> Asked:
    return parse(json.dumps({**BASE, **fields}).encode(), chat=False, model=served, random_seed=9)


def chat(**fields: Any) -> Asked:
    return parse(json.dumps({**CHAT, **fields}).encode(), chat=True, model=MODEL, random_seed=9)


def test_defaults() -> None:
    assert completion() == Asked(
        chat=False,
        prompts=([104, 105],),
        outputs=1,
        max_tokens=16,
        sampling=Sampling(seed=9),
        stop=(),
        stop_ids=frozenset((0,)),
        stream=False,
        include_usage=False,
        return_token_ids=False,
    )
    assert chat().max_tokens is None
    assert bytes(chat().prompts[0]) == b"<user>hi<assistant>"


def test_everything() -> None:
    asked = completion(
        prompt=[[1, 2], [3]],
        n=2,
        best_of=2,
        max_tokens=7,
        temperature=0,
        top_p=0.5,
        top_k=3,
        seed=-4,
        stop=["a", "b"],
        stop_token_ids=[9],
        ignore_eos=True,
        logprobs=2,
        stream=True,
        stream_options={"include_usage": True},
        return_token_ids=True,
        user="me",
        unknown={},
        presence_penalty=0,
    )
    assert asked == Asked(
        chat=False,
        prompts=([1, 2], [3]),
        outputs=2,
        max_tokens=7,
        sampling=Sampling(temperature=0.0, top_p=0.5, top_k=3, seed=-4, logprobs=2),
        stop=("a", "b"),
        stop_ids=frozenset((9,)),
        stream=True,
        include_usage=True,
        return_token_ids=True,
    )


def test_of_two_names_of_the_longest_output_a_chat_takes_the_newer() -> None:
    assert chat(max_tokens=5, max_completion_tokens=6).max_tokens == 6
    assert chat(max_tokens=5).max_tokens == 5


def test_text_parts_are_joined() -> None:
    content = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert bytes(chat(messages=[{"role": "user", "content": content}]).prompts[0]) == b"<user>ab<assistant>"


def test_a_chat_asks_for_log_probabilities_by_two_fields() -> None:
    assert chat(logprobs=True, top_logprobs=4).sampling.logprobs == 4
    assert chat(logprobs=True).sampling.logprobs == 0
    assert chat(logprobs=False).sampling.logprobs is None


def test_token_ids_need_no_tokenizer() -> None:
    assert completion(BARE, prompt=[5, 6]).prompts == ([5, 6],)


@pytest.mark.parametrize(
    ("fields", "code", "param", "words"),
    [
        ({"prompt": ""}, "empty_prompt", "prompt", "prompt is empty"),
        ({"prompt": []}, "empty_prompt", "prompt", "prompt is empty"),
        ({"prompt": [[]]}, "empty_prompt", "prompt", "prompt is empty"),
        ({"prompt": None}, "invalid_type", "prompt", "got null"),
        ({"prompt": 5}, "invalid_type", "prompt", "got 5"),
        ({"prompt": [1, "a"]}, "invalid_type", "prompt", "a string, a list of token ids"),
        ({"prompt": [True]}, "invalid_type", "prompt", "a list of 1"),
        ({"prompt": [[1.0]]}, "invalid_type", "prompt", "a list of 1"),
        ({"prompt": [256]}, "invalid_token_id", "prompt", "the token id 256; the ids of tiny are 0 to 255"),
        ({"prompt": [-1]}, "invalid_token_id", "prompt", "the token id -1"),
        ({"prompt": ["a"] * 65}, "array_above_max_length", "prompt", "at most 64 prompts, got 65"),
        ({"prompt": "\ud800"}, "invalid_unicode", "prompt", "half of a surrogate pair at character 0"),
        ({"model": 4}, "invalid_type", "model", "got 4"),
        ({"max_tokens": 0}, "integer_below_min_value", "max_tokens", "from 1 to"),
        ({"max_tokens": 1.0}, "invalid_type", "max_tokens", "got 1.0"),
        ({"max_tokens": "1"}, "invalid_type", "max_tokens", "got a string"),
        ({"max_tokens": 10**9}, "integer_above_max_value", "max_tokens", "got 1000000000"),
        ({"n": 0}, "integer_below_min_value", "n", "got 0"),
        ({"n": 65}, "integer_above_max_value", "n", "got 65"),
        ({"n": 2, "best_of": 3}, "unsupported_parameter", "best_of", "best_of must be n, which is 2"),
        ({"temperature": -0.1}, "decimal_below_min_value", "temperature", "from 0 to 2"),
        ({"temperature": 2.1}, "decimal_above_max_value", "temperature", "from 0 to 2"),
        ({"temperature": 10**400}, "decimal_above_max_value", "temperature", "got one of 1329 bits"),
        ({"temperature": True}, "invalid_type", "temperature", "got true"),
        ({"top_p": 0}, "decimal_below_min_value", "top_p", "above 0"),
        ({"top_p": 1.5}, "decimal_above_max_value", "top_p", "from 0 to 1"),
        ({"top_k": -2}, "integer_below_min_value", "top_k", "from -1"),
        ({"seed": 2**63}, "integer_above_max_value", "seed", "of 64 bits"),
        ({"stop": 5}, "invalid_type", "stop", "a string, or a list of strings"),
        ({"stop": [""]}, "invalid_value", "stop", "1 to 1024 characters"),
        ({"stop": ["a"] * 17}, "invalid_value", "stop", "at most 16 strings"),
        ({"stop_token_ids": ["a"]}, "invalid_type", "stop_token_ids", "a list of token ids"),
        ({"stop_token_ids": [999]}, "invalid_token_id", "stop_token_ids", "999"),
        ({"logprobs": 21}, "integer_above_max_value", "logprobs", "from 0 to 20"),
        ({"stream": 1}, "invalid_type", "stream", "true or false"),
        ({"stream_options": {}}, "invalid_value", "stream_options", "needs stream"),
        ({"stream": True, "stream_options": 1}, "invalid_type", "stream_options", "an object"),
        (
            {"stream": True, "stream_options": {"include_usage": 1}},
            "invalid_type",
            "stream_options.include_usage",
            "true or false",
        ),
        ({"echo": True}, "unsupported_parameter", "echo", "leave it out"),
        ({"suffix": "x"}, "unsupported_parameter", "suffix", "leave it out"),
        ({"presence_penalty": 0.5}, "unsupported_parameter", "presence_penalty", "leave it out"),
        ({"logit_bias": {"5": 1}}, "unsupported_parameter", "logit_bias", "leave it out"),
        ({"min_tokens": 5}, "unsupported_parameter", "min_tokens", "leave it out"),
        ({"response_format": {"type": "json_object"}}, "unsupported_parameter", "response_format", "leave it out"),
    ],
)
def test_a_completion_is_refused(fields: dict[str, Any], code: str, param: str, words: str) -> None:
    with pytest.raises(BadRequestError) as caught:
        completion(**fields)
    refusal = caught.value.refusal
    assert (refusal.status, refusal.code, refusal.param) == (400, code, param)
    assert words in refusal.message
    assert refusal.message.endswith(".")


@pytest.mark.parametrize(
    ("fields", "code", "words"),
    [
        ({"messages": []}, "empty_prompt", "messages is empty"),
        ({"messages": "hi"}, "invalid_type", "a list of objects"),
        ({"messages": ["hi"]}, "invalid_type", "a list of objects"),
        ({"messages": [{"content": "hi"}]}, "invalid_type", "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "invalid_type", "messages[0].content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "unsupported_content",
            "this engine reads text only",
        ),
        ({"messages": [{"role": "alien", "content": "hi"}]}, "invalid_chat", "knows no role 'alien'"),
        (
            {"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]},
            "unsupported_parameter",
            "tool_calls",
        ),
        ({"tools": [{}]}, "unsupported_parameter", "tools"),
        ({"documents": [{"text": "x"}]}, "unsupported_parameter", "documents"),
        ({"reasoning_effort": "high"}, "unsupported_parameter", "reasoning_effort"),
        ({"logprobs": 3}, "invalid_type", "true or false"),
        ({"top_logprobs": 3}, "invalid_value", "needs logprobs"),
        ({"max_completion_tokens": 0}, "integer_below_min_value", "max_completion_tokens"),
    ],
)
def test_a_chat_is_refused(fields: dict[str, Any], code: str, words: str) -> None:
    with pytest.raises(BadRequestError) as caught:
        chat(**fields)
    assert (caught.value.refusal.status, caught.value.refusal.code) == (400, code)
    assert words in caught.value.refusal.message


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff", b'{"n": NaN}', b'{"n": 1, "n": 2}', b"[" * 100_000])
def test_what_is_no_object_is_refused(body: bytes) -> None:
    with pytest.raises(BadRequestError) as caught:
        parse(body, chat=False, model=MODEL, random_seed=0)
    assert caught.value.refusal.code == "malformed_json"


def test_of_many_keys_the_one_that_is_given_twice_is_found_at_once() -> None:
    """Looking through all for each of them would take minutes, and the interpreter with it."""
    body = json.dumps(dict.fromkeys(map(str, range(200_000)))).removesuffix("}") + ', "199999": 1}'
    with pytest.raises(BadRequestError, match="The key '199999' is given twice in one object"):
        parse(body.encode(), chat=False, model=MODEL, random_seed=0)


def test_another_model_is_not_found() -> None:
    with pytest.raises(BadRequestError) as caught:
        parse(b'{"model": "large", "prompt": "a"}', chat=False, model=MODEL, random_seed=0)
    assert (caught.value.refusal.status, caught.value.refusal.code) == (404, "model_not_found")


@pytest.mark.parametrize("fields", [{"prompt": "hi"}, {"prompt": [1], "stop": "a"}])
def test_text_needs_a_tokenizer(fields: dict[str, Any]) -> None:
    with pytest.raises(BadRequestError, match="has no tokenizer"):
        completion(BARE, **fields)
