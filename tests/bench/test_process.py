"""Controllers as processes: weighed while they run, reported with their log when they end by themselves."""

import sys
from pathlib import Path

import pytest

from bench.operator.process import Process


def test_a_running_process_is_weighed_and_killed(tmp_path: Path) -> None:
    process = Process([sys.executable, "-c", "import time; time.sleep(60)"], {}, log=tmp_path / "log")
    process.start()
    try:
        assert 0 < process.rss_mb() < 200
        assert process.cpu_seconds() >= 0
    finally:
        process.kill()
    with pytest.raises(RuntimeError, match="ended by itself"):
        process.check()
    process.kill()  # twice is fine


def test_an_end_of_its_own_is_an_error_with_the_end_of_the_log(tmp_path: Path) -> None:
    process = Process(
        [sys.executable, "-c", "import os; raise SystemExit(os.environ['WHY'])"], {}, log=tmp_path / "log"
    )
    process.start(WHY="no certificate")
    try:
        with pytest.raises(RuntimeError, match="no certificate"):
            while True:
                process.check()
    finally:
        process.kill()
