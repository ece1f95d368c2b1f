"""What the tests of rings, and the benchmark of their recovery, make of a streamed answer."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler

import pytest

from e2e.rings.drill import Work
from e2e.rings.streams import Asking, ask, ask_until_answered, longest_pause
from e2e.serving import serve_threads

TOKEN = b'data: {"choices": [{"index": 0, "text": "x", "token_ids": [%d]}]}\n\n'
USAGE = b'data: {"choices": [], "usage": {"prompt_tokens": 3, "prompt_tokens_details": {"cached_tokens": 2}}}\n\n'
DONE = b"data: [DONE]\n\n"
WHOLE = (b": prefill 1/3\n\n", TOKEN % 7, TOKEN % 8, USAGE, DONE)


@contextmanager
def serving(*answers: tuple[int, tuple[bytes, ...]]) -> Iterator[tuple[str, list[dict[str, object]]]]:
    """host:port of a server that gives these answers (status, pieces), and the bodies that it was sent."""
    left, bodies = list(answers), []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            status, pieces = left.pop(0)
            self.send_response(status)
            self.end_headers()
            for piece in pieces:
                self.wfile.write(piece)

        def log_message(self, *_: object) -> None:
            pass

    with serve_threads(Handler, host="127.0.0.1", port=0) as where:
        yield where, bodies


def test_an_answer_is_its_tokens_and_their_moments() -> None:
    with serving((200, WHOLE)) as (where, bodies):
        answer = ask(where, "m", [1, 2, 3], count=2)
    assert (answer.tokens, answer.cached_tokens, answer.error) == ([7, 8], 2, None)
    assert len(answer.at) == 2
    assert answer.at == sorted(answer.at)
    assert bodies[0]["prompt"] == [1, 2, 3]
    assert bodies[0]["temperature"] == 0


@pytest.mark.parametrize(
    ("status", "pieces", "error"),
    [
        (200, (TOKEN % 7,), "without [DONE]"),
        (200, (TOKEN % 7, DONE), "1 tokens came of 2"),
        (200, (TOKEN % 7, b'data: {"error": {"message": "lost"}}\n\n', DONE), "lost"),
        (200, (TOKEN % 7, b'data: {"choi'), "Error"),
        (503, (b'{"error": 1}',), "503"),
    ],
)
def test_what_is_not_whole_says_why(status: int, pieces: tuple[bytes, ...], error: str) -> None:
    with serving((status, pieces)) as (where, _):
        answer = ask(where, "m", [1], count=2)
    assert error in str(answer.error)
    assert answer.tokens == ([7] if status == 200 else [])


def test_nobody_there_is_an_error_too() -> None:
    with serving() as (where, _):
        pass
    assert "Refused" in str(ask(where, "m", [1], count=2).error)


def test_a_client_asks_until_it_is_answered() -> None:
    with serving((503, ()), (200, (TOKEN % 7,)), (200, WHOLE)) as (where, bodies):
        answer = ask_until_answered(where, "m", [1], count=2, seconds=60)
    assert answer.error is None
    assert answer.tokens == [7, 8]
    assert len(bodies) == 3


def test_an_answer_on_its_way_is_waited_for() -> None:
    with serving((200, WHOLE)) as (where, _), Asking(where, "m", [1], count=2) as asking:
        asking.await_tokens(2)
        assert asking.finish().error is None


def test_an_answer_that_ends_early_is_not_waited_for() -> None:
    with (
        serving((200, (TOKEN % 7,))) as (where, _),
        Asking(where, "m", [1], count=2) as asking,
        pytest.raises(RuntimeError, match="ended after 1 tokens"),
    ):
        asking.await_tokens(2)


def test_the_longest_pause_is_the_one_of_the_fault() -> None:
    at = [0.0, 0.1, 0.2, 1.4, 1.5, 3.5, 3.6]
    lost = longest_pause(at, after=0.25, begun_by=0.75)
    assert (lost.began, lost.ended) == (0.2, 1.4)
    assert lost.seconds == pytest.approx(1.2)
    assert longest_pause(at, after=0.25).seconds == pytest.approx(2.0), "a rank that joins later makes a pause too"
    assert longest_pause(at, after=3.5).ended == 3.6


def test_a_fault_after_the_last_token_has_no_pause() -> None:
    with pytest.raises(ValueError, match="No token came after the fault"):
        longest_pause([0.0, 0.1], after=0.1)


def test_the_same_seed_asks_the_same() -> None:
    work = Work(prompt_tokens=50, output_tokens=10)
    assert work.prompt(3) == work.prompt(3)
    assert work.prompt(3)[:10] != work.prompt(4)[:10]
    assert len(work.prompt(3)) == 50
    with pytest.raises(ValueError, match="4097 tokens, the model takes 4096"):
        Work(prompt_tokens=4000, output_tokens=97)
