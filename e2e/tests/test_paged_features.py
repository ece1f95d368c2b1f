"""What a paged engine can do beyond plain decoding, on the real vLLM with the arguments that the operator renders.

Nothing else asks the service meanwhile, so its counters say exactly what one request did. The engine refreshes them with
each step and the sidecar reads them once a second.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from e2e.stack import Stack
from e2e.tests import sidecar
from e2e.tests.client import address, complete, tokens
from e2e.tests.conftest import CHAT_BLOCKS

BLOCK_TOKENS = 32
LOOK_SECONDS = 0.3
"""More than a look takes: one that was under way already does not count."""


@pytest.fixture
def where(stack: Stack, chat: str) -> str:
    return address(stack, chat, "chat")


@pytest.fixture
def ip(stack: Stack, chat: str) -> str:
    return sidecar.pod_ip(stack, chat, "chat")


@contextmanager
def _growing(ip: str, metric: str, by: Callable[[float], bool], **labels: str) -> Iterator[None]:
    """A counter, unknown and so absent before as it may be, grows as it should by what is done in the context."""

    def now() -> float:
        try:
            return sidecar.value(ip, metric, **labels)
        except KeyError:
            return 0.0

    _await_look(ip)
    before = now()
    yield
    sidecar.eventually(lambda: by(now() - before), seconds=10, otherwise=lambda: f"{metric} grew by {now() - before}")


def _await_look(ip: str) -> None:
    """What was asked before is in the sidecar's figures: it has looked at its engine since."""
    begin = time.monotonic()

    def has_looked() -> bool:
        now = time.monotonic()  # before the question: an answer that comes late makes no look younger
        return bool(sidecar.state(ip)["signalAgeSeconds"] < now - begin - LOOK_SECONDS)

    sidecar.eventually(has_looked, seconds=20, otherwise=lambda: f"no look at the engine: {sidecar.state(ip)}")


def test_a_shared_prompt_is_found_in_the_cache(where: str, ip: str) -> None:
    prompt = tokens(320)
    complete(where, "chat", prompt, max_tokens=1)
    with _growing(ip, "kvplane_prefix_cache_hits_tokens_total", lambda hits: hits == 320 - BLOCK_TOKENS):
        complete(where, "chat", prompt, max_tokens=1)  # the last block is computed for its first token


def test_n_outputs_share_one_prompt(where: str, ip: str) -> None:
    """Four times the prompt would be more than the cache holds: counted so, it would be refused as one that never fits."""
    length = CHAT_BLOCKS * BLOCK_TOKENS // 3
    answers: list[dict[str, Any]] = []
    state: dict[str, Any] = {}
    seen = threading.Event()

    def ask() -> None:
        """One after another: a fast machine is done with one before the sidecar has looked at its engine."""
        while not seen.is_set():
            answers.append(
                complete(where, "chat", tokens(length), n=4, temperature=0.8, max_tokens=200, ignore_eos=True)
            )

    def runs() -> bool:
        """All in one answer of the sidecar, so that both parts are of a time at which such a request ran."""
        state.update(sidecar.state(ip))
        return bool(state["engine"]["requestsRunning"] == 4 and state["admission"]["running"])

    with _growing(ip, "kvplane_generation_tokens_total", lambda output: output == len(answers) * 4 * 200):
        asking = threading.Thread(target=ask)
        asking.start()
        try:
            sidecar.eventually(runs, seconds=20, otherwise=lambda: state)
        finally:
            seen.set()
            asking.join()
    admission = state["admission"]
    assert admission["running"] == 1
    assert length + 4 * 16 < admission["reservedTokens"] < length + 4 * (200 + 2 * BLOCK_TOKENS)
    for answer in answers:
        assert answer["usage"]["prompt_tokens"] == length
        assert answer["usage"]["completion_tokens"] == 4 * 200


def test_ngram_speculation_accepts_tokens(where: str, ip: str) -> None:
    with (
        _growing(ip, "kvplane_spec_decode_draft_tokens_total", lambda proposed: proposed > 0),
        _growing(ip, "kvplane_spec_decode_accepted_tokens_total", lambda accepted: accepted > 0),
    ):
        complete(where, "chat", "again and " * 40, max_tokens=100, ignore_eos=True)


def test_block_size_is_known_and_what_it_wastes(where: str, ip: str) -> None:
    assert sidecar.value(ip, "kvplane_kv_cache_block_size_tokens") == BLOCK_TOKENS

    def wasted() -> float | None:
        """Unknown until the next look at the engine, where a request ended during the last one."""
        try:
            return sidecar.value(ip, "kvplane_kv_cache_tail_waste_tokens")
        except KeyError:
            return None

    sidecar.eventually(lambda: wasted() == 0, seconds=10, otherwise=lambda: f"nothing runs, and {wasted()} are wasted")
    seen: set[float] = set()
    asking = threading.Thread(target=complete, args=(where, "chat"), kwargs={"max_tokens": 600, "ignore_eos": True})
    asking.start()
    while asking.is_alive():
        if (found := wasted()) is not None:
            seen.add(found)
    assert max(seen) > 0
    assert max(seen) < BLOCK_TOKENS, "one sequence leaves less than one block unused"


def test_evictions_are_counted_one_by_one(where: str, ip: str) -> None:
    """More prompts than the cache holds, each once: their blocks are stored, and the oldest go."""
    prompts, each = 6, CHAT_BLOCKS * BLOCK_TOKENS // 3
    surplus = prompts * (each // BLOCK_TOKENS) - CHAT_BLOCKS
    with _growing(ip, "kvplane_kv_block_evictions_total", lambda blocks: blocks >= surplus, source="exact"):
        for _ in range(prompts):
            complete(where, "chat", tokens(each), max_tokens=1)
    blocks: dict[str, float] = {}

    def is_cached() -> bool:
        """What is cached is told by events of the engine's, which may come a look later than the end of the request."""
        blocks.clear()
        blocks.update(sidecar.by_label(ip, "kvplane_kv_cache_blocks", "state"))
        return blocks["used"] == 0 and blocks.get("cached", 0.0) > 0.9 * CHAT_BLOCKS

    sidecar.eventually(is_cached, seconds=10, otherwise=lambda: blocks)
    assert blocks.keys() == {"used", "cached", "free"}
    assert sum(blocks.values()) == CHAT_BLOCKS


def test_evicted_kv_comes_back_through_the_connector(where: str, ip: str) -> None:
    """kvTransfer: the prompt's KV is gone from the cache, and is loaded instead of computed."""
    prompt = tokens(320)
    complete(where, "chat", prompt, max_tokens=1)
    for _ in range(6):
        complete(where, "chat", tokens(CHAT_BLOCKS * BLOCK_TOKENS // 3), max_tokens=1)
    with _growing(ip, "kvplane_external_prefix_cache_hits_tokens_total", lambda hits: hits > 0):
        complete(where, "chat", prompt, max_tokens=1)
