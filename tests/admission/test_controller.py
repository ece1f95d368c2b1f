"""The life of a request through the gates."""

from tests.admission.world import World


def test_an_idle_engine_lets_a_request_in_at_once() -> None:
    world = World()
    world.scrape()
    assert world.offer().admitted_at == world.now
