"""From kills to the recovery benchmark's table and last line; and what is made for LeaderWorkerSet."""

from dataclasses import replace
from typing import Any

import pytest

from bench import report
from bench.ring_recovery import ours, theirs
from bench.ring_recovery.figures import Fault, Rank0, Results, spread
from e2e.stack import Images

OURS = Fault(0.8, 14.0, 1.01, pods_recreated=0, went_on=True, equal=True)
THEIRS = Fault(21.0, 22.0, 4.0, pods_recreated=4, went_on=False, equal=True)
IMAGES = Images(control="control:1", engine="engine:1", model="model:1", ring="ring:1")
LEADER = Rank0(12.5, 12.0, 1.05, equal=True)
RESULTS = Results(
    ranks=4,
    peer="LeaderWorkerSet-v1",
    ours=[OURS, replace(OURS, next_token_seconds=1.2), replace(OURS, next_token_seconds=0.7)],
    rank_0=[LEADER],
    theirs=[THEIRS],
)


def test_the_last_line_has_the_figures_that_scripts_expect_in_their_order() -> None:
    assert report.last_line("ring-recovery", RESULTS.last_line()) == (
        "bench ring-recovery: next_token_s=0.80 rank0_next_token_s=12.5 back_to_n_s=14.0 recomputed_share_times_n=1.01 "
        "tokens_equal=yes pods_recreated=0 lws_next_token_s=21.0 lws_pods_recreated=4"
    )


@pytest.mark.parametrize("wrong", ["ours", "rank_0", "theirs"])
def test_one_wrong_answer_is_told(wrong: str) -> None:
    results = replace(RESULTS, **{wrong: [replace(getattr(RESULTS, wrong)[0], equal=False)]})
    assert results.last_line()["tokens_equal"] == "no"


def test_an_answer_that_never_came_is_no_figure() -> None:
    never = replace(RESULTS, theirs=[replace(THEIRS, next_token_seconds=float("inf"), equal=False)])
    assert "lws_next_token_s=none" in report.last_line("ring-recovery", never.last_line())


def test_rows_have_both_contestants() -> None:
    rows = {row[0]: row[1:] for row in RESULTS.rows()}
    assert all(len(row) == len(RESULTS.header()) for row in RESULTS.rows())
    assert rows["kill -9 of a rank of 4 → next token, s"] == ("0.80 (0.70 to 1.20)", "21.0")
    assert rows["… streams that went on"] == ("3 of 3", "0 of 1")
    assert rows["… pods made anew"] == ("0 of 4", "4 of 4")
    assert rows["answers equal to the unsharded model's"] == ("4 of 4", "1 of 1")
    assert report.table(RESULTS.header(), RESULTS.rows())


def test_a_single_value_has_no_spread() -> None:
    assert spread([2.0]) == "2.00"


def test_a_value_that_is_not_known_is_left_out() -> None:
    assert spread([1.0, float("nan"), 3.0, 4.0]) == "3.00 (1.00 to 4.00)"
    assert spread([float("nan"), 4.0]) == "4.00"
    assert spread([float("nan")]) == "none"


def test_the_budget_bears_every_kill() -> None:
    recovery = ours.service(IMAGES, ranks=4, rounds=5)["spec"]["ring"]["recovery"]
    assert recovery["restartBudget"] == 10


def test_the_group_runs_the_engine_of_our_rings() -> None:
    wanted = theirs.manifest(IMAGES, ranks=4)
    template = wanted["spec"]["leaderWorkerTemplate"]
    assert (template["size"], template["restartPolicy"]) == (4, "RecreateGroupOnPodRestart")
    (container,) = template["workerTemplate"]["spec"]["containers"]
    assert container["image"] == "ring:1"
    variables = {variable["name"]: variable.get("value") for variable in container["env"]}
    assert variables["WORLD_SIZE"] == "4"
    assert variables["KVPLANE_RING_LEADER"] == "peer-0.peer.bench-lws"


def test_webhooks_lead_to_the_host_and_see_their_own_pods_only() -> None:
    def hook(name: str, resource: str) -> dict[str, Any]:
        return {
            "name": name,
            "clientConfig": {"service": {"name": "webhook-service", "namespace": "system", "path": f"/{name}"}},
            "rules": [{"resources": [resource]}],
        }

    document = {
        "apiVersion": "admissionregistration.k8s.io/v1",
        "kind": "MutatingWebhookConfiguration",
        "metadata": {"name": "mutating"},
        "webhooks": [hook("sets", "leaderworkersets"), hook("pods", "pods")],
    }
    (found,) = theirs.webhooks([document], url="https://10.0.0.1:9443", authority="Q0E=")
    assert found["metadata"] == {"name": "lws-mutating"}
    sets, pods = found["webhooks"]
    assert sets["clientConfig"] == {"url": "https://10.0.0.1:9443/sets", "caBundle": "Q0E="}
    assert "objectSelector" not in sets
    (selected,) = pods["objectSelector"]["matchExpressions"]
    assert selected == {"key": "leaderworkerset.sigs.k8s.io/name", "operator": "Exists"}
