"""promtool as the tests call it: built from the pinned module, like the cluster's programs."""

import subprocess
from functools import cache
from pathlib import Path

from e2e.cluster import binaries
from e2e.cluster.progress import Progress


@cache
def program() -> Path:
    return binaries.build([binaries.PROMETHEUS], progress=Progress(quiet=True))["promtool"]


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run it; standard error goes with standard output."""
    return subprocess.run(
        [program(), *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
