"""Overview: are the services fine, what do their users get, and what is in the way?"""

from charts.dashboards.panels import (
    CHOSEN_SERVICES,
    ENGINE_VARIABLES,
    Query,
    Row,
    board,
    graph,
    quantile,
    quantiles,
    rate,
    stat,
    table,
)
from charts.dashboards.phrases import (
    NEEDED_SIGNALS,
    READY,
    READY_TEXTS,
    TOKENS_PER_SECOND,
    broken_share,
    kept_share,
    refused_share,
    replicas,
    thrashing,
    wasted_share,
)

UID = "kvplane-overview"
_SERVICE = "{{namespace}}/{{service}}"


def overview() -> str:
    """The dashboard's JSON."""
    return board(
        UID,
        "kvplane / Overview",
        "All LLMServices: are they fine, what do their users get, and what is in the way?",
        variables=ENGINE_VARIABLES[:2],
        content=(_fine(), _users(), _causes(), _which()),
    )


def _fine() -> Row:
    return Row(
        "Is it fine?",
        (
            stat(
                "Services not ready",
                "LLMServices whose condition Ready is False. The table below names them, with the reason.",
                f"sum(1 - {READY})",
                unit="none",
                steps=((1, "red"),),
            ),
            stat(
                "Replicas missing",
                "Replicas asked for that are not ready: being scheduled, loading, or crashing.",
                f"{replicas('desired')} - {replicas('ready')}",
                unit="none",
                steps=((1, "orange"),),
            ),
            stat(
                "Replicas thrashing",
                "Replicas that compute again what they had computed before, because their KV cache is too small "
                "for what they were given. More in the dashboard KV memory and thrash.",
                thrashing(CHOSEN_SERVICES),
                unit="none",
                steps=((1, "red"),),
            ),
            stat(
                "Requests refused",
                "Share of requests that admission refused, of those that it decided on. More in the dashboard "
                "Admission.",
                refused_share(CHOSEN_SERVICES),
                unit="percentunit",
                steps=((0.01, "orange"), (0.05, "red")),
                none="no requests",
            ),
            stat(
                "Promises kept",
                "Share of requests that got what slo promises: a whole answer, its first token and its pace in time, waiting "
                "included. Refused and failed requests did not; clients that left in time are not counted.",
                kept_share(CHOSEN_SERVICES),
                unit="percentunit",
                below="red",
                steps=((0.95, "orange"), (0.99, "green")),
                none="no requests",
            ),
            stat(
                "Oldest signal",
                "Age of the oldest engine signal that admission needs. Above 2 s admission knows only what went "
                "through it, and reserves more.",
                f"max(kvplane_signal_age_seconds{{{NEEDED_SIGNALS}, {CHOSEN_SERVICES}}})",
                unit="s",
                steps=((2, "orange"), (15, "red")),
            ),
        ),
    )


