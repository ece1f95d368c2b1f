"""What a generation request asks for, read from its body strictly and once.

Admission needs the size of the prompt, the number of outputs and their longest length before an engine sees the request;
what is wrong in these fields is refused here, in the words that OpenAI clients know. Other fields are the engine's business
and pass unread. The body goes to the engine as it came, with one edit: a streamed request that says nothing of
``stream_options`` gets ``include_usage``, as its answer then ends with the exact counts (:mod:`sse` takes that event out
again). A client that sends ``stream_options`` itself is left alone: what its other members mean is the engine's to say.

Strict means: UTF-8, no NaN, no key twice in one object (readers differ on which one counts), integers where integers
belong (``1.0``, ``"1"`` and ``true`` are none), bounded nesting.
"""

import enum
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final
from urllib.parse import unquote_to_bytes

from kvplane_runtime.proxy.gate import Refusal
from kvplane_runtime.proxy.http1 import RequestHead
from kvplane_runtime.strict_json import TOO_DEEP, MalformedJsonError, decode, shown

MAX_TOKENS: Final = 10_000_000
"""Highest ``max_tokens`` taken: more than any context, and small enough that sums of it stay exact everywhere."""
MAX_OUTPUTS: Final = 64
"""Most outputs of one prompt: each is a sequence of its own in the engine."""
MAX_PROMPTS: Final = 2048
"""Most prompts in one request, OpenAI's bound of a batch."""
DEFAULT_COMPLETION_TOKENS: Final = 16
"""``max_tokens`` of /v1/completions where the field is absent, by OpenAI's reference and in vLLM."""
MAX_EDITED_BYTES: Final = 4 * 1024 * 1024
"""Largest body that is edited: the edit is a copy, which stops the event loop for some 0.3 ms a MiB."""


class Endpoint(enum.Enum):
    """Where an engine generates. Only of completions and chats is the prompt understood here; for the others the whole body
    is taken for it, which is never too little.
    """

    COMPLETION = enum.auto()
    CHAT = enum.auto()
    RESPONSES = enum.auto()
    MESSAGES = enum.auto()
    OTHER = enum.auto()


_PATHS: Final = {
    b"/v1/completions": Endpoint.COMPLETION,
    b"/v1/chat/completions": Endpoint.CHAT,
    b"/v1/responses": Endpoint.RESPONSES,
    b"/v1/messages": Endpoint.MESSAGES,
    b"/invocations": Endpoint.OTHER,
    b"/inference/v1/generate": Endpoint.OTHER,
}


@dataclass(frozen=True, slots=True)
class Prompt:
    """Size of one prompt."""

    text_bytes: int
    """UTF-8 bytes of the text that becomes the prompt; 0 for a list of token ids."""
    tokens: int | None = None
    """Exact, where the prompt is a list of token ids."""


@dataclass(frozen=True, slots=True)
class Generation:
    """What a request would cost."""

    endpoint: Endpoint
    prompts: tuple[Prompt, ...]
    outputs: int
    """Outputs of each prompt: the greater of ``n`` and ``best_of``."""
    max_tokens: int | None
    """Most tokens of each output; None: as many as the engine's context holds."""
    media: int
    """Images, sounds and videos in the prompts, whose size is not in ``text_bytes``."""
    stream: bool
    include_usage: bool | None
    """``stream_options.include_usage``; None: nothing is said of ``stream_options``, so that it may be added."""


class _BadRequestError(Exception):
    """A field is not as it must be; carries the refusal."""

    def __init__(self, code: str, message: str, param: str | None) -> None:
        super().__init__(message)
        self.refusal = Refusal(400, code, message, param=param)


def endpoint(head: RequestHead) -> Endpoint | None:
    """What a request generates at; None where it does not generate.

    Paths are compared as servers do: without query, percent-decoded, also where the target is an absolute URL.
    """
    if head.method != b"POST":
        return None
    path = head.target.partition(b"?")[0]
    if not path.startswith(b"/"):
        path = b"/" + path.partition(b"://")[2].partition(b"/")[2]
    return _PATHS.get(unquote_to_bytes(path) if b"%" in path else path)


