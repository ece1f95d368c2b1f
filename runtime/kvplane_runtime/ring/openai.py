"""A request's body, read strictly: what OpenAI clients may ask of this engine, and in which words the rest is refused.

What cannot be done is refused, never passed over in silence: a client that asks for penalties and does not get them has
a wrong answer without knowing it. Members that nobody knows are passed over, as everywhere. Strict means: strict JSON, and
integers where integers belong.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from kvplane_runtime.ring.admission import Refusal
from kvplane_runtime.ring.sampling import MAX_LOGPROBS, Sampling
from kvplane_runtime.ring.tokens import TemplateError, Tokenizer
from kvplane_runtime.strict_json import MalformedJsonError, decode, shown

MAX_TOKENS: Final = 10_000_000
MAX_OUTPUTS: Final = 64
MAX_PROMPTS: Final = 64
MAX_STOPS: Final = 16
MAX_STOP_LENGTH: Final = 1024
DEFAULT_COMPLETION_TOKENS: Final = 16
"""``max_tokens`` of /v1/completions where the field is absent, by OpenAI's reference and in vLLM."""
_SEED: Final = 2**63

_UNSUPPORTED: Final[Mapping[str, tuple[object, ...]]] = {
    "suffix": (None, ""),
    "echo": (None, False),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "repetition_penalty": (None, 1),
    "min_p": (None, 0),
    "logit_bias": (None, {}),
    "reasoning_effort": (None,),
    "documents": (None, []),
    "tools": (None, []),
    "functions": (None, []),
    "response_format": (None, {"type": "text"}),
    "structured_outputs": (None,),
    "guided_json": (None,),
    "guided_regex": (None,),
    "guided_choice": (None,),
    "guided_grammar": (None,),
    "min_tokens": (None, 0),
    "bad_words": (None, []),
    "allowed_token_ids": (None,),
    "truncate_prompt_tokens": (None,),
    "chat_template": (None,),
    "chat_template_kwargs": (None, {}),
    "add_generation_prompt": (None, True),
    "continue_final_message": (None, False),
    "skip_special_tokens": (None, True),
    "include_stop_str_in_output": (None, False),
    "prompt_logprobs": (None,),
    "use_beam_search": (None, False),
}
"""Members that would change the answer in OpenAI's API or in vLLM's, with the values that ask for nothing."""

N = TypeVar("N", int, float)


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What a request may name, and how its text becomes tokens."""

    name: str
    vocabulary: int
    """Token ids are below."""
    tokenizer: Tokenizer | None
    stop_ids: frozenset[int]
    """Tokens that end an output."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What a body asks for."""

    chat: bool
    prompts: tuple[list[int], ...]
    outputs: int
    """Of each prompt."""
    max_tokens: int | None
    sampling: Sampling
    stop: tuple[str, ...]
    stop_ids: frozenset[int]
    stream: bool
    include_usage: bool
    return_token_ids: bool
    """Whether choices carry ``token_ids``, as in vLLM."""


class BadRequestError(Exception):
    """The body is not as it must be; carries the refusal."""

    def __init__(self, code: str, message: str, param: str | None = None, *, status: int = 400) -> None:
        super().__init__(message)
        self.refusal = Refusal(status, code, message, param=param)


def parse(body: bytes, *, chat: bool, model: ServedModel, random_seed: int) -> Asked:
    """What ``body`` asks for at /v1/completions or /v1/chat/completions; raises BadRequestError.

    ``random_seed`` serves requests that have none. Takes a second for a million tokens: keep large bodies off the loop.
    """
    try:
        fields = decode(body)
    except MalformedJsonError as error:
        raise BadRequestError("malformed_json", str(error)) from error
    _check_model(fields, model)
    _check_unsupported(fields)
    logprobs = _chat_logprobs(fields) if chat else _integer(fields, "logprobs", 0, MAX_LOGPROBS)
    outputs = _integer(fields, "n", 1, MAX_OUTPUTS) or 1
    best_of = _integer(fields, "best_of", 1, MAX_OUTPUTS)
    if best_of not in (None, outputs):
        raise BadRequestError(
            "unsupported_parameter", f"best_of must be n, which is {outputs}; leave it out.", "best_of"
        )
    seed = _integer(fields, "seed", -_SEED, _SEED - 1)
    temperature = _number(fields, "temperature", 0.0, 2.0)
    top_p = _number(fields, "top_p", 0.0, 1.0)
    if top_p == 0:
        raise BadRequestError(
            "decimal_below_min_value", "top_p must be above 0, got 0; for greedy set temperature to 0.", "top_p"
        )
    prompts = (_chat_prompt(fields, model),) if chat else _prompts(fields, model)
    return Asked(
        chat=chat,
        prompts=prompts,
        outputs=outputs,
        max_tokens=_max_tokens(fields, chat=chat),
        sampling=Sampling(
            temperature=1.0 if temperature is None else temperature,
            top_p=1.0 if top_p is None else top_p,
            top_k=max(0, _integer(fields, "top_k", -1, model.vocabulary) or 0),
            seed=random_seed if seed is None else seed,
            logprobs=logprobs,
        ),
        stop=_stop(fields, model),
        stop_ids=_stop_ids(fields, model),
        stream=_boolean(fields, "stream") or False,
        include_usage=_include_usage(fields),
        return_token_ids=_boolean(fields, "return_token_ids") or False,
    )


