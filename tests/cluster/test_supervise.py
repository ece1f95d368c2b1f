import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from e2e.cluster.supervise import Daemon, Plan

REPOSITORY = Path(__file__).resolve().parents[2]


def eventually(what: str, ready: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not ready():
        assert time.monotonic() < end, what
        time.sleep(0.01)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


class Guard:
    """A supervisor of `daemons` in a process of its own."""

    def __init__(self, folder: Path, *daemons: Daemon) -> None:
        self.control, self.logs = folder / "control", folder / "logs"
        plan = Plan(daemons, str(self.control), str(self.logs), {"PATH": os.defpath, "WORD": "hello"})
        (folder / "plan.json").write_text(plan.to_json())
        self.process = subprocess.Popen(
            [sys.executable, "-S", "-m", "e2e.cluster.supervise", str(folder)], cwd=REPOSITORY, stdin=subprocess.PIPE
        )

    def pid(self, name: str) -> int:
        """Read once: between two lives the file is gone, and at the beginning of one it is empty."""
        text = ""

        def runs() -> bool:
            nonlocal text
            with contextlib.suppress(FileNotFoundError):
                text = (self.control / f"{name}.pid").read_text()
            return text != ""

        eventually(f"{name} runs", runs)
        return int(text)

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait(timeout=60)


@pytest.fixture
def guards() -> Iterator[list[Guard]]:
    started: list[Guard] = []
    yield started
    for guard in started:
        guard.close()


def sleeper(name: str, *needs: str) -> Daemon:
    return Daemon(name, ("/bin/sleep", "1000"), needs)


def test_plans_survive_being_written_down() -> None:
    plan = Plan((sleeper("a", "/x"), sleeper("b")), "/control", "/logs", {"PATH": "/bin"})
    assert Plan.from_json(plan.to_json()) == plan


def test_daemons_log_and_get_the_plans_environment(tmp_path: Path, guards: list[Guard]) -> None:
    guards.append(Guard(tmp_path, Daemon("talker", ("/bin/sh", "-c", "echo $WORD; echo oh >&2; exec sleep 1000"))))
    log = tmp_path / "logs" / "talker.log"
    eventually("it has spoken", lambda: log.exists() and log.read_text() == "hello\noh\n")


def test_a_killed_daemon_is_restarted(tmp_path: Path, guards: list[Guard]) -> None:
    guards.append(guard := Guard(tmp_path, sleeper("a")))
    first = guard.pid("a")
    os.kill(first, signal.SIGKILL)
    eventually("it has another pid", lambda: guard.pid("a") != first)


def test_a_daemon_starts_when_what_it_needs_is_there(tmp_path: Path, guards: list[Guard]) -> None:
    guards.append(guard := Guard(tmp_path, sleeper("first"), sleeper("second", str(tmp_path / "flag"))))
    guard.pid("first")
    assert not (guard.control / "second.pid").exists()
    (tmp_path / "flag").touch()
    guard.pid("second")


def test_a_stopped_daemon_stays_down_until_it_is_let_go(tmp_path: Path, guards: list[Guard]) -> None:
    guards.append(guard := Guard(tmp_path, sleeper("a")))
    first = guard.pid("a")
    (guard.control / "a.down").touch()
    eventually("it is gone", lambda: not (guard.control / "a.pid").exists())
    assert not alive(first)
    (guard.control / "a.down").unlink()
    assert guard.pid("a") != first


def test_nothing_is_left_when_the_owner_closes_the_pipe(tmp_path: Path) -> None:
    guard = Guard(tmp_path, sleeper("a"))
    pid = guard.pid("a")
    guard.close()
    assert not alive(pid)


def test_nothing_is_left_when_the_guard_itself_is_killed(tmp_path: Path) -> None:
    guard = Guard(tmp_path, sleeper("a"))
    pid = guard.pid("a")
    guard.process.kill()
    guard.process.wait()
    assert guard.process.stdin
    guard.process.stdin.close()
    eventually("the daemon died with it", lambda: not alive(pid))


def test_a_program_that_is_not_there_is_logged(tmp_path: Path, guards: list[Guard]) -> None:
    guards.append(Guard(tmp_path, Daemon("ghost", ("/nonexistent",))))
    log = tmp_path / "logs" / "ghost.log"
    eventually("it says so", lambda: log.exists() and "/nonexistent cannot be started" in log.read_text())
