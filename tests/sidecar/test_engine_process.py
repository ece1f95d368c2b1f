"""Which process is taken for the engine. That killing it ends the container is shown by e2e/tests/test_drain.py."""

import logging
import signal
from pathlib import Path

import pytest

from kvplane_runtime.sidecar.engine_process import end_engine

ENGINE = "/venv/bin/python /venv/bin/vllm serve /models --host 127.0.0.1 --port 8100 --dtype float32"


class Namespace:
    """A /proc of a few processes, and the signals that they were sent."""

    def __init__(self, proc: Path) -> None:
        self.proc = proc
        self.sent: list[tuple[int, int]] = []
        (proc / "self").mkdir()
        (proc / "meminfo").touch()

    def has(self, pid: int, command: str, *, parent: int = 0) -> None:
        folder = self.proc / str(pid)
        folder.mkdir()
        (folder / "cmdline").write_bytes(b"".join(word.encode() + b"\0" for word in command.split()))
        (folder / "status").write_text(f"Name:\tx\nPid:\t{pid}\nPPid:\t{parent}\nUid:\t1000\n")

    def end_engine(self) -> None:
        end_engine(port=8100, proc=self.proc, kill=lambda pid, number: self.sent.append((pid, number)))


@pytest.fixture
def namespace(tmp_path: Path) -> Namespace:
    namespace = Namespace(tmp_path)
    namespace.has(1, "/pause")
    namespace.has(7, "kvplane-sidecar")
    return namespace


def test_the_first_process_of_the_engines_container(namespace: Namespace) -> None:
    namespace.has(19, ENGINE)
    namespace.has(34, "VLLM::EngineCore", parent=19)
    namespace.has(35, ENGINE, parent=19)
    namespace.end_engine()
    assert namespace.sent == [(19, signal.SIGKILL)]


@pytest.mark.parametrize("command", ["nginx --port 8080", "client --port 81000", "worker 8100 --port", "x --port=8100"])
def test_no_other_container(namespace: Namespace, command: str) -> None:
    namespace.has(19, command)
    namespace.end_engine()
    assert namespace.sent == []


def test_never_process_1(tmp_path: Path) -> None:
    """Pods of before, whose containers have namespaces of their own: process 1 is whoever looks."""
    namespace = Namespace(tmp_path)
    namespace.has(1, ENGINE)
    namespace.end_engine()
    assert namespace.sent == []


def test_a_process_that_goes_meanwhile(namespace: Namespace) -> None:
    (namespace.proc / "19").mkdir()
    namespace.end_engine()
    assert namespace.sent == []


def test_one_of_another_user_is_left_to_its_grace(namespace: Namespace, caplog: pytest.LogCaptureFixture) -> None:
    namespace.has(19, ENGINE)

    def refused(pid: int, number: int) -> None:
        del pid, number
        raise PermissionError(1, "Operation not permitted")

    with caplog.at_level(logging.WARNING):
        end_engine(port=8100, proc=namespace.proc, kill=refused)
    assert "process 19, could not be ended while it loads: [Errno 1] Operation not permitted." in caplog.text
