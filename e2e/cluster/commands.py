"""Run a program to its end; a failure is an error that carries what the program said."""

import subprocess
from collections.abc import Mapping
from os import PathLike

from e2e.cluster.errors import CommandError

Argument = str | PathLike[str]


def run(
    *command: Argument,
    stdin: str | bytes | None = None,
    environment: Mapping[str, str] | None = None,
    timeout_seconds: float | None = None,
) -> str:
    """The stdout of `command`.

    Raises:
        CommandError: it is not there, failed, or ran longer than `timeout_seconds`; the message ends with its stderr.
    """
    words = [str(word) for word in command]
    shown = " ".join(words)
    try:
        done = subprocess.run(
            words,
            input=stdin.encode() if isinstance(stdin, str) else stdin,
            stdin=subprocess.DEVNULL if stdin is None else None,
            capture_output=True,
            env=environment,
            timeout=timeout_seconds,
            check=False,
        )
    except FileNotFoundError:
        raise CommandError(f"The program {words[0]} is not installed.") from None
    except subprocess.TimeoutExpired:
        raise CommandError(f"`{shown}` did not end within {timeout_seconds:.0f} s.") from None
    if done.returncode:
        output = (done.stderr or done.stdout).decode(errors="replace")
        raise CommandError(f"`{shown}` failed with status {done.returncode}.", output)
    return done.stdout.decode()
