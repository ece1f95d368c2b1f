"""Ring: is every ring whole, do its ranks work as one, where is its KV, and what did a lost rank cost?

What a ring that works well shows is a picture of its own: the load curves of all ranks lie on each other, each sends the same
as the others, on a plateau while a long prompt is computed, and next to no time is spent waiting. Rank 0 tells it of all
ranks, so a ring is named by the pod of its rank 0.
"""

from charts.dashboards.panels import (
    CHOSEN_PODS,
    CHOSEN_SERVICES,
    Query,
    Row,
    Variable,
    bars,
    board,
    graph,
    quantiles,
    rate,
    stat,
)
from charts.dashboards.phrases import TOKENS, TOKENS_PER_SECOND

UID = "kvplane-ring"
TITLE = "kvplane / Ring"

VARIABLES = (
    Variable("namespace", "Namespace", "label_values(kvplane_ring_world_size, namespace)"),
    Variable("service", "Service", 'label_values(kvplane_ring_world_size{namespace=~"$namespace"}, service)'),
    Variable(
        "pod", "Rank 0", 'label_values(kvplane_ring_world_size{namespace=~"$namespace", service=~"$service"}, pod)'
    ),
)
_RANK = "{{pod}} rank {{rank}}"
_STEP = "kvplane_ring_step_seconds_total"


def ring() -> str:
    """The dashboard's JSON."""
    return board(
        UID,
        TITLE,
        "Ring groups: is every ring whole, do its ranks work as one, where is its KV, and what did a lost rank cost? "
        "How rings work: docs/ring.md; what the operator does for them: docs/ring-groups.md.",
        variables=VARIABLES,
        content=(_whole(), _as_one(), _kv(), _lost()),
    )


def _whole() -> Row:
    return Row(
        "Is every ring whole?",
        (
            stat(
                "Rings formed",
                "Rings that work now, with all of their ranks or one less.",
                f"sum({_by_ring('kvplane_ring_formed')})",
                unit="none",
            ),
            stat(
                "Ranks missing",
                "Ranks that rings are short of. One is survived; the next one ends its ring.",
                f"sum({_by_ring('kvplane_ring_world_size')} - {_by_ring('kvplane_ring_members')})",
                unit="none",
                steps=((1, "orange"), (2, "red")),
            ),
            stat(
                "Formed anew",
                "How often rings formed anew within the last hour. A rank that is lost and comes back is two; so is a rank that "
                "is moved.",
                f"sum(increase(kvplane_ring_reforms_total{{{CHOSEN_PODS}}}[1h]))",
                unit="none",
                steps=((6, "orange"), (20, "red")),
            ),
            stat(
                "Recovery",
                "From the detection of a loss until the ring worked again, the mean of the last hour. Computing the lost part of "
                "the KV again comes after it.",
                _mean_recovery(),
                unit="s",
                steps=((2, "orange"),),
                none="no loss",
            ),
            stat(
                "Exposed wait",
                "Share of step time in which ranks stood still for communication. Above a few percent the network is too slow "
                "for the windows: raise ring.windowTokens.",
                _waited_share(),
                unit="percentunit",
                steps=((0.05, "orange"), (0.2, "red")),
                none="no steps",
            ),
            stat(
                "Fullest rank",
                "Share of a rank's KV tokens that requests in progress hold or have reserved, on the fullest rank.",
                f"max({_kv_tokens('reserved')} / on (pod) group_left () {_by_pod('kvplane_ring_kv_capacity_tokens')})",
                unit="percentunit",
                steps=((0.95, "orange"),),
            ),
        ),
    )


def _as_one() -> Row:
    return Row(
        "Do the ranks work as one?",
        (
            graph(
                "Load of each rank",
                "Seconds of computing per second, by rank. The curves of one ring lie on each other: every step is divided "
                "evenly and all wait for the slowest. One that is above the others is a slower machine.",
                Query(rate(_STEP, f'part="computing", {CHOSEN_PODS}', "pod", "rank"), _RANK),
                unit="percentunit",
            ),
            graph(
                "Ring traffic",
                "Bytes per second that each rank sends to others. A flat plateau, the same for all, while a long prompt is "
                "computed; decode sends little.",
                Query(rate("kvplane_ring_sent_bytes_total", CHOSEN_PODS, "pod", "rank"), _RANK),
                unit="Bps",
            ),
            graph(
                "Exposed wait",
                "Share of step time in which ranks stood still for communication, by ring. Near 0 the exchange is hidden behind "
                "the computing.",
                Query(_waited_share("pod"), "{{pod}}"),
                unit="percentunit",
                maximum=1,
                steps=((0.05, "orange"), (0.2, "red")),
            ),
            graph(
                "Step time by part",
                "Seconds per second of all ranks chosen. computing: in the model. waited: for communication that nothing hid. "
                "other: sampling, merging, and what steps cost by themselves.",
                Query(rate(_STEP, CHOSEN_PODS, "part"), "{{part}}"),
                unit="none",
                stacked=True,
                span=12,
            ),
            graph(
                "Imbalance",
                "Computing time of the busiest rank over the mean, less 1, since rank 0 was started. Prompts too short to be cut "
                "lie on one rank, which unbalances it.",
                Query(_by_pod("kvplane_ring_imbalance_ratio"), "{{pod}}"),
                unit="percentunit",
                span=12,
            ),
        ),
    )


