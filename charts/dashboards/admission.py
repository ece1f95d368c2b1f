"""Admission: is work turned away, what do callers see of it, and which limit turns it away?"""

from charts.dashboards.panels import (
    CHOSEN_PODS,
    ENGINE_VARIABLES,
    Query,
    Row,
    board,
    graph,
    quantiles,
    rate,
    stat,
    table,
)
from charts.dashboards.phrases import NEEDED_SIGNALS, refused_share

UID = "kvplane-admission"
_POD = "{{pod}}"


def admission() -> str:
    """The dashboard's JSON."""
    return board(
        UID,
        "kvplane / Admission",
        "Is work turned away, what do callers see of it, and which limit turns it away?",
        variables=ENGINE_VARIABLES,
        content=(_shedding(), _callers(), _limits(), _settings()),
    )


def _shedding() -> Row:
    return Row(
        "Is work turned away?",
        (
            stat(
                "Requests refused",
                "Share of requests that admission refused, of those that it decided on.",
                refused_share(CHOSEN_PODS),
                unit="percentunit",
                steps=((0.01, "orange"), (0.05, "red")),
                none="no requests",
            ),
            stat(
                "Admitted",
                "Requests per second that were let through.",
                rate("kvplane_admission_decisions_total", f'decision="admitted", {CHOSEN_PODS}'),
                unit="reqps",
            ),
            stat(
                "Queued",
                "Requests that admission holds back now.",
                f'sum(kvplane_admission_requests{{state="queued", {CHOSEN_PODS}}})',
                unit="none",
            ),
            stat(
                "Running",
                "Requests that were let through and are not over.",
                f'sum(kvplane_admission_requests{{state="running", {CHOSEN_PODS}}})',
                unit="none",
            ),
            stat(
                "Predicted KV peak",
                "Highest KV use that the requests let through are expected to reach, as a share of the capacity, on the "
                "fullest replica. Requests wait while it would exceed kappa.",
                f"max(kvplane_admission_kv_peak_ratio{{{CHOSEN_PODS}}})",
                unit="percentunit",
                steps=((0.95, "orange"), (1.05, "red")),
            ),
            stat(
                "Oldest signal",
                "Age of the oldest engine signal that admission needs. Above 2 s it knows only what went through it, and "
                "lowers kappa to 0.85.",
                f"max(kvplane_signal_age_seconds{{{NEEDED_SIGNALS}, {CHOSEN_PODS}}})",
                unit="s",
                steps=((2, "orange"), (15, "red")),
            ),
            graph(
                "Decisions",
                "Requests per second by decision. would-refuse: policy Observe let them pass.",
                Query(rate("kvplane_admission_decisions_total", CHOSEN_PODS, "decision"), "{{decision}}"),
                unit="reqps",
                span=12,
                stacked=True,
            ),
            graph(
                "Refused, by reason",
                "Requests per second. kv: no KV memory in time. prefill: too many prompt tokens outstanding. sequences: as many "
                "run as the engine takes at the promised pace. queue-full: no place to wait. deadline: it could not be served in "
                "time. tenant: its tenant's own limit. context-length: it never fits.",
                Query(
                    rate(
                        "kvplane_admission_decisions_total",
                        f'decision!="admitted", {CHOSEN_PODS}',
                        "decision",
                        "reason",
                    ),
                    "{{decision}} {{reason}}",
                ),
                unit="reqps",
                span=12,
                stacked=True,
            ),
        ),
    )


def _callers() -> Row:
    return Row(
        "What do callers see?",
        (
            graph(
                "Wait in admission's queue",
                "Time from a request's arrival to the decision on it.",
                *quantiles("kvplane_admission_queue_seconds", CHOSEN_PODS, 0.5, 0.95),
                unit="s",
            ),
            graph(
                "Retry-After",
                "Seconds that refused callers were told to wait.",
                *quantiles("kvplane_retry_after_seconds", CHOSEN_PODS, 0.5, 0.95),
                unit="s",
            ),
            graph(
                "Answers by status code",
                "HTTP answers per second, by status and by who answered: the engine, or the sidecar in front of it (proxy).",
                Query(rate("kvplane_proxy_responses_total", CHOSEN_PODS, "code", "origin"), "{{code}} {{origin}}"),
                unit="reqps",
                stacked=True,
            ),
        ),
    )


def _limits() -> Row:
    return Row(
        "Which limit holds?",
        (
            graph(
                "Predicted KV peak and its limit",
                "Share of the KV capacity that the requests let through are expected to reach, and kappa, up to which they are "
                "let through. Kappa falls while preemptions throw away more than 0.3 % of the tokens, and rises slowly.",
                Query(f"max by (pod) (kvplane_admission_kv_peak_ratio{{{CHOSEN_PODS}}})", "{{pod}} peak"),
                Query(f"max by (pod) (kvplane_admission_kappa{{{CHOSEN_PODS}}})", "{{pod}} kappa"),
                unit="percentunit",
            ),
            graph(
                "KV cache in use",
                "What the engine says itself. Far below the predicted peak: outputs are shorter than those before them, and "
                "kappa rises while requests wait for KV memory. Above it: something goes round the sidecar.",
                Query(f"max by (pod) (kvplane_kv_cache_usage_ratio{{{CHOSEN_PODS}}})", _POD),
                unit="percentunit",
                maximum=1,
                steps=((0.95, "red"),),
            ),
            graph(
                "Preemptions",
                "Requests per second that the engine threw out of its cache: what admission is there to prevent.",
                Query(rate("kvplane_preemptions_total", CHOSEN_PODS, "pod"), _POD),
                unit="reqps",
            ),
            graph(
                "Requests in admission",
                "Held back (queued) and let through (running), by replica.",
                Query(f"sum by (pod, state) (kvplane_admission_requests{{{CHOSEN_PODS}}})", "{{pod}} {{state}}"),
                unit="none",
                span=12,
            ),
            graph(
                "Waiting in the engine",
                "Requests in the engine's own queue. More than a few: the limit on outstanding prompt tokens is too high, or "
                "admission is off.",
                Query(f"sum by (pod) (kvplane_requests_waiting{{{CHOSEN_PODS}}})", _POD),
                unit="none",
                span=12,
            ),
        ),
    )


def _settings() -> Row:
    return Row(
        "What was it told?",
        (
            table(
                "Settings",
                "Policy and reservation as the sidecars have them. A change in the LLMService reaches them within seconds, "
                "without a restart.",
                f"count by (namespace, service, policy, reservation) (kvplane_admission_info{{{CHOSEN_PODS}}})",
                columns={
                    "namespace": "Namespace",
                    "service": "Service",
                    "policy": "Policy",
                    "reservation": "Reservation",
                },
                value="Replicas",
            ),
            graph(
                "Configuration reloads",
                "Changed configurations that sidecars read, per minute. refused: not valid; the previous one stays in force.",
                Query(
                    f"60 * {rate('kvplane_sidecar_config_reloads_total', CHOSEN_PODS, 'result')}",
                    "{{result}}",
                ),
                unit="suffix:per minute",
                span=12,
            ),
        ),
    )
