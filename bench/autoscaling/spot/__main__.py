"""``python -m bench.autoscaling.spot``: one run on a cluster of its own (root)."""

import argparse
import signal
import sys
import time
from dataclasses import asdict, dataclass
from typing import Final

from bench import report
from bench.autoscaling.spot.figures import HEADER, Goals, Results, spell
from bench.cluster import with_kvplane
from e2e.cluster.cluster import Cluster
from e2e.cluster.progress import Progress
from e2e.stack import Images, Stack, prepare_images, prepare_machine
from e2e.tests import elastic, sidecar
from e2e.tests.client import address
from e2e.tests.fleet import reachable

NAMESPACE: Final = "bench-spot"
_NODES: Final = 2
_LONGEST_SECONDS: Final = 900.0
"""For a start, and for the way back: two windows of two starts each, and the five minutes of recent demand."""


@dataclass(frozen=True)
class Size:
    """How long things last that are not waited for."""

    light_seconds: float = 30.0
    """Before the step."""
    settle_seconds: float = 15.0
    """After the second replica is Ready, until callers have found it."""
    both_seconds: float = 90.0
    """The step on two replicas."""
    window_seconds: int = 20
    """scaleDownWindowSeconds: less than two starts, which are waited for anyway."""
    after_seconds: float = 5.0
    """After the pod has gone, for whoever was cut to notice."""


def measure(stack: Stack, cluster: Cluster, images: Images, size: Size, progress: Progress) -> Results:
    """The service is made, and scales itself twice."""
    service = elastic.service(NAMESPACE, images, replicas=1, minReplicas=1, scaleDownWindowSeconds=size.window_seconds)
    slo = service["spec"]["slo"]
    goals = Goals(slo["ttftMilliseconds"] / 1000, slo["tpotMilliseconds"] / 1000)
    stack.make_namespace(NAMESPACE)
    stack.apply(service)
    stack.wait_ready(NAMESPACE, elastic.NAME)
    reachable(stack, NAMESPACE, elastic.NAME)
    where = address(stack, NAMESPACE, elastic.NAME)
    with elastic.light_load(where) as light:
        with progress.step("a light load on one replica"):
            time.sleep(size.light_seconds)
        ip = sidecar.pod_ip(stack, NAMESPACE, elastic.NAME)
        with elastic.step_load(where) as step:
            with progress.step("a step of load: a second replica is asked for") as told:
                signal_to_ask = elastic.asked_after_overload(cluster, NAMESPACE, ip)
                asked = time.monotonic()
                told.detail = f"{signal_to_ask:.2f} s after the overload"
            with progress.step("… is Ready"):
                elastic.until(
                    lambda: elastic.ready(cluster, NAMESPACE) == 2,
                    "it was not Ready",
                    seconds=_LONGEST_SECONDS,
                    every=0.2,
                )
                ready = time.monotonic()
            with progress.step("the step on two replicas"):
                time.sleep(size.settle_seconds + size.both_seconds)
            over = time.monotonic()
        with progress.step("one replica is asked for"):
            elastic.until(
                lambda: elastic.asked(cluster, NAMESPACE) == 1, "two are still asked for", seconds=_LONGEST_SECONDS
            )
            lowered = time.monotonic()
        with progress.step("… the other pod is gone"):
            elastic.until(lambda: len(sidecar.pods(stack, NAMESPACE, elastic.NAME)) == 1, "there are two pods")
            gone = time.monotonic()
        time.sleep(size.after_seconds)
    return Results(
        signal_to_ask_seconds=signal_to_ask,
        ask_to_ready_seconds=ready - asked,
        alone=spell(step.answers, goals, begin=asked, end=ready),
        both=spell(step.answers, goals, begin=ready + size.settle_seconds, end=over),
        back_to_one_seconds=lowered - over,
        gone_seconds=gone - lowered,
        answers=step.done + light.done,
        refusals=len(step.refusals) + len(light.refusals),
        lost=[*step.lost, *light.lost],
        events=elastic.events(stack, NAMESPACE),
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.autoscaling.spot", description=__doc__)
    parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the cluster goes
    size, started, machine, progress = Size(), report.now(), report.machine(), Progress()
    prepare_machine(progress)
    images = prepare_images(progress)
    values = {"replicas": "1"}
    with with_kvplane("spot", nodes=_NODES, images=images, values=values, progress=progress) as (cluster, stack):
        results = measure(stack, cluster, images, size, progress)
    for reason, message in results.events:
        progress.say(f"{reason}: {message}")
    written = report.Report(
        bench="autoscaling-spot",
        machine=machine,
        started=started,
        settings=asdict(size),
        header=HEADER,
        rows=results.rows(),
        last_line=results.last_line(),
        samples=asdict(results),
    )
    progress.say(f"written: {written.write()}")
    print(written.text())


if __name__ == "__main__":
    main()
