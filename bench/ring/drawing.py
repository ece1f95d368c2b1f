"""Curves over time as SVG, for the documentation. Pure; the same values give the same bytes."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

Points = Sequence[tuple[float, float]]
"""(seconds, value), ascending."""

WIDTH: Final = 760
PANEL: Final = 170
LEFT: Final = 70
RIGHT: Final = 20
TOP: Final = 34
COLOURS: Final = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
"""Okabe and Ito's, which the colour-blind tell apart."""


@dataclass(frozen=True)
class Panel:
    """One chart of several above each other; they share the time."""

    title: str
    lines: Mapping[str, Points]
    top: float
    """Value at the upper edge; the lower one is 0."""


def rates(counter: Points, *, every: float) -> list[tuple[float, float]]:
    """How fast a counter grew, over steps of at least ``every`` seconds; the time is the middle of each."""
    found = []
    points = iter(counter)
    began, before = next(points, (0.0, 0.0))
    for at, value in points:
        if at - began >= every:
            found.append(((at + began) / 2, (value - before) / (at - began)))
            began, before = at, value
    return found


def moves(counter: Points) -> list[tuple[float, float]]:
    """The points at which a counter was seen to have moved, for one that moves in jumps."""
    return [later for earlier, later in itertools.pairwise(counter) if later[1] != earlier[1]]


def svg(panels: Sequence[Panel], *, seconds: float, marks: Mapping[str, float]) -> str:
    """The panels, with a vertical line and a name at each of ``marks`` (seconds); raises ValueError for no panels."""
    if not panels:
        raise ValueError("There is nothing to draw: give at least one panel.")
    height = TOP + len(panels) * (PANEL + TOP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
    ]
    for number, panel in enumerate(panels):
        parts += _panel(panel, TOP + number * (PANEL + TOP), seconds=seconds, marks=marks if number == 0 else {})
        parts += [_mark(at, TOP + number * (PANEL + TOP), seconds) for at in marks.values()]
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{height - 8}" text-anchor="end" fill="#444444">{seconds:.0f} s</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(panel: Panel, top: int, *, seconds: float, marks: Mapping[str, float]) -> list[str]:
    bottom = top + PANEL
    parts = [
        f'<text x="{LEFT}" y="{top - 8}" font-weight="bold">{_escaped(panel.title)}</text>',
        f'<path d="M{LEFT} {top}V{bottom}H{WIDTH - RIGHT}" fill="none" stroke="#444444"/>',
    ]
    for share in (0.0, 0.5, 1.0):
        y = bottom - share * PANEL
        parts.append(
            f'<text x="{LEFT - 6}" y="{y + 4:.0f}" text-anchor="end" fill="#444444">{share * panel.top:.3g}</text>'
        )
    for name, at in marks.items():
        x = _x(at, seconds)
        parts.append(f'<text x="{x + 4:.1f}" y="{top + 12}" fill="#444444">{_escaped(name)}</text>')
    for place, (name, points) in enumerate(panel.lines.items()):
        colour = COLOURS[place % len(COLOURS)]
        path = " ".join(
            f"{_x(at, seconds):.1f},{bottom - min(1.0, value / panel.top) * PANEL:.1f}" for at, value in points
        )
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        parts.append(
            f'<text x="{WIDTH - RIGHT - 70 * (len(panel.lines) - 1 - place)}" y="{top - 8}" text-anchor="end" '
            f'fill="{colour}">{_escaped(name)}</text>'
        )
    return parts


def _mark(at: float, top: int, seconds: float) -> str:
    x = _x(at, seconds)
    return f'<line x1="{x:.1f}" y1="{top}" x2="{x:.1f}" y2="{top + PANEL}" stroke="#999999" stroke-dasharray="4 3"/>'


def _x(at: float, seconds: float) -> float:
    return LEFT + (WIDTH - LEFT - RIGHT) * at / seconds


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")
