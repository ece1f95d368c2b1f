"""The benchmark of the scaling operator: what its pods tell, and how it sums up what it measured."""

import math
from collections import Counter
from dataclasses import replace

import aiohttp
import pytest

from bench import report
from bench.operator.autoscaled import figures, fleet
from bench.operator.autoscaled.__main__ import Decisions, Fleet, Scrapes, Size
from bench.operator.autoscaled.figures import Outcome, Window
from bench.operator.autoscaled.sidecars import Load, Sidecars, state_of
from bench.operator.requests import Requests
from kvplane_api.service import LLMServiceSpec
from kvplane_api.wire import SidecarState
from kvplane_operator.autoscaler import document
from kvplane_operator.autoscaler.history import fresh
from kvplane_operator.autoscaler.law import decide
from kvplane_operator.autoscaler.series import BUCKETS, MINUTES
from kvplane_operator.autoscaler.settings import Settings, Tuning
from kvplane_operator.autoscaler.signals import Replica, Signals, read
from kvplane_operator.autoscaler.startup import SAMPLES


def desired(load: Load) -> int:
    """What the law makes of two pods with this load."""
    readings = {name: read(state_of(name, load, seconds=60.0), pod=name, at=60.0) for name in ("a", "b")}
    assert None not in readings.values()
    replicas = tuple(Replica(name=name, created_at=0.0, ready=True, reading=each) for name, each in readings.items())
    decision = decide(
        Signals(asked=2, replicas=replicas), fresh(Tuning()), Settings(min_replicas=2, max_replicas=8), 60.0
    )
    return decision.desired


class TestPods:
    def test_only_an_overload_asks_for_more(self) -> None:
        assert (desired(Load.QUIET), desired(Load.BUSY)) == (2, 2)
        assert desired(Load.OVERLOADED) > 2

    def test_a_quiet_pod_does_nothing_and_a_busy_one_goes_on(self) -> None:
        quiet, busy = ([state_of("a", load, seconds=s) for s in (10.0, 20.0)] for load in (Load.QUIET, Load.BUSY))
        assert quiet[0] == quiet[1]
        totals = [state.engine.generation_tokens_total for state in busy]
        assert totals == [4000, 8000]

    def test_the_services_are_valid(self) -> None:
        spec = LLMServiceSpec.parse(fleet.service("svc-1", replicas=2)["spec"])
        assert spec.autoscaling is not None
        assert (spec.autoscaling.policy, spec.autoscaling.min_replicas) == ("Native", 2)

    def test_what_was_learned_is_as_much_as_is_ever_kept(self) -> None:
        state = fleet.state("svc-1", uid="u1", now=1_700_000_000.0)
        assert state["metadata"]["ownerReferences"][0]["uid"] == "u1"
        assert len(state["data"]["state.json"]) <= document.MOST_BYTES
        history = document.load(state["data"]["state.json"], Tuning())
        assert (len(history.series.minutes), len(history.series.buckets)) == (MINUTES, BUCKETS)
        assert (len(history.starts.cached), len(history.starts.pulled)) == (SAMPLES, SAMPLES)
        assert history.series.highest(since=0.0) < 0.7  # which one replica serves, and there are two

    def test_addresses_differ(self) -> None:
        found = Fleet(Size(services=600, pods_each=2, busy=7))
        everything = found.of(found.names)
        assert len(set(everything)) == len(everything) == 1200
        assert len(found.busy) == 7
        assert len(found.quiet) == 593


async def test_each_address_answers_for_its_pod() -> None:
    sidecars = Sidecars({"10.77.0.1": ("svc-0-0", Load.QUIET), "10.77.0.2": ("svc-0-1", Load.BUSY)})
    async with sidecars.serving() as url, aiohttp.ClientSession() as session:

        async def ask(ip: str) -> SidecarState | int:
            async with session.get(f"{url}/{ip}/state") as response:
                return SidecarState.model_validate_json(await response.read()) if response.ok else response.status

        quiet = await ask("10.77.0.1")
        assert isinstance(quiet, SidecarState)
        assert (quiet.pod, quiet.engine.requests_running) == ("svc-0-0", 0)
        assert not sidecars.all_read()
        await ask("10.77.0.2")
        assert sidecars.all_read()
        sidecars.tell("10.77.0.1", Load.OVERLOADED)
        loaded = await ask("10.77.0.1")
        assert isinstance(loaded, SidecarState)
        assert loaded.engine.requests_running == 20
        assert await ask("10.77.9.9") == 404
    assert len(sidecars.gaps(["10.77.0.1"])) == 1
    assert sidecars.gaps(["10.77.0.2"]) == []
    sidecars.forget()
    assert sidecars.gaps(["10.77.0.1"]) == []


async def test_an_overload_does_not_bring_the_requests_of_the_quiet_time_before_it() -> None:
    sidecars = Sidecars({"10.77.0.1": ("svc-0-0", Load.QUIET), "10.77.0.2": ("svc-1-0", Load.BUSY)})
    for ip in ("10.77.0.1", "10.77.0.2"):
        sidecars._since[ip] -= 100.0
        sidecars.tell(ip, Load.OVERLOADED)
    async with sidecars.serving() as url, aiohttp.ClientSession() as session:
        admitted = []
        for ip in ("10.77.0.1", "10.77.0.2"):
            async with session.get(f"{url}/{ip}/state") as response:
                state = SidecarState.model_validate_json(await response.read())
            assert state.admission is not None
            admitted.append(state.admission.admitted_total)
    assert admitted[0] < 100
    assert admitted[1] >= 200


