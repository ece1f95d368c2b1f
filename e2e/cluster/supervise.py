"""Starts daemons, restarts them when they end, stops them when told to: what systemd is on a real machine.

Two uses. As pid 1 of a machine (pid1.py), where it also reaps whatever is orphaned there. As the guard of a control
plane without namespaces (controlplane.py): `python -m e2e.cluster.supervise FOLDER` runs until its stdin closes, which
the kernel does when the process that started it ends in whatever way, and kills its daemons then.

It is told what to do by files, so that anyone who can write to the folder can, from either side of a namespace:

    control/NAME.down   the daemon must not run (killed with SIGKILL if it does)
    control/NAME.pid    it runs, with this pid as seen by the supervisor
    logs/NAME.log       its stdout and stderr, appended
"""

import ctypes
import json
import os
import select
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

TURN_SECONDS = 0.05
RESTART_SECONDS = 1.0
PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Daemon:
    """A program that should always run."""

    name: str
    command: tuple[str, ...]
    needs: tuple[str, ...] = ()
    """Files that must exist before it is first worth starting: a socket, or a flag that somebody sets."""


@dataclass(frozen=True)
class Plan:
    """Everything a supervisor is told at its start."""

    daemons: tuple[Daemon, ...]
    control: str
    logs: str
    environment: Mapping[str, str]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    @staticmethod
    def from_json(text: str) -> "Plan":
        raw = json.loads(text)
        daemons = (Daemon(d["name"], tuple(d["command"]), tuple(d["needs"])) for d in raw.pop("daemons"))
        return Plan(daemons=tuple(daemons), **raw)


class Supervisor:
    """Runs a plan's daemons; call `turn()` every TURN_SECONDS. One thread, as it forks."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._control, self._logs = Path(plan.control), Path(plan.logs)
        self._running: dict[int, Daemon] = {}
        self._not_before: dict[str, float] = {}
        for folder in (self._control, self._logs):
            folder.mkdir(parents=True, exist_ok=True)
        for stale in self._control.glob("*.pid"):
            stale.unlink()

    def turn(self) -> None:
        """Reap what ended, then start what should run and kill what should not."""
        self._reap()
        pids = {daemon.name: pid for pid, daemon in self._running.items()}
        for daemon in self._plan.daemons:
            stopped = (self._control / f"{daemon.name}.down").exists()
            if daemon.name in pids:
                if stopped:
                    os.kill(pids[daemon.name], signal.SIGKILL)
            elif not stopped and self._may_start(daemon):
                self._start(daemon)

    def stop(self) -> None:
        """Kill every daemon and wait for its end."""
        for pid in self._running:
            os.kill(pid, signal.SIGKILL)
        while self._running:
            self._reap()
            time.sleep(TURN_SECONDS / 10)

    def _may_start(self, daemon: Daemon) -> bool:
        due = time.monotonic() >= self._not_before.get(daemon.name, 0.0)
        return due and all(Path(path).exists() for path in daemon.needs)

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if daemon := self._running.pop(pid, None):
                (self._control / f"{daemon.name}.pid").unlink(missing_ok=True)
                self._not_before[daemon.name] = time.monotonic() + RESTART_SECONDS
                print(f"{time.strftime('%T')} {daemon.name} ended with wait status {status}", flush=True)

    def _start(self, daemon: Daemon) -> None:
        supervisor = os.getpid()
        pid = os.fork()
        if pid == 0:
            self._become(daemon, supervisor)
        self._running[pid] = daemon
        (self._control / f"{daemon.name}.pid").write_text(str(pid))

    def _become(self, daemon: Daemon, supervisor: int) -> None:
        """Run in the child: never returns."""
        try:
            die_with_parent(supervisor)
            os.setsid()
            log = os.open(self._logs / f"{daemon.name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            for target, source in ((0, os.open(os.devnull, os.O_RDONLY)), (1, log), (2, log)):
                os.dup2(source, target)
            os.execve(daemon.command[0], daemon.command, dict(self._plan.environment))  # noqa: S606 - no shell is wanted
        except OSError as error:
            print(f"{daemon.command[0]} cannot be started: {error}", file=sys.stderr, flush=True)
        finally:
            os._exit(127)


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent ends, also by SIGKILL.

    `parent` is its pid, noted before the fork: asked afterwards, a parent that ended meanwhile has been replaced already.
    Undone by fork, kept by exec. The parent must be single-threaded: it is the thread's end that counts.
    """
    if _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:
        os._exit(1)  # it ended before we asked


def main(arguments: Sequence[str]) -> None:
    """Run FOLDER/plan.json until stdin closes."""
    os.setsid()  # a Ctrl-C in the terminal is for the one who started us; it closes our stdin in good order
    supervisor = Supervisor(Plan.from_json(Path(arguments[0], "plan.json").read_text()))
    try:
        while True:
            supervisor.turn()
            readable, _, _ = select.select([0], [], [], TURN_SECONDS)
            if readable and not os.read(0, 1):
                return
    finally:
        supervisor.stop()


if __name__ == "__main__":
    main(sys.argv[1:])
