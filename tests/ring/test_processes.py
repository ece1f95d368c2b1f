"""Drills on real processes: whatever is killed or stands still, the answer has the tokens of the unsharded model."""

import copy
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ring.processes import LIMIT_SECONDS, Processes, Stream, processes
from tests.ring.tiny import SERVED, VOCABULARY, Tiny, build, configure, wrong

LONG = 3900
"""Tokens of a prompt; the model's context is hardly longer."""
SLICE_SECONDS = "0.05"
"""A twentieth of the default: a small model computes a long prompt in about a second, and it is to take many windows."""


@pytest.fixture(scope="module")
def model() -> Any:
    return build(SERVED[0])


@pytest.fixture(scope="module")
def ring(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    folder = tmp_path_factory.mktemp("tiny")
    model.save_pretrained(folder)
    with processes(3, folder, tmp_path_factory.mktemp("logs"), KVPLANE_RING_SLICE_SECONDS=SLICE_SECONDS) as started:
        started.formed()
        yield started


def prompt(length: int, seed: int) -> list[int]:
    return torch.randint(3, VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def under_way(ring: Processes, stream: Stream, tokens: int) -> None:
    """Waits until so many tokens have come, and makes sure that there are more to come."""
    ring.until(lambda: len(stream.tokens) >= tokens or stream.over.is_set(), seconds=60)
    assert not stream.over.is_set(), (stream.error, stream.broken)


def in_prefill(ring: Processes, stream: Stream) -> None:
    """Waits until some of its prompt is computed, and makes sure that there is more to come."""
    ring.until(lambda: stream.prefilled > 0 or stream.over.is_set(), seconds=60)
    assert (stream.tokens, stream.over.is_set()) == ([], False), (stream.error, stream.broken)


def whole(stream: Stream, model: Any, tokens: list[int], count: int) -> None:
    """The answer to a prompt came to its end, and is what the unsharded model says."""
    assert stream.over.wait(120)
    assert (stream.error, stream.broken) == (None, None)
    assert len(stream.tokens) == count
    assert wrong(model, tokens, stream.tokens) == []


def test_a_rank_killed_in_generation(ring: Processes, model: Any) -> None:
    tokens = prompt(500, 1)
    refilled = ring.ring()["refilledTokensTotal"]
    stream = ring.ask(tokens, 150)
    under_way(ring, stream, 10)
    ring.signal(2, signal.SIGKILL)
    whole(stream, model, tokens, 150)
    ring.formed(0, 1)
    share = (ring.ring()["refilledTokensTotal"] - refilled) / (500 + 150)
    assert share <= 1.3 / 3
    ring.start(2)
    ring.formed()


def test_a_rank_that_stands_still_comes_back_with_its_kv(ring: Processes, model: Any) -> None:
    tokens = prompt(500, 2)
    done = ring.ask(tokens, 20)
    whole(done, model, tokens, 20)
    refilled, before = ring.ring()["refilledTokensTotal"], ring.ring()["epoch"]
    ring.signal(1, signal.SIGSTOP)
    ring.formed(0, 2, seconds=20)
    ring.signal(1, signal.SIGCONT)
    ring.formed()
    assert ring.ring()["epoch"] > before
    stream = ring.ask(tokens, 150)
    whole(stream, model, tokens, 150)
    assert ring.ring()["refilledTokensTotal"] == refilled
    assert stream.usage["prompt_tokens_details"]["cached_tokens"] >= 400


def test_a_rank_that_stands_still_in_generation(ring: Processes, model: Any) -> None:
    tokens = prompt(400, 3)
    stream = ring.ask(tokens, 200)
    under_way(ring, stream, 10)
    ring.signal(2, signal.SIGSTOP)
    whole(stream, model, tokens, 200)
    ring.signal(2, signal.SIGCONT)
    ring.formed()


def rank_0_stands_still(ring: Processes) -> None:
    ring.signal(0, signal.SIGSTOP)
    time.sleep(LIMIT_SECONDS + 1.5)  # a hang has no virtual time; the workers have given up on rank 0 by then
    ring.signal(0, signal.SIGCONT)


def test_rank_0_stands_still_in_generation(ring: Processes, model: Any) -> None:
    tokens = prompt(400, 4)
    stream = ring.ask(tokens, 200)
    under_way(ring, stream, 10)
    rank_0_stands_still(ring)
    whole(stream, model, tokens, 200)
    ring.formed()


def test_rank_0_stands_still_in_prefill(ring: Processes, model: Any) -> None:
    tokens = prompt(LONG, 11)
    stream = ring.ask(tokens, 20)
    in_prefill(ring, stream)
    rank_0_stands_still(ring)
    whole(stream, model, tokens, 20)
    ring.formed()


def test_two_losses_in_a_row(ring: Processes, model: Any) -> None:
    tokens = prompt(500, 5)
    stream = ring.ask(tokens, 200)
    under_way(ring, stream, 10)
    ring.signal(1, signal.SIGKILL)
    ring.signal(2, signal.SIGKILL)
    ring.start(1, 2)
    whole(stream, model, tokens, 200)
    ring.formed()


def test_the_same_rank_is_killed_twice_in_a_row(ring: Processes, model: Any) -> None:
    """Both times one answer is under way, and goes on; in the end its client leaves, as how much comes meanwhile is open."""
    tokens = prompt(300, 12)
    stream = ring.ask(tokens, 3500)
    for _ in range(2):
        under_way(ring, stream, len(stream.tokens) + 10)
        ring.signal(1, signal.SIGKILL)
        ring.formed(0, 2)
        ring.start(1)
        ring.formed()
    under_way(ring, stream, len(stream.tokens) + 10)
    stream.leave = 0
    assert stream.over.wait(60)
    assert (stream.error, stream.broken) == (None, None)
    assert wrong(model, tokens, stream.tokens) == []


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_worker_is_lost_in_prefill(ring: Processes, model: Any, number: signal.Signals) -> None:
    tokens = prompt(LONG, 100 + number)
    stream = ring.ask(tokens, 20)
    in_prefill(ring, stream)
    ring.signal(1, number)
    whole(stream, model, tokens, 20)
    if number == signal.SIGKILL:
        ring.start(1)
    else:
        ring.signal(1, signal.SIGCONT)
    ring.formed()


def test_a_client_that_goes_away_in_prefill_keeps_no_room(ring: Processes) -> None:
    stream = ring.ask(prompt(LONG, 13), 20, leave=0)
    assert stream.over.wait(60)
    assert stream.prefilled > 0
    assert (stream.tokens, stream.error, stream.broken) == ([], None, None)
    ring.until(lambda: reserved(ring) == 0)


def reserved(ring: Processes) -> int:
    """KV tokens that are kept for requests in progress."""
    state = ring.state()
    assert state is not None
    return int(state["admission"]["reservedTokens"])


def a_retry_finds_what_the_workers_hold(ring: Processes, model: Any, tokens: list[int], *, cut: Stream) -> None:
    """Rank 0 has ended, and with it an answer to 600 ``tokens``."""
    again = a_retry(ring, model, tokens, cut=cut, count=120)
    assert again.usage["prompt_tokens_details"]["cached_tokens"] >= 600 // 2


def a_retry(ring: Processes, model: Any, tokens: list[int], *, cut: Stream, count: int) -> Stream:
    """Rank 0 has ended, and with it an answer to ``tokens``. It comes back, and the request is sent again."""
    assert cut.over.wait(30)
    assert wrong(model, tokens, cut.tokens) == []
    assert cut.finish is None
    ring.start(0)
    ring.formed()
    again = ring.ask(tokens, count)
    whole(again, model, tokens, count)
    return again


def test_rank_0_is_killed_in_prefill_and_a_retry_is_answered(ring: Processes, model: Any) -> None:
    """What the workers hold of a part of a prompt may be less than is worth finding again."""
    tokens = prompt(LONG, 14)
    stream = ring.ask(tokens, 20)
    in_prefill(ring, stream)
    ring.signal(0, signal.SIGKILL)
    a_retry(ring, model, tokens, cut=stream, count=20)


def test_rank_0_is_killed_and_a_retry_finds_what_the_workers_hold(ring: Processes, model: Any) -> None:
    tokens = prompt(600, 7)
    stream = ring.ask(tokens, 3000)
    under_way(ring, stream, 10)
    ring.signal(0, signal.SIGKILL)
    a_retry_finds_what_the_workers_hold(ring, model, tokens, cut=stream)


def test_a_rank_that_is_told_to_end_leaves_between_two_steps(ring: Processes, model: Any) -> None:
    tokens = prompt(500, 8)
    left = ring.ring()["reforms"]["left"]
    stream = ring.ask(tokens, 150)
    under_way(ring, stream, 10)
    ring.signal(1, signal.SIGTERM)
    assert ring.ranks[1].wait(timeout=30) == 0
    whole(stream, model, tokens, 150)
    ring.formed(0, 2)  # the last tokens may have come before it
    assert ring.ring()["reforms"]["left"] == left + 1
    ring.start(1)
    ring.formed()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGKILL, -signal.SIGKILL)])
