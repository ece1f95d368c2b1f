"""Autoscaling: how many replicas, how many are needed, what was foreseen, and why was it decided so?"""

from charts.dashboards.panels import (
    CHOSEN_SERVICES,
    Query,
    Row,
    Variable,
    board,
    graph,
    quantiles,
    rate,
    stat,
    table,
)
from charts.dashboards.phrases import TOKENS

UID = "kvplane-autoscaling"
_VARIABLES = (
    Variable("namespace", "Namespace", "label_values(kvplane_autoscaler_active, namespace)"),
    Variable("service", "Service", 'label_values(kvplane_autoscaler_active{namespace=~"$namespace"}, service)'),
)
_SERVICE = "{{namespace}}/{{service}}"
_MOST = 'limit="max"'
_STATES = {"0": ("does not act", "red"), "1": ("acts", "green")}


def autoscaling() -> str:
    """The dashboard's JSON."""
    return board(
        UID,
        "kvplane / Autoscaling",
        "How many replicas are there, how many are needed, what was foreseen, and why was it decided so?",
        variables=_VARIABLES,
        content=(_fine(), _replicas(), _forecasts(), _decisions(), _signals(), _pace()),
    )


def _each(metric: str, selector: str = "", *by: str) -> str:
    """One value for each service: during a change of leader two operators may export it."""
    labels = ", ".join(("namespace", "service", *by))
    chosen = f"{selector}, {CHOSEN_SERVICES}" if selector else CHOSEN_SERVICES
    return f"max by ({labels}) (kvplane_autoscaler_{metric}{{{chosen}}})"


def _sum(metric: str, selector: str = "") -> str:
    return f"sum({_each(metric, selector)})"


def _sum_by(label: str, metric: str, selector: str = "") -> str:
    return f"sum by ({label}) ({_each(metric, selector, label)})"


def _hourly(metric: str, *by: str) -> str:
    """Events of each service within the last hour."""
    labels = ", ".join(("namespace", "service", *by))
    return f"max by ({labels}) (increase(kvplane_autoscaler_{metric}{{{CHOSEN_SERVICES}}}[1h]))"


def _fine() -> Row:
    return Row(
        "Is it scaling as it should?",
        (
            stat(
                "Scalers blind",
                "Services with a replica that serves and whose signals are missing. They may still be scaled up; nothing is "
                "scaled down.",
                f"sum({_each('signals_missing')} > bool 0)",
                unit="none",
                steps=((1, "red"),),
            ),
            stat(
                "At maxReplicas",
                "Services for which as many replicas are asked as maxReplicas allows. Whether they need more, the demand says.",
                f"sum({_each('desired_replicas')} >= bool on (namespace, service) {_each('limit_replicas', _MOST)})",
                unit="none",
                steps=((1, "orange"),),
            ),
            stat(
                "Replicas pending",
                "Replicas asked for that do not serve yet.",
                _sum("replicas", 'state="pending"'),
                unit="none",
                steps=((1, "orange"),),
            ),
            stat(
                "In a panic",
                "Services with an overload under way or a moment ago: replicas are added without limits, and none goes.",
                _sum("panic"),
                unit="none",
                steps=((1, "orange"),),
            ),
            stat(
                "Reversals",
                "Changes of the last hour that went the other way than the one before. On steady load there is none.",
                f"round(sum({_hourly('reversals_total')}))",
                unit="suffix:per hour",
                steps=((3, "orange"), (6, "red")),
            ),
            stat(
                "Oldest decision",
                "Of all services. Busy ones are decided for every 5 s, quiet ones every 15 s.",
                f"max(kvplane_autoscaler_decision_age_seconds{{{CHOSEN_SERVICES}}})",
                unit="s",
                steps=((20, "orange"), (60, "red")),
            ),
        ),
    )


def _replicas() -> Row:
    return Row(
        "How many replicas are there, and how many are needed?",
        (
            graph(
                "Replicas",
                "desired: what the autoscaler wants. ready: they serve. pending: asked for and not ready. limit: maxReplicas.",
                Query(_sum("desired_replicas"), "desired"),
                Query(_sum("replicas", 'state="ready"'), "ready"),
                Query(_sum("replicas", 'state="pending"'), "pending"),
                Query(_sum("limit_replicas", _MOST), "limit"),
                unit="none",
                span=12,
            ),
            graph(
                "Demand by cause",
                "In replicas. held: KV that requests hold or are expected to. queued: KV of those that wait. shed: of those that "
                "were refused. prefill: time for prompts. waste: work done twice. The total is the larger of the first three "
                "together and prefill, and waste on top.",
                Query(_sum_by("cause", "demand_cause_replicas"), "{{cause}}"),
                Query(_sum("demand_replicas"), "total"),
                unit="none",
                span=12,
            ),
        ),
    )


