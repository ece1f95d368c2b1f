"""What the sidecars of a service's pods say on their admin port, which this host reaches by the pods' addresses."""

import json
import time
import urllib.request
from collections.abc import Callable
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from e2e.stack import Stack
from kvplane_api import names


def pods(stack: Stack, namespace: str, service: str) -> list[dict[str, Any]]:
    """The pods of a service, also those that are about to go."""
    found: list[dict[str, Any]] = stack.get(namespace, "pods", "-l", f"{names.LABEL_SERVICE}={service}")
    return found


def pod_ip(stack: Stack, namespace: str, service: str) -> str:
    """The address of the first pod of a service."""
    return str(pods(stack, namespace, service)[0]["status"]["podIP"])


def state(ip: str) -> dict[str, Any]:
    """/state of the sidecar in the pod with that address."""
    found: dict[str, Any] = json.loads(_get(ip, "/state"))
    return found


def value(ip: str, metric: str, **labels: str) -> float:
    """One series of /metrics; the sum where several have these labels. Raises KeyError where none has: that is unknown."""
    found = [
        sample.value
        for family in text_string_to_metric_families(_get(ip, "/metrics"))
        for sample in family.samples
        if sample.name == metric and labels.items() <= sample.labels.items()
    ]
    if not found:
        raise KeyError(f"{metric} {labels} is not among the metrics of {ip}.")
    return sum(found)


def by_label(ip: str, metric: str, label: str) -> dict[str, float]:
    """The series of a metric as they are at one moment, by the value of a label."""
    return {
        sample.labels[label]: sample.value
        for family in text_string_to_metric_families(_get(ip, "/metrics"))
        for sample in family.samples
        if sample.name == metric
    }


def eventually(holds: Callable[[], bool], *, seconds: float, otherwise: Callable[[], object]) -> None:
    """Wait until it holds; the sidecar looks at its engine once a second. Fails with what `otherwise` says."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, otherwise()
        time.sleep(0.2)


def _get(ip: str, path: str) -> str:
    url = f"http://{ip}:{names.PORT_ADMIN}{path}"
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=10) as answer:
        text: str = answer.read().decode()
        return text