def test_rank_0_ends_in_idle_and_the_workers_keep_what_they_hold(
    ring: Processes, model: Any, number: signal.Signals, status: int
) -> None:
    tokens = prompt(600, 200 + number)
    whole(ring.ask(tokens, 20), model, tokens, 20)
    ring.signal(0, number)
    assert ring.ranks[0].wait(timeout=30) == status
    assert [ring.ranks[rank].poll() for rank in (1, 2)] == [None, None]
    ring.start(0)
    ring.formed()
    again = ring.ask(tokens, 20)
    whole(again, model, tokens, 20)
    assert again.usage["prompt_tokens_details"]["cached_tokens"] >= 600 // 2


def test_every_rank_says_whether_it_is_in_a_ring(ring: Processes) -> None:
    def said() -> list[int | None]:
        return [ring.health(rank) for rank in range(3)]

    ring.until(lambda: said() == [200, 200, 200])
    ring.signal(0, signal.SIGSTOP)
    ring.until(lambda: [ring.health(1), ring.health(2)] == [503, 503], seconds=20)
    ring.signal(0, signal.SIGCONT)
    ring.until(lambda: said() == [200, 200, 200])
    ring.signal(2, signal.SIGKILL)
    ring.until(lambda: said() == [200, 200, None])
    ring.start(2)
    ring.until(lambda: said() == [200, 200, 200])


