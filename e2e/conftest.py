"""What the end-to-end tests measured is shown once more after all of them."""

import pytest

from e2e.times import TOLD


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """A line for each."""
    if TOLD:
        terminalreporter.section("measured")
        for line in TOLD:
            terminalreporter.write_line(line)
