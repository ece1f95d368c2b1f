"""An engine that answers without computing: each output is what a script says."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace

from kvplane_runtime.ring.accounting import Reserve
from kvplane_runtime.ring.admission import Refusal, Room, never_fits
from kvplane_runtime.ring.api import RejectedError
from kvplane_runtime.ring.requests import COUNTS, Accepted, Ended, Event, Failed, Progress, Request, Snapshot, Token
from kvplane_runtime.ring.sampling import Sampled
from kvplane_runtime.ring.state import RankTraffic, State

ROOM = Room(ranks=4, capacity=100, reserve=Reserve.OFF, model_tokens=None)
STATE = State(
    pod="ring-0",
    served_name="tiny",
    formed=True,
    epoch=3,
    world_size=4,
    members=(0, 1, 2, 3),
    loading={},
    reforms={"lost": 1, "joined": 1},
    recovery_seconds=(1.2,),
    startup_seconds=4.0,
    traffic=(RankTraffic(10, 2.0, 1.5, 0.25, 1000), *[RankTraffic(10, 2.0, 1.0, 0.25, 1000)] * 3),
    scheduler=Snapshot(
        waiting=1,
        prefilling=1,
        decoding=2,
        parked=1,
        kept=3,
        waiting_prompt_tokens=50,
        waiting_kv_tokens=30,
        capacity_tokens=100,
        limit_tokens=100,
        whole_tokens=400,
        longest_tokens=None,
        held=(10, 20, 30, 40),
        active=(20, 20, 20, 50),
        kept_tokens=(5, 5, 5, 5),
        counts={name: number for number, name in enumerate(COUNTS)},
    ),
)


class FakeEngine:
    """Says the bytes of ``answer`` for each output; holds them back while ``gate`` is closed."""

    def __init__(self, answer: str = "hello") -> None:
        self.answer = answer
        self.gate = asyncio.Event()
        self.gate.set()
        self.known = STATE
        self.hangs: str | None = None
        self.refusal: Refusal | None = None
        """Given to every request."""
        self.fails: Refusal | None = None
        """Given after the first token."""
        self.progress: Sequence[tuple[int, int]] = ()
        self.cached = 0
        self.requests: list[Request] = []
        self.aborted: list[tuple[str, int | None]] = []
        self.on_token: Callable[[], None] = lambda: None

    async def submit(self, request: Request) -> AsyncIterator[Event]:
        refusal = self.refusal or never_fits(len(request.prompt), request.max_tokens or 1, request.outputs, ROOM)
        if refusal is not None:
            raise RejectedError(refusal)
        self.requests.append(request)
        yield Accepted(request.id, self.cached, request.max_tokens or 20)
        for computed, total in self.progress:
            yield Progress(request.id, computed, total)
        tokens = list(self.answer.encode())
        most = request.max_tokens or 20
        over: set[int] = set()
        for index, token in enumerate(tokens):
            for output in range(request.outputs):
                if output in over:
                    continue
                await self.gate.wait()
                self.on_token()
                top = tuple((65 + i, -1.0 - i) for i in range(request.sampling.logprobs or 0))
                logprob = None if request.sampling.logprobs is None else -0.5
                yield Token(request.id, output, Sampled(token, logprob, top))
                if self.fails is not None:
                    yield Failed(request.id, self.fails)
                    return
                stopped = token in request.stop_ids
                if stopped or index + 1 in (most, len(tokens)):
                    over.add(output)
                    yield Ended(request.id, output, "stop" if stopped else "length")

    def abort(self, request: str, output: int | None = None) -> None:
        self.aborted.append((request, output))

    def state(self) -> State:
        return self.known

    def hung(self) -> str | None:
        return self.hangs

    def set(self, **changes: object) -> None:
        self.known = replace(self.known, **changes)  # type: ignore[arg-type]  # each test names fields of State
