"""Joins the proxy to admission: what passes the gate is offered, waits, is measured, and is ended exactly once.

The decisions are :mod:`kvplane_runtime.admission`'s, the bytes are the proxy's. Here are only the things between them: the
size of a prompt from its bytes, the tenant and the class from the head, a future for each request that waits, the counts
of tokens that passed, what an answer's usage teaches, and whether it came as promised. Counts are collected at most
TICK_SECONDS apart and not pushed with every chunk, so that the hot path does no accounting.

Policy Off reads and measures without touching anything: bodies go as they came, and nothing is refused or held here.
"""

import asyncio
import logging
from collections.abc import Callable
from typing import Final

from kvplane_runtime.admission.controller import Admission
from kvplane_runtime.admission.demand import Demand, Entry, Feedback, Reason, Refused
from kvplane_runtime.admission.prompts import PromptLengths
from kvplane_runtime.histogram import Buckets
from kvplane_runtime.proxy import openai, sse
from kvplane_runtime.proxy.gate import Again, End, Refusal, Relay
from kvplane_runtime.proxy.http1 import Request, RequestHead, ResponseHead
from kvplane_runtime.proxy.openai import Endpoint, Generation
from kvplane_runtime.proxy.reader import BodyReader
from kvplane_runtime.sidecar.config import WatchedConfig
from kvplane_runtime.sidecar.drain import DrainGate, Visit
from kvplane_runtime.sidecar.engine import EngineMonitor
from kvplane_runtime.sidecar.promises import Promises, Result, judged

log = logging.getLogger(__name__)

TICK_SECONDS: Final = 0.25
"""Between two looks at the queue without a cause, and at the counts of the answers under way."""
_PARTS: Final = 10
"""In which the counts are collected in that time: all of 500 at once would stop every stream for milliseconds."""
_FEW: Final = 32
"""So many answers are counted whenever something begins or ends, too."""
STALE_SECONDS: Final = 2.0
"""Older signals count for nothing: admission goes on by its own accounts, and carefully."""
HEADER_PRIORITY: Final = b"x-kvplane-priority"
MEDIA_TOKENS: Final = 2048
"""Prompt tokens that an image or a sound is taken for: more than the engines' models make of one at usual sizes."""
SURE: Final = 3
"""An estimated prompt has at least this part of its tokens for certain: texts of one tenant differ less."""
_TENANT_BYTES: Final = 128
_QUEUE_BOUNDS: Final = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_RETRY_BOUNDS: Final = (1, 2, 3, 5, 8, 13, 20, 30)
_RETRY_DIGITS: Final = 9
"""Of a ring's own Retry-After; a longer one is no time."""
_WEIGHT: Final = 0.1
"""Of the newest answer in the moving averages."""
_NO_ROOM: Final = (429, 503)
"""Statuses by which an engine turns a request away and is not at fault."""


