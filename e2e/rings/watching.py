"""Every change of some pods, in order: what was true at no instant cannot be seen by looking now and then."""

import json
import os
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final, Self

from e2e.cluster.api import Json
from e2e.rings.ring import serves
from e2e.stack import Stack
from kvplane_api import names

Pods = Mapping[str, Json]
"""By name."""
_BEGIN_SECONDS: Final = 30.0


@dataclass
class PodWatch:
    """The pods of a namespace with some labels while in the context, from those that are there at its beginning on."""

    stack: Stack
    namespace: str
    selector: str
    events: list[tuple[float, str, Json]] = field(default_factory=list)
    """When (monotonic clock), what (ADDED, MODIFIED, DELETED), and the pod as it was then."""

    def __enter__(self) -> Self:
        command = [str(self.stack.programs["kubectl"]), "get", "pods", "-n", self.namespace]
        command += ["-l", self.selector, "--watch", "--output-watch-events", "-o", "json"]
        environment = {**os.environ, "KUBECONFIG": str(self.stack.kubeconfig)}
        self._process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE)
        self._thread = threading.Thread(target=self._read)
        self._thread.start()
        # kubectl takes its time to begin; of a pod that went before it looks nobody would know.
        end = time.monotonic() + _BEGIN_SECONDS
        while not self.events and self._thread.is_alive() and time.monotonic() < end:
            time.sleep(0.05)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait()
        self._thread.join()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if not line.endswith(b"\n"):
                return  # it was told to end
            event = json.loads(line)
            self.events.append((time.monotonic(), event["type"], event["object"]))

    def instants(self) -> Iterator[tuple[float, Pods]]:
        """The pods after each event, with its time."""
        pods: dict[str, Json] = {}
        for at, kind, pod in self.events:
            name = pod["metadata"]["name"]
            if kind == "DELETED":
                pods.pop(name, None)
            else:
                pods[name] = pod
            yield at, dict(pods)

    def uids(self) -> set[str]:
        """Of all pods that there were."""
        return {pod["metadata"]["uid"] for _, _, pod in self.events}


def most_short_at_once(watch: PodWatch, *, size: int) -> int:
    """Most groups that were short of a rank at the same instant: from when a rank goes until all are Ready again."""
    whole: set[str] = set()
    short: set[str] = set()
    most = 0
    for _, pods in watch.instants():
        ranks: dict[str, list[Json]] = {group: [] for group in whole}
        for pod in pods.values():
            ranks.setdefault(pod["metadata"]["labels"][names.LABEL_GROUP], []).append(pod)
        for group, mine in ranks.items():
            if len(mine) == size and all(map(serves, mine)):
                whole.add(group)
                short.discard(group)
            elif group in whole and (len(mine) < size or any("deletionTimestamp" in p["metadata"] for p in mine)):
                short.add(group)
        most = max(most, len(short))
    return most
