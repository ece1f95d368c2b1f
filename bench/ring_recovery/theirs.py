"""The same engine in a LeaderWorkerSet with RecreateGroupOnPodRestart: a restart of one container recreates the group.

Its controller runs on this host, as an administrator, with its admission webhooks, which give pods their rank: the API server
reaches them at this host's address in the cluster. The engine is that of our rings with the same settings, less what only
our operator has: no sidecar stands before it, clients talk to rank 0 directly, and it ends at once when it is told to.
"""

import base64
import json
import math
import shutil
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Final

import yaml

from bench import lws
from bench.operator.process import Process
from bench.ring_recovery.figures import Fault
from bench.ring_recovery.ours import Mistakes
from e2e.cluster import pki
from e2e.cluster.api import Json
from e2e.cluster.cluster import Cluster
from e2e.cluster.errors import ApiError
from e2e.cluster.ports import free_ports
from e2e.cluster.progress import Progress
from e2e.rings.drill import UNDER_WAY_TOKENS, Work
from e2e.rings.ring import WHOLE_SECONDS, await_true, pods_of, serves, state_of
from e2e.rings.service import SETTINGS
from e2e.rings.streams import AGAIN_SECONDS, Answer, Asking, ask, longest_pause
from e2e.rings.watching import PodWatch
from e2e.stack import Images, Stack, StackError
from kvplane_api import names

NAMESPACE: Final = "bench-lws"
NAME: Final = "peer"
CONTAINER: Final = "engine"
_LABEL_SET: Final = "leaderworkerset.sigs.k8s.io/name"
_SELECTOR: Final = f"{_LABEL_SET}={NAME}"
_LEADER: Final = f"{NAME}-0"
_SYSTEM: Final = "lws-system"
_CERTIFICATE: Final = "webhooks"


def measure(
    stack: Stack,
    cluster: Cluster,
    images: Images,
    mistakes: Mistakes,
    *,
    ranks: int,
    victim: int,
    work: Work,
    rounds: int,
    folder: Path,
    progress: Progress,
) -> list[Fault]:
    """The controller is installed, the group made, hurt and removed; the controller's log is in ``folder``."""
    with controller(stack, cluster, folder, progress):
        stack.make_namespace(NAMESPACE, {})
        with progress.step(f"{lws.NAME}: a group of {ranks}"):
            _apply(stack, manifest(images, ranks=ranks))
            _await_whole(cluster, ranks, without=set())
        faults: list[Fault] = []
        for number in range(rounds):
            with progress.step(f"{lws.NAME}: a rank is killed, {number + 1} of {rounds}") as step:
                fault = _lose_a_rank(
                    stack, cluster, mistakes, ranks=ranks, victim=victim, prompt=work.prompt(2 * number), work=work
                )
                step.detail = f"next token {fault.next_token_seconds:.2f} s"
                faults.append(fault)
        stack.kubectl("delete", "namespace", NAMESPACE)
    return faults


def _apply(stack: Stack, wanted: Json) -> None:
    """Its webhooks listen a moment before they answer."""
    refused = ""

    def applied() -> bool:
        nonlocal refused
        try:
            stack.apply(wanted)
        except StackError as error:
            refused = str(error)
            return False
        return True

    await_true(applied, what=lambda: f"The LeaderWorkerSet is refused: {refused}", seconds=60)


def _lose_a_rank(
    stack: Stack, cluster: Cluster, mistakes: Mistakes, *, ranks: int, victim: int, prompt: list[int], work: Work
) -> Fault:
    before = {pod["metadata"]["uid"] for pod in _pods(cluster)}
    with PodWatch(stack, NAMESPACE, _SELECTOR) as watch:
        with Asking(_where(cluster), NAME, prompt, count=work.output_tokens) as asking:
            asking.await_tokens(UNDER_WAY_TOKENS)
            hurt = time.monotonic()
            cluster.kill_pod_process(NAMESPACE, f"{_LEADER}-{victim}", container=CONTAINER)
            first = asking.finish()
        went_on = first.error is None
        with ThreadPoolExecutor(max_workers=1) as client:
            asked = None if went_on else client.submit(_ask_until_answered, cluster, prompt, work)
            # The engine goes on by itself until its group is deleted, so the group may still be the old one.
            _await_whole(cluster, ranks, without=before)
            whole = time.monotonic()
            answer = first if asked is None else asked.result()
    if answer.error is not None:
        kept = math.inf
    elif went_on:
        kept = longest_pause(answer.at, after=hurt).ended
    else:
        kept = answer.at[0]
    again = ranks * (len(prompt) - (answer.cached_tokens or 0)) / len(prompt)
    return Fault(
        next_token_seconds=kept - hurt,
        whole_seconds=whole - hurt,
        # What a stream that went on had to compute again only its engine knew, which is gone with its group.
        recomputed_times_n=math.nan if went_on else again,
        pods_recreated=len(watch.uids() - before),
        went_on=went_on,
        equal=answer.error is None and not mistakes(prompt, answer.tokens),
    )


