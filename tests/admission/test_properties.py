"""What holds after any sequence of events, hostile ones included."""

import math
import random

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvplane_api.wire import SidecarConfig
from kvplane_runtime.admission.controller import CHECK_SECONDS, Admission
from kvplane_runtime.admission.demand import Demand, Entry, Feedback, Reason
from kvplane_runtime.admission.peak import blocks_held
from tests.admission.world import BLOCK_SIZE, BLOCKS, configuration

PRIORITIES = ["high", "low", "batch"]
HARD_CAP = 60
"""Well below kappa, so that both bind."""
WAIT_SECONDS = 2
MOST_QUEUED = 12


class Traffic(RuleBasedStateMachine):
    """Requests come, stream, end and vanish; the engine is scraped, falls silent, refuses and restarts."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 100.0
        self.admission = Admission(config=self.configuration(), uniform=random.Random(7).random)  # noqa: S311
        self.capacity_known = False
        self.policy = "Enforce"
        self.waiting: dict[Entry, None] = {}
        self.running: dict[Entry, None] = {}
        self.over: list[Entry] = []
        self.returned: set[Entry] = set()
        self.others_use = False
        """Whether the last scrape may have shown KV beyond ours."""
        self.prefixes_hit = False

    @staticmethod
    def configuration(**changes: object) -> SidecarConfig:
        admission: dict[str, object] = {
            "kvHardCapPercent": HARD_CAP,
            "priorities": PRIORITIES,
            "queue": {"maxRequests": MOST_QUEUED, "maxWaitSeconds": WAIT_SECONDS},
            "fairness": {"header": "x-tenant"},
        }
        return configuration(admission=admission | changes)

    # Events.

    @rule(
        prompt=st.integers(1, 3200),
        outputs=st.sampled_from([1, 1, 1, 2, 4, 100]),
        most=st.none() | st.integers(1, 3000),
        tenant=st.sampled_from(["", "a", "b"]) | st.text(max_size=3),
        priority=st.integers(0, 2),
    )
    def offer(self, prompt: int, outputs: int, most: int | None, tenant: str, priority: int) -> None:
        demand = Demand(
            prompt, outputs=outputs, max_output_tokens=most, tenant=tenant, priority=priority, prompt_bytes=4 * prompt
        )
        entry = self.admission.offer(demand, now=self.now)
        if entry.admitted_at is not None:
            self.admitted([entry])
        elif self.policy != "Enforce":
            raise AssertionError("Only Enforce delays or refuses.")
        elif entry.refusal is not None:
            self.refused(entry)
        else:
            self.waiting[entry] = None

    @precondition(lambda self: self.capacity_known)
    @rule(prompts=st.lists(st.integers(200, 1500), min_size=3, max_size=6), priority=st.integers(0, 2))
    def fill(self, prompts: list[int], priority: int) -> None:
        """Prompts that are computed as they come, with short outputs."""
        for prompt in prompts:
            self.offer(prompt=prompt, outputs=1, most=8, tenant="", priority=priority)
            for entry in self.running:
                self.admission.first_token(entry, now=self.now)

    @rule()
    def decide(self) -> None:
        admitted = []
        decided = self.admission.decide(now=self.now)
        for entry in decided:
            del self.waiting[entry]
            if entry.admitted_at is not None:
                admitted.append(entry)
            else:
                self.refused(entry)
        self.admitted(admitted)
        assert all(entry.admitted_at is None and entry.refusal is None for entry in self.waiting)
        if self.waiting and not self.running and not self.others_use:
            # Work conserving: an idle engine never lets a request wait, unless it sent that one back just now.
            assert all(entry in self.returned for entry in self.waiting)

    @rule(seconds=st.floats(0, 0.3) | st.floats(0, 3))
    def time_passes(self, seconds: float) -> None:
        until = self.now + seconds
        while (due := self.admission.next_decision_at()) is not None and due <= until:
            self.now = max(self.now, due)
            self.decide()
        self.now = until

    @precondition(lambda self: self.running)
    @rule(data=st.data(), tokens=st.integers(0, 200))
    def stream(self, data: st.DataObject, tokens: int) -> None:
        entry = data.draw(st.sampled_from(list(self.running)))
        if tokens % 3:
            self.admission.first_token(entry, now=self.now)
        self.admission.progress(entry, entry.generated + tokens - 2, now=self.now)

    @precondition(lambda self: self.running or self.waiting or self.over)
    @rule(data=st.data(), completed=st.booleans(), output=st.none() | st.integers(0, 500))
    def end(self, data: st.DataObject, completed: bool, output: int | None) -> None:
        entry = data.draw(st.sampled_from([*self.running, *self.waiting, *self.over]))
        self.admission.end(entry, now=self.now, completed=completed, prompt_tokens=7, output_tokens=output)
        self.running.pop(entry, None)
        self.waiting.pop(entry, None)
        self.over.append(entry)

    @precondition(lambda self: self.running and self.policy == "Enforce")
    @rule(data=st.data())
    def engine_refuses(self, data: st.DataObject) -> None:
        entry = data.draw(st.sampled_from(list(self.running)))
        self.admission.requeue(entry, now=self.now)
        del self.running[entry]
        if entry.refusal is not None:
            assert entry in self.returned
            self.refused(entry)
        else:
            self.waiting[entry] = None
            self.returned.add(entry)

    @rule(
        used=st.none() | st.integers(0, BLOCKS),
        preemptions=st.none() | st.integers(0, 5),
        hits=st.none() | st.floats(0, 1),
        requests=st.integers(0, 20),
        thrashing=st.booleans(),
    )
    def scrape(
        self, used: int | None, preemptions: int | None, hits: float | None, requests: int, thrashing: bool
    ) -> None:
        self.admission.observe(
            Feedback(
                kv_blocks=BLOCKS,
                block_size_tokens=BLOCK_SIZE,
                max_model_len_tokens=BLOCKS * BLOCK_SIZE,
                kv_blocks_used=used,
                preemptions_total=preemptions,
                requests_running=requests,
                requests_waiting=0,
                prefix_hit_ratio=hits,
                thrashing=thrashing,
            ),
            now=self.now,
        )
        self.capacity_known = True
        self.others_use = bool(used)
        self.prefixes_hit |= bool(hits)

    @rule()
    def silence(self) -> None:
        self.admission.stale(now=self.now)

    @rule()
    def restart(self) -> None:
        self.admission.engine_restarted(now=self.now)
        self.over += self.running
        self.running.clear()

    @rule(policy=st.sampled_from(["Enforce", "Enforce", "Observe", "Off"]), peak=st.sampled_from([None, 80, 130]))
    def configure(self, policy: str, peak: int | None) -> None:
        self.decide()  # what Enforce has refused is told first
        self.policy = policy
        self.admission.configure(self.configuration(policy=policy, kvPeakPercent=peak))

    # What is expected of them.

    def admitted(self, entries: list[Entry]) -> None:
        self.running.update(dict.fromkeys(entries))
        if not entries or self.policy != "Enforce" or not self.capacity_known:
            return
        # Never beyond kappa x C by its own estimate, except alone; and what is known to be there never beyond H x C.
        state = self.admission.state(now=self.now)
        if len(self.running) > 1:
            assert state.kv_peak_ratio is not None
            assert state.kv_peak_ratio <= state.kappa + 1e-9
        held = sum(
            blocks_held(
                prompt=entry.demand.prompt_tokens,
                generated=-(-entry.generated // entry.demand.outputs),
                outputs=entry.demand.outputs,
                block_size=BLOCK_SIZE,
                shared=True,
            )
            for entry in self.running
        )
        assert held <= BLOCKS * HARD_CAP // 100 or self.prefixes_hit

    def refused(self, entry: Entry) -> None:
        assert self.policy == "Enforce"
        refusal = entry.refusal
        assert refusal is not None
        assert refusal.message.endswith(".")
        if refusal.reason is Reason.CONTEXT:
            assert refusal.retry_after_seconds is None
        else:
            assert refusal.retry_after_seconds is not None
            assert 1 <= refusal.retry_after_seconds <= 30
        self.over.append(entry)

    @invariant()
    def nobody_waits_beyond_its_time(self) -> None:
        for entry in self.waiting:
            if self.now > entry.arrived_at + WAIT_SECONDS + CHECK_SECONDS:
                due = self.admission.next_decision_at()
                assert due is not None
                assert due <= self.now

    @invariant()
    def the_queue_is_bounded(self) -> None:
        state = self.admission.state(now=self.now)
        if self.policy != "Off":
            assert state.queued <= MOST_QUEUED + len(self.returned)

    @invariant()
    def idle_means_nothing_is_reserved(self) -> None:
        state = self.admission.state(now=self.now)
        if not self.running:
            assert state.reserved_tokens == 0
            assert state.running == 0
        if not self.waiting:
            assert (state.queued, state.queued_prompt_tokens, state.queued_reservation_tokens) == (0, 0, 0)
        assert math.isfinite(state.kappa)

    def teardown(self) -> None:
        for entry in [*self.running, *self.waiting]:
            self.admission.end(entry, now=self.now, completed=False)
        self.running.clear()
        self.waiting.clear()
        self.idle_means_nothing_is_reserved()


TestTraffic = Traffic.TestCase
TestTraffic.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)
