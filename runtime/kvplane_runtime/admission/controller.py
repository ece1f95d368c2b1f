"""Admission: events of requests and of the engine in, decisions out.

A request is *offered* once. It is let in at once, or waits in the queue, or is refused; :meth:`Admission.decide` says
later what became of those that wait. Every request that was let in is reported on (first token, progress) and ended
exactly once; what it reserved is given back there. Gates, in the order in which they are asked:

=========  =======================================================================================================
context    never fits: its prompt is above H x C or the engine's context limit, or (Worst) its reservation above C
tenant     the tenant's token bucket
sequences  the engine's ``max_num_seqs``
kv         gate C: KV known to be in use + the prompt <= H x C; gate A: the expected peak (:mod:`peak`) <= kappa x C
prefill    gate B: prompts under way (:mod:`prefill`), and what this one costs those that run (:mod:`goals`)
sequences  those that can run at the promised time per token (:mod:`pace`)
=========  =======================================================================================================

With nothing in flight only context, tenant and gate C are asked: an idle engine always works. While the capacity is not
known (before the first scrape, or an engine that does not export it) gates A and C cannot be computed; the others hold,
and at most 256 sequences run, or with Worst one request at a time. That never halts and guesses no capacity; an engine
that stays silent is a condition of its own (SignalsFresh).

A ring decides on its own room: its scheduler knows what each rank holds and what each request may come to hold, and cuts
long prefills into slices, so that they hold nobody up. Of the gates only tenant and ``max_num_seqs`` are asked in front of
one; what is never served, or not now, it says itself, in its own numbers.
"""

from collections import Counter
from collections.abc import Callable
from typing import Final

from kvplane_api.wire import AdmissionState, SidecarConfig
from kvplane_runtime.admission import retry
from kvplane_runtime.admission.buckets import TokenBuckets
from kvplane_runtime.admission.demand import Demand, Entry, Feedback, Reason, Refused
from kvplane_runtime.admission.engine import EngineView
from kvplane_runtime.admission.goals import MOST_MISSES, Cost, Slacks, newly_missed
from kvplane_runtime.admission.inflight import InFlight, Running, Shape, held, profile
from kvplane_runtime.admission.lengths import Curve, OutputLengths
from kvplane_runtime.admission.pace import Pace
from kvplane_runtime.admission.peak import ONE, Profile, blocks_held
from kvplane_runtime.admission.prefill import Prefill
from kvplane_runtime.admission.queue import FORCED_SHARE, Queue, Waiting
from kvplane_runtime.admission.trim import FLOOR, Trim

Z: Final = 1.0
"""Standard deviations between the expected KV and the predicted peak."""
CHECK_SECONDS: Final = 0.25
"""Time between two looks at the queue when nothing happens."""
_SEQUENCES_UNKNOWN: Final = 256
"""Sequences let in while neither the engine's capacity nor its max_num_seqs is known."""
_QUEUED_BYTES: Final = 64 * 1024 * 1024
_CLASS_STEP: Final = 0.1
"""By how much of kappa each class's ceiling is below that of the class above."""
_TRIES: Final = 32
"""Lines of the queue whose first request is looked at in one go."""
_MARGIN: Final = 0.95
"""Share of the promised time per token that is planned with."""
_HOPELESS: Final = 2.0
"""Times a lone request's time per token that is planned with where even that is more than was promised."""
_EARLY: Final = 1.25
"""By how much the work before a request must exceed its time before it is refused early: rates are estimates."""
_HELD_BY: Final = {
    Reason.KV: "the engine's KV cache is taken",
    Reason.PREFILL: "prompts that came before are still being computed",
    Reason.SEQUENCES: "as many requests run as the engine can serve at the promised speed",
    Reason.QUEUE_FULL: "the queue is full",
    Reason.DEADLINE: "others come first",
}
_NO_DEMAND: Final = frozenset({Reason.CONTEXT, Reason.TENANT})
"""Refused whatever room there is, so it is no lack of it."""
_LEAST_WAIT_SHARE: Final = 0.5
"""A prompt whose own prefill takes up its time may still wait for half of it: it would never be served otherwise."""


