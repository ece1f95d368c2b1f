"""Expressions and words that several dashboards share, so that one figure means the same everywhere."""

from typing import Final

from charts.dashboards.panels import CHOSEN_SERVICES, rate

TOKENS_PER_SECOND: Final = "suffix:tokens/s"
TOKENS: Final = "suffix:tokens"

NEEDED_SIGNALS: Final = 'signal=~"kv_cache|kv_cache_usage_ratio|preemptions|requests_running|requests_waiting"'
"""The engine signals that admission needs."""

READY: Final = f'max by (namespace, service) (kvplane_service_condition{{condition="Ready", {CHOSEN_SERVICES}}})'
"""1 or 0 for each service. During a change of leader two operators may export it: hence max."""
READY_TEXTS: Final = {"0": ("not ready", "red"), "1": ("ready", "green")}

_JUDGED: Final = "kvplane_slo_requests_total"


def thrashing(selector: str) -> str:
    """Replicas that thrash, of whatever kind."""
    return f"sum(max by (namespace, service, pod) (kvplane_thrashing{{{selector}}}))"


def replicas(state: str) -> str:
    """Replicas of the services chosen: desired or ready."""
    selector = f'state="{state}", {CHOSEN_SERVICES}'
    return f"sum(max by (namespace, service) (kvplane_service_replicas{{{selector}}}))"


def refused_share(selector: str) -> str:
    """Requests refused, of those that were decided on; no point where there were none."""
    decisions = "kvplane_admission_decisions_total"
    refused = rate(decisions, f'decision="refused", {selector}')
    decided = rate(decisions, f'decision=~"admitted|refused", {selector}')
    return f"{refused} / ({decided} > 0)"


def kept_share(selector: str, *by: str) -> str:
    """Requests that got what slo promises, of those that were judged; no point where there were none."""
    met, judged = (rate(_JUDGED, chosen, *by) for chosen in (f'result="met", {selector}', selector))
    return f"{met} / ({judged} > 0)"


def broken_share(selector: str) -> str:
    """Requests that did not, by result, of those that were judged."""
    broken = rate(_JUDGED, f'result!="met", {selector}', "result")
    return f"{broken} / on () group_left () ({rate(_JUDGED, selector)} > 0)"


def wasted_share(selector: str, *by: str) -> str:
    """Tokens computed again, of all processed and generated; no point where there were none."""
    prompt, output = (rate(f"kvplane_{kind}_tokens_total", selector, *by) for kind in ("prompt", "generation"))
    return f"{rate('kvplane_wasted_tokens_total', selector, *by)} / ({prompt} + {output} > 0)"
