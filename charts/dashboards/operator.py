"""Operator: does it lead and keep up, what holds services back, and what does it ask of the API server?"""

from charts.dashboards.panels import Query, Row, Variable, board, graph, quantile, quantiles, rate, stat, table
from charts.dashboards.phrases import READY_TEXTS

UID = "kvplane-operator"
_OPERATORS = 'namespace=~"$namespace"'
_VARIABLES = (Variable("namespace", "Operator's namespace", "label_values(kvplane_operator_leading, namespace)"),)


def operator() -> str:
    """The dashboard's JSON."""
    return board(
        UID,
        "kvplane / Operator",
        "Does the operator lead and keep up, what holds services back, and what does it ask of the API server?",
        variables=_VARIABLES,
        content=(_fine(), _services(), _pace(), _requests()),
    )


def _fine() -> Row:
    return Row(
        "Is it fine?",
        (
            stat(
                "Leaders",
                "Operators that hold the leader Lease: one for each installation. With 0 nothing is reconciled; engines serve on. "
                "2 for longer than a scrape: two installations are chosen.",
                f"sum(kvplane_operator_leading{{{_OPERATORS}}})",
                unit="none",
                below="red",
                steps=((1, "green"), (2, "orange")),
            ),
            stat(
                "Services",
                "LLMServices in the operator's care.",
                f"max(kvplane_operator_services{{{_OPERATORS}}})",
                unit="none",
            ),
            stat(
                "Services waiting",
                "LLMServices that wait for a worker.",
                f"max(kvplane_operator_queue_depth{{{_OPERATORS}}})",
                unit="none",
                steps=((50, "orange"),),
            ),
            stat(
                "Failed reconciles",
                "Reconciles per minute that failed and are tried again after a back-off. The operator's log says why.",
                f"60 * {rate('kvplane_operator_reconcile_errors_total', _OPERATORS)}",
                unit="suffix:per minute",
                steps=((1, "orange"), (10, "red")),
            ),
            stat(
                "Container restarts",
                "Restarts of engines and sidecars in the last hour.",
                "round(sum(max by (namespace, service, pod, container) "
                "(increase(kvplane_service_container_restarts_total[1h]))))",
                unit="none",
                steps=((1, "orange"), (3, "red")),
            ),
            stat(
                "Event loop lag",
                "How late the operator's event loop was at its last one-second tick.",
                f"max(kvplane_operator_event_loop_lag_seconds{{{_OPERATORS}}})",
                unit="s",
                steps=((0.5, "orange"), (2, "red")),
            ),
        ),
    )


def _services() -> Row:
    return Row(
        "What holds services back?",
        (
            table(
                "Services",
                "The condition Ready of each LLMService and its reason; those that are not ready come first. "
                "docs/reference/conditions.md says what to do about a reason.",
                'bottomk(50, max by (namespace, service, reason) (kvplane_service_condition{condition="Ready"}))',
                columns={"namespace": "Namespace", "service": "Service", "reason": "Reason"},
                value="State",
                texts=READY_TEXTS,
            ),
            graph(
                "Services by reason",
                "LLMServices by the reason of their condition Ready. Serving is the good one.",
                Query(
                    "count by (reason) (max by (namespace, service, reason) "
                    '(kvplane_service_condition{condition="Ready"}))',
                    "{{reason}}",
                ),
                unit="none",
                span=12,
                stacked=True,
            ),
            graph(
                "Container restarts",
                "Restarts per hour of engine and sidecar containers, by service.",
                Query(
                    "round(sum by (namespace, service, container) (max by (namespace, service, pod, container) "
                    "(increase(kvplane_service_container_restarts_total[1h]))))",
                    "{{namespace}}/{{service}} {{container}}",
                ),
                unit="suffix:per hour",
                span=12,
            ),
            graph(
                "Start of an engine",
                "From the start of a pod's sidecar to the engine's first healthy answer: download, load, warm-up.",
                Query("max by (namespace, service) (kvplane_startup_seconds)", "{{namespace}}/{{service}}"),
                unit="s",
                span=12,
            ),
        ),
    )


def _pace() -> Row:
    return Row(
        "Does it keep up?",
        (
            graph(
                "Reconciles",
                "Passes over one service, per second, and those that failed.",
                Query(rate("kvplane_operator_reconcile_seconds_count", _OPERATORS), "reconciles"),
                Query(rate("kvplane_operator_reconcile_errors_total", _OPERATORS), "failed"),
                unit="ops",
            ),
            graph(
                "Duration of a reconcile",
                "Of one pass over one service, its API requests included.",
                *quantiles("kvplane_operator_reconcile_seconds", _OPERATORS, 0.5, 0.99),
                unit="s",
            ),
            graph(
                "Wait for a worker",
                "From an event to the start of the reconcile that it causes.",
                *quantiles("kvplane_operator_queue_seconds", _OPERATORS, 0.5, 0.99),
                unit="s",
            ),
        ),
    )


def _requests() -> Row:
    return Row(
        "What does it ask of the API server?",
        (
            graph(
                "Requests",
                "Per second, by verb and status code; watches are not counted. Code 0: no answer. Idle, only the Lease is "
                "renewed.",
                Query(
                    rate("kvplane_operator_api_requests_total", _OPERATORS, "verb", "code"),
                    "{{verb}} {{code}}",
                ),
                unit="reqps",
                stacked=True,
            ),
            graph(
                "Duration of a request, p99",
                "By verb.",
                Query(
                    quantile(0.99, "kvplane_operator_api_request_seconds", _OPERATORS, "verb"),
                    "{{verb}}",
                ),
                unit="s",
            ),
            graph(
                "Drift healed",
                "Children per minute that another writer changed and the operator wrote again, by kind. A steady line means "
                "that two writers disagree.",
                Query(f"60 * {rate('kvplane_operator_drift_healed_total', _OPERATORS, 'kind')}", "{{kind}}"),
                unit="suffix:per minute",
            ),
        ),
    )
