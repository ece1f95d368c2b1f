"""The ring's metrics: one table, and the collector that fills it from what is known now.

What every engine has bears vLLM's names, so that the sidecar, dashboards and alerts that read a paged engine read this one
too; what only a ring has is ``kvplane_ring_*``. Base units; a metric appears only when its value is known; labels never
carry a request, a prompt or a user. The table is also the source of the documentation.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Final

from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

from kvplane_runtime.histogram import Buckets, Histogram
from kvplane_runtime.metric import Kind, Metric, Samples, families
from kvplane_runtime.ring.state import (
    RankTraffic,
    State,
    WorkerAccount,
    exposed_wait,
    imbalance,
    processed_tokens,
    room,
    usage,
)

BLOCK_TOKENS: Final = 16
"""A ring's KV has no blocks; capacity is told in vLLM's usual ones, as readers of ``cache_config_info`` expect."""
_TTFT: Final = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0)
_LATENCY: Final = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.2, 0.4, 0.8, 1.5, 3.0, 6.0)
_TOKENS: Final = tuple(float(4**power) for power in range(12))


class Tally:
    """What the API sees of its requests."""

    def __init__(self) -> None:
        self.responses: dict[int, int] = {}
        """Answers that were given to their end, by HTTP status."""
        self.disconnects = 0
        self.time_to_first_token = Buckets(_TTFT)
        self.inter_token_latency = Buckets(_LATENCY)
        self.request_latency = Buckets(_TTFT)
        self.prompt_tokens = Buckets(_TOKENS)
        self.generated_tokens = Buckets(_TOKENS)

    def token(self, *, since_arrival: float, since_last: float | None) -> None:
        """A token of an output came; ``since_last``: None for its first."""
        if since_last is None:
            self.time_to_first_token.add(since_arrival)
        else:
            self.inter_token_latency.add(since_last)

    def completed(self, *, seconds: float, prompt_tokens: int, generated_tokens: int) -> None:
        """A request has its whole answer."""
        self.request_latency.add(seconds)
        self.prompt_tokens.add(prompt_tokens)
        self.generated_tokens.add(generated_tokens)


CACHE_CONFIG: Final = Metric(
    "vllm:cache_config_info",
    Kind.GAUGE,
    "Always 1; the ring's KV capacity, without what is kept free for a lost rank, in its labels, in blocks of 16 tokens as vLLM "
    "tells it.",
    ("block_size", "num_gpu_blocks", "kv_cache_size_tokens"),
)
KV_USAGE: Final = Metric(
    "vllm:kv_cache_usage_perc",
    Kind.GAUGE,
    "Share of that capacity that requests in progress hold or have reserved, on the fullest rank, 0 to 1.",
)
PREEMPTIONS: Final = Metric("vllm:num_preemptions", Kind.COUNTER, "Always 0: what is admitted has room to its end.")
RUNNING: Final = Metric("vllm:num_requests_running", Kind.GAUGE, "Outputs that are prefilled or decoded.")
WAITING: Final = Metric(
    "vllm:num_requests_waiting_by_reason",
    Kind.GAUGE,
    "Outputs that wait: for the first window of their prompt (capacity), or for room after a lost rank (parked).",
    ("reason",),
)
PROMPT_TOKENS: Final = Metric(
    "vllm:prompt_tokens", Kind.COUNTER, "Prompt tokens processed: computed, or found in a kept sequence."
)
GENERATION_TOKENS: Final = Metric("vllm:generation_tokens", Kind.COUNTER, "Tokens generated.")
PREFIX_QUERIES: Final = Metric(
    "vllm:prefix_cache_queries", Kind.COUNTER, "Prompt tokens looked up among the sequences that are there."
)
PREFIX_HITS: Final = Metric("vllm:prefix_cache_hits", Kind.COUNTER, "Prompt tokens found there, not computed again.")
TIME_TO_FIRST_TOKEN: Final = Metric(
    "vllm:time_to_first_token_seconds", Kind.HISTOGRAM, "Time from a request's arrival to its first token."
)
INTER_TOKEN_LATENCY: Final = Metric(
    "vllm:inter_token_latency_seconds", Kind.HISTOGRAM, "Time between two tokens of an output."
)
REQUEST_LATENCY: Final = Metric(
    "vllm:e2e_request_latency_seconds", Kind.HISTOGRAM, "Time from a request's arrival to its last token."
)
REQUEST_PROMPT_TOKENS: Final = Metric(
    "vllm:request_prompt_tokens", Kind.HISTOGRAM, "Prompt tokens per finished request."
)
REQUEST_GENERATION_TOKENS: Final = Metric(
    "vllm:request_generation_tokens", Kind.HISTOGRAM, "Tokens generated per finished request."
)

FORMED: Final = Metric("kvplane_ring_formed", Kind.GAUGE, "1 while the ring works, else 0.")
EPOCH: Final = Metric("kvplane_ring_epoch", Kind.GAUGE, "Number of the ring that is, or was last.")
MEMBERS: Final = Metric("kvplane_ring_members", Kind.GAUGE, "Ranks of the ring that is, or was last.")
WORLD_SIZE: Final = Metric("kvplane_ring_world_size", Kind.GAUGE, "Ranks of a whole ring.")
LOADED: Final = Metric(
    "kvplane_ring_loaded_ratio",
    Kind.GAUGE,
    "Share of the weights that a process has loaded, until it has all.",
    ("ordinal",),
)
REFORMS: Final = Metric(
    "kvplane_ring_reforms",
    Kind.COUNTER,
    "Rings formed after the first, by cause: lost (a rank, by a fault), left (a rank that was told to end), joined.",
    ("cause",),
)
RECOVERY: Final = Metric(
    "kvplane_ring_recovery_seconds", Kind.HISTOGRAM, "From the detection of a loss until the ring worked again."
)
STARTUP: Final = Metric("kvplane_ring_startup_seconds", Kind.GAUGE, "From the process's start to its first ring.")
KV_TOKENS: Final = Metric(
    "kvplane_ring_kv_tokens",
    Kind.GAUGE,
    "KV tokens by rank and state: held (in memory, of requests and kept prefixes), reserved (held by requests or kept free "
    "for them), kept (of finished requests, for their prefixes).",
    ("rank", "state"),
)
KV_CAPACITY: Final = Metric("kvplane_ring_kv_capacity_tokens", Kind.GAUGE, "KV tokens that each rank can hold.")
PARKED: Final = Metric(
    "kvplane_ring_parked_requests", Kind.COUNTER, "Requests that lost their room with a rank and had to wait for some."
)
WAITING_PROMPT_TOKENS: Final = Metric(
    "kvplane_ring_waiting_prompt_tokens",
    Kind.GAUGE,
    "Tokens still to be computed for the outputs that wait: for the first window of their prompt, or for room after a lost rank.",
)
WAITING_KV_TOKENS: Final = Metric(
    "kvplane_ring_waiting_kv_tokens",
    Kind.GAUGE,
    "KV tokens that the outputs which wait for room after a lost rank may need beyond what they hold; for all others they are "
    "reserved.",
)
COMPUTED: Final = Metric(
    "kvplane_ring_prefill_tokens",
    Kind.COUNTER,
    "Tokens computed in windows: new (never before), refilled (again, after a rank was lost).",
    ("kind",),
)
WINDOWS: Final = Metric("kvplane_ring_windows", Kind.COUNTER, "Prefill windows computed.")
STEPS: Final = Metric("kvplane_ring_steps", Kind.COUNTER, "Steps that all ranks have done.")
STEP_SECONDS: Final = Metric(
    "kvplane_ring_step_seconds",
    Kind.COUNTER,
    "Time in steps by rank and part: computing, waited (communication that no computation hid), other.",
    ("rank", "part"),
)
SENT: Final = Metric("kvplane_ring_sent_bytes", Kind.COUNTER, "Bytes sent to other ranks.", ("rank",))
EXPOSED_WAIT: Final = Metric(
    "kvplane_ring_exposed_wait_ratio", Kind.GAUGE, "Share of step time that ranks stood still for communication."
)
IMBALANCE: Final = Metric(
    "kvplane_ring_imbalance_ratio", Kind.GAUGE, "Computing time of the busiest rank over the mean of all, less 1."
)
EVICTED: Final = Metric(
    "kvplane_ring_evicted_prefixes", Kind.COUNTER, "Finished sequences dropped because their room was needed."
)
DECISIONS: Final = Metric(
    "kvplane_ring_admission_decisions",
    Kind.COUNTER,
    "Decisions on requests: admitted; refused, by what was short (context: it can never fit; kv or requests: not now).",
    ("decision", "reason"),
)
CANCELLED: Final = Metric("kvplane_ring_cancelled_requests", Kind.COUNTER, "Requests ended before they were complete.")
IN_FLIGHT: Final = Metric("kvplane_ring_api_requests_in_flight", Kind.GAUGE, "Generating requests inside the API now.")
RESPONSES: Final = Metric("kvplane_ring_api_responses", Kind.COUNTER, "Answers, by HTTP status.", ("code",))
DISCONNECTS: Final = Metric(
    "kvplane_ring_api_client_disconnects", Kind.COUNTER, "Requests ended because their client went away."
)

METRICS: Final = (
    CACHE_CONFIG,
    KV_USAGE,
    PREEMPTIONS,
    RUNNING,
    WAITING,
    PROMPT_TOKENS,
    GENERATION_TOKENS,
    PREFIX_QUERIES,
    PREFIX_HITS,
    TIME_TO_FIRST_TOKEN,
    INTER_TOKEN_LATENCY,
    REQUEST_LATENCY,
    REQUEST_PROMPT_TOKENS,
    REQUEST_GENERATION_TOKENS,
    FORMED,
    EPOCH,
    MEMBERS,
    WORLD_SIZE,
    LOADED,
    REFORMS,
    RECOVERY,
    STARTUP,
    KV_TOKENS,
    KV_CAPACITY,
    PARKED,
    WAITING_PROMPT_TOKENS,
    WAITING_KV_TOKENS,
    COMPUTED,
    WINDOWS,
    STEPS,
    STEP_SECONDS,
    SENT,
    EXPOSED_WAIT,
    IMBALANCE,
    EVICTED,
    DECISIONS,
    CANCELLED,
    IN_FLIGHT,
    RESPONSES,
    DISCONNECTS,
)

# A worker's own, beside what rank 0 says of all ranks: what is true of this process, also while it has no rank 0.
INSIDE: Final = Metric("kvplane_ring_worker_inside", Kind.GAUGE, "1 while this worker is in a ring that works, else 0.")
WORKER_EPOCH: Final = Metric(
    "kvplane_ring_worker_epoch", Kind.GAUGE, "Number of the ring that this worker is in, or was in last."
)
WORKER_KV: Final = Metric(
    "kvplane_ring_worker_kv_tokens", Kind.GAUGE, "KV tokens that this worker holds, of requests and kept prefixes."
)
WORKER_KV_CAPACITY: Final = Metric(
    "kvplane_ring_worker_kv_capacity_tokens", Kind.GAUGE, "KV tokens that this worker can hold."
)
WORKER_STEPS: Final = Metric("kvplane_ring_worker_steps", Kind.COUNTER, "Steps that this worker has done.")
WORKER_STEP_SECONDS: Final = Metric(
    "kvplane_ring_worker_step_seconds",
    Kind.COUNTER,
    "This worker's time in steps by part: computing, waited (communication that no computation hid), other.",
    ("part",),
)
WORKER_SENT: Final = Metric(
    "kvplane_ring_worker_sent_bytes", Kind.COUNTER, "Bytes that this worker sent to other ranks."
)

WORKER_METRICS: Final = (
    INSIDE,
    WORKER_EPOCH,
    WORKER_KV,
    WORKER_KV_CAPACITY,
    WORKER_STEPS,
    WORKER_STEP_SECONDS,
    WORKER_SENT,
)


class RingCollector(Collector):
    """Renders the ring at the moment of a scrape."""

    def __init__(self, *, state: Callable[[], State], tally: Tally, in_flight: Callable[[], int]) -> None:
        self._state = state
        self._tally = tally
        self._in_flight = in_flight

    def describe(self) -> Iterable[Family]:
        """Every family that may be collected."""
        return [metric.family() for metric in METRICS]

    def collect(self) -> Iterator[Family]:
        """The families that have a value now."""
        state = self._state()
        return families(self._known(state), served_name=state.served_name)

    def _known(self, state: State) -> Iterator[tuple[Metric, Samples]]:
        yield from _from_scheduler(state)
        yield from _from_ring(state)
        tally = self._tally
        yield TIME_TO_FIRST_TOKEN, {(): tally.time_to_first_token.histogram()}
        yield INTER_TOKEN_LATENCY, {(): tally.inter_token_latency.histogram()}
        yield REQUEST_LATENCY, {(): tally.request_latency.histogram()}
        yield REQUEST_PROMPT_TOKENS, {(): tally.prompt_tokens.histogram()}
        yield REQUEST_GENERATION_TOKENS, {(): tally.generated_tokens.histogram()}
        yield IN_FLIGHT, {(): self._in_flight()}
        yield RESPONSES, {(str(code),): count for code, count in tally.responses.items()}
        yield DISCONNECTS, {(): tally.disconnects}


class WorkerCollector(Collector):
    """Renders a worker at the moment of a scrape."""

    def __init__(
        self,
        *,
        account: Callable[[], WorkerAccount],
        inside: Callable[[], bool],
        served_name: str,
        capacity_tokens: int,
    ) -> None:
        self._account = account
        self._inside = inside
        self._served_name = served_name
        self._capacity_tokens = capacity_tokens

    def describe(self) -> Iterable[Family]:
        """Every family that may be collected."""
        return [metric.family() for metric in WORKER_METRICS]

    def collect(self) -> Iterator[Family]:
        """The families that have a value now."""
        return families(self._known(), served_name=self._served_name)

    def _known(self) -> Iterator[tuple[Metric, Samples]]:
        account = self._account()
        yield INSIDE, {(): self._inside()}
        if account.epoch >= 0:
            yield WORKER_EPOCH, {(): account.epoch}
        yield WORKER_KV, {(): account.kv_tokens}
        yield WORKER_KV_CAPACITY, {(): self._capacity_tokens}
        yield WORKER_STEPS, {(): account.traffic.steps}
        yield WORKER_STEP_SECONDS, {(part,): seconds for part, seconds in _parts(account.traffic).items()}
        yield WORKER_SENT, {(): account.traffic.sent_bytes}


def _parts(traffic: RankTraffic) -> dict[str, float]:
    """Time in steps by what was done in it."""
    return {
        "computing": traffic.compute_seconds,
        "waited": traffic.waited_seconds,
        "other": max(0.0, traffic.seconds - traffic.compute_seconds - traffic.waited_seconds),
    }


def _from_scheduler(state: State) -> Iterator[tuple[Metric, Samples]]:
    known = state.scheduler
    counts, ranks = known.counts, range(len(known.held))
    capacity = room(known) * len(known.held)
    # One block more than there is: readers take one away, vLLM's null block.
    blocks, told = capacity // BLOCK_TOKENS + 1, capacity + BLOCK_TOKENS
    yield CACHE_CONFIG, {(str(BLOCK_TOKENS), str(blocks), str(told)): 1}
    yield KV_USAGE, {(): usage(known)}
    yield PREEMPTIONS, {(): 0}
    yield RUNNING, {(): known.prefilling + known.decoding}
    yield WAITING, {("capacity",): known.waiting, ("parked",): known.parked}
    yield PROMPT_TOKENS, {(): processed_tokens(known)}
    yield GENERATION_TOKENS, {(): counts["generated_tokens"]}
    yield PREFIX_QUERIES, {(): counts["prompt_tokens"]}
    yield PREFIX_HITS, {(): counts["cached_tokens"]}
    yield (
        KV_TOKENS,
        {
            (str(rank), name): values[rank]
            for name, values in (("held", known.held), ("reserved", known.active), ("kept", known.kept_tokens))
            for rank in ranks
        },
    )
    yield KV_CAPACITY, {(): known.capacity_tokens}
    yield PARKED, {(): counts["parked_requests"]}
    yield WAITING_PROMPT_TOKENS, {(): known.waiting_prompt_tokens}
    yield WAITING_KV_TOKENS, {(): known.waiting_kv_tokens}
    refilled = counts["refilled_tokens"]
    yield COMPUTED, {("new",): counts["computed_tokens"] - refilled, ("refilled",): refilled}
    yield WINDOWS, {(): counts["windows"]}
    yield STEPS, {(): counts["steps"]}
    yield EVICTED, {(): counts["evicted_sequences"]}
    yield (
        DECISIONS,
        {
            ("admitted", ""): counts["admitted"],
            ("refused", "context"): counts["refused_never"],
            ("refused", "kv"): counts["refused_kv"],
            ("refused", "requests"): counts["refused_requests"],
        },
    )
    yield CANCELLED, {(): counts["cancelled"]}


def _from_ring(state: State) -> Iterator[tuple[Metric, Samples]]:
    yield FORMED, {(): state.formed}
    if state.epoch >= 0:
        yield EPOCH, {(): state.epoch}
    yield MEMBERS, {(): len(state.members)}
    yield WORLD_SIZE, {(): state.world_size}
    yield LOADED, {(str(ordinal),): share for ordinal, share in state.loading.items()}
    yield REFORMS, {(cause,): count for cause, count in state.reforms.items()}
    recovery = Buckets(_TTFT)
    for seconds in state.recovery_seconds:
        recovery.add(seconds)
    yield RECOVERY, {(): recovery.histogram()}
    if state.startup_seconds is not None:
        yield STARTUP, {(): state.startup_seconds}
    times: dict[tuple[str, ...], float | Histogram] = {}
    for rank, traffic in enumerate(state.traffic):
        times |= {(str(rank), part): seconds for part, seconds in _parts(traffic).items()}
    yield STEP_SECONDS, times
    yield SENT, {(str(rank),): traffic.sent_bytes for rank, traffic in enumerate(state.traffic)}
    exposed, uneven = exposed_wait(state), imbalance(state)
    if exposed is not None:
        yield EXPOSED_WAIT, {(): exposed}
    if uneven is not None:
        yield IMBALANCE, {(): uneven}
