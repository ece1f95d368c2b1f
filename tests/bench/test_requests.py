"""Requests as the API server counts them."""

from bench.operator import requests

BEFORE = """\
# TYPE apiserver_request_total counter
apiserver_request_total{code="200",group="coordination.k8s.io",resource="leases",subresource="",verb="PUT"} 10
apiserver_request_total{code="409",group="coordination.k8s.io",resource="leases",subresource="",verb="PUT"} 1
apiserver_request_total{code="200",group="",resource="",subresource="readyz",verb="GET"} 7
apiserver_request_duration_seconds_count{resource="leases",verb="PUT"} 99
"""
AFTER = """\
apiserver_request_total{code="200",group="coordination.k8s.io",resource="leases",subresource="",verb="PUT"} 34
apiserver_request_total{code="409",group="coordination.k8s.io",resource="leases",subresource="",verb="PUT"} 1
apiserver_request_total{code="200",group="",resource="",subresource="readyz",verb="GET"} 7
apiserver_request_total{code="201",group="apps",resource="deployments",subresource="",verb="APPLY"} 1.2e+03
apiserver_request_total{code="200",group="kvplane.dev",resource="llmservices",subresource="status",verb="PATCH"} 5
"""


def test_only_the_one_counter_is_read_and_codes_are_added_up() -> None:
    assert dict(requests.parse(BEFORE).counts) == {("PUT", "leases"): 11, ("GET", "/readyz"): 7}


def test_a_window_is_the_difference_of_two_readings() -> None:
    window = requests.parse(AFTER).since(requests.parse(BEFORE))
    assert window.by_kind() == {"APPLY deployments": 1200, "PUT leases": 24, "PATCH llmservices/status": 5}
    assert window.total() == 1229


def test_the_renewal_of_leases_does_not_count_as_work() -> None:
    window = requests.parse(AFTER).since(requests.parse(BEFORE))
    assert window.writes() == 1205