def parse(endpoint: Endpoint, body: bytes | bytearray) -> Generation | Refusal:
    """What ``body`` asks for at ``endpoint``, or the 400 that says what is wrong with it.

    It takes 5 to 50 ns a byte without a pause: :mod:`reader` keeps large bodies off the event loop.
    """
    try:
        return _generation(endpoint, decode(body), len(body))
    except MalformedJsonError as error:
        return Refusal(400, "malformed_json", str(error))
    except _BadRequestError as error:
        return error.refusal
    except RecursionError:  # of what was decoded
        return Refusal(400, "malformed_json", TOO_DEEP)


def with_usage(body: bytes | bytearray, generation: Generation) -> bytes | None:
    """``body``, which ``parse`` took, with ``stream_options.include_usage`` added; None where it goes as it came.

    Beside the added member every byte stays. A ``"stream_options": null`` of the outermost object gives its place, where there is
    no other. A body over ``MAX_EDITED_BYTES`` goes as it came.
    """
    if len(body) > MAX_EDITED_BYTES:
        return None
    understood = generation.endpoint in (Endpoint.COMPLETION, Endpoint.CHAT)
    if not understood or not generation.stream or generation.include_usage is not None:
        return None
    nulls = [match.span() for match in _NULL_OPTIONS.finditer(body)]
    if len(nulls) > 1:
        return None
    if nulls and not _is_outermost(body, nulls[0][0]):  # it is a tool's, or another member's: part of the prompt
        nulls = []
    first = body.index(b"{") + 1
    begin, end = nulls[0] if nulls else (first, first)
    whole = memoryview(body)
    return b"".join((whole[:begin], _OPTIONS, b"" if nulls else b",", whole[end:]))


_OPTIONS: Final = b'"stream_options":{"include_usage":true}'
_NULL_OPTIONS: Final = re.compile(rb'"stream_options"\s*:\s*null')
_STRING: Final = re.compile(rb'"(?:[^"\\]|\\.)*+"')


def _is_outermost(body: bytes | bytearray, at: int) -> bool:
    """Whether the key at this offset of well-formed JSON is one of the outermost object's."""
    before = _STRING.sub(b"", memoryview(body)[:at])
    return before.count(b"{") + before.count(b"[") - before.count(b"}") - before.count(b"]") == 1


def _generation(endpoint: Endpoint, fields: dict[str, object], size: int) -> Generation:
    media = 0
    max_tokens = _integer(fields, "max_tokens", 0, MAX_TOKENS, cure="leave it out for as many as fit")
    match endpoint:
        case Endpoint.COMPLETION:
            prompts = _prompts(fields.get("prompt"), size)
            if "max_tokens" not in fields:
                max_tokens = DEFAULT_COMPLETION_TOKENS
        case Endpoint.CHAT:
            text_bytes, media = _chat(fields)
            prompts = (Prompt(text_bytes),)
        case _:
            prompts = (Prompt(size),)
    if endpoint is not Endpoint.COMPLETION:
        for name in ("max_completion_tokens", "max_output_tokens"):
            newer = _integer(fields, name, 0, MAX_TOKENS, cure="leave it out for as many as fit")
            max_tokens = max_tokens if newer is None else newer
    outputs = [
        _integer(fields, name, 1, MAX_OUTPUTS, cure="send several requests instead") or 1 for name in ("n", "best_of")
    ]
    return Generation(
        endpoint=endpoint,
        prompts=prompts,
        outputs=max(outputs),
        max_tokens=max_tokens,
        media=media,
        stream=_boolean(fields, "stream") or False,
        include_usage=_include_usage(fields),
    )