def _users() -> Row:
    return Row(
        "What do users get?",
        (
            graph(
                "Promises kept, by service",
                "Share of requests that got what slo promises. With policy Observe it is what users get without admission, with "
                "Enforce what they get with it.",
                Query(kept_share(CHOSEN_SERVICES, "namespace", "service"), _SERVICE),
                unit="percentunit",
                span=12,
                maximum=1,
            ),
            graph(
                "Promises not kept, by reason",
                "Share of requests. ttft-missed: the first token came late, waiting included. tpot-missed: the tokens after it "
                "came slowly. total-missed: not streamed, and longer than both promises allow together. refused: 429, or the "
                "engine's 503. failed: another 5xx, a cut answer, or no engine.",
                Query(broken_share(CHOSEN_SERVICES), "{{result}}"),
                unit="percentunit",
                span=12,
                stacked=True,
            ),
            graph(
                "Time to first token",
                "From a request's arrival at the engine to its first token, over all services chosen. With the wait: from its "
                "arrival at the sidecar, so with the time in admission's queue (streamed answers only).",
                *quantiles("kvplane_time_to_first_token_seconds", CHOSEN_SERVICES, 0.5, 0.95, 0.99),
                Query(
                    quantile(0.95, "kvplane_client_time_to_first_token_seconds", CHOSEN_SERVICES), "p95 with the wait"
                ),
                unit="s",
            ),
            graph(
                "Time between tokens",
                "Between two tokens of one request, over all services chosen.",
                *quantiles("kvplane_inter_token_latency_seconds", CHOSEN_SERVICES, 0.5, 0.95, 0.99),
                unit="s",
            ),
            graph(
                "Whole answers, p95",
                "From a request's arrival at the engine to its last token, by service. It grows with the length "
                "of answers, so compare it with the output length in KV memory and thrash.",
                Query(
                    quantile(0.95, "kvplane_e2e_request_latency_seconds", CHOSEN_SERVICES, "namespace", "service"),
                    _SERVICE,
                ),
                unit="s",
            ),
            graph(
                "Answers by status code",
                "HTTP answers per second. 429: contended, come back after Retry-After. 503: no capacity, loading or "
                "draining. 400: never fits, or malformed.",
                Query(rate("kvplane_proxy_responses_total", CHOSEN_SERVICES, "code"), "{{code}}"),
                unit="reqps",
                stacked=True,
            ),
            graph(
                "Tokens",
                "Tokens per second that the engines processed (prompt) and generated (output).",
                Query(rate("kvplane_prompt_tokens_total", CHOSEN_SERVICES), "prompt"),
                Query(rate("kvplane_generation_tokens_total", CHOSEN_SERVICES), "output"),
                unit=TOKENS_PER_SECOND,
            ),
            graph(
                "Cut answers and departed clients",
                "Per second: answers that the engine broke off after they had begun, and requests whose client went "
                "away before the end. Cut answers are lost work; a drain causes none.",
                Query(rate("kvplane_proxy_cut_responses_total", CHOSEN_SERVICES), "cut by the engine"),
                Query(rate("kvplane_proxy_client_disconnects_total", CHOSEN_SERVICES), "client left"),
                unit="reqps",
            ),
        ),
    )


def _causes() -> Row:
    return Row(
        "Why not?",
        (
            graph(
                "Fullest KV cache",
                "Share of KV blocks that running requests hold, on the fullest replica of each service. Near 1 the "
                "engine preempts: it throws a request's KV away and computes it again.",
                Query(
                    f"max by (namespace, service) (kvplane_kv_cache_usage_ratio{{{CHOSEN_SERVICES}}})",
                    _SERVICE,
                ),
                unit="percentunit",
                maximum=1,
                steps=((0.9, "orange"), (0.95, "red")),
            ),
            graph(
                "Where requests are",
                "Held back by admission (queued), in the engine's own queue (waiting; near 0 while admission works), "
                "and in its batch (running).",
                Query(f'sum(kvplane_admission_requests{{state="queued", {CHOSEN_SERVICES}}})', "queued"),
                Query(f"sum(kvplane_requests_waiting{{{CHOSEN_SERVICES}}})", "waiting"),
                Query(f"sum(kvplane_requests_running{{{CHOSEN_SERVICES}}})", "running"),
                unit="none",
                stacked=True,
            ),
            graph(
                "Work done twice",
                "Tokens computed again, as a share of all tokens processed and generated, by service.",
                Query(wasted_share(CHOSEN_SERVICES, "namespace", "service"), _SERVICE),
                unit="percentunit",
                steps=((0.02, "red"),),
            ),
        ),
    )


def _which() -> Row:
    return Row(
        "Which service, which replica?",
        (
            table(
                "Services",
                "The condition Ready of each LLMService and its reason; those that are not ready come first. "
                "docs/reference/conditions.md says what to do about a reason.",
                f"bottomk(50, max by (namespace, service, reason) "
                f'(kvplane_service_condition{{condition="Ready", {CHOSEN_SERVICES}}}))',
                columns={"namespace": "Namespace", "service": "Service", "reason": "Reason"},
                value="State",
                texts=READY_TEXTS,
            ),
            table(
                "Replicas",
                "Whether each replica's engine passes its health check, and what it is.",
                f"max by (namespace, service, pod) (kvplane_engine_ready{{{CHOSEN_SERVICES}}})"
                " * on (namespace, service, pod) group_left (version) "
                f"max by (namespace, service, pod, version) (kvplane_engine_info{{{CHOSEN_SERVICES}}})",
                columns={"namespace": "Namespace", "service": "Service", "pod": "Pod", "version": "Engine"},
                value="State",
                texts=READY_TEXTS,
            ),
        ),
    )
