"""The life of a request through the gates."""

from tests.admission.world import World, configuration


def test_an_idle_engine_lets_a_request_in_at_once() -> None:
    world = World()
    world.scrape()
    assert world.offer().admitted_at == world.now


def test_a_promise_that_a_lone_request_breaks_does_not_make_the_engine_serve_one_at_a_time() -> None:
    world = World(config=configuration(slo={"ttftMilliseconds": 60_000, "tpotMilliseconds": 50}))
    world.scrape()
    pair = [world.offer(max_output_tokens=60) for _ in range(2)]
    for _ in range(60):  # together 0.12 s a token
        for entry in pair:
            world.run(entry, 1, seconds_per_token=0.06)
        world.decide()
    for entry in pair:
        world.finish(entry, 60)
    alone = world.offer(max_output_tokens=60)
    for _ in range(60):
        world.run(alone, 1, seconds_per_token=0.1)
        world.decide()
    world.finish(alone, 60)
    together = [world.offer(max_output_tokens=60) for _ in range(3)]
    assert sum(entry.admitted_at is not None for entry in together) > 1
