"""Controllers as processes: weighed while they run, reported with their log when they end by themselves."""

import sys
import time
from pathlib import Path

import pytest

from bench.operator.process import Process


def test_a_running_process_is_weighed_and_killed(tmp_path: Path) -> None:
    log = tmp_path / "log"
    process = Process([sys.executable, "-c", "import time; print('up', flush=True); time.sleep(60)"], {}, log=log)
    process.start()
    try:
        end = time.monotonic() + 30
        while not log.read_text():  # before it runs, it may weigh nothing
            assert time.monotonic() < end
            time.sleep(0.01)
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
