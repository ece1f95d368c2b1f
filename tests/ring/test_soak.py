"""A soak on real processes: short and long requests, while ranks are killed and stand still, in an order drawn from a seed.

No token is wrong, no request is stuck, no rank ends by itself, and in the end all the room of the ring is free. Rank 0 is killed
once: what is under way is cut short then, and its clients ask again.
"""

import itertools
import math
import random
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.ring.processes import LIMIT_SECONDS, Processes, Stream, processes
from tests.ring.tiny import SERVED, VOCABULARY, build, wrong

SEED = 20
CLIENTS = 3
FAULT_SECONDS = 30.0
"""At least; longer where the machine is so busy that there was less by then than the run is to show (:func:`enough`)."""
FEWEST = 20
FEWEST_FAULTS = 5
STUCK_SECONDS = 120.0
"""Longer than two ranks take to come back one after another, on a busy machine."""


@dataclass(frozen=True)
class Asked:
    prompt: list[int]
    count: int
    stream: Stream

    def ended_well(self) -> bool:
        """As it was asked: all tokens, or as many as its client stayed for."""
        stream = self.stream
        if (stream.error, stream.broken) != (None, None):
            return False
        if stream.leave is not None:
            return len(stream.tokens) >= stream.leave
        return len(stream.tokens) == self.count and stream.finish == "length"


