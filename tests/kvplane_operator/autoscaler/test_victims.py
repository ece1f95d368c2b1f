"""Who goes first."""

from kvplane_operator.autoscaler.victims import deletion_costs, order
from tests.kvplane_operator.autoscaler.world import START, reading, replica


def test_first_what_does_not_serve_then_the_emptiest_last_the_unread() -> None:
    replicas = (
        replica("unread"),
        replica("full", reading=reading(0.9)),
        replica("queues", reading=reading(0.1, 0.5)),
        replica("empty", reading=reading(0.2)),
        replica("starts", ready=False),
        replica("cannot start", ready=False, refused=True),
    )
    assert order(replicas) == ("cannot start", "starts", "empty", "queues", "full", "unread")


def test_of_equals_the_youngest_has_the_coldest_cache() -> None:
    replicas = (
        replica("old", created_at=START - 900, reading=reading(0.5)),
        replica("young", created_at=START - 60, reading=reading(0.5)),
        replica("older", created_at=START - 999, reading=reading(0.5)),
    )
    assert order(replicas) == ("young", "old", "older")


def test_what_goes_already_is_not_chosen_again() -> None:
    assert order((replica("goes", draining=True), replica("stays", reading=reading()))) == ("stays",)


def test_costs_are_below_0_for_those_that_are_to_go_and_rise_in_that_order() -> None:
    loads = {"full": 0.9, "empty": 0.1, "half": 0.5}
    replicas = tuple(replica(name, reading=reading(load)) for name, load in loads.items())
    assert deletion_costs(replicas, going=2) == {"empty": -2, "half": -1, "full": 0}
    assert set(deletion_costs(replicas, going=0).values()) == {0}