class AdmissionGate:
    """The gate of a sidecar: behind the drain's gate, generating requests are admitted, all others pass."""

    def __init__(
        self,
        *,
        drain: DrainGate,
        admission: Admission,
        config: WatchedConfig,
        engine: EngineMonitor,
        clock: Callable[[], float],
    ) -> None:
        self.reader = BodyReader()
        self.admission = admission
        self.queue_seconds = Buckets(_QUEUE_BOUNDS)
        """Time from arrival to the decision, of requests that were let in."""
        self.retry_after_seconds = Buckets(_RETRY_BOUNDS)
        """What refused clients were told."""
        self.promises = Promises()
        """What became of those in ``slo``."""
        self._drain = drain
        self._config = config
        self._engine = engine
        self._clock = clock
        self._prompts = PromptLengths()
        self._tickets: dict[Entry, Ticket] = {}
        """By entry, in the order of arrival."""
        self._settling: asyncio.Handle | None = None
        self._uncounted: list[Entry] = []
        """Whose counts come next; they go round."""
        self._applied = config.current
        self._scraped_at: float | None = None
        self._starts = engine.starts
        self._tokens_per_event = 1.0
        self._seconds_per_token: float | None = None
        self._prefill_tokens_per_second: float | None = None
        self._reuse = _PrefixReuse()
        engine.kv.contexts = self._contexts

    @property
    def off(self) -> bool:
        """Whether requests are only measured."""
        return self._config.current.admission.policy == "Off"

    @property
    def enforced(self) -> bool:
        """Whether what is decided is done."""
        return self._config.current.admission.policy == "Enforce"

    # Requests.
    def enter(self, head: RequestHead) -> "Ticket | Visit | Refusal":
        """Refuses while the pod drains or the engine is not ready; decides on nothing else yet."""
        visit = self._drain.enter(head)
        endpoint = openai.endpoint(head)
        if endpoint is None:
            return visit
        if isinstance(visit, Refusal):
            self.promises.results[Result.FAILED] += 1
            return visit
        return Ticket(self, visit, endpoint)

    def demand(self, request: Request, generation: Generation) -> Demand:
        """What ``request`` asks of the engine."""
        tenant = self._tenant(request.head)
        known = sum(prompt.tokens or 0 for prompt in generation.prompts)
        text = sum(prompt.text_bytes for prompt in generation.prompts)
        estimated = self._prompts.estimate(text, tenant) if text else 0
        exact = len(generation.prompts) == 1 and not text and not generation.media
        return Demand(
            prompt_tokens=max(1, known + estimated + generation.media * MEDIA_TOKENS),
            outputs=generation.outputs * len(generation.prompts),
            max_output_tokens=None if generation.max_tokens is None else max(1, generation.max_tokens),
            tenant=tenant,
            priority=self._priority(request.head),
            prompt_bytes=len(request.body),
            # What is estimated is not called too long, unless by far: the engine counts exactly, and says so.
            least_prompt_tokens=None
            if exact
            else max(
                prompt.tokens or self._prompts.estimate(prompt.text_bytes, tenant) // SURE
                for prompt in generation.prompts
            ),
        )

    def offer(self, ticket: "Ticket", demand: Demand) -> Entry:
        """Offers a request to admission; undecided, it is decided in a later settlement."""
        entry = self.admission.offer(demand, now=self._clock())
        self._tickets[entry] = ticket
        return entry

    def decided(self, entry: Entry) -> None:
        """Counts a decision that the request's handler has learned of."""
        if entry.admitted_at is not None:
            self.queue_seconds.add(entry.admitted_at - entry.arrived_at)
        elif entry.refusal is not None and entry.refusal.retry_after_seconds is not None:
            self.retry_after_seconds.add(entry.refusal.retry_after_seconds)

    def first_token(self, ticket: "Ticket", entry: Entry) -> None:
        """The engine has begun to answer: its prompt is computed, and makes room for the next one."""
        now = self._clock()
        ticket.first_token_at = now
        self.promises.first_token_seconds.add(now - entry.arrived_at)
        if entry.admitted_at is not None and now > entry.admitted_at:
            rate = entry.demand.prompt_tokens / (now - entry.admitted_at)
            self._prefill_tokens_per_second = _average(self._prefill_tokens_per_second, rate)
        self.admission.first_token(entry, now=now)
        self.settle_soon()

    def requeue(self, entry: Entry) -> bool:
        """The engine refused the request itself; False where admission no longer knows it, the engine being a new one."""
        self.admission.requeue(entry, now=self._clock())
        self.settle_soon()
        return entry.admitted_at is None

    def turned_away(self, entry: Entry, head: ResponseHead) -> None:
        """A ring has no room for the request; what it told the client counts as a refusal here."""
        seconds = head.value(b"retry-after") or b""
        if seconds.isdigit() and len(seconds) <= _RETRY_DIGITS:
            self.retry_after_seconds.add(int(seconds))
        many = head.value(b"x-kvplane-reason") == b"requests"
        self.admission.turned_away(entry, Reason.SEQUENCES if many else Reason.KV, now=self._clock())
        self.settle_soon()

    def end(self, ticket: "Ticket", entry: Entry, end: End) -> None:
        """Gives back what the request held, and learns from what it turned out to be."""
        now = self._clock()
        completed = end is End.COMPLETED and ticket.status == 200
        meter = ticket.meter
        usage = meter.usage() if meter is not None else None
        output = usage.completion_tokens if usage else None
        if isinstance(meter, sse.StreamMeter):
            if usage and meter.token_events:
                self._tokens_per_event = _average(self._tokens_per_event, usage.completion_tokens / meter.token_events)
            output = output if output is not None else self._streamed(meter)
        if usage and ticket.text_bytes and ticket.only_text:
            self._prompts.learn(ticket.text_bytes, usage.prompt_tokens, entry.demand.tenant)
        began = entry.first_token_at or entry.admitted_at
        if completed and output and began is not None and now > began:
            per_token = (now - began) * entry.demand.outputs / output
            self._seconds_per_token = _average(self._seconds_per_token, per_token)
        if (result := self._result(ticket, entry, end, output_tokens=output, now=now)) is not None:
            self.promises.results[result] += 1
        del self._tickets[entry]
        self.admission.end(
            entry,
            now=now,
            completed=completed,
            prompt_tokens=usage.prompt_tokens if usage else None,
            output_tokens=output,
        )
        self.settle_soon()

    def _result(
        self, ticket: "Ticket", entry: Entry, end: End, *, output_tokens: int | None, now: float
    ) -> Result | None:
        """What became of the promises to a request that is over; None where it is not to be judged."""
        if end is End.ABANDONED:
            # Who left after it was late may have left because of that; who left before may have got it in time.
            waited = (ticket.first_token_at or entry.admitted_at or now) - entry.arrived_at
            return Result.TTFT_MISSED if waited > self._config.current.slo.ttft_milliseconds / 1000 else None
        if entry.refusal is not None:
            return None if entry.refusal.reason is Reason.CONTEXT else Result.REFUSED
        status = ticket.status
        if status in _NO_ROOM:
            return Result.REFUSED
        if end is End.UNSERVED or status is None or status >= 500 or (ticket.tokenless and not output_tokens):
            return Result.FAILED
        if status != 200 or entry.admitted_at is None:
            return None
        first = ticket.first_token_at
        return judged(
            self._config.current.slo,
            let_through=entry.admitted_at - entry.arrived_at,
            first_token=None if first is None else first - entry.arrived_at,
            total=now - entry.arrived_at,
            tokens=None if output_tokens is None else output_tokens / entry.demand.outputs,
        )

    def _tenant(self, head: RequestHead) -> str:
        header = self._config.current.admission.fairness.header
        value = head.value(header.lower().encode()) if header else None
        return (value or b"")[:_TENANT_BYTES].decode("latin-1")

    def _priority(self, head: RequestHead) -> int:
        given = (head.value(HEADER_PRIORITY) or b"").decode("latin-1")
        names = self._config.current.admission.priorities
        return names.index(given) if given in names else 0

    # Decisions.
    async def run(self) -> None:
        """Keeps admission informed until cancelled."""
        while True:
            self.tick()
            for _ in range(_PARTS):
                await asyncio.sleep(TICK_SECONDS / _PARTS)
                self._collect(-(-len(self._tickets) // _PARTS), now=self._clock())

    def tick(self) -> None:
        """Takes in a changed configuration, a new scrape, or the lack of one; then settles."""
        now = self._clock()
        if self._config.current is not self._applied:
            self._applied = self._config.current
            self.admission.configure(self._applied)
        if self._engine.starts != self._starts:
            if self._starts:  # the first life that this sidecar sees, be it new or long begun, is no restart
                self.admission.engine_restarted(now=now)
            self._starts = self._engine.starts
        scraped_at = self._engine.scraped_at
        if scraped_at is not None and scraped_at != self._scraped_at:
            self._scraped_at = scraped_at
            self.admission.observe(self._feedback(), now=now)
        elif scraped_at is None or now - scraped_at > STALE_SECONDS:
            self.admission.stale(now=now)
        self.settle()

    def settle_soon(self) -> None:
        """Settles once, after everything that this turn of the event loop brings."""
        if self._settling is None:
            self._settling = asyncio.get_running_loop().call_soon(self.settle)

    def settle(self) -> None:
        """Wakes those whose request was decided."""
        self._settling = None
        now = self._clock()
        if len(self._tickets) <= _FEW:
            self._collect(_FEW, now=now)
        for entry in self.admission.decide(now=now):
            ticket = self._tickets.get(entry)
            if ticket is not None:
                ticket.decided.set()

    def _collect(self, most: int, *, now: float) -> None:
        """Tells admission how many tokens the next answers have."""
        for _ in range(min(most, len(self._tickets))):
            if not self._uncounted:
                self._uncounted = list(reversed(self._tickets))
            entry = self._uncounted.pop()
            ticket = self._tickets.get(entry)
            if ticket is None or entry.admitted_at is None:
                continue
            tokens = 0
            if isinstance(ticket.meter, sse.StreamMeter):
                tokens = self._streamed(ticket.meter)
            elif not ticket.streams:
                tokens = self._guessed(entry, now)
            if tokens > entry.generated:
                self.admission.progress(entry, tokens, now=now)

    def _streamed(self, meter: sse.StreamMeter) -> int:
        return round(meter.token_events * self._tokens_per_event)

    def _guessed(self, entry: Entry, now: float) -> int:
        """Tokens of an answer that is not streamed, by the times that others took.

        What is guessed is no first token that was seen: nothing is learned from it of the time that prompts take.
        """
        assert entry.admitted_at is not None  # noqa: S101  (only what was let in is looked at)
        if entry.first_token_at is None:
            rate = self._prefill_tokens_per_second
            if rate is None or now < entry.admitted_at + entry.demand.prompt_tokens / rate:
                return 0
            return 1
        per_token = self._seconds_per_token
        if per_token is None:
            return 0
        most = entry.demand.max_output_tokens
        each = int((now - entry.first_token_at) / per_token)
        return entry.demand.outputs * (each if most is None else min(each, most))

    # The engine.
    def _feedback(self) -> Feedback:
        scrape = self._engine.scrape
        if scrape is None:
            return Feedback()
        cache, values = scrape.kv_cache, scrape.values
        return Feedback(
            kv_blocks=cache.blocks if cache else None,
            block_size_tokens=cache.block_size_tokens if cache else None,
            max_model_len_tokens=self._engine.max_model_len_tokens,
            kv_blocks_used=scrape.kv_blocks_used,
            preemptions_total=_whole(values.get("preemptions")),
            preempted_tokens_total=self._engine.kv.preempted_tokens,
            requests_running=_whole(values.get("requests_running")),
            requests_waiting=_whole(values.get("requests_waiting")),
            generation_tokens_total=_whole(values.get("generation_tokens")),
            prefix_hit_ratio=self._reuse.ratio(
                values.get("prefix_cache_queries_tokens"), values.get("prefix_cache_hits_tokens")
            ),
            thrashing=self._engine.kv.thrash.kind is not None,
        )

    def _contexts(self) -> list[int]:
        """Tokens of each request inside the engine, oldest first."""
        inside = sorted((entry for entry in self._tickets if entry.admitted_at is not None), key=_admitted_at)
        return [entry.demand.prompt_tokens + entry.generated for entry in inside]


class Ticket:
    """One generating request's stay."""

    def __init__(self, gate: AdmissionGate, visit: Visit, endpoint: Endpoint) -> None:
        self._gate = gate
        self._visit = visit
        self._endpoint = endpoint
        self._entry: Entry | None = None
        self._request: Request | None = None
        """As it goes to the engine."""
        self._edited = False
        self.decided = asyncio.Event()
        self.status: int | None = None
        """Of the engine's answer that is passed on; None until it begins."""
        self.meter: sse.StreamMeter | sse.AnswerMeter | None = None
        self.first_token_at: float | None = None
        """On the gate's clock; None also where the answer is not streamed."""
        self.streams = False
        """Whether a stream is asked for: its tokens are seen, so none is guessed."""
        self.text_bytes = 0
        self.only_text = False

    @property
    def last_on_connection(self) -> bool:
        """As the drain says."""
        return self._visit.last_on_connection

    @property
    def tokenless(self) -> bool:
        """Whether it is answered by a stream in which no token has come: an error comes so, when it comes as an event."""
        return isinstance(self.meter, sse.StreamMeter) and self.first_token_at is None

    def admit_now(self, request: Request) -> Request | Refusal | None:
        """The decision on a new request where there is one at once; None where it has to wait, or came again."""
        if self._entry is not None:
            return None
        generation = self._gate.reader.read_now(self._endpoint, request.body)
        return None if generation is None else self._offer(request, generation) or self._decision(request)

    async def admit(self, request: Request) -> Request | Refusal:
        """Waits until the request may go to the engine; a request that comes again waits with what it had."""
        if self._entry is None:
            generation = await self._gate.reader.read(self._endpoint, request.body)
            if unread := self._offer(request, generation):
                return unread
        while (decision := self._decision(request)) is None:
            self.decided.clear()
            await self.decided.wait()
        return decision

    def _decision(self, request: Request) -> Request | Refusal | None:
        """What became of the offer; None as long as it waits."""
        entry = self._entry
        assert entry is not None and self._request is not None  # noqa: S101  (it was offered)
        if entry.admitted_at is None and entry.refusal is None:
            return None
        self._gate.decided(entry)
        if entry.refusal is not None:
            return refusal(entry.refusal)
        # The engine may have died while the request waited.
        died = self._visit.admit_now(request)
        return died if isinstance(died, Refusal) else self._request

    def _offer(self, request: Request, generation: Generation | Refusal) -> Request | Refusal | None:
        """Offers the request; returns it, or a refusal, where there is nothing to offer."""
        off = self._gate.off
        if isinstance(generation, Refusal):
            return request if off else generation
        self.streams = generation.stream
        self.text_bytes = sum(prompt.text_bytes for prompt in generation.prompts)
        self.only_text = not generation.media and all(prompt.tokens is None for prompt in generation.prompts)
        edited = None if off else openai.with_usage(request.body, generation)
        self._edited = edited is not None
        self._request = request if edited is None else Request(request.head, request.request_id, edited)
        self._entry = self._gate.offer(self, self._gate.demand(request, generation))
        return None

    def answered(self, head: ResponseHead) -> Relay | Again | Refusal:
        """The engine's own 503 sends the request back into the queue, where there is one; all else is passed on and measured. A
        ring's 429 too: it knows what is short, and when it will not be.
        """
        entry = self._entry
        if entry is None:
            return Relay()
        if head.status == 503 and self._gate.enforced and self._gate.requeue(entry):
            return Again() if entry.refusal is None else refusal(entry.refusal)
        self.status = head.status
        if head.status == 429 and self._gate.admission.ring and not self._gate.off:
            self._gate.turned_away(entry, head)
            return Relay()
        self.meter = sse.meter(
            head, self._endpoint, drop_usage=self._edited, on_first_token=lambda: self._gate.first_token(self, entry)
        )
        return Relay(self.meter)

    def leave(self, end: End) -> None:
        """Gives everything back."""
        if self._entry is not None:
            self._gate.end(self, self._entry, end)
        self.meter = None  # it knows this ticket: a cycle would be left to the collector, whose work stops all streams
        self._visit.leave(end)


def refusal(refused: Refused) -> Refusal:
    """A refusal of admission as the client gets it."""
    if refused.reason is Reason.CONTEXT:
        return Refusal(400, "context_length_exceeded", refused.message)
    code = "rate_limit_exceeded" if refused.reason is Reason.TENANT else "engine_overloaded"
    return Refusal(429, code, refused.message, refused.retry_after_seconds, reason=refused.reason.value)


class _PrefixReuse:
    """Share of prompt tokens found in the prefix cache lately, from two counters."""

    _FORGET: Final = 0.05

    def __init__(self) -> None:
        self._last: tuple[float, float] | None = None
        self._queries = 0.0
        self._hits = 0.0

    def ratio(self, queries: float | None, hits: float | None) -> float | None:
        """Takes one scrape; None while nothing was looked up, or where the engine does not say."""
        if queries is None or hits is None:
            self._last = None
            return None
        if self._last is not None and queries >= self._last[0]:
            keep = 1 - self._FORGET
            self._queries = self._queries * keep + queries - self._last[0]
            self._hits = self._hits * keep + hits - self._last[1]
        self._last = queries, hits
        return self._hits / self._queries if self._queries >= 1 else None


def _average(old: float | None, new: float) -> float:
    return new if old is None else old + _WEIGHT * (new - old)


def _whole(value: float | None) -> int | None:
    return None if value is None else round(value)


def _admitted_at(entry: Entry) -> float:
    assert entry.admitted_at is not None  # noqa: S101  (filtered before)
    return entry.admitted_at