class Admission:
    """One engine's admission. ``uniform`` gives numbers from [0, 1), to spread Retry-After; ``ring``: the engine is a ring."""

    def __init__(self, *, config: SidecarConfig, uniform: Callable[[], float], ring: bool = False) -> None:
        self.ring = ring
        self._config = config
        self._uniform = uniform
        self._queue = Queue()
        self._lengths = OutputLengths()
        self._buckets = TokenBuckets()
        self._trim = Trim()
        self._pace = Pace()
        self._prefill = Prefill()
        self._backlog = retry.Backlog()
        self._engine = EngineView()
        self._flight = InFlight(self._shape())
        self._slacks = Slacks()
        self._profiled: tuple[tuple[Demand, Curve, int | None, Shape], Profile] | None = None
        """The newest profile and what it was made of."""
        self._processed = 0
        """Tokens that the engine computed since the last scrape."""
        self._kv_binds = False
        """Whether KV has kept a request waiting since the last scrape."""
        self._changed_at: float | None = None
        """When something happened that may let a waiting request in, and nobody has looked yet."""
        self._next_check = 0.0
        self._ruled: list[Entry] = []
        """Refused between two calls of ``decide``."""
        self._shed = 0.0
        self._refused = 0
        self._admitted = 0
        self.decisions: Counter[tuple[str, str]] = Counter()
        """By decision (``admitted``, ``refused``; with policy Observe ``would-refuse``) and reason (``""`` if admitted)."""

    def configure(self, config: SidecarConfig) -> None:
        """Takes on a new configuration; what is in flight and what waits stay."""
        self._config = config
        self._flight.reshape(self._shape())
        self._next_check = 0.0

    # What requests do.

    def offer(self, demand: Demand, *, now: float) -> Entry:
        """Decides on a new request at once, or queues it: then its entry is undecided, and ``decide`` rules on it."""
        entry = Entry(demand, arrived_at=now)
        self._backlog.until(now, waited=len(self._queue) > 0)
        self._close_window(now)
        policy = self._config.admission.policy
        if policy == "Off":
            self._admit(entry, now=now)
            return entry
        refusal = self._never(demand) or self._overdrawn(demand, now=now)
        waiting = None
        if refusal is None and (reason := self._arrival_hold(entry, now=now)) is not None:
            waiting = self._wait(entry, held_by=reason, now=now)
            refusal = self._no_room(waiting, now=now)
        if policy == "Observe":
            entry.would_refuse = refusal.reason if refusal is not None else self._would_expire(waiting, now=now)
            if entry.would_refuse is not None:
                self.decisions["would-refuse", entry.would_refuse] += 1
            self._admit(entry, now=now)
        elif refusal is not None:
            self._refuse(entry, refusal, now=now)
        elif waiting is not None:
            self._displace(waiting, now=now)
            self._next_check = min(self._next_check, now + CHECK_SECONDS) if len(self._queue) else now + CHECK_SECONDS
            self._queue.put(waiting, now=now)
            if waiting.held_by is Reason.DEADLINE:
                self._changed(now)  # nobody has looked whether it may go beside those before it
        else:
            self._admit(entry, now=now)
        return entry

    def decide(self, *, now: float) -> list[Entry]:
        """Rules on what waits; the entries that were admitted or refused, in the order in which the engine shall get them."""
        self._backlog.until(now, waited=len(self._queue) > 0)
        self._close_window(now)
        self._changed_at = None
        decided, self._ruled = self._ruled, []
        if self._config.admission.policy != "Enforce":
            return decided + [self._let_in(waiting, now=now) for waiting in list(self._queue)]
        decided += [self._too_late(waiting, now=now) for waiting in self._queue.expired(now=now)]
        if now >= self._next_check:
            self._next_check = now + CHECK_SECONDS
            decided += self._recheck(now=now)
        while (waiting := self._next(now=now)) is not None:
            # Sent now, it would still be late; a ring computes a short prompt beside a long one.
            if not self.ring and now + self._prefill.under_way > waiting.expires_at:
                waiting.held_by = Reason.PREFILL
                decided.append(self._too_late(waiting, now=now))
            else:
                decided.append(self._let_in(waiting, now=now))
        return decided

    def next_decision_at(self) -> float | None:
        """When ``decide`` must run at the latest; None while nothing waits."""
        if not len(self._queue) and not self._ruled:
            return None
        due = self._next_check
        expiry = self._queue.next_expiry()
        if expiry is not None:
            due = min(due, expiry)
        return due if self._changed_at is None else min(due, self._changed_at)

    def first_token(self, entry: Entry, *, now: float) -> None:
        """The engine sent the first token of a request."""
        running = self._flight.get(entry)
        if running is not None and entry.first_token_at is None:
            self._prefill.learn(outstanding=running.prefill_outstanding, seconds=now - running.sent_at)
            self._prefilled(running, now=now)

    def _prefilled(self, running: Running, *, now: float) -> None:
        entry = running.entry
        prompt = entry.demand.prompt_tokens
        self._pace.sequences(self._flight.decoding, now=now)
        entry.first_token_at = running.last_at = running.window_at = now
        self._flight.first_token(running)
        self._slacks.put(running)
        self._prefill.outstanding -= prompt
        self._pace.prefilled(prompt)
        self._processed += prompt
        self._changed(now)

    def progress(self, entry: Entry, generated_tokens: int, *, now: float) -> None:
        """A request has that many output tokens by now, over all its outputs.

        For a response that is not streamed the caller reports what it estimates; without ``first_token``, nothing is
        learned of the time to it.
        """
        running = self._flight.get(entry)
        if running is None or generated_tokens <= entry.generated:
            return
        if entry.first_token_at is None:
            self._prefilled(running, now=now)
        if not running.window_generated:
            running.window_at, running.window_generated = now, generated_tokens
        self._close_window(now)
        self._processed += generated_tokens - entry.generated
        running.last_at = now
        self._flight.progress(running, generated_tokens)
        self._slacks.put(running)

    def requeue(self, entry: Entry, *, now: float) -> None:
        """The engine answered 503 itself: the first time back to the front of the queue, then refused.

        Meant for policy Enforce; with the others the caller passes the engine's answer on and ends the entry.
        """
        running = self._flight.get(entry)
        if running is None:
            return
        self._release(running, now=now)
        self._charge(
            entry.demand,
            prompt_tokens=-entry.demand.prompt_tokens,
            output_tokens=-running.expected_output,
            now=now,
        )
        entry.admitted_at, entry.first_token_at, entry.generated = None, None, 0
        if running.returned:
            self._refuse(
                entry, self._refusal(Reason.QUEUE_FULL, "The engine refused it twice", entry.demand, now=now), now=now
            )
        else:
            self._queue.put(self._wait(entry, held_by=Reason.QUEUE_FULL, returned=True, now=now), now=now)

    def turned_away(self, entry: Entry, reason: Reason, *, now: float) -> None:
        """A ring has no room for a request that was let in, and has told its client so."""
        running = self._flight.get(entry)
        if running is None:
            return
        self._release(running, now=now)
        self._charge(
            entry.demand,
            prompt_tokens=-entry.demand.prompt_tokens,
            output_tokens=-running.expected_output,
            now=now,
        )
        self._count_refused(entry.demand, reason)
        self._changed(now)

    def end(
        self,
        entry: Entry,
        *,
        now: float,
        completed: bool,
        prompt_tokens: int | None = None,
        output_tokens: int | None = None,
    ) -> None:
        """A request is over, or its client has left the queue. Idempotent.

        ``completed``: the engine finished it; ``prompt_tokens`` and ``output_tokens`` as the engine counted them.
        """
        if self._queue.take(entry) is not None:
            return
        if entry in self._ruled:
            self._ruled.remove(entry)
        running = self._flight.get(entry)
        if running is None:
            return
        if output_tokens is not None:
            self.progress(entry, output_tokens, now=now)
        self._release(running, now=now)
        demand = entry.demand
        used = entry.generated
        self._charge(
            demand,
            prompt_tokens=(demand.prompt_tokens if prompt_tokens is None else prompt_tokens) - demand.prompt_tokens,
            output_tokens=used - running.expected_output,
            now=now,
        )
        if completed and used > 0:
            self._lengths.learn(
                priority=demand.priority,
                prompt_tokens=demand.prompt_tokens,
                output_tokens=-(-used // demand.outputs),
                capped=running.limit is not None and used >= running.limit * demand.outputs,
            )
        self._changed(now)

    # What the engine says.

    def observe(self, feedback: Feedback, *, now: float) -> None:
        """Takes in a scrape."""
        flight, view = self._flight, self._engine
        room = view.blocks, view.block_size, view.context_tokens
        youngest = flight.youngest
        preempted, generated = view.observe(
            feedback,
            held=flight.held,
            held_present=flight.held_present,
            prompt_blocks=flight.prompt_blocks_present,
            sequences=flight.sequences,
            youngest_tokens=0 if youngest is None else youngest.entry.demand.prompt_tokens + youngest.entry.generated,
            now=now,
        )
        flight.reshape(self._shape())
        if room != (view.blocks, view.block_size, view.context_tokens):
            self._next_check = 0.0  # what waits may turn out never to fit
        if preempted is not None and view.blocks is not None and not self._shape().worst:
            percent = self._config.admission.kv_peak_percent
            self._trim.learn(
                processed=max(self._processed, generated or 0),
                preempted=preempted,
                capacity=view.blocks * flight.shape.block_size,
                peak_ratio=self._peak_blocks() / view.blocks,
                pays=self._kv_binds and self._slowness() <= 1.0,
                fixed=None if percent is None else percent / 100,
            )
        self._processed = 0
        self._kv_binds = False
        self._changed(now)

    def stale(self, *, now: float) -> None:
        """The engine has not been scraped for more than two seconds."""
        self._engine.lost()
        self._changed(now)

    def engine_restarted(self, *, now: float) -> None:
        """The engine is a new process: what was in flight is lost, and its entries count no more."""
        for running in list(self._flight):
            self._release(running, now=now)
        self._engine.restarted(now=now)
        self._changed(now)

    def state(self, *, now: float) -> AdmissionState:
        """What is held and decided now, for the operator's autoscaler."""
        policy = self._config.admission.policy
        if policy == "Off":
            return AdmissionState(
                policy=policy,
                running=0,
                queued=0,
                queued_prompt_tokens=0,
                queued_reservation_tokens=0,
                reserved_tokens=0,
                kappa=0,
                admitted_total=0,
                refused_total=0,
                shed_reservation_tokens_total=0,
            )
        peak = self._peak_blocks()
        blocks = self._engine.blocks
        return AdmissionState(
            policy=policy,
            running=len(self._flight),
            queued=len(self._queue),
            queued_prompt_tokens=self._queue.prompt_tokens,
            queued_reservation_tokens=round(sum(self._reservation(waiting.entry.demand) for waiting in self._queue)),
            reserved_tokens=round(peak * self._flight.shape.block_size),
            kv_peak_ratio=None if not blocks or self.ring else max(0.0, peak + self._engine.external) / blocks,
            kappa=1.0 if self.ring else self._kappa(now=now),
            admitted_total=self._admitted,
            refused_total=self._refused,
            shed_reservation_tokens_total=round(self._shed),
        )

    # The gates.

    def _never(self, demand: Demand) -> Refused | None:
        """Refusal of a request that cannot be served however long it waits."""
        if self.ring:
            return None
        view, prompt, outputs = self._engine, demand.prompt_tokens, demand.outputs
        if demand.least_prompt_tokens is not None:
            prompt, outputs = max(1, demand.least_prompt_tokens), 1
        if view.context_tokens is not None and prompt >= view.context_tokens:
            return self._too_long(
                f"The prompt has {prompt} tokens and the engine's context holds {view.context_tokens}, at least one of them "
                f"output; shorten the prompt to at most {view.context_tokens - 1} tokens."
            )
        if view.blocks is None or view.block_size is None:
            return None
        most = self._hard_cap(view.blocks)
        shape = self._flight.shape
        least = blocks_held(
            prompt=prompt, generated=0, outputs=outputs, block_size=shape.block_size, shared=shape.shared
        )
        if least > most:
            return self._too_long(
                f"The prompt has {prompt} tokens for {outputs} output(s) and the engine's KV cache takes prompts of at "
                f"most {most * view.block_size} tokens ({self._config.admission.kv_hard_cap_percent} % of {view.blocks} blocks "
                f"of {view.block_size}); shorten the prompt, or ask for fewer outputs."
            )
        if shape.worst and self._profile(demand).mean[0] > view.blocks * ONE:
            return self._too_long(
                f"The request may need {self._profile(demand).mean[0] // ONE * view.block_size} KV tokens for {demand.outputs} "
                f"output(s) and the engine holds {view.blocks * view.block_size}; lower max_tokens or n, or shorten the prompt."
            )
        return None

    def _overdrawn(self, demand: Demand, *, now: float) -> Refused | None:
        """Refusal of a tenant whose token bucket is empty."""
        rate = self._config.admission.fairness.tokens_per_second
        wait = self._buckets.wait(demand.tenant, rate=rate, now=now) if rate else 0.0
        if wait <= 0:
            return None
        after = retry.seconds(wait, uniform=self._uniform())
        return Refused(
            Reason.TENANT,
            after,
            f"This tenant has used more than its {rate} tokens per second of the last minute; retry in {after} s.",
        )

    def _blocked(self, demand: Demand, *, own: Profile, forced: bool, now: float) -> Reason | None:
        """The gate that keeps a request back now, None if it may go; ``forced``: whatever its class."""
        flight, view = self._flight, self._engine
        most = self._config.engine.max_sequences
        if most is None and view.blocks is None:
            most = _SEQUENCES_UNKNOWN
        if len(flight) and most is not None and flight.sequences + view.external_sequences + demand.outputs > most:
            return Reason.SEQUENCES
        if self.ring:
            return None
        share = 1.0 if forced else max(0.0, 1.0 - _CLASS_STEP * demand.priority)
        if not self._holds(demand, own=own, kappa=share * self._kappa(now=now)):
            return Reason.KV
        return self._unkept(demand, now=now) if len(flight) else None

    def _holds(self, demand: Demand, *, own: Profile, kappa: float) -> bool:
        """Whether the engine's KV cache has room for a request: gates C and A."""
        flight, view = self._flight, self._engine
        worst = flight.shape.worst
        if view.blocks is None:
            return not (worst and len(flight))
        external = max(0, view.external) if worst else view.external
        cap = self._hard_cap(view.blocks)
        # An estimate above the cap may be wrong: such a request goes when it is alone.
        if flight.held + external + min(cap, held(demand, generated=0, shape=flight.shape)) > cap:
            return False
        if not len(flight) and not (worst and external):
            return True
        return flight.peak.blocks(own, z=Z) + external <= kappa * view.blocks

    def _unkept(self, demand: Demand, *, now: float) -> Reason | None:
        """The gate that a request would break its own or others' promised time per token by, if it went now."""
        flight, prefill = self._flight, self._prefill
        promised = _MARGIN * self._planned
        batched = self._config.engine.max_batched_tokens
        in_time = self._in_time(demand, now=now)
        if not prefill.allows(demand.prompt_tokens, promised=promised, batched_tokens=batched, in_time=in_time):
            return Reason.PREFILL
        step, slower = self._pace.step(flight.sequences), self._pace.step(flight.sequences + demand.outputs)
        if step is None or slower is None:
            return None
        if slower >= promised:
            return Reason.SEQUENCES
        cost = Cost(
            promised=promised,
            step=step,
            slower_step=slower,
            under_way=prefill.under_way,
            stall=prefill.seconds_per_token * demand.prompt_tokens,
        )
        tight = self._slacks.below(cost.under_way + cost.stall, promised=promised)
        return Reason.PREFILL if newly_missed(tight, cost, enough=MOST_MISSES) > MOST_MISSES else None

    def _in_time(self, demand: Demand, *, now: float) -> bool:
        """Whether this request, and all that wait, would get their first token in time if all were sent now.

        One that waits itself is counted twice, which errs on the side of order.
        """
        expiry = self._queue.next_expiry()
        left = self._longest_wait if expiry is None else expiry - now
        work = self._prefill.outstanding + self._queue.prompt_tokens + demand.prompt_tokens
        return self._prefill.seconds(work) <= left

    # Queue.

    def _arrival_hold(self, entry: Entry, *, now: float) -> Reason | None:
        """What keeps a new request from going at once; DEADLINE if it is only not its turn."""
        if not self._queue.leads(entry, now=now):
            return Reason.DEADLINE
        reason = self._blocked(entry.demand, own=self._profile(entry.demand), forced=False, now=now)
        self._kv_binds |= reason is Reason.KV
        return reason

    def _wait(self, entry: Entry, *, held_by: Reason, returned: bool = False, now: float) -> Waiting:
        expires_at = self._expires_at(entry)
        return Waiting(
            entry,
            expires_at=expires_at,
            forced_at=entry.arrived_at + FORCED_SHARE * (expires_at - entry.arrived_at),
            held_by=held_by,
            returned=returned,
            not_before=now + CHECK_SECONDS if returned else now,
        )

    def _expires_at(self, entry: Entry) -> float:
        """When a request must have been sent, for its first token to come in time."""
        longest = self._longest_wait
        own = self._prefill.seconds(entry.demand.prompt_tokens)
        return entry.arrived_at + max(_LEAST_WAIT_SHARE * longest, longest - own)

    def _no_room(self, waiting: Waiting, *, now: float) -> Refused | None:
        """Refusal of a new request that the queue cannot take."""
        bounds, demand, queue = self._config.admission.queue, waiting.entry.demand, self._queue
        if bounds.max_requests == 0:
            return self._refusal(waiting.held_by, "There is no room now and no queue", demand, now=now)
        if len(queue) and (
            refusal := self._hopeless(waiting.entry, ahead=queue.ahead(of=waiting.entry)[waiting.entry], now=now)
        ):
            return refusal
        if len(queue) and queue.prompt_bytes + demand.prompt_bytes > _QUEUED_BYTES:
            why = f"Requests of {queue.prompt_bytes} bytes wait already"
            return self._refusal(Reason.QUEUE_FULL, why, demand, now=now)
        if len(queue) >= bounds.max_requests and queue.crowding(demand.tenant) is None:
            return self._full(demand, waiting=len(queue), now=now)
        return None

    def _displace(self, waiting: Waiting, *, now: float) -> None:
        """Sends one away for a new request that a full queue takes: a tenant with more there gives up its place."""
        bounds, queue = self._config.admission.queue, self._queue
        if len(queue) < bounds.max_requests or (crowding := queue.crowding(waiting.entry.demand.tenant)) is None:
            return
        before = len(queue)
        queue.take(crowding.entry)
        self._refuse(crowding.entry, self._full(crowding.entry.demand, waiting=before, now=now), now=now)
        self._ruled.append(crowding.entry)
        self._changed(now)

    def _full(self, demand: Demand, *, waiting: int, now: float) -> Refused:
        return self._refusal(Reason.QUEUE_FULL, f"{waiting} requests wait already", demand, now=now)

    def _next(self, *, now: float) -> Waiting | None:
        """The request that goes to the engine now; None if every gate is closed for all that may go."""
        for waiting in self._queue.turns(now=now)[:_TRIES]:
            demand, forced = waiting.entry.demand, waiting.forced(now=now)
            reason = self._blocked(demand, own=self._profile(demand), forced=forced, now=now)
            if reason is None:
                return waiting
            waiting.held_by = reason
            self._kv_binds |= reason is Reason.KV
            if forced:
                break  # what comes free is kept for it
        return None

    def _recheck(self, *, now: float) -> list[Entry]:
        """Refuses those that wait in vain: they never fit what is now known of the engine, or too much is before them."""
        decided: list[Entry] = []
        for entry, ahead in self._queue.ahead().items():
            refusal = self._never(entry.demand) or self._hopeless(entry, ahead=ahead, now=now)
            if refusal is not None:
                self._queue.take(entry)
                self._refuse(entry, refusal, now=now)
                decided.append(entry)
        return decided

    def _hopeless(self, entry: Entry, *, ahead: int, now: float) -> Refused | None:
        """Refusal of a request that has too much before it for its time."""
        if self._backlog.seconds(ahead) <= _EARLY * (self._expires_at(entry) - now):
            return None
        why = f"{ahead} prompt tokens wait before it, too many for its time"
        return self._refusal(Reason.DEADLINE, why, entry.demand, now=now)

    def _would_expire(self, waiting: Waiting | None, *, now: float) -> Reason | None:
        """The gate that would keep a request beyond its time, as far as can be foreseen."""
        if waiting is None:
            return None
        behind = self._prefill.outstanding if not self.ring else 0
        prefills = self._prefill.seconds(behind) if behind else 0.0
        wait = max(prefills, self._expected_wait(waiting.entry.demand, now=now))
        return waiting.held_by if wait > waiting.expires_at - now else None

    def _too_late(self, waiting: Waiting, *, now: float) -> Entry:
        entry = waiting.entry
        self._queue.take(entry)
        waited = now - entry.arrived_at
        refusal = self._refusal(waiting.held_by, f"There was no room within {waited:.1f} s", entry.demand, now=now)
        self._refuse(entry, refusal, now=now)
        return entry

    def _let_in(self, waiting: Waiting, *, now: float) -> Entry:
        self._queue.take(waiting.entry)
        self._admit(waiting.entry, returned=waiting.returned, now=now)
        return waiting.entry

    # Bookkeeping.

    def _admit(self, entry: Entry, *, returned: bool = False, now: float) -> None:
        demand = entry.demand
        curve, limit = self._curve(demand), self._limit(demand)
        output = demand.outputs * curve.expected(limit)
        self._pace.sequences(self._flight.decoding, now=now)
        entry.admitted_at = now
        self._prefill.outstanding += demand.prompt_tokens
        self._flight.add(
            Running(
                entry,
                sent_at=now,
                curve=curve,
                limit=limit,
                expected_output=output,
                prefill_outstanding=self._prefill.outstanding,
                profile=self._profile(demand),
                returned=returned,
            )
        )
        self._charge(demand, prompt_tokens=demand.prompt_tokens, output_tokens=output, now=now)
        self._backlog.admitted(demand.prompt_tokens)
        self._admitted += 1
        self.decisions["admitted", ""] += 1

    def _refuse(self, entry: Entry, refusal: Refused, *, now: float) -> None:
        entry.refusal = refusal
        self._count_refused(entry.demand, refusal.reason)

    def _count_refused(self, demand: Demand, reason: Reason) -> None:
        if reason is not Reason.CONTEXT:
            self._backlog.refused(demand.prompt_tokens)
        if reason not in _NO_DEMAND:
            self._shed += self._reservation(demand)
            self._refused += 1
        self.decisions["refused", reason] += 1

    def _release(self, running: Running, *, now: float) -> None:
        """Gives back all that a request reserved."""
        self._pace.sequences(self._flight.decoding, now=now)
        self._flight.remove(running.entry)
        if running.entry.first_token_at is None:
            self._prefill.outstanding -= running.entry.demand.prompt_tokens
        else:
            self._slacks.take(running)

    def _charge(self, demand: Demand, *, prompt_tokens: float, output_tokens: float, now: float) -> None:
        """Books what a tenant got; negative to give back."""
        self._queue.charge(demand.tenant, prompt_tokens=prompt_tokens, output_tokens=output_tokens, now=now)
        rate = self._config.admission.fairness.tokens_per_second
        if rate:
            self._buckets.pay(demand.tenant, prompt_tokens + output_tokens, rate=rate, now=now)

    def _changed(self, now: float) -> None:
        if self._changed_at is None:
            self._changed_at = now

    def _close_window(self, now: float) -> None:
        """Learns from the tokens of the last half second, when it is over."""
        length = self._pace.window(now=now)
        if length is None:
            return
        self._pace.sequences(self._flight.decoding, now=now)
        times = []
        for running in self._flight:
            tokens = running.entry.generated - running.window_generated
            if running.window_generated and tokens:
                times.append((running.last_at - running.window_at) * running.entry.demand.outputs / tokens)
                running.window_at, running.window_generated = running.last_at, running.entry.generated
        self._pace.close(length, times, seconds_per_prompt_token=self._prefill.seconds_per_token, now=now)

    # What follows from configuration and experience.

    def _shape(self) -> Shape:
        engine = self._config.engine
        return Shape(
            block_size=self._engine.block_size or 1,
            shared=engine.prefix_caching,
            worst=self._config.admission.reservation == "Worst",
            lookahead=engine.speculative_tokens,
        )

    @property
    def _promised(self) -> float:
        return self._config.slo.tpot_milliseconds / 1000

    @property
    def _planned(self) -> float:
        """The time per token that is planned with: the promised one, unless the engine needs more for a request alone.

        Then no order of requests keeps the promise, and serving one after another would only waste the engine.
        """
        alone = self._pace.step(1)
        return self._promised if alone is None or alone < self._promised else _HOPELESS * alone

    @property
    def _longest_wait(self) -> float:
        seconds = self._config.admission.queue.max_wait_seconds
        return self._config.slo.ttft_milliseconds / 1000 if seconds is None else float(seconds)

    def _slowness(self) -> float:
        """Newest time per token as a share of the promised one; 0 while unknown."""
        return (self._pace.seconds_per_token or 0.0) / self._promised

    def _hard_cap(self, blocks: int) -> int:
        return blocks * self._config.admission.kv_hard_cap_percent // 100

    def _kappa(self, *, now: float) -> float:
        admission = self._config.admission
        kappa = self._trim.kappa
        if admission.reservation == "Worst":
            kappa = admission.kv_hard_cap_percent / 100
        elif admission.kv_peak_percent is not None:
            kappa = min(kappa, admission.kv_peak_percent / 100)
        if self._engine.stale:
            kappa = min(kappa, FLOOR)
        return kappa * self._engine.ramp(now=now)

    def _peak_blocks(self) -> float:
        return self._flight.peak.blocks(z=Z)

    def _curve(self, demand: Demand) -> Curve:
        return self._lengths.curve(priority=demand.priority, prompt_tokens=demand.prompt_tokens)

    def _limit(self, demand: Demand) -> int | None:
        """Most tokens of one output: the client's bound, and what the context leaves."""
        view, bounds = self._engine, [demand.max_output_tokens]
        if view.context_tokens is not None:
            bounds.append(max(1, view.context_tokens - demand.prompt_tokens))
        if view.blocks is not None and view.block_size is not None:
            bounds.append(max(1, view.blocks * view.block_size - demand.prompt_tokens))
        return min((bound for bound in bounds if bound is not None), default=None)

    def _profile(self, demand: Demand) -> Profile:
        """Of a request that has not begun; several gates ask for the same one in a row."""
        asked = demand, self._curve(demand), self._limit(demand), self._flight.shape
        if self._profiled is None or asked != self._profiled[0]:
            _, curve, limit, shape = asked
            self._profiled = asked, profile(demand, curve=curve, generated=0, limit=limit, shape=shape)
        return self._profiled[1]

    def _reservation(self, demand: Demand) -> float:
        """KV tokens that a request would reserve."""
        limit = self._limit(demand)
        worst = self._flight.shape.worst and limit is not None
        each = limit if worst and limit is not None else self._curve(demand).expected(limit)
        return demand.prompt_tokens + demand.outputs * each

    # Answers.

    @staticmethod
    def _too_long(message: str) -> Refused:
        return Refused(Reason.CONTEXT, None, message)

    def _refusal(self, reason: Reason, why: str, demand: Demand, *, now: float) -> Refused:
        after = retry.seconds(self._expected_wait(demand, now=now), uniform=self._uniform())
        return Refused(reason, after, f"{why} ({_HELD_BY[reason]}); retry in {after} s.")

    def _expected_wait(self, demand: Demand, *, now: float) -> float:
        """Seconds until the need of such a request is free and those before it are gone."""
        backlog = self._backlog.seconds(self._queue.prompt_tokens, returning=True)
        if self._engine.blocks is None or self.ring:
            return backlog
        own, limit = self._profile(demand), self._kappa(now=now) * self._engine.blocks - self._engine.external
        if not self._backlog.drains:
            # Nobody knows yet when those before it will be gone: they are taken for requests like it that need their room too.
            limit -= len(self._queue) * max(own.mean) / ONE
        if self._flight.shape.worst:
            missing = self._flight.peak.blocks(own, z=Z) - limit
            steps = self._flight.steps_until_free(missing) if missing > 0 else 0.0
        else:
            steps = self._flight.peak.steps_until(own, limit=limit, z=Z)
        free = retry.MOST_SECONDS if steps is None else steps * (self._pace.seconds_per_token or self._promised)
        return max(backlog, free)
