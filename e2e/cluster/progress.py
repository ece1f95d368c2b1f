"""One line per step, with its seconds, on stderr; a sign of life while a long step runs.

stdout stays free for what a shell may want to evaluate (`export KUBECONFIG=…`). On a terminal the running step is
redrawn twice a second; elsewhere (CI logs) it prints a line every 15 seconds, so that a cold build of many minutes is
never silent.
"""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

REDRAW_SECONDS = 0.5
REPEAT_SECONDS = 15.0


class Step:
    """The step that is running; set `detail` to say how far it is."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.detail = ""

    def __str__(self) -> str:
        return f"{self.what}: {self.detail}" if self.detail else self.what


class Progress:
    """Prints steps to `stream`; `clock` gives seconds. `quiet` prints nothing (for tests that start many clusters)."""

    def __init__(
        self,
        *,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
        quiet: bool = False,
    ) -> None:
        self._stream = stream or sys.stderr
        self._clock = clock
        self._quiet = quiet
        self._terminal = self._stream.isatty()
        self._start = clock()

    def say(self, line: str) -> None:
        if not self._quiet:
            print(line, file=self._stream, flush=True)

    def seconds(self) -> float:
        """Seconds since this progress began."""
        return self._clock() - self._start

    @contextmanager
    def step(self, what: str) -> Iterator[Step]:
        """Time the body; print `seconds  what: detail` when it ends, and a sign of life before where it is long."""
        step, begin, done = Step(what), self._clock(), threading.Event()
        ticker = threading.Thread(target=self._tick, args=(step, begin, done), daemon=True)
        if not self._quiet:
            ticker.start()
        failed = True
        try:
            yield step
            failed = False
        finally:
            done.set()
            if not self._quiet:
                ticker.join()
            self._clear()
            self.say(f"{self._clock() - begin:7.1f} s  {step}{'  FAILED' if failed else ''}")

    def _tick(self, step: Step, begin: float, done: threading.Event) -> None:
        while not done.wait(REDRAW_SECONDS if self._terminal else REPEAT_SECONDS):
            line = f"{self._clock() - begin:7.1f} s  {step} …"
            if self._terminal:
                print(f"\r\x1b[K{line[:110]}", end="", file=self._stream, flush=True)
            else:
                self.say(line)

    def _clear(self) -> None:
        if self._terminal and not self._quiet:
            print("\r\x1b[K", end="", file=self._stream, flush=True)
