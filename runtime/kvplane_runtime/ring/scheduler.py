"""What the ring does next: each step is the decode batch of all running outputs and one window of one prefill.

Rank 0 alone decides. A step is planned, run by all ranks, and only then applied here (:meth:`Scheduler.complete`): a step
that breaks leaves no trace, and the next epoch goes on from what the ranks still hold (:meth:`Scheduler.reform`).

*Order.* The prefill with the least slack goes first: its promised time to first token, less what its prefill is
expected to take. A prompt that takes several windows is *long*, and is promised twice its own time. A long prefill may
hold up a short one for the window under way and no longer: while a short one waits that has waited for such a window,
no long one gets a turn. Short ones that came later have not waited for one, so the long ones go on too. Slack is taken
as it was when a prefill began to wait: with the work that remains, two equal long prompts would take turns and both
end last.

*Windows* take at most a slice of time, by the learned cost, and at least what hides communication while keys go round. All
but a prompt's last are multiples of 2N, so the zigzag gives every rank the same. Prompts that are too short to be worth
cutting lie whole on the rank with the least.

*Room.* What is admitted has room for all that it may come to hold (:mod:`accounting`). Finished sequences are kept for
their prefixes until the room is needed. A request finds its prefix in one of these and goes on in it, or has it copied (a
*fork*), as the further outputs of one prompt do.

*After a loss* there may be less room than was promised. Requests get theirs again least slack first; the others are
*parked*: what they hold stays, and they go on as soon as there is room. Where what all of them hold lets none go on, the
most urgent that the ring can hold goes on, and those with most slack give up what they hold, to compute it again later. So
one always goes on, unless the ring is too small for each of them alone. While one is parked that is to go on, nothing new
is admitted.

Pure: the time is an argument, and so is randomness.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from kvplane_runtime.admission import retry
from kvplane_runtime.ring import admission, windows
from kvplane_runtime.ring.accounting import Accounting, Tokens, decode_shares, zigzag_share
from kvplane_runtime.ring.admission import Refusal, Room
from kvplane_runtime.ring.cost import Work, work
from kvplane_runtime.ring.layout import Layout, Placement
from kvplane_runtime.ring.messages import Decode, Fork, Positions, Step, Table, Truncate, Window
from kvplane_runtime.ring.prefix import Prefixes
from kvplane_runtime.ring.ranges import Run
from kvplane_runtime.ring.requests import (
    COUNTS,
    Accepted,
    Ended,
    Event,
    Failed,
    Policy,
    Progress,
    Request,
    Snapshot,
    Token,
)
from kvplane_runtime.ring.sampling import Draw, Sampled
from kvplane_runtime.ring.sequence import Job, TokenSequence
from kvplane_runtime.ring.windows import Windows

_WASTE: Final = 4
"""A kept sequence is gone on in, rather than copied, if at most the reused tokens over this are thrown away."""
_HITS: Final = 4
"""Sequences with a common prefix that are tried before it is computed anew."""


@dataclass(frozen=True, slots=True)
class _Option:
    """One way to give a request room."""

    layout: Layout
    placement: Placement
    source: int | None = None
    """Sequence with a common prefix."""
    fork: bool = False
    """Its prefix is copied; else it is gone on in."""


class Scheduler:
    """Decides the steps of one ring; see the module for how."""

    def __init__(self, *, policy: Policy, ranks: int, whole: int, capacity: int, uniform: Callable[[], float]) -> None:
        """``ranks`` are there now, and ``whole`` when none is lost; ``capacity``: KV tokens of each. ``uniform`` draws from [0, 1)
        and spreads Retry-After.
        """
        self.policy = policy
        self._uniform = uniform
        self._accounting = Accounting(ranks=ranks, capacity=capacity, reserve=policy.reserve)
        self._whole = whole
        self._prefixes = Prefixes(block=policy.prefix_block_tokens)
        self._windows = Windows(
            slice_seconds=policy.slice_seconds, tokens=policy.window_tokens, keys_per_query=policy.keys_per_query
        )
        self._decode_seconds = 0.0
        self._jobs: dict[str, Job] = {}
        self._sequences: dict[int, TokenSequence] = {}
        self._next = 0
        self._release: list[int] = []
        self._truncate: list[Truncate] = []
        self._forks: dict[int, Fork] = {}
        """By child; not yet carried out by the ranks."""
        self._flight: Step | None = None
        self._cancelled: list[tuple[str, int | None]] = []
        """While a step is under way, for its end."""
        self._counts = dict.fromkeys(COUNTS, 0)

    # Requests come and go.

    @property
    def room(self) -> Room:
        """What the ring holds when it is empty."""
        accounting, policy = self._accounting, self.policy
        return Room(accounting.ranks, accounting.capacity, policy.reserve, policy.model_tokens, policy.context_tokens)

    def submit(self, request: Request, *, now: float) -> Accepted | Refusal:
        """Takes a request in, or says why not."""
        if request.id in self._jobs:
            raise ValueError(f"The request {request.id!r} is in progress already; give each its own id.")
        prompt, outputs, most = len(request.prompt), request.outputs, request.max_tokens
        if most is None:
            most = self.room.output_tokens(prompt, outputs, most=self.policy.default_output_tokens)
        refusal = self._never(prompt, most, outputs) or self._not_yet(prompt, most, outputs)
        if refusal is not None:
            return refusal
        job = Job(request, most, set())
        option = self._find_room(job)
        if option is None:
            needed = self._needed(prompt, most, outputs)
            free = tuple(self._accounting.limit - tokens for tokens in self._accounting.active)
            return self._no_room(needed, admission.no_room(needed, free, self._retry_after(None, needed)))
        return self._admit(job, option, now)

    def _never(self, prompt: int, most: int, outputs: int) -> Refusal | None:
        """Why the whole ring could not serve a request with nothing else in it."""
        if outputs > self.policy.max_sequences:
            refusal: Refusal | None = admission.too_many_outputs(outputs, self.policy.max_sequences)
        else:
            refusal = admission.never_fits(prompt, most, outputs, replace(self.room, ranks=self._whole))
        self._counts["refused_never"] += refusal is not None
        return refusal

    def _not_yet(self, prompt: int, most: int, outputs: int) -> Refusal | None:
        """Why a request is not taken in now, whatever room there is."""
        active = sum(len(job.outputs) for job in self._jobs.values()) + outputs
        if active > self.policy.max_sequences:
            self._counts["refused_requests"] += 1
            return admission.too_many(self.policy.max_sequences, self._retry_after(active, None))
        needed = self._needed(prompt, most, outputs)
        ranks = self._accounting.ranks
        if not self.room.holds(prompt, most, outputs, ranks=ranks):
            return self._no_room(needed, admission.until_whole(ranks, self._whole, retry.MOST_SECONDS))
        if any(self._is_possible(lead) for lead in self._sequences.values() if lead.waits_for_room):
            return self._no_room(needed, admission.after_parked(self._retry_after(None, needed)))
        return None

    def _needed(self, prompt: int, most: int, outputs: int) -> Tokens:
        return tuple(outputs * tokens for tokens in admission.demand(prompt, most, ranks=self._accounting.ranks))

    def _no_room(self, needed: Tokens, refusal: Refusal) -> Refusal:
        self._counts["refused_kv"] += 1
        self._counts["refused_reservation_tokens"] += sum(needed)
        return refusal

    def cancel(self, request: str, output: int | None = None) -> None:
        """Ends a request, or one output of it, without an event; what is computed of its prompt is kept."""
        if self._flight is not None:
            self._cancelled.append((request, output))
        else:
            self._cancel(request, output)

    def fail_all(self, refusal: Refusal) -> list[Event]:
        """Ends all requests and forgets a step under way."""
        self._flight = None
        self._cancelled = []
        failed: list[Event] = [Failed(request, refusal) for request in self._jobs]
        for request in list(self._jobs):
            self._cancel(request, None)
        return failed

    def expire(self, *, now: float) -> list[Event]:
        """Ends the requests that were parked too long; none while a step is under way."""
        if self._flight is not None:
            return []
        since = {s.request: s.parked_since for s in self._sequences.values() if s.parked_since is not None}
        late = [request for request, parked in since.items() if now - parked >= self.policy.park_seconds]
        for request in late:
            self._cancel(request, None)
        refusal = admission.parked_too_long(self.policy.park_seconds, self._accounting.ranks)
        return [Failed(request, refusal) for request in late]

    # Steps.

    def plan(self, *, epoch: int, number: int, now: float) -> Step | None:
        """The next step; None where there is nothing to compute. It is under way until ``complete`` or ``reform``."""
        if self._flight is not None:
            raise RuntimeError("A step is under way; complete it, or form the ring anew, before the next is planned.")
        self._unpark(now)
        decode = [
            Decode(sequence.id, len(sequence.tokens) - 1, sequence.tokens[-1])
            for sequence in self._sequences.values()
            if sequence.decodes
        ]
        chosen = self._choose(now)
        if not decode and chosen is None:
            return None
        self._flight = Step(
            epoch=epoch,
            number=number,
            decode=decode,
            window=None if chosen is None else self._window(chosen),
            release=list(self._release),
            truncate=list(self._truncate),
            fork=list(self._forks.values()),
        )
        return self._flight

    def draws(self, step: Step) -> list[Draw]:
        """The tokens that have to be chosen from the logits of ``step``."""
        drawn = [self._draw(row, self._sequences[decode.sequence]) for row, decode in enumerate(step.decode)]
        if step.window is not None and step.window.logits:
            lead = step.window.sequence
            for sequence in self._sequences.values():
                if lead in (sequence.id, sequence.lead):
                    drawn.append(self._draw(len(step.decode), sequence))
        return drawn

    def complete(
        self, step: Step, sampled: Mapping[int, Sampled], *, seconds: float, failed: Mapping[int, Refusal] | None = None
    ) -> list[Event]:
        """Applies ``step``, which took ``seconds``. Each draw has a token in ``sampled``, by sequence, or in ``failed`` why there
        is none: the request of that sequence ends.
        """
        if step is not self._flight:
            raise RuntimeError(f"Step {step.number} of epoch {step.epoch} is not the one under way.")
        self._flight = None
        self._carried_out(step)
        self._learn(step, seconds)
        self._counts["steps"] += 1
        events: list[Event] = []
        for decode in step.decode:
            sequence = self._sequences[decode.sequence]
            sequence.layout.append_token(decode.position)
            sequence.reached = sequence.layout.length
            self._charge(sequence)
        if step.window is not None:
            events += self._computed(step.window)
        for identity, token in sampled.items():
            events += self._sampled(self._sequences[identity], token)
        for identity, refusal in (failed or {}).items():
            events += self._fail(identity, refusal)
        cancelled, self._cancelled = self._cancelled, []
        gone = set(cancelled)
        for request, output in cancelled:
            self._cancel(request, output)
        return [event for event in events if not _is_gone(event, gone)]

    # The ring changes.

    def tables(self) -> list[Table]:
        """All sequences that ranks are to hold KV of, for a ``Form``."""
        return [
            Table.of(
                sequence.id,
                sequence.tokens[: sequence.layout.length],
                [
                    [Positions(run.first, run.count, run.step) for run in sequence.layout.runs(rank)]
                    for rank in range(sequence.layout.ranks)
                ],
            )
            for sequence in self._sequences.values()
            if sequence.id not in self._forks and sequence.layout.length
        ]

    def reform(self, layouts: Mapping[int, Layout], *, ranks: int, capacity: int, now: float) -> None:
        """The ring has ``ranks`` from now on, which hold ``layouts``: all that :meth:`lengths` names, less what was lost.

        A step under way is forgotten. Requests for which there is no room are parked.
        """
        self._flight = None
        self._release, self._truncate = [], []  # the tables of the new ring say it all, but for what is dropped here
        self._accounting = Accounting(ranks=ranks, capacity=capacity, reserve=self.policy.reserve)
        for sequence in self._sequences.values():
            known = None if sequence.id in self._forks else layouts.get(sequence.id)
            sequence.layout = Layout(ranks) if known is None else known
        for request, output in self._cancelled:
            self._cancel(request, output)
        self._cancelled = []
        self._refork()
        for sequence in list(self._sequences.values()):
            if sequence.job is None and any(sequence.held()):
                self._accounting.charge(sequence.id, sequence.held(), kept=True)
            elif sequence.job is None:
                self._forget(sequence)
        self._share_out(now)

    def restore(self, tables: Sequence[Table], *, ranks: int) -> None:
        """Takes over what workers hold of a ring whose rank 0 is gone: as sequences that are kept for their prefixes.

        For a scheduler that has nothing yet; positions that nobody holds are computed when they are needed.
        """
        for table in tables:
            held = [[Run(run.first, run.count, run.step) for run in mine] for mine in table.held]
            layout = Layout(ranks, held=held, length=len(table.tokens))
            self._next = max(self._next, table.sequence + 1)
            sequence = TokenSequence(
                id=table.sequence,
                job=None,
                output=0,
                prompt=len(table.tokens),
                tokens=list(table.tokens),
                layout=layout,
                placement="zigzag",
                reached=len(table.tokens),
            )
            self._sequences[sequence.id] = sequence
            self._keep(sequence)

    # What is known.

    def snapshot(self) -> Snapshot:
        """The state now. It is asked for after every step: those that are kept, which may be thousands, are not gone through."""
        in_progress = [self._sequences[identity] for job in self._jobs.values() for identity in job.outputs]
        return Snapshot(
            waiting=sum(not s.begun and s.parked_since is None for s in in_progress),
            prefilling=sum(s.begun and s.prefills for s in in_progress),
            decoding=sum(s.begun and s.decodes for s in in_progress),
            parked=sum(s.parked_since is not None for s in in_progress),
            kept=len(self._sequences) - len(in_progress),
            waiting_prompt_tokens=sum(s.missing_tokens for s in in_progress if s.waits),
            waiting_kv_tokens=sum(s.missing_tokens + s.to_generate for s in in_progress if s.parked_since is not None),
            capacity_tokens=self._accounting.capacity,
            limit_tokens=self._accounting.limit,
            whole_tokens=replace(self.room, ranks=self._whole).tokens,
            longest_tokens=self.room.longest,
            held=tuple(
                kept + sum(s.layout.tokens(rank) for s in in_progress)
                for rank, kept in enumerate(self._accounting.kept)
            ),
            active=self._accounting.active,
            kept_tokens=self._accounting.kept,
            counts=dict(self._counts),
        )

    # Room.

    def _find_room(self, job: Job) -> _Option | None:
        """The best way in which there is room, once kept sequences are dropped where needed."""
        prompt, outputs = job.request.prompt, job.request.outputs
        for option in self._options(prompt):
            each = self._demand(option.layout, option.placement, target=len(prompt), more=job.max_tokens - 1)
            taken = () if option.source is None or option.fork else (option.source,)
            if self._evict_for([outputs * tokens for tokens in each], taken=taken, spared=option.source):
                return option
        return None

    def _evict_for(
        self, demand: Sequence[int], *, taken: Sequence[int] = (), spared: int | None = None, reserved: bool = True
    ) -> bool:
        """Whether there is room for ``demand`` where ``taken`` gives up its own; drops kept sequences, oldest first, where
        needed. ``reserved``: besides what the policy reserves.
        """
        parents = self._parents()
        droppable = [kept for kept in self._prefixes.kept() if kept not in parents and kept != spared]
        if not self._accounting.fits(demand, without=(*taken, *droppable), reserved=reserved):
            return False
        for kept in droppable:
            if self._accounting.fits(demand, without=taken, reserved=reserved):
                break
            self._forget(self._sequences[kept])
            self._counts["evicted_sequences"] += 1
        return True

    def _options(self, prompt: Sequence[int]) -> Iterator[_Option]:
        """Ways to give a prompt room, the best first."""
        for source, length in self._prefixes.find(prompt)[:_HITS]:
            sequence = self._sequences[source]
            layout = sequence.layout.copy()
            layout.truncate(length)
            if layout.length < length or source in self._forks:  # a loss has cut it shorter, or it is no copy yet
                continue
            go_on = [False] if self._prefixes.is_kept(source) and source not in self._parents() else []
            fork = [True] if layout.complete() else []
            cheap = (sequence.layout.length - length) * _WASTE <= length
            for copied in (*go_on, *fork) if cheap else (*fork, *go_on):
                for placement in self._placements(layout, len(prompt)):
                    yield _Option(layout.copy(), placement, source, fork=copied)
        ranks = self._accounting.ranks
        for placement in self._placements(Layout(ranks), len(prompt)):
            yield _Option(Layout(ranks), placement)

    def _parents(self) -> set[int]:
        """Sequences that the next step still copies from."""
        return {fork.parent for fork in self._forks.values()}

    def _is_short(self, tokens: int) -> bool:
        ranks = self._accounting.ranks
        return ranks > 1 and tokens < 2 * ranks * self.policy.short_tokens

    def _placements(self, layout: Layout, tokens: int) -> Iterator[Placement]:
        """Where the rest of so many tokens may go, the best first: few lie whole on a rank, where no other has any."""
        if self._is_short(tokens):
            active = self._accounting.active
            holders = [rank for rank in range(layout.ranks) if layout.tokens(rank)]
            if len(holders) <= 1:
                yield from holders or sorted(range(layout.ranks), key=lambda rank: (active[rank], rank))
        yield "zigzag"

    def _demand(self, layout: Layout, placement: Placement, *, target: int, more: int) -> Tokens:
        """Most KV tokens of an output, by rank: what it holds, what it misses of ``target`` and ``more`` generated ones."""
        ranks = self._accounting.ranks
        missing = sum(run.count for run in layout.missing(0, target))
        if placement == "zigzag":
            computed = (zigzag_share(missing, ranks),) * ranks
        else:
            computed = tuple(missing if rank == placement else 0 for rank in range(ranks))
        generated = decode_shares(target, more, ranks)
        return tuple(layout.tokens(rank) + computed[rank] + generated[rank] for rank in range(ranks))

    def _charge(self, sequence: TokenSequence) -> None:
        """Charges a sequence in progress what it holds and may come to hold; a parked one only what it holds."""
        if sequence.parked_since is None:
            computing = sequence if sequence.lead is None else self._sequences[sequence.lead]
            layout, placement = computing.layout, computing.placement
            tokens = self._demand(layout, placement, target=sequence.target, more=sequence.to_generate)
        else:  # a copy that is not made yet holds nothing
            tokens = sequence.held() if sequence.id not in self._forks else (0,) * self._accounting.ranks
        self._accounting.charge(sequence.id, tokens)

    def _retry_after(self, sequences: int | None, needed: Tokens | None) -> int:
        """Seconds until so many outputs, or so much room, may be free, if all run to their longest."""
        ends: list[tuple[float, TokenSequence]] = []
        computing = 0.0
        for sequence in self._sequences.values():
            if sequence.job is None or sequence.parked_since is not None:
                continue
            if sequence.prefills:
                computing += self._windows.seconds(self._work(sequence))
            left = sequence.prompt + sequence.job.max_tokens - len(sequence.tokens)
            ends.append((left * self._decode_seconds + computing, sequence))
        ends.sort(key=lambda end: end[0])
        gone: list[int] = []
        for wait, sequence in ends:
            gone.append(sequence.id)
            enough = needed is None or self._accounting.fits(needed, without=(*gone, *self._prefixes.kept()))
            if enough and (sequences is None or sequences - len(gone) <= self.policy.max_sequences):
                return retry.seconds(wait, uniform=self._uniform())
        return retry.MOST_SECONDS

    # A request's life.

    def _admit(self, job: Job, option: _Option, now: float) -> Accepted:
        request = job.request
        lead = self._begin(job, option)
        for output in range(1, request.outputs):
            child = self._new(job, output, Layout(self._accounting.ranks), option.placement)
            child.lead = lead.id
        cached = sum(lead.held())
        self._await_prefill(lead, now)
        for identity in sorted(job.outputs):
            self._charge(self._sequences[identity])
        self._jobs[request.id] = job
        self._counts["admitted"] += 1
        self._counts["prompt_tokens"] += len(request.prompt)
        self._counts["cached_tokens"] += cached
        return Accepted(request.id, cached, job.max_tokens)

    def _begin(self, job: Job, option: _Option) -> TokenSequence:
        """The sequence that computes the prompt."""
        if option.source is None or option.fork:
            sequence = self._new(job, 0, option.layout, option.placement)
            if option.source is not None:
                self._forks[sequence.id] = Fork(option.source, sequence.id, option.layout.length)
                if self._prefixes.is_kept(option.source):
                    self._prefixes.keep(option.source)
        else:
            sequence = self._sequences[option.source]
            self._prefixes.take(sequence.id)
            if option.layout.length < sequence.layout.length:
                self._truncate.append(Truncate(sequence.id, option.layout.length))
            sequence.job, sequence.output, sequence.begun = job, 0, False
            sequence.prompt, sequence.tokens = len(job.request.prompt), list(job.request.prompt)
            sequence.layout, sequence.placement = option.layout, option.placement
            job.outputs.add(sequence.id)
            del self._sequences[sequence.id]  # it is now the newest: decode batches are in the order of admission
            self._sequences[sequence.id] = sequence
        sequence.reached = min(sequence.reached, option.layout.length) if not option.fork else option.layout.length
        self._prefixes.add(sequence.id, sequence.tokens, known=option.layout.length)
        return sequence

    def _new(self, job: Job, output: int, layout: Layout, placement: Placement) -> TokenSequence:
        prompt = job.request.prompt
        sequence = TokenSequence(self._next, job, output, len(prompt), list(prompt), layout, placement)
        self._sequences[sequence.id] = sequence
        self._next += 1
        job.outputs.add(sequence.id)
        return sequence

    def _await_prefill(self, sequence: TokenSequence, now: float) -> None:
        """From now on the sequence waits for its prefill, or for what is missing of it."""
        sequence.since, sequence.held_up = now, False
        sequence.work = self._work(sequence)

    def _is_long(self, sequence: TokenSequence) -> bool:
        """Of one that waits for its prefill; judged by what is known now, which is little when the first prompts come."""
        ranks, placement = self._accounting.ranks, sequence.placement
        return self._windows.several(sequence.work, ranks=ranks, placement=placement)

    def _computed(self, window: Window) -> list[Event]:
        sequence = self._sequences[window.sequence]
        end = window.start + len(window.tokens)
        missing = sequence.layout.missing(window.start, end)
        count = sum(run.count for run in missing)
        again = sum(run.before(sequence.reached) for run in missing)
        if window.placement == "zigzag":
            sequence.layout.append_window(window.start, len(window.tokens))
        else:
            sequence.layout.append_whole(window.placement, window.start, len(window.tokens))
        sequence.begun = True
        sequence.reached = max(sequence.reached, end)
        self._charge(sequence)
        self._prefixes.add(sequence.id, sequence.tokens, known=sequence.layout.length)
        self._counts["windows"] += 1
        self._counts["computed_tokens"] += count
        self._counts["refilled_tokens"] += again
        if self._is_long(sequence):
            for other in self._sequences.values():
                if other.prefills and not self._is_long(other):
                    other.held_up = True
        if window.logits:
            self._fork_outputs(sequence)
            return []
        return [Progress(sequence.request, sum(sequence.held()), sequence.target)] if sequence.prefills else []

    def _fork_outputs(self, lead: TokenSequence) -> None:
        """The prompt is computed: the other outputs begin as copies."""
        for child in self._sequences.values():
            if child.lead == lead.id:
                child.lead, child.layout, child.begun = None, lead.layout.copy(), True
                child.reached = lead.layout.length
                self._forks[child.id] = Fork(lead.id, child.id, lead.layout.length)
                self._charge(child)

    def _sampled(self, sequence: TokenSequence, sampled: Sampled) -> list[Event]:
        job = sequence.job
        assert job is not None  # noqa: S101  (cancelling waits for the end of the step)
        sequence.tokens.append(sampled.token)
        self._counts["generated_tokens"] += 1
        request = job.request
        events: list[Event] = [Token(request.id, sequence.output, sampled)]
        stopped = sampled.token in request.stop_ids
        if stopped or len(sequence.tokens) - sequence.prompt >= job.max_tokens:
            events.append(Ended(request.id, sequence.output, "stop" if stopped else "length"))
            self._finish(sequence)
        return events

    def _cancel(self, request: str, output: int | None) -> None:
        job = self._jobs.get(request)
        if job is None:
            return
        outputs = [self._sequences[identity] for identity in job.outputs]
        outputs.sort(key=lambda sequence: (sequence.lead is None, sequence.id))  # who computes the prompt comes last
        for sequence in [each for each in outputs if output in (None, each.output)]:
            self._finish(sequence)
        self._counts["cancelled"] += output is None

    def _fail(self, identity: int, refusal: Refusal) -> list[Event]:
        """Ends the request of a sequence whose KV is in doubt; nothing if another of its outputs has done so.

        Nothing of it is kept, and no finished sequence that it may have its KV from. Those in progress show for themselves
        whether they can go on.
        """
        sequence = self._sequences.get(identity)
        if sequence is None or sequence.job is None:
            return []
        request, doubtful = sequence.request, [*sequence.job.outputs, *self._prefixes.alike(sequence.tokens)]
        self._cancel(request, None)
        parents = self._parents()
        for each in doubtful:
            if self._prefixes.is_kept(each) and each not in parents:
                self._forget(self._sequences[each])
        return [Failed(request, refusal)]

    def _finish(self, sequence: TokenSequence) -> None:
        """The output is over. What the first output of a request has computed is kept; the others share its prompt."""
        job = sequence.job
        assert job is not None  # noqa: S101  (a sequence finishes once)
        waiting = self._unit(sequence)[1:]
        if waiting:  # what is computed of their prompt becomes that of one of them
            sequence.output, waiting[0].output = waiting[0].output, sequence.output
            sequence = waiting[0]
        job.outputs.discard(sequence.id)
        if not job.outputs:
            del self._jobs[job.request.id]
        sequence.job, sequence.lead, sequence.parked_since = None, None, None
        enough = sequence.output == 0 and sequence.layout.length >= self.policy.prefix_block_tokens
        if (enough and sequence.id not in self._forks) or sequence.id in self._parents():
            self._keep(sequence)
        else:
            self._forget(sequence)

    def _keep(self, sequence: TokenSequence) -> None:
        del sequence.tokens[sequence.layout.length :]
        self._accounting.charge(sequence.id, sequence.held(), kept=True)
        self._prefixes.add(sequence.id, sequence.tokens, known=sequence.layout.length)
        self._prefixes.keep(sequence.id)

    def _forget(self, sequence: TokenSequence) -> None:
        """Drops a sequence and its KV; ranks hear of it with the next step, unless they have none of it yet."""
        if self._forks.pop(sequence.id, None) is None:
            self._release.append(sequence.id)
        self._truncate = [cut for cut in self._truncate if cut.sequence != sequence.id]
        del self._sequences[sequence.id]
        self._accounting.drop(sequence.id)
        self._prefixes.remove(sequence.id)

    # Steps in detail.

    def _choose(self, now: float) -> TokenSequence | None:
        """The prefill whose turn it is."""
        waiting = [sequence for sequence in self._sequences.values() if sequence.prefills]
        if not waiting:
            return None
        first = min(waiting, key=lambda sequence: (self._slack(sequence, now), sequence.id))
        held_up = [sequence for sequence in waiting if sequence.held_up and not self._is_long(sequence)]
        if held_up and self._is_long(first):
            return min(held_up, key=lambda sequence: (self._slack(sequence, now), sequence.id))
        return first

    def _slack(self, sequence: TokenSequence, now: float) -> float:
        """Seconds until its prefill has to begin, for its first token to come when it is promised."""
        seconds = self._windows.seconds(sequence.work)
        promised = max(self.policy.ttft_seconds, self.policy.stretch * seconds)
        return sequence.since + promised - seconds - now

    def _window(self, sequence: TokenSequence) -> Window:
        missing = sequence.missing()
        begin, end = windows.span(missing, self._window_size(sequence))
        last = missing[-1].last + 1
        return Window(
            sequence=sequence.id,
            start=begin,
            tokens=sequence.tokens[begin:end],
            placement=sequence.placement,
            logits=end == last and len(sequence.tokens) == sequence.prompt,
        )

    def _window_size(self, sequence: TokenSequence) -> int:
        ranks, placement = self._accounting.ranks, sequence.placement
        return self._windows.size(sequence.missing(), ranks=ranks, placement=placement)

    def _work(self, sequence: TokenSequence) -> Work:
        return windows.whole(sequence.missing(), ranks=self._accounting.ranks, placement=sequence.placement)

    def _draw(self, row: int, sequence: TokenSequence) -> Draw:
        assert sequence.job is not None  # noqa: S101  (cancelling waits for the end of the step)
        sampling = sequence.job.request.sampling
        return Draw(row, sequence.id, sampling, sequence.output, len(sequence.tokens) - sequence.prompt)

    def _carried_out(self, step: Step) -> None:
        """The ranks have done what the step told them to do beside computing."""
        released, cut = set(step.release), set(step.truncate)
        self._release = [sequence for sequence in self._release if sequence not in released]
        self._truncate = [item for item in self._truncate if item not in cut]
        for fork in step.fork:
            self._forks.pop(fork.child, None)

    def _learn(self, step: Step, seconds: float) -> None:
        """Takes in what a step took: the decode batch by itself, or the window beside it."""
        window = step.window
        if window is None:
            share = 0.2 if self._decode_seconds else 1.0
            self._decode_seconds += share * (seconds - self._decode_seconds)
            return
        end = window.start + len(window.tokens)
        count = sum(run.count for run in self._sequences[window.sequence].layout.missing(window.start, end))
        done = work(window.start, end, count, ranks=self._accounting.ranks, placement=window.placement)
        beside = self._decode_seconds if step.decode else 0.0
        self._windows.learn(done, seconds=max(seconds - beside, 0.1 * seconds), placement=window.placement)

    # The ring changes, in detail.

    def _refork(self) -> None:
        """Copies that were not made yet are made from parents in progress that still have all, or computed anew.

        Not from finished parents: these must be droppable when room is given out.
        """
        for fork in list(self._forks.values()):
            child, parent = self._sequences[fork.child], self._sequences[fork.parent]
            layout = parent.layout.copy()
            layout.truncate(fork.length)
            if parent.job is not None and layout.length == fork.length and layout.complete():
                child.layout = layout
            else:
                self._unfork(child)

    def _unfork(self, child: TokenSequence) -> None:
        """A copy that was not made yet is computed anew instead."""
        del self._forks[child.id]
        child.layout = Layout(child.layout.ranks)
        self._prefixes.cut(child.id, known=0)

    def _share_out(self, now: float) -> None:
        """Gives the requests in progress their room on the new ring, least slack first, and parks the rest."""
        before = {lead.request for lead in self._parked(now)}
        for sequence in self._sequences.values():
            if sequence.job is not None and sequence.lead is None:
                self._park(sequence, now if sequence.parked_since is None else sequence.parked_since)
        for lead in self._parked(now):
            self._go_on(lead, now)
        parked = self._parked(now)
        for lead in parked:
            if lead.id in self._forks:
                self._unfork(lead)
        self._counts["parked_requests"] += len({lead.request for lead in parked} - before)

    def _unpark(self, now: float) -> None:
        """Lets parked requests go on for which there is room, least slack first, and at least one if that is possible."""
        for lead in self._parked(now):
            self._go_on(lead, now)
        if not any(sequence.goes_on for sequence in self._sequences.values()):
            self._make_way(now)

    def _make_way(self, now: float) -> None:
        """None goes on: the most urgent that this ring can hold does, and those with most slack give up what they hold."""
        parked = self._parked(now)
        lead = next((lead for lead in parked if self._is_possible(lead)), None)
        if lead is None:
            return
        if not self._fits_alone(lead, lead.layout):
            self._give_up(lead)
        others = [other for other in parked if other is not lead]
        while not self._go_on(lead, now):  # with nothing else in the ring it does
            self._give_up(others.pop())

    def _is_possible(self, lead: TokenSequence) -> bool:
        """Whether this ring could hold a sequence, with nothing else in it: as it lies, or computed anew.

        Anew it may take less: after a rank has come back empty, the others hold their old share and part of the lost one.
        """
        return self._fits_alone(lead, lead.layout) or self._fits_alone(lead, Layout(self._accounting.ranks))

    def _fits_alone(self, lead: TokenSequence, layout: Layout) -> bool:
        placements = self._placements(layout, lead.target)
        return any(max(self._needs(lead, layout, where)) <= self._accounting.capacity for where in placements)

    def _give_up(self, lead: TokenSequence) -> None:
        """Drops what a parked sequence holds; it is computed again when there is room."""
        if lead.layout.length:
            self._truncate.append(Truncate(lead.id, 0))
        lead.layout = Layout(self._accounting.ranks)
        self._prefixes.cut(lead.id, known=0)
        self._charge(lead)

    def _go_on(self, lead: TokenSequence, now: float) -> bool:
        """Lets a parked sequence, and those that wait for it, go on if there is room, for which kept ones are dropped."""
        unit = [sequence.id for sequence in self._unit(lead)]
        for placement in self._placements(lead.layout, lead.target):
            if self._evict_for(self._needs(lead, lead.layout, placement), taken=unit, reserved=False):
                lead.placement = placement
                self._park(lead, None)
                if lead.prefills:
                    self._await_prefill(lead, now)
                return True
        return False

    def _park(self, lead: TokenSequence, since: float | None) -> None:
        """Parks a sequence, and those that wait for it; None: they go on."""
        for sequence in self._unit(lead):
            sequence.parked_since = since
            self._charge(sequence)

    def _parked(self, now: float) -> list[TokenSequence]:
        """The parked sequences that compute for themselves, least slack first."""
        parked = [sequence for sequence in self._sequences.values() if sequence.waits_for_room]
        return sorted(parked, key=lambda sequence: (self._slack(sequence, now), sequence.id))

    def _needs(self, lead: TokenSequence, layout: Layout, placement: Placement) -> Tokens:
        """Most KV tokens, by rank, of a sequence with ``layout`` and of those that wait for it to compute their prompt."""
        each = self._demand(layout, placement, target=lead.target, more=lead.to_generate)
        return tuple(len(self._unit(lead)) * tokens for tokens in each)

    def _unit(self, lead: TokenSequence) -> list[TokenSequence]:
        """A sequence and those that wait for it to compute their prompt."""
        return [lead, *(s for s in self._sequences.values() if s.lead == lead.id)]


def _is_gone(event: Event, gone: set[tuple[str, int | None]]) -> bool:
    if (event.request, None) in gone:
        return True
    return isinstance(event, Token | Ended) and (event.request, event.output) in gone
