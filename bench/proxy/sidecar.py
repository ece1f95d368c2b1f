"""The sidecar that is measured: configured as the operator does it, and asked as it is in a cluster.

Admission decides on every request and must let every one in, or the figures are of another load than they say: a refusal
ends the benchmark. So the engine has KV for all streams, and the service promises TPOT_MILLISECONDS.
"""

import contextlib
import http.client
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from kvplane_api.wire import SidecarConfig, SidecarState, SloConfig
from kvplane_runtime.sidecar import exposition

MODEL: Final = "bench"
TPOT_MILLISECONDS: Final = 100
"""Promised time between two tokens. The load's 50 ms are also the default promise, and before an engine that barely keeps
its promise admission holds requests back."""
_ASKED: Final = {"/ready": 2, "/healthz": 10, "/engine/live": 10, "/state": 10, "/metrics": 5}
"""Seconds between two questions: the periods of the kubelet and of the operator. Prometheus asks more often than every
30 s, the chart's default, so that each window has its share."""
_ANSWER_SECONDS: Final = 5.0
_DECISIONS: Final = "kvplane_admission_decisions_total"


def config() -> SidecarConfig:
    """What the operator renders for a service that sets only its promise; without KV events, which the engine lacks."""
    return SidecarConfig(served_name=MODEL, slo=SloConfig(tpot_milliseconds=TPOT_MILLISECONDS))


class Sidecar:
    """One sidecar's command line and admin port; starting and ending it is its contestant's."""

    def __init__(self, *, engine_port: int, admin_port: int, folder: Path) -> None:
        """``folder``: where its configuration file goes."""
        self._engine_port = engine_port
        self._admin_port = admin_port
        self._file = folder / "sidecar.json"
        self._file.write_text(config().model_dump_json(by_alias=True))

    def command(self, port: int) -> list[str]:
        """Its command line, for clients on ``port``."""
        return [
            *(sys.executable, "-m", "kvplane_runtime.sidecar", "--config", str(self._file), "--pod", "bench"),
            *("--host", "127.0.0.1", "--port", str(port), "--admin-port", str(self._admin_port)),
            *("--engine-port", str(self._engine_port)),
        ]

    def ready(self) -> bool:
        """Whether clients are served and admission knows the engine's capacity, and so decides with all of its gates.

        Raises RuntimeError where the engine's metrics lack what admission needs.
        """
        state = SidecarState.model_validate_json(self._get("/state"))
        if state.missing_signals:
            raise RuntimeError(f"The benchmark's engine does not export {', '.join(state.missing_signals)}.")
        return state.engine_ready and state.admission is not None and state.admission.kv_peak_ratio is not None

    def check(self) -> None:
        """Raises RuntimeError if a request was refused since the start, or if its metrics do not tell."""
        check_that_all_were_let_in(decisions(self._get("/metrics").decode()))

    def admission_metrics(self) -> list[str]:
        """What its metrics say of admission: decisions, and how long requests waited."""
        lines = self._get("/metrics").decode().splitlines()
        return [line for line in lines if line.startswith("kvplane_admission_")]

    @contextlib.contextmanager
    def asked(self) -> Iterator[None]:
        """Meanwhile it is asked what kubelet, operator and Prometheus ask."""
        over = threading.Event()
        asking = threading.Thread(target=self._keep_asking, args=(over,), daemon=True)
        asking.start()
        try:
            yield
        finally:
            over.set()
            asking.join()

    def _keep_asking(self, over: threading.Event) -> None:
        second = 0
        while not over.wait(1.0):
            second += 1
            for path in [path for path, period in _ASKED.items() if second % period == 0]:
                with contextlib.suppress(OSError, http.client.HTTPException):  # that it has ended, its contestant tells
                    self._ask(path)

    def _get(self, path: str) -> bytes:
        status, body = self._ask(path)
        if status != 200:
            raise RuntimeError(f"The sidecar answers {status} to GET {path}.")
        return body

    def _ask(self, path: str) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self._admin_port, timeout=_ANSWER_SECONDS)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()


def decisions(metrics: str) -> Mapping[str, int]:
    """Requests by the reason of their refusal, "" for those that were let in, from the sidecar's metrics.

    Raises RuntimeError where they say nothing of decisions.
    """
    samples = exposition.read(metrics, {_DECISIONS}).get(_DECISIONS, [])
    decided = {
        sample.labels["reason"]: round(sample.value)
        for sample in samples
        if sample.labels["decision"] in ("admitted", "refused")
    }
    if "" not in decided:
        raise RuntimeError(f"The sidecar's metrics have no {_DECISIONS} of requests that were let in.")
    return decided


def check_that_all_were_let_in(decided: Mapping[str, int]) -> None:
    """Raises RuntimeError, with the reasons, if a request was refused; ``decided`` as by :func:`decisions`."""
    refused = {reason: count for reason, count in decided.items() if reason and count}
    if refused:
        listed = ", ".join(f"{reason}: {count}" for reason, count in refused.items())
        raise RuntimeError(
            f"Admission refused {sum(refused.values())} requests ({listed}) and let {decided['']} in, and only a load that is "
            "let in whole is measured here; measure fewer streams, or on a faster machine."
        )
