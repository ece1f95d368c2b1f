"""A real Prometheus beside a cluster: finds kvplane's pods through Kubernetes, scrapes them, evaluates the shipped rules.

It runs on this host, which reaches pods by their addresses, with the discovery that docs/prometheus-scrape.yaml tells users
to take, so that what it does not find no user's Prometheus would find either. Scrapes and rules run every second: a test
waits for seconds where a user's dashboard waits for minutes.
"""

import json
import math
import os
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml

from e2e.cluster import binaries
from e2e.cluster.errors import ClusterError
from e2e.cluster.ports import free_ports
from e2e.cluster.progress import Progress

REPOSITORY: Final = Path(__file__).resolve().parents[1]
SCRAPE_CONFIG: Final = REPOSITORY / "docs" / "prometheus-scrape.yaml"
RULES: Final = REPOSITORY / "charts" / "kvplane" / "rules" / "kvplane.yaml"

INTERVAL: Final = "1s"
RATE_INTERVAL: Final = "1m"
"""What stands for Grafana's $__rate_interval: long enough for what happens once a minute, as a reconcile of a service."""

_START_SECONDS: Final = 30.0


class PrometheusError(ClusterError):
    """Prometheus did not start, or refused a request; the message has its words."""


@dataclass(frozen=True)
class Sample:
    """The newest value of one series of a query's answer."""

    labels: Mapping[str, str]
    value: float


@dataclass(frozen=True)
class Prometheus:
    """A running Prometheus, by the URL of its API."""

    url: str

    def query(self, expr: str, *, at: float | None = None) -> list[Sample]:
        """The series of an expression now, or `at` a time (seconds since 1970); those without a finite value left out.

        Raises:
            PrometheusError: the expression is not valid.
        """
        answer = self._get("query", query=expr, **({} if at is None else {"time": str(at)}))
        if answer["resultType"] != "vector":
            raise PrometheusError(f"{expr} is a {answer['resultType']}, and a vector is wanted.")
        samples = (Sample(found["metric"], float(found["value"][1])) for found in answer["result"])
        return [sample for sample in samples if math.isfinite(sample.value)]

    def matrix(self, expr: str, *, start: int, end: int, step: int) -> list[dict[str, Any]]:
        """The series of an expression over time, as Prometheus gives them: `metric` (labels) and `values` (time, text)."""
        found: list[dict[str, Any]] = self._get(
            "query_range", query=expr, start=str(start), end=str(end), step=str(step)
        )["result"]
        return found

    def selectors(self, expr: str) -> list[str]:
        """Every vector selector in an expression, as one that can be asked for on its own: {__name__="up"}."""
        return [
            _selector(node["matchers"]) for node in _nodes(self._get("parse_query", query=expr)) if "matchers" in node
        ]

    def rules(self) -> list[dict[str, Any]]:
        """The loaded rules, each with its health, last error and alerts."""
        return [rule for group in self._get("rules")["groups"] for rule in group["rules"]]

    def firing(self) -> set[tuple[str, str, str]]:
        """Name of each alert that fires, and namespace and service it fires for ("" where it has none)."""
        return {_alert(alert["labels"]) for alert in self._get("alerts")["alerts"] if alert["state"] == "firing"}

    def fired(self, *, start: int, end: int) -> set[tuple[str, str, str]]:
        """As `firing`, at any time from `start` to `end` (seconds since 1970)."""
        series = self.matrix('ALERTS{alertstate="firing"}', start=start, end=end, step=1)
        return {_alert(found["metric"]) for found in series}

    def targets(self) -> list[dict[str, Any]]:
        """What it scrapes, each with its labels, health and last error."""
        found: list[dict[str, Any]] = self._get("targets", state="active")["activeTargets"]
        return found

    def _get(self, path: str, **parameters: str) -> Any:
        try:
            answer = _fetch(f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}")
        except urllib.error.HTTPError as error:
            raise PrometheusError(f"Prometheus refuses {path} {parameters}: {error.read().decode()[:500]}") from None
        return json.loads(answer)["data"]


@contextmanager
def running(configuration: Mapping[str, Any], folder: Path, *, progress: Progress) -> Iterator[Prometheus]:
    """A Prometheus, while in the context; its files are in `folder`, its data, which may be there before, in `data`.

    Raises:
        PrometheusError: it did not become ready; the message has the end of its log.
    """
    program = binaries.build([binaries.PROMETHEUS], progress=progress)["prometheus"]
    folder.mkdir(parents=True, exist_ok=True)
    config, log = folder / "prometheus.yaml", folder / "prometheus.log"
    config.write_text(yaml.safe_dump(dict(configuration)))
    (port,) = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    command = [
        str(program),
        f"--config.file={config}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
        "--log.level=warn",
    ]
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=_without_proxies(os.environ), stdout=output, stderr=subprocess.STDOUT)
    try:
        with progress.step("Prometheus"):
            _await_ready(url, process, log)
        yield Prometheus(url)
    finally:
        process.terminate()
        process.wait()


def watching(kubeconfig: Path) -> dict[str, Any]:
    """The configuration that watches a cluster from outside: the documented scrape jobs, and the shipped rules."""
    jobs = yaml.safe_load(SCRAPE_CONFIG.read_text())["scrape_configs"]
    for job in jobs:
        for discovery in job["kubernetes_sd_configs"]:
            discovery["kubeconfig_file"] = str(kubeconfig)
    return {
        "global": {"scrape_interval": INTERVAL, "scrape_timeout": INTERVAL, "evaluation_interval": INTERVAL},
        "rule_files": [str(RULES)],
        "scrape_configs": jobs,
    }


def _alert(labels: Mapping[str, str]) -> tuple[str, str, str]:
    return labels["alertname"], labels.get("namespace", ""), labels.get("service", "")


def _selector(matchers: Sequence[Mapping[str, str]]) -> str:
    return "{" + ",".join(f"{m['name']}{m['type']}{json.dumps(m['value'])}" for m in matchers) + "}"


def _nodes(tree: Any) -> Iterator[Mapping[str, Any]]:
    """Every node of a parsed expression."""
    if isinstance(tree, dict):
        yield tree
        for part in tree.values():
            yield from _nodes(part)
    elif isinstance(tree, list):
        for part in tree:
            yield from _nodes(part)


def _await_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + _START_SECONDS
    while True:
        try:
            _fetch(f"{url}/-/ready")
        except OSError as error:
            if process.poll() is not None or time.monotonic() > end:
                tail = log.read_text(errors="replace")[-2000:]
                raise PrometheusError(
                    f"Prometheus was not ready within {_START_SECONDS:.0f} s: {error}\n{tail}"
                ) from None
            time.sleep(0.1)
        else:
            return


def _fetch(url: str) -> str:
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=10) as answer:
        text: str = answer.read().decode()
        return text


def _without_proxies(environment: Mapping[str, str]) -> dict[str, str]:
    """The API server and the pods are reached directly: client-go would ask a proxy of the environment for them."""
    return {name: value for name, value in environment.items() if not name.lower().endswith("_proxy")}
