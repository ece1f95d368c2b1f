"""Our admission as a policy: the sidecar's own controller, fed with what a sidecar sees."""

import random
from collections.abc import Mapping, Sequence

from bench.admission.policy import Engine, Request, Ruling, Verdict, View
from kvplane_api.wire import EngineConfig, SidecarConfig, SloConfig
from kvplane_runtime.admission.controller import Admission
from kvplane_runtime.admission.demand import Demand, Entry, Feedback
from kvplane_runtime.sidecar.admit import TICK_SECONDS
from kvplane_runtime.sidecar.engine import POLL_SECONDS


class Kvplane:
    """``kvplane_runtime.admission`` with its defaults; only the goals and the engine's arguments are given."""

    name = "kvplane"
    progress_seconds = TICK_SECONDS
    """The sidecar collects its counts of tokens at least as often."""
    scrape_seconds = POLL_SECONDS

    def __init__(self, *, ttft_seconds: float, tpot_seconds: float, engine: Engine, seed: int = 0) -> None:
        """``seed``: of the jitter of Retry-After, which nobody reads here."""
        self._admission = Admission(
            config=SidecarConfig(
                served_name="replay",
                slo=SloConfig(
                    ttft_milliseconds=max(1, round(1000 * ttft_seconds)),
                    tpot_milliseconds=max(1, round(1000 * tpot_seconds)),
                ),
                engine=EngineConfig(
                    max_batched_tokens=engine.max_num_batched_tokens, max_sequences=engine.max_num_seqs
                ),
            ),
            uniform=random.Random(seed).random,
        )
        self._entries: dict[int, Entry] = {}
        self._held: dict[int, int] = {}
        """Request by the identity of its entry, while it is undecided."""

    def on_arrival(self, request: Request, view: View, now: float) -> Verdict:
        entry = self._admission.offer(
            Demand(prompt_tokens=request.prompt_tokens, max_output_tokens=request.max_tokens), now=now
        )
        if entry.refusal is not None:
            return Verdict.REFUSE
        self._entries[request.id] = entry
        if entry.admitted_at is not None:
            return Verdict.PASS
        self._held[id(entry)] = request.id
        return Verdict.HOLD

    def on_first_token(self, request: Request, view: View, now: float) -> None:
        self._admission.first_token(self._entries[request.id], now=now)

    def on_progress(self, generated: Mapping[int, int], view: View, now: float) -> None:
        for request, tokens in generated.items():
            self._admission.progress(self._entries[request], tokens, now=now)

    def on_finish(self, request: Request, output_tokens: int, view: View, now: float) -> None:
        self._admission.end(
            self._entries.pop(request.id),
            now=now,
            completed=True,
            prompt_tokens=request.prompt_tokens,
            output_tokens=output_tokens,
        )

    def on_scrape(self, view: View, now: float) -> None:
        scrape = view.scrape
        assert scrape is not None
        usable = view.engine.blocks - 1
        self._admission.observe(
            Feedback(
                kv_blocks=usable,
                block_size_tokens=view.engine.block_size,
                max_model_len_tokens=view.engine.max_model_len,
                kv_blocks_used=round(scrape.kv_cache_usage * usable),
                preemptions_total=scrape.preemptions,
                requests_running=scrape.running,
                requests_waiting=scrape.waiting,
                generation_tokens_total=scrape.generation_tokens,
            ),
            now=now,
        )

    def on_tick(self, view: View, now: float) -> Sequence[Ruling]:
        rulings = []
        for entry in self._admission.decide(now=now):
            request = self._held.pop(id(entry))
            if entry.refusal is not None:
                del self._entries[request]
                rulings.append(Ruling(request, Verdict.REFUSE))
            else:
                rulings.append(Ruling(request, Verdict.PASS))
        return rulings

    def next_tick_at(self, now: float) -> float | None:
        return self._admission.next_decision_at()