def _check_model(fields: Mapping[str, Any], model: ServedModel) -> None:
    name = fields.get("model")
    if name is None:
        return
    if not isinstance(name, str):
        raise _wrong_type("model", "a string", name)
    if name != model.name:
        raise BadRequestError(
            "model_not_found",
            f"The model {name[:128]!r} is not served here; this is {model.name!r}.",
            "model",
            status=404,
        )


def _check_unsupported(fields: Mapping[str, Any]) -> None:
    for name, harmless in _UNSUPPORTED.items():
        value = fields.get(name)
        if not any(value == nothing and isinstance(value, bool) == isinstance(nothing, bool) for nothing in harmless):
            raise BadRequestError(
                "unsupported_parameter", f"{name} is not supported by this engine; leave it out.", name
            )


def _chat_logprobs(fields: Mapping[str, Any]) -> int | None:
    wanted = _boolean(fields, "logprobs")
    top = _integer(fields, "top_logprobs", 0, MAX_LOGPROBS)
    if top is not None and not wanted:
        raise BadRequestError("invalid_value", "top_logprobs needs logprobs to be true; set it.", "top_logprobs")
    return (top or 0) if wanted else None


def _max_tokens(fields: Mapping[str, Any], *, chat: bool) -> int | None:
    value = _integer(fields, "max_tokens", 1, MAX_TOKENS)
    if chat:
        newer = _integer(fields, "max_completion_tokens", 1, MAX_TOKENS)
        return value if newer is None else newer
    return DEFAULT_COMPLETION_TOKENS if value is None else value


def _prompts(fields: Mapping[str, Any], model: ServedModel) -> tuple[list[int], ...]:
    wanted = "a string, a list of token ids, or a list of these"
    prompt = fields.get("prompt")
    if isinstance(prompt, str):
        return (_encoded(prompt, model),)
    if not isinstance(prompt, list):
        raise _wrong_type("prompt", wanted, prompt)
    if not prompt:
        raise _empty("prompt")
    kinds = set(map(type, prompt))
    if kinds == {int}:
        return (_checked(prompt, "prompt", model),)
    if not kinds <= {str, list}:
        raise _wrong_type("prompt", wanted, prompt)
    if len(prompt) > MAX_PROMPTS:
        raise BadRequestError(
            "array_above_max_length",
            f"prompt must be at most {MAX_PROMPTS} prompts, got {len(prompt)}; send several requests instead.",
            "prompt",
        )
    return tuple(_encoded(item, model) if isinstance(item, str) else _ids(item, model) for item in prompt)


def _ids(item: list[Any], model: ServedModel) -> list[int]:
    if not item:
        raise _empty("prompt")
    if set(map(type, item)) != {int}:
        raise _wrong_type("prompt", "a string, a list of token ids, or a list of these", item)
    return _checked(item, "prompt", model)


def _checked(ids: list[int], name: str, model: ServedModel) -> list[int]:
    if min(ids) < 0 or max(ids) >= model.vocabulary:
        wrong = min(ids) if min(ids) < 0 else max(ids)
        raise BadRequestError(
            "invalid_token_id",
            f"{name} has the token id {shown(wrong)}; the ids of {model.name} are 0 to {model.vocabulary - 1}.",
            name,
        )
    return ids


def _encoded(text: str, model: ServedModel) -> list[int]:
    if model.tokenizer is None:
        raise BadRequestError(
            "no_tokenizer", f"{model.name} has no tokenizer; send the prompt as a list of token ids.", "prompt"
        )
    tokens = model.tokenizer.encode(_unicode(text, "prompt"))
    if not text or not tokens:
        raise _empty("prompt")
    return _checked(tokens, "prompt", model)


def _chat_prompt(fields: Mapping[str, Any], model: ServedModel) -> list[int]:
    messages = fields.get("messages")
    if not isinstance(messages, list) or set(map(type, messages)) - {dict}:
        raise _wrong_type("messages", "a list of objects", messages)
    if not messages:
        raise _empty("messages")
    if model.tokenizer is None:
        raise BadRequestError(
            "no_tokenizer", f"{model.name} has no tokenizer; send token ids to /v1/completions.", "messages"
        )
    try:
        tokens = model.tokenizer.chat([_message(number, message) for number, message in enumerate(messages)])
    except TemplateError as error:
        raise BadRequestError("invalid_chat", str(error), "messages") from error
    if not tokens:
        raise _empty("messages")
    return _checked(tokens, "messages", model)