def _forecasts() -> Row:
    return Row(
        "Does it see what comes?",
        (
            graph(
                "Forecast and demand",
                "The forecast is for the time when a replica that is asked for now would serve. Where it leads the demand by that "
                "time, it sees what comes; where it follows, nobody could have seen it.",
                Query(_sum("forecast_replicas"), "forecast"),
                Query(_sum("demand_replicas"), "demand"),
                unit="none",
            ),
            graph(
                "Forecasts by method",
                "persistence: as now. trend: level and slope. yesterday: the same time a day ago. recent: a high quantile of the "
                "last minutes. Of those that have erred no more than persistence the highest counts.",
                Query(_sum_by("method", "forecast_method_replicas"), "{{method}}"),
                unit="none",
            ),
            graph(
                "How far it looks ahead",
                "The 90th percentile of measured starts, and one decision more, by service.",
                Query(_each("horizon_seconds"), _SERVICE),
                unit="s",
            ),
        ),
    )


def _decisions() -> Row:
    return Row(
        "Why was it decided so?",
        (
            graph(
                "Decisions, by reason",
                "Per minute. The sentence with the numbers is in the service's events; docs/autoscaling.md explains each reason.",
                Query(f"60 * {rate('kvplane_autoscaler_decisions_total', CHOSEN_SERVICES, 'reason')}", "{{reason}}"),
                unit="suffix:per minute",
                span=12,
                stacked=True,
            ),
            graph(
                "Changes",
                "Changes of the desired replicas within the last hour, by direction, and those that went back.",
                Query(f"round(sum by (direction) ({_hourly('changes_total', 'direction')}))", "{{direction}}"),
                Query(f"round(sum({_hourly('reversals_total')}))", "reversals"),
                unit="suffix:per hour",
                span=12,
            ),
            table(
                "Scalers",
                "The condition ScalingActive of each LLMService and its reason. docs/reference/conditions.md says what to do about "
                "a reason.",
                "bottomk(50, max by (namespace, service, reason) "
                f'(kvplane_service_condition{{condition="ScalingActive", {CHOSEN_SERVICES}}}))',
                columns={"namespace": "Namespace", "service": "Service", "reason": "Reason"},
                value="State",
                texts=_STATES,
            ),
            graph(
                "Usable share of KV memory",
                "Learned: up to which share of its KV memory a replica serves as promised. Demand is counted in replicas that are "
                "filled so far.",
                Query(_each("usable_ratio"), _SERVICE),
                unit="percentunit",
                span=12,
                maximum=1,
            ),
        ),
    )


def _signals() -> Row:
    return Row(
        "What does it hear?",
        (
            graph(
                "Signals missing",
                "Replicas that serve and whose signals are missing: not answered, stale, of another pod, or absurd.",
                Query(_each("signals_missing"), _SERVICE),
                unit="none",
                steps=((1, "red"),),
            ),
            graph(
                "KV memory",
                "Tokens of the replicas that were read: what they hold, what is held or expected, what those that wait would take.",
                Query(_sum_by("state", "kv_tokens"), "{{state}}"),
                unit=TOKENS,
            ),
            graph(
                "Requests",
                "Per second, let in and refused, as the sidecars count them.",
                Query(_sum_by("result", "requests_per_second"), "{{result}}"),
                unit="reqps",
            ),
            graph(
                "Promises",
                "Answers per second that kept the promises in spec.slo, and those that did not. By these it learns how much room "
                "prompts need.",
                Query(_sum_by("promises", "answers_per_second"), "{{promises}}"),
                unit="reqps",
            ),
        ),
    )


def _pace() -> Row:
    return Row(
        "Does the operator keep up?",
        (
            graph(
                "Duration of a round",
                "Reading the state of one service's pods, and deciding.",
                *quantiles("kvplane_autoscaler_round_seconds", "", 0.5, 0.99),
                unit="s",
            ),
            graph(
                "Duration of a decision",
                "Computing alone.",
                *quantiles("kvplane_autoscaler_decision_seconds", "", 0.5, 0.99),
                unit="s",
            ),
            graph(
                "Errors and writes",
                "Per minute: rounds that ended by an error, and writes of what was learned into ConfigMaps, by result.",
                Query(f"60 * {rate('kvplane_autoscaler_errors_total', '')}", "errors"),
                Query(f"60 * {rate('kvplane_autoscaler_state_writes_total', '', 'result')}", "{{result}}"),
                unit="suffix:per minute",
            ),
        ),
    )