def test_the_first_sight_of_more_replicas_is_the_decision() -> None:
    decisions = Decisions(2)

    def event(kind: str, name: str, replicas: int) -> dict[str, object]:
        return {"type": kind, "object": {"metadata": {"name": name}, "spec": {"replicas": replicas}}}

    for kind, name, replicas, moment in (
        ("ADDED", "a", 2, 1.0),
        ("MODIFIED", "a", 4, 2.0),
        ("MODIFIED", "a", 5, 3.0),
        ("DELETED", "b", 9, 4.0),
    ):
        decisions.notice(event(kind, name, replicas), moment)
    assert decisions.moments == {"a": 2.0}


async def test_a_scrape_that_fails_is_counted_and_ends_nothing() -> None:
    sidecars = Sidecars({"10.77.0.1": ("svc-0-0", Load.QUIET)})
    async with sidecars.serving() as url:
        scrapes = Scrapes(f"{url}/10.77.0.1/state")
        assert "svc-0-0" in await scrapes.text()
        assert (scrapes.made, scrapes.failed) == (1, 0)
    assert await scrapes.text() == ""
    assert (scrapes.made, scrapes.failed) == (2, 1)


EXPOSITION = """\
# TYPE kvplane_autoscaler_round_seconds histogram
kvplane_autoscaler_round_seconds_bucket{le="0.01"} 50.0
kvplane_autoscaler_round_seconds_bucket{le="0.1"} 90.0
kvplane_autoscaler_round_seconds_bucket{le="+Inf"} 100.0
kvplane_autoscaler_round_seconds_count 100.0
kvplane_autoscaler_round_seconds_sum 3.0
# TYPE kvplane_autoscaler_decision_seconds histogram
kvplane_autoscaler_decision_seconds_bucket{le="+Inf"} 7.0
kvplane_autoscaler_decision_seconds_count 7.0
kvplane_autoscaler_decision_seconds_sum 3.0
"""


class TestQuantiles:
    COUNTS = figures.buckets(EXPOSITION)

    def test_only_the_one_histogram_is_read(self) -> None:
        assert dict(self.COUNTS) == {0.01: 50.0, 0.1: 90.0, math.inf: 100.0}

    @pytest.mark.parametrize(("q", "seconds"), [(0.25, 0.005), (0.5, 0.01), (0.7, 0.055), (0.99, 0.1)])
    def test_within_a_bucket_by_a_line(self, q: float, seconds: float) -> None:
        """Beyond the last bound nothing is known, so that bound stands for it."""
        assert figures.quantile(self.COUNTS, q) == pytest.approx(seconds)

    def test_a_window_is_a_difference(self) -> None:
        before = {0.01: 50.0, 0.1: 50.0, math.inf: 50.0}
        assert figures.since(self.COUNTS, before) == {0.01: 0.0, 0.1: 40.0, math.inf: 50.0}

    def test_of_a_window_that_was_seen_at_one_end_only_nothing_is_known(self) -> None:
        assert figures.since(self.COUNTS, figures.buckets("")) == {}
        assert figures.since(figures.buckets(""), self.COUNTS) == {}

    def test_a_decision_that_came_before_the_overload_is_not_of_it(self) -> None:
        told = {"a": 10.0, "b": 11.0, "c": 12.0}
        assert figures.waited(told, {"a": 12.5, "b": 10.5}) == {"a": 2.5, "b": math.inf, "c": math.inf}

    def test_nothing_counted_is_not_known(self) -> None:
        assert math.isnan(figures.quantile({}, 0.5))
        assert math.isnan(figures.quantile({math.inf: 0.0}, 0.5))


class TestTold:
    OUTCOME = Outcome(
        services=1000,
        pods=2000,
        window=Window(
            seconds=100.0,
            requests=Requests(Counter({("PUT", "leases"): 40, ("APPLY", "configmaps"): 100})),
            noise_per_second=0.4,
            rss_mb=321.0,
            cpu_cores=0.5,
            rounds=figures.buckets(EXPOSITION),
            busy_gaps=(5.0, 5.1),
            quiet_gaps=(15.0,),
        ),
        busy=(1.0, 4.0, 2.0),
        quiet=(9.0, 3.0),
        undecided=(),
        scrapes=24,
        scrapes_failed=1,
    )

    def test_the_last_line(self) -> None:
        line = figures.last_line(self.OUTCOME)
        assert list(line) == ["busy_decided_s", "all_decided_s", "cpu_cores", "rss_mb", "requests_per_s"]
        assert (line["busy_decided_s"], line["all_decided_s"]) == (4.0, 9.0)
        assert line["requests_per_s"] == pytest.approx(1.0)

    def test_a_busy_service_may_be_the_last(self) -> None:
        assert figures.last_line(replace(self.OUTCOME, busy=(11.0,)))["all_decided_s"] == 11.0

    def test_rows(self) -> None:
        told = dict(figures.rows(self.OUTCOME))
        assert told["services / pods"] == "1,000 / 2,000"
        assert told["… most of them"] == "APPLY configmaps 1.00/s, PUT leases 0.40/s"
        assert told["tick: p50 / p99, ms"] == "10.0 / 100"
        assert told["overload → Deployment, busy: median / p99 / most, s"] == "2.00 / 4.00 / 4.00"
        assert told["… without a decision"] == "0 of 5"
        assert told["scrapes that failed"] == "1 of 24"

    def test_a_service_without_a_decision_leaves_its_figures_unknown_and_is_counted(self) -> None:
        outcome = replace(self.OUTCOME, quiet=(9.0, math.inf), undecided=("svc-7",))
        told = dict(figures.rows(outcome))
        assert told["overload → Deployment, quiet before: median / p99 / most, s"] == "none / none / none"
        assert told["… without a decision"] == "1 of 5"
        assert "busy_decided_s=4.00 all_decided_s=none" in report.last_line("x", figures.last_line(outcome))