def _message(number: int, message: Mapping[str, Any]) -> dict[str, Any]:
    where = f"messages[{number}]"
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise _wrong_type(f"{where}.role", "a role, such as user", role)
    if message.get("tool_calls"):
        raise BadRequestError(
            "unsupported_parameter", f"{where}.tool_calls are not supported by this engine.", "messages"
        )
    return {**message, "content": _content(where, message.get("content"))}


def _content(where: str, content: object) -> str:
    if isinstance(content, str):
        return _unicode(content, f"{where}.content")
    if not isinstance(content, list):
        raise _wrong_type(f"{where}.content", "a string, or a list of text parts", content)
    texts = []
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise BadRequestError(
                "unsupported_content",
                f"{where}.content has a part that is no text; this engine reads text only.",
                "messages",
            )
        texts.append(_unicode(part["text"], f"{where}.content"))
    return "".join(texts)


def _unicode(text: str, name: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRequestError(
            "invalid_unicode", f"{name} has half of a surrogate pair at character {error.start}; correct it.", name
        ) from error
    return text


def _stop(fields: Mapping[str, Any], model: ServedModel) -> tuple[str, ...]:
    stop = fields.get("stop")
    if stop is None:
        return ()
    found = [stop] if isinstance(stop, str) else stop
    if not isinstance(found, list) or not all(isinstance(item, str) for item in found):
        raise _wrong_type("stop", "a string, or a list of strings", stop)
    if len(found) > MAX_STOPS or any(not 0 < len(item) <= MAX_STOP_LENGTH for item in found):
        raise BadRequestError(
            "invalid_value",
            f"stop must be at most {MAX_STOPS} strings of 1 to {MAX_STOP_LENGTH} characters; correct it.",
            "stop",
        )
    if found and model.tokenizer is None:
        raise BadRequestError("no_tokenizer", f"{model.name} has no tokenizer; use stop_token_ids.", "stop")
    return tuple(found)


def _stop_ids(fields: Mapping[str, Any], model: ServedModel) -> frozenset[int]:
    more = fields.get("stop_token_ids")
    if more is None:
        more = []
    if not isinstance(more, list) or set(map(type, more)) - {int}:
        raise _wrong_type("stop_token_ids", "a list of token ids", more)
    usual = frozenset() if _boolean(fields, "ignore_eos") else model.stop_ids
    return usual | frozenset(_checked(more, "stop_token_ids", model) if more else ())


def _include_usage(fields: Mapping[str, Any]) -> bool:
    options = fields.get("stream_options")
    if options is None:
        return False
    if not isinstance(options, dict):
        raise _wrong_type("stream_options", "an object", options)
    if not fields.get("stream"):
        raise BadRequestError("invalid_value", "stream_options needs stream to be true; set it.", "stream_options")
    return _boolean(options, "include_usage", "stream_options.") or False


def _integer(fields: Mapping[str, Any], name: str, lowest: int, highest: int) -> int | None:
    value = fields.get(name)
    if value is None:
        return None
    bounds = f"an integer from {lowest} to {highest}"
    if type(value) is not int:
        raise _wrong_type(name, bounds, value)
    return _bounded(name, value, lowest, highest, bounds=bounds, kind="integer")


def _number(fields: Mapping[str, Any], name: str, lowest: float, highest: float) -> float | None:
    value = fields.get(name)
    if value is None:
        return None
    bounds = f"a number from {lowest:g} to {highest:g}"
    if type(value) not in (int, float) or (isinstance(value, float) and not math.isfinite(value)):
        raise _wrong_type(name, bounds, value)
    return float(_bounded(name, value, lowest, highest, bounds=bounds, kind="decimal"))


def _bounded(name: str, value: N, lowest: float, highest: float, *, bounds: str, kind: str) -> N:
    if not lowest <= value <= highest:
        code = f"{kind}_below_min_value" if value < lowest else f"{kind}_above_max_value"
        raise BadRequestError(code, f"{name} must be {bounds}, got {shown(value)}; correct it.", name)
    return value


def _boolean(fields: Mapping[str, Any], name: str, inside: str = "") -> bool | None:
    value = fields.get(name)
    if value is not None and not isinstance(value, bool):
        raise _wrong_type(inside + name, "true or false", value)
    return value


def _empty(name: str) -> BadRequestError:
    return BadRequestError("empty_prompt", f"{name} is empty; the model needs at least one token to begin with.", name)


def _wrong_type(name: str, wanted: str, value: object) -> BadRequestError:
    return BadRequestError("invalid_type", f"{name} must be {wanted}, got {shown(value)}; correct it.", name)