def _kv() -> Row:
    return Row(
        "Where is the KV?",
        (
            graph(
                "KV held by each rank",
                "KV tokens in a rank's memory, of requests and of kept prefixes. About the same on all ranks of a ring; a rank "
                "that came back begins empty.",
                Query(_kv_tokens("held"), _RANK),
                unit=TOKENS,
            ),
            graph(
                "KV promised on each rank",
                "KV tokens that requests in progress hold or may come to hold. What is admitted has its room to the end, so "
                "nothing is ever preempted.",
                Query(_kv_tokens("reserved"), _RANK),
                unit=TOKENS,
            ),
            bars(
                "Capacity of a rank",
                "KV tokens that each rank of a ring can hold: the smallest of its ranks counts for all.",
                Query(_by_pod("kvplane_ring_kv_capacity_tokens"), "{{pod}}"),
                unit=TOKENS,
            ),
            graph(
                "Tokens computed",
                "Tokens per second in prefill windows. new: never computed before. refilled: a second time, after a rank was "
                "lost with its share.",
                Query(rate("kvplane_ring_prefill_tokens_total", CHOSEN_PODS, "kind"), "{{kind}}"),
                unit=TOKENS_PER_SECOND,
                stacked=True,
                span=12,
            ),
            graph(
                "Prompt length",
                "Prompt tokens of finished requests.",
                *quantiles("kvplane_request_prompt_tokens", CHOSEN_PODS, 0.5, 0.95),
                unit=TOKENS,
                span=12,
            ),
        ),
    )


def _lost() -> Row:
    return Row(
        "What was lost, and what did it cost?",
        (
            graph(
                "Epochs",
                "The number of each ring's present epoch. A step upwards is a ring that formed anew; a slope is one that cannot "
                "keep its ranks.",
                Query(_by_pod("kvplane_ring_epoch"), "{{pod}}"),
                unit="none",
            ),
            graph(
                "Ranks",
                "Members of each ring that is, or was last, as its rank 0 tells; and, of each service, workers that are inside a "
                "ring that works, as they tell themselves: what there is to see while a rank 0 is gone.",
                Query(_by_pod("kvplane_ring_members"), "{{pod}}"),
                Query(
                    f"sum by (namespace, service) (kvplane_ring_worker_inside{{{CHOSEN_SERVICES}}})",
                    "workers of {{namespace}}/{{service}}",
                ),
                unit="none",
            ),
            graph(
                "Recovery",
                "From the detection of a loss until the ring worked again, the mean of the last hour, by ring.",
                Query(_mean_recovery("pod"), "{{pod}}"),
                unit="s",
                steps=((2, "orange"),),
            ),
            graph(
                "Formed anew, by cause",
                "Within the last hour. lost: a rank is gone, by a fault. left: one was told to go. joined: one came, or came back.",
                Query(f"sum by (cause) (increase(kvplane_ring_reforms_total{{{CHOSEN_PODS}}}[1h]))", "{{cause}}"),
                unit="none",
                span=12,
            ),
            graph(
                "Requests that had to wait for room",
                "Within the last hour: requests that lost their room with a rank and were parked. ring.recovery.reserve: Survive "
                "keeps that room free.",
                Query(f"sum by (pod) (increase(kvplane_ring_parked_requests_total{{{CHOSEN_PODS}}}[1h]))", "{{pod}}"),
                unit="none",
                span=12,
            ),
        ),
    )


def _by_pod(metric: str) -> str:
    return f"max by (pod) ({metric}{{{CHOSEN_PODS}}})"


def _by_ring(metric: str) -> str:
    """Rank 0's pods of two namespaces may have the same name."""
    return f"max by (namespace, pod) ({metric}{{{CHOSEN_PODS}}})"


def _kv_tokens(state: str) -> str:
    return f'max by (pod, rank) (kvplane_ring_kv_tokens{{state="{state}", {CHOSEN_PODS}}})'


def _waited_share(*by: str) -> str:
    waited = rate(_STEP, f'part="waited", {CHOSEN_PODS}', *by)
    return f"{waited} / ({rate(_STEP, CHOSEN_PODS, *by)} > 0)"


def _mean_recovery(*by: str) -> str:
    """Of the last hour, since losses are rare; no point where there was none."""
    of = f"sum by ({', '.join(by)})" if by else "sum"
    total, count = (
        f"{of} (increase(kvplane_ring_recovery_seconds_{part}{{{CHOSEN_PODS}}}[1h]))" for part in ("sum", "count")
    )
    return f"{total} / ({count} > 0)"