class Client:
    """Asks one thing after another: short and long, new and going on with what it had, and sometimes it goes away early."""

    def __init__(self, ring: Processes, draw: random.Random, faults: "Faults") -> None:
        self._ring = ring
        self._draw = draw
        self._faults = faults
        self._enough = threading.Event()
        self.asked: list[Asked] = []
        self.cut: list[Asked] = []
        """What rank 0's end has cut short; it was asked again."""
        self.busy = 0
        """Answers that said that there is no room just now."""
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Returns when its last request has ended, or is stuck."""
        self._enough.set()
        self._thread.join()

    def _run(self) -> None:
        again: Asked | None = None
        while not self._enough.is_set():
            prompt = again.prompt if again else self._next_prompt()
            count = again.count if again else self._draw.randint(1, 120)
            leave = self._draw.randint(0, count) if self._draw.random() < 0.15 else None
            began = time.monotonic()
            stream = self._ring.ask(prompt, count, leave=leave)
            asked, again = Asked(prompt, count, stream), None
            ended = stream.over.wait(STUCK_SECONDS)
            if ended and (stream.error or {}).get("code") in {"kv_cache_full", "too_many_sequences"}:
                self.busy += 1
                self._enough.wait(0.5)
            elif ended and not asked.ended_well() and began < self._faults.led_since:
                self.cut.append(asked)
                again = asked
                self._enough.wait(0.5)
            else:
                self.asked.append(asked)
                if not ended:
                    return

    def _next_prompt(self) -> list[int]:
        draw = self._draw
        lengths = draw.choice([(1, 40), (1, 40), (100, 600), (1000, 2500)])
        new = [draw.randrange(3, VOCABULARY) for _ in range(draw.randint(*lengths))]
        if self.asked and draw.random() < 0.4:
            last = self.asked[-1]
            before = [*last.prompt, *last.stream.tokens]
            if len(before) < 2500:
                return [*before, *new[:600]]
        return new


class Faults:
    """Kills workers, which come back a little later, and has ranks stand still, rank 0 too; once it kills rank 0."""

    def __init__(self, ring: Processes, draw: random.Random) -> None:
        self._ring = ring
        self._draw = draw
        self.led_since = 0.0
        """When the ring was formed by a rank 0 that had been killed; infinite while it is away, 0 before."""
        self._back: dict[int, float] = {}
        """When a rank that was killed is started again."""
        self._go_on: dict[int, float] = {}
        """When a rank that stands still goes on."""
        self.done = 0

    def run(self, seconds: float, *, until: Callable[[], bool]) -> None:
        began = time.monotonic()
        behead = began + self._draw.uniform(0.2, 0.5) * seconds
        pause = 0.0
        while (now := time.monotonic()) < began + seconds or not until():
            if now >= behead:
                behead = math.inf
                self._kill_rank_0(now)
            if now >= pause and self.led_since <= now:
                self._strike(now)
                pause = now + self._draw.uniform(0.5, 3.0)
            self._mend(now)
            time.sleep(0.02)
        self._mend(math.inf)

    def lost(self) -> bool:
        """Whether a rank was lost, too, since rank 0 is back."""
        if not 0 < self.led_since < math.inf or 0 in self._go_on:  # a rank 0 that stands still does not answer
            return False
        return bool((self._ring.ring().get("reforms") or {}).get("lost"))

    def _kill_rank_0(self, now: float) -> None:
        self.done += 1
        self.led_since = math.inf
        self._go_on.pop(0, None)
        self._ring.signal(0, signal.SIGKILL)
        self._back[0] = now + self._draw.uniform(0.0, 2.0)

    def _strike(self, now: float) -> None:
        draw = self._draw
        rank = draw.randrange(self._ring.size)
        if rank in self._back or rank in self._go_on:
            return
        self.done += 1
        if rank and draw.random() < 0.5:
            self._ring.signal(rank, signal.SIGKILL)
            self._back[rank] = now + draw.uniform(0.0, 4.0)
        else:
            self._ring.signal(rank, signal.SIGSTOP)
            self._go_on[rank] = now + draw.uniform(0.2, 2 * LIMIT_SECONDS)

    def _mend(self, now: float) -> None:
        for rank in [rank for rank, at in self._go_on.items() if now >= at]:
            del self._go_on[rank]
            self._ring.signal(rank, signal.SIGCONT)
        for rank in [rank for rank, at in self._back.items() if now >= at]:
            del self._back[rank]
            self._ring.start(rank)
        if self.led_since == math.inf and 0 not in self._back and self._ring.ring().get("formed"):
            self.led_since = time.monotonic()


def enough(clients: list[Client], faults: Faults) -> bool:
    """Whether there was all that the run is to show."""
    asked = sum(len(client.asked) for client in clients)
    return asked >= FEWEST and faults.done >= FEWEST_FAULTS and faults.lost()


def nothing_reserved(ring: Processes) -> bool:
    state = ring.state()
    if state is None:
        return False
    engine = state["engine"]
    busy = engine["requestsRunning"] + engine["requestsWaiting"] + state["ring"]["parked"]
    return busy == 0 and state["admission"]["reservedTokens"] == 0


@pytest.mark.timeout(900)  # it goes on until enough has happened, however busy the machine is
def test_random_faults_cost_no_token_no_request_and_no_room(tmp_path: Path) -> None:
    draw = random.Random(SEED)  # noqa: S311  (faults, no secrets)
    model = build(SERVED[0])
    model.save_pretrained(tmp_path / "tiny")
    (tmp_path / "logs").mkdir()
    with processes(3, tmp_path / "tiny", tmp_path / "logs") as ring:
        ring.formed()
        faults = Faults(ring, draw)
        clients = [Client(ring, random.Random(draw.random()), faults) for _ in range(CLIENTS)]  # noqa: S311  (see above)
        faults.run(FAULT_SECONDS, until=lambda: enough(clients, faults))
        ring.formed()
        for client in clients:
            client.stop()
        asked = list(itertools.chain.from_iterable(client.asked for client in clients))
        cut = list(itertools.chain.from_iterable(client.cut for client in clients))
        assert [each for each in asked if not each.stream.over.is_set()] == []
        assert [(len(each.prompt), each.count, each.stream) for each in asked if not each.ended_well()] == []
        assert [rank for rank, process in ring.ranks.items() if process.poll() is not None] == []
        ring.until(lambda: nothing_reserved(ring))
        # What is free can be given out: three requests at a time that need most of every rank.
        last = [
            Asked(prompt, 50, ring.ask(prompt, 50))
            for prompt in ([draw.randrange(3, VOCABULARY) for _ in range(3800)] for _ in range(3))
        ]
        for each in last:
            assert each.stream.over.wait(STUCK_SECONDS)
            assert each.ended_well(), each.stream
        ring.until(lambda: nothing_reserved(ring))
        reforms = ring.ring()["reforms"]
        logs = [ring.log(rank) for rank in range(3)]
    assert [log for log in logs if "Traceback" in log] == []
    found = {
        index: places
        for index, each in enumerate([*asked, *cut, *last])
        if (places := wrong(model, each.prompt, each.stream.tokens))
    }
    assert found == {}
    generated = sum(len(each.stream.tokens) for each in asked)
    print(
        f"\n{len(asked)} requests, {generated} tokens, {faults.done} faults, re-forms since rank 0's end {reforms}, "
        f"{sum(client.busy for client in clients)} times no room, {len(cut)} times asked again"
    )
    assert faults.done >= FEWEST_FAULTS
    assert 0 < faults.led_since < math.inf
    assert reforms["lost"] >= 1
    assert len(asked) >= FEWEST
