"""What a worker answers about itself, over real HTTP on loopback."""

import json
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from e2e.cluster.ports import free_ports
from kvplane_runtime.ring.metrics import WORKER_METRICS
from kvplane_runtime.ring.state import RankTraffic, WorkerAccount
from kvplane_runtime.ring.worker_api import WorkerApi

HOST = "127.0.0.1"


class Worker:
    def __init__(self) -> None:
        self.account = WorkerAccount(epoch=4, kv_tokens=300, traffic=RankTraffic(5, 2.0, 1.25, 0.5, 1000))
        self.reason: str | None = None
        self.hangs: str | None = None

    def outside(self) -> str | None:
        return self.reason

    def hung(self) -> str | None:
        return self.hangs


class Served:
    def __init__(self) -> None:
        (self.port,) = free_ports(1)
        self.worker = Worker()
        self.api = api(self.worker, self.port)

    def get(self, path: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(f"http://{HOST}:{self.port}{path}", timeout=10) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    def samples(self) -> dict[tuple[str, str], float]:
        return {
            (sample.name, sample.labels.get("part", "")): sample.value
            for family in text_string_to_metric_families(self.get("/metrics")[1])
            for sample in family.samples
        }


def api(worker: Any, port: int) -> WorkerApi:
    return WorkerApi(worker=worker, served_name="tiny", capacity_tokens=512, host=HOST, port=port)


@pytest.fixture
def served() -> Iterator[Served]:
    made = Served()
    made.api.start()
    yield made
    made.api.stop()
    with pytest.raises(urllib.error.URLError):
        made.get("/health")


def test_health_is_that_of_the_ring(served: Served) -> None:
    assert served.get("/health") == (200, '{"ready": true}')
    served.worker.reason = "Rank 0 has formed no ring with this rank."
    status, text = served.get("/health")
    assert (status, json.loads(text)) == (503, {"ready": False, "reason": "Rank 0 has formed no ring with this rank."})


@pytest.mark.parametrize("reason", [None, "Rank 0 has formed no ring with this rank."])
def test_a_worker_that_hangs_is_told_from_one_that_waits(served: Served, reason: str | None) -> None:
    served.worker.reason, served.worker.hangs = reason, "A step does not end."
    status, text = served.get("/health")
    assert (status, json.loads(text)) == (500, {"ready": False, "reason": "A step does not end."})


def test_metrics_are_of_this_worker_alone(served: Served) -> None:
    assert served.samples() == {
        ("kvplane_ring_worker_inside", ""): 1,
        ("kvplane_ring_worker_epoch", ""): 4,
        ("kvplane_ring_worker_kv_tokens", ""): 300,
        ("kvplane_ring_worker_kv_capacity_tokens", ""): 512,
        ("kvplane_ring_worker_steps_total", ""): 5,
        ("kvplane_ring_worker_step_seconds_total", "computing"): 1.25,
        ("kvplane_ring_worker_step_seconds_total", "waited"): 0.5,
        ("kvplane_ring_worker_step_seconds_total", "other"): 0.25,
        ("kvplane_ring_worker_sent_bytes_total", ""): 1000,
    }
    families = {family.name for family in text_string_to_metric_families(served.get("/metrics")[1])}
    assert families == {metric.name for metric in WORKER_METRICS}


def test_an_epoch_is_known_once_there_was_a_ring(served: Served) -> None:
    served.worker.account, served.worker.reason = WorkerAccount(), "There is none."
    known = served.samples()
    assert ("kvplane_ring_worker_epoch", "") not in known
    assert known["kvplane_ring_worker_inside", ""] == 0


def test_the_version(served: Served) -> None:
    status, text = served.get("/version")
    assert (status, list(json.loads(text))) == (200, ["version"])


def test_a_port_that_is_taken_is_said_to_be() -> None:
    with socket.create_server((HOST, 0)) as taken:
        second = api(Worker(), taken.getsockname()[1])
        with pytest.raises(OSError, match="in use"):
            second.start()
        second.stop()