def _prompts(prompt: object, size: int) -> tuple[Prompt, ...]:
    if prompt is None:  # embeddings, or an error that the engine explains
        return (Prompt(size),)
    if isinstance(prompt, str):
        return (Prompt(_utf8_bytes(prompt)),)
    if isinstance(prompt, list):
        kinds = set(map(type, prompt))
        if kinds == {int}:
            return (Prompt(0, tokens=len(prompt)),)
        if len(prompt) > MAX_PROMPTS:
            raise _BadRequestError(
                "array_above_max_length",
                f"prompt must be at most {MAX_PROMPTS} prompts, got {len(prompt)}; send several requests instead.",
                "prompt",
            )
        if prompt and kinds <= {str, list}:
            return tuple(_prompt(item) for item in prompt)
    raise _wrong_type("prompt", "a string, a list of token ids, or a list of these", prompt)


def _prompt(item: object) -> Prompt:
    if isinstance(item, str):
        return Prompt(_utf8_bytes(item))
    if isinstance(item, list) and set(map(type, item)) <= {int}:
        return Prompt(0, tokens=len(item))
    raise _wrong_type("prompt", "a string, a list of token ids, or a list of these", item)


def _chat(fields: dict[str, object]) -> tuple[int, int]:
    """UTF-8 bytes of all strings in messages, tools and documents, and the number of media parts.

    Keys count too: tools and documents become part of the prompt as JSON, and for messages the keys stand in for what the
    chat template writes around each.
    """
    messages = fields.get("messages", [])
    if not isinstance(messages, list) or set(map(type, messages)) - {dict}:
        raise _wrong_type("messages", "a list of objects", messages)
    media: list[object] = []
    text_bytes = sum(_text_bytes(fields.get(name), media) for name in ("messages", "tools", "functions", "documents"))
    return text_bytes, len(media)


_MEDIA: Final = frozenset(
    (
        "image_url",
        "input_image",
        "image_pil",
        "image_embeds",
        "input_audio",
        "audio_url",
        "audio_embeds",
        "video_url",
        "file",
    )
)
"""Keys that hold an image, a sound or a video, in OpenAI's API and in vLLM's."""


def _text_bytes(value: object, media: list[object]) -> int:
    if isinstance(value, str):
        return _utf8_bytes(value)
    if isinstance(value, dict):
        if not _MEDIA.isdisjoint(value):
            media.append(value)
            return 0
        return _all_text_bytes(value, media) + _all_text_bytes(value.values(), media)
    if isinstance(value, list):
        return _all_text_bytes(value, media)
    return 0


def _all_text_bytes(values: Iterable[object], media: list[object]) -> int:
    return sum(_text_bytes(value, media) for value in values)


def _utf8_bytes(text: str) -> int:
    # JSON may escape half of a surrogate pair, which has no UTF-8; its three bytes are what a replacement would have.
    return len(text) if text.isascii() else len(text.encode(errors="surrogatepass"))


def _integer(fields: dict[str, object], name: str, lowest: int, highest: int, *, cure: str) -> int | None:
    value = fields.get(name)
    if value is None:
        return None
    bounds = f"an integer from {lowest} to {highest}"
    if type(value) is not int:
        raise _wrong_type(name, bounds, value)
    if not lowest <= value <= highest:
        code = "integer_below_min_value" if value < lowest else "integer_above_max_value"
        raise _BadRequestError(code, f"{name} must be {bounds}, got {shown(value)}; {cure}.", name)
    return value


def _boolean(fields: dict[str, object], name: str, inside: str = "") -> bool | None:
    value = fields.get(name)
    if value is not None and not isinstance(value, bool):
        raise _wrong_type(inside + name, "true or false", value)
    return value


def _include_usage(fields: dict[str, object]) -> bool | None:
    options = fields.get("stream_options")
    if options is None:
        return None
    if not isinstance(options, dict):
        raise _wrong_type("stream_options", "an object", options)
    return _boolean(options, "include_usage", "stream_options.") or False


def _wrong_type(name: str, wanted: str, value: object) -> _BadRequestError:
    return _BadRequestError("invalid_type", f"{name} must be {wanted}, got {shown(value)}; correct it.", name)
