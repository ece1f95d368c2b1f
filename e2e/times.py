"""What the tests measured, told where it happens and once more at the end of the run: pytest shows nothing of tests that pass."""

from typing import Final

from e2e.cluster.progress import Progress

PROGRESS: Final = Progress()
TOLD: Final[list[str]] = []


def tell(line: str) -> None:
    """A line for whoever reads the run."""
    TOLD.append(line)
    PROGRESS.say(line)