def _ask_until_answered(cluster: Cluster, prompt: list[int], work: Work) -> Answer:
    """Rank 0 has another address after each recreation: it is looked up for every request."""
    end = time.monotonic() + WHOLE_SECONDS
    answer = Answer(error="rank 0 was not there")
    while answer.error is not None and time.monotonic() < end:
        time.sleep(AGAIN_SECONDS)
        try:
            where = _where(cluster)
        except (ApiError, KeyError):
            continue
        answer = ask(where, NAME, prompt, count=work.output_tokens)
    return answer


def _where(cluster: Cluster) -> str:
    leader = cluster.api.get(f"/api/v1/namespaces/{NAMESPACE}/pods/{_LEADER}")
    return f"{leader['status']['podIP']}:{names.PORT_ENGINE}"


def _pods(cluster: Cluster) -> list[Json]:
    return pods_of(cluster, NAMESPACE, _SELECTOR)


def _await_whole(cluster: Cluster, ranks: int, *, without: set[str]) -> None:
    """Until all ranks are Ready, the leader in a pod that is none of ``without``."""

    def whole() -> bool:
        pods = _pods(cluster)
        leader = next((pod["metadata"]["uid"] for pod in pods if pod["metadata"]["name"] == _LEADER), None)
        return len(pods) == ranks and all(serves(pod) for pod in pods) and leader not in without

    await_true(
        whole,
        what=lambda: f"The group is not whole: {[state_of(pod) for pod in _pods(cluster)]}",
        seconds=WHOLE_SECONDS,
    )


# ------------------------------------------------------------------------------------------------------- the group