def test_a_fault_of_rank_0_ends_it_at_once_and_the_workers_keep_what_they_hold(ring: Processes, model: Any) -> None:
    ring.signal(0, signal.SIGKILL)
    ring.start(0, FAULT_AT_SAMPLE="40")
    ring.formed()
    tokens = prompt(600, 10)
    stream = ring.ask(tokens, 120)
    assert ring.ranks[0].wait(timeout=60) == 1
    a_retry_finds_what_the_workers_hold(ring, model, tokens, cut=stream)
    assert [ring.ranks[rank].poll() for rank in (1, 2)] == [None, None]


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"WORLD_SIZE": "2"}, "has WORLD_SIZE=2, rank 0 has 3; start all with the same WORLD_SIZE."),
        ({"KVPLANE_RING_DTYPE": "bfloat16"}, "give all ranks the same model, dtype and KVPLANE_RING_* settings."),
    ],
)
def test_a_rank_that_does_not_belong_ends_with_a_sentence(
    ring: Processes, changed: dict[str, str], sentence: str
) -> None:
    stranger = ring.launch(1, **changed)
    assert stranger.wait(timeout=90) == 2
    assert sentence in ring.log(1)
    ring.formed()


def test_a_rank_with_a_fine_tune_of_the_model_ends_with_a_sentence(ring: Processes, model: Any, tmp_path: Path) -> None:
    tuned = copy.deepcopy(model)
    tuned.get_parameter("model.layers.1.mlp.up_proj.weight").mul_(1.001)
    tuned.save_pretrained(tmp_path)
    said = len(ring.log(1))
    stranger = ring.launch(1, KVPLANE_RING_MODEL=str(tmp_path))
    assert stranger.wait(timeout=90) == 2
    assert "give all ranks the same model, dtype and KVPLANE_RING_* settings." in ring.log(1)[said:]
    ring.formed()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_model_that_the_ring_does_not_serve_ends_a_rank_with_the_reason(rank: int, tmp_path: Path) -> None:
    configure(Tiny("gemma2", "gemma2")).save_pretrained(tmp_path)
    ring = Processes(2, tmp_path, tmp_path)
    try:
        ring.start(rank)
        assert ring.ranks[rank].wait(timeout=90) == 2
    finally:
        ring.close()
    reason = "The ring does not serve models of type gemma2: it caps attention logits (attn_logit_softcapping=50)"
    assert reason in ring.log(rank)


def test_nothing_is_held_for_nobody(ring: Processes) -> None:
    ring.until(lambda: reserved(ring) == 0)
