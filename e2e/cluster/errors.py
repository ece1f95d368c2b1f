"""What can go wrong with the local cluster, as one small tree.

    ClusterError
    ├── RequirementError   the machine lacks something; the message says what, and how to get it
    ├── BuildError         a Go program did not build
    ├── ClusterStateError  the command does not fit the cluster's state (not up, no such node, no free range)
    ├── CommandError       a program that we started failed; carries its last lines
    ├── ApiError           the API server refused a request; carries the HTTP status
    └── StartTimeoutError  something did not become ready in time; names the log to read

Every message is a whole sentence that a newcomer can act on: the command line prints it alone, without a traceback.
"""


class ClusterError(Exception):
    """Base of everything that `python -m e2e.cluster` reports as one sentence."""


class RequirementError(ClusterError):
    """The machine lacks something that the cluster needs."""


class BuildError(ClusterError):
    """A Go program could not be built."""


class ClusterStateError(ClusterError):
    """The command does not fit the state that the cluster is in."""


class CommandError(ClusterError):
    """A program failed; `output` holds the end of what it printed."""

    def __init__(self, message: str, output: str = "") -> None:
        tail = "\n".join(output.strip().splitlines()[-20:])
        super().__init__(f"{message}\n{tail}" if tail else message)
        self.output = output


class ApiError(ClusterError):
    """The API server answered with an error status (`status`, an HTTP code)."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"The API server answered {status}: {message}")
        self.status = status


class StartTimeoutError(ClusterError):
    """Something did not become ready in time."""