def manifest(images: Images, *, ranks: int) -> Json:
    """The LeaderWorkerSet: one group, each rank on a node of its own."""
    values = {
        "WORLD_SIZE": str(ranks),
        "PROMPT_SPLIT_STRATEGY": "RING",
        "KVPLANE_RING_MODEL": names.PATH_MODEL,
        "KVPLANE_RING_SERVED_NAME": NAME,
        "KVPLANE_RING_DTYPE": "float32",
        # Rank 0's pod bears the group's name, so the engine's own guess, from a worker's name, is wrong here.
        "KVPLANE_RING_LEADER": f"{_LEADER}.{NAME}.{NAMESPACE}",
        "KVPLANE_RING_HOST": "0.0.0.0",  # noqa: S104  a pod's own network
        "KVPLANE_RING_DRAIN_SECONDS": "0",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        **SETTINGS,
    }
    env: list[Json] = [{"name": name, "value": value} for name, value in values.items()]
    env += [
        {"name": name, "valueFrom": {"fieldRef": {"fieldPath": field}}}
        for name, field in (("POD_IP", "status.podIP"), ("POD_UID", "metadata.uid"))
    ]
    apart = {"labelSelector": {"matchLabels": {_LABEL_SET: NAME}}, "topologyKey": "kubernetes.io/hostname"}
    pod = {
        # The engine is not pid 1 then, and heeds SIGTERM as soon as it is told.
        "shareProcessNamespace": True,
        "terminationGracePeriodSeconds": 5,
        "affinity": {"podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [apart]}},
        "containers": [
            {
                "name": CONTAINER,
                "image": images.ring,
                "imagePullPolicy": "IfNotPresent",
                "command": ["kvplane-ring", "serve"],
                "env": env,
                "resources": {"requests": {"cpu": "100m", "memory": "512Mi"}, "limits": {"memory": "4Gi"}},
                "readinessProbe": {
                    "httpGet": {"path": "/health", "port": names.PORT_ENGINE},
                    "periodSeconds": 1,
                    "timeoutSeconds": 5,
                },
                "volumeMounts": [{"name": "model", "mountPath": names.PATH_MODEL, "readOnly": True}],
            }
        ],
        "volumes": [{"name": "model", "image": {"reference": images.model, "pullPolicy": "IfNotPresent"}}],
    }
    return {
        "apiVersion": "leaderworkerset.x-k8s.io/v1",
        "kind": "LeaderWorkerSet",
        "metadata": {"name": NAME, "namespace": NAMESPACE},
        "spec": {
            "replicas": 1,
            "leaderWorkerTemplate": {
                "size": ranks,
                "restartPolicy": "RecreateGroupOnPodRestart",
                "workerTemplate": {"spec": pod},
            },
        },
    }


# -------------------------------------------------------------------------------------------------- the controller


@contextmanager
def controller(stack: Stack, cluster: Cluster, folder: Path, progress: Progress) -> Iterator[None]:
    """LeaderWorkerSet's controller with its webhooks, while in the context; the webhooks stay with the cluster."""
    program, source, host = lws.program(progress), lws.sources(), cluster.addresses.host
    certificates = folder / "lws-certificates"
    pki.issue(certificates, "lws-ca", [pki.Certificate(_CERTIFICATE, "lws-webhooks", names=(f"IP:{host}",))])
    for kind in ("crt", "key"):  # the names that it looks for
        shutil.copy(certificates / f"{_CERTIFICATE}.{kind}", certificates / f"tls.{kind}")
    stack.kubectl("apply", "--server-side", "-f", str(source / lws.CRDS))
    stack.kubectl("wait", "--for=condition=Established", "crd", "--all", "--timeout=60s")
    stack.make_namespace(_SYSTEM, {})
    (port,), (metrics, health) = free_ports(1, host=host), free_ports(2)
    configuration = {
        "apiVersion": "config.lws.x-k8s.io/v1alpha1",
        "kind": "Configuration",
        "webhook": {"host": host, "port": port, "certDir": str(certificates)},
        "metrics": {"bindAddress": f"127.0.0.1:{metrics}"},
        "health": {"healthProbeBindAddress": f"127.0.0.1:{health}"},
        "leaderElection": {"leaderElect": True},
        "internalCertManagement": {"enable": False},
    }
    path = folder / "lws-configuration.json"
    path.write_text(json.dumps(configuration))
    # The cluster is reached directly: client-go would ask a proxy of the environment for it.
    environment = {"KUBECONFIG": str(stack.kubeconfig), "NO_PROXY": "*", "no_proxy": "*"}
    process = Process(
        [str(program), f"--config={path}", "--zap-log-level=2"], environment, log=folder / "lws-controller.log"
    )
    process.start()
    try:
        with progress.step(f"{lws.NAME}: its controller"):
            await_true(
                lambda: _listens(host, port, process),
                what=lambda: f"The webhooks do not listen; read {folder}/lws-controller.log",
                seconds=60,
            )
        documents = list(yaml.safe_load_all((source / lws.WEBHOOKS).read_text()))
        authority = base64.b64encode((certificates / f"{pki.CA}.crt").read_bytes()).decode()
        stack.apply(*webhooks(documents, url=f"https://{host}:{port}", authority=authority))
        yield
    finally:
        process.kill()


def webhooks(documents: list[Any], *, url: str, authority: str) -> list[Json]:
    """Its webhook configurations, led to ``url``; those of pods see the pods of LeaderWorkerSets only, as its own
    installation has it."""
    found = []
    for document in documents:
        hooks = []
        for hook in document["webhooks"]:
            client = {"url": url + hook["clientConfig"]["service"]["path"], "caBundle": authority}
            mine = {**hook, "clientConfig": client}
            if any("pods" in rule["resources"] for rule in hook["rules"]):
                mine["objectSelector"] = {"matchExpressions": [{"key": _LABEL_SET, "operator": "Exists"}]}
            hooks.append(mine)
        found.append(
            {
                "apiVersion": document["apiVersion"],
                "kind": document["kind"],
                "metadata": {"name": f"lws-{document['metadata']['name']}"},
                "webhooks": hooks,
            }
        )
    return found


def _listens(host: str, port: int, process: Process) -> bool:
    process.check()
    with closing(socket.socket()) as probe:
        probe.settimeout(1.0)
        return probe.connect_ex((host, port)) == 0
