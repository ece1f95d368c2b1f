"""Curves of a recording, and the picture of them."""

from xml.etree import ElementTree as ET

import pytest

from bench.ring.drawing import Panel, moves, rates, svg


def test_rates_are_of_steps_of_at_least_so_long() -> None:
    counter = [(0.0, 0.0), (0.5, 5.0), (1.0, 10.0), (1.5, 10.0), (2.0, 30.0), (2.2, 31.0)]
    assert rates(counter, every=1.0) == [(0.5, 10.0), (1.5, 20.0)]


def test_a_counter_that_moves_in_jumps_has_a_steady_rate_from_jump_to_jump() -> None:
    jumps = [(step * 0.25, 9.0 * (step // 4)) for step in range(40)]
    assert moves(jumps)[:2] == [(1.0, 9.0), (2.0, 18.0)]
    assert {rate for _, rate in rates(moves(jumps), every=2.5)} == {9.0}
    assert len({rate for _, rate in rates(jumps, every=2.5)}) > 1, "from sample to sample it would not be steady"
    assert rates(moves([(0.0, 1.0), (1.0, 1.0)]), every=1.0) == []


def test_a_picture_has_a_curve_for_each_line_within_its_panel() -> None:
    panels = [
        Panel("load", {"rank 0": [(0.0, 0.5), (10.0, 1.0)], "rank <1>": [(0.0, 0.5), (10.0, 7.0)]}, top=1.0),
        Panel("sent", {"rank 0": [(5.0, 3.0)]}, top=6.0),
    ]
    root = ET.fromstring(svg(panels, seconds=10.0, marks={"first token": 4.0}))  # noqa: S314  (our own)
    lines = [element for element in root if element.tag.endswith("polyline")]
    assert [line.attrib["points"] for line in lines] == [
        "70.0,119.0 740.0,34.0",
        "70.0,119.0 740.0,34.0",
        "405.0,323.0",
    ]
    words = [element.text for element in root if element.tag.endswith("text")]
    assert {"load", "sent", "rank <1>", "first token", "10 s"} <= set(words)


def test_nothing_is_not_drawn() -> None:
    with pytest.raises(ValueError, match="nothing to draw"):
        svg([], seconds=1.0, marks={})
