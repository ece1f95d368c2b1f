"""`python -m e2e.cluster`: a real multi-node Kubernetes on this machine, on the command line."""

import argparse
import os
import sys
from collections.abc import Sequence

from e2e.cluster import binaries
from e2e.cluster.cluster import Cluster
from e2e.cluster.errors import ClusterError
from e2e.cluster.faults import SIGNALS
from e2e.cluster.progress import Progress
from e2e.cluster.spec import ClusterSpec

EXAMPLES = """\
examples:
  python -m e2e.cluster up --nodes 3         the first time builds everything (about 15 minutes on 2 cores)
  python -m e2e.cluster load kvplane/control an image of buildah's, or an archive: to all nodes, in seconds
  python -m e2e.cluster exec node-1 -- ctr -n k8s.io containers ls
  python -m e2e.cluster cut node-2           pull its cable; heal plugs it in again
  python -m e2e.cluster stop-daemon cp kube-apiserver
  python -m e2e.cluster down                 nothing is left
"""


def parser() -> argparse.ArgumentParser:
    root = argparse.ArgumentParser(
        prog="python -m e2e.cluster",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    defaults = ClusterSpec()
    root.add_argument("--name", default=defaults.name, help="which cluster (default: %(default)s)")
    commands = root.add_subparsers(dest="command", required=True, metavar="COMMAND")

    build = commands.add_parser("build", help="build the programs that are not in the cache")
    names = ", ".join(component.name for component in binaries.KNOWN)
    default = "all that a cluster is made of"
    build.add_argument("components", nargs="*", metavar="COMPONENT", help=f"{names} (default: {default})")

    up = commands.add_parser("up", help="have the cluster up and every node Ready")
    up.add_argument("--nodes", type=int, default=defaults.nodes, help="how many (default: %(default)s)")
    up.add_argument("--recreate", action="store_true", help="also where it is up already")

    commands.add_parser("down", help="remove the cluster and all that it took")
    commands.add_parser("status", help="machines, nodes and pods")
    commands.add_parser("kubeconfig", help="print the path of the kubeconfig")
    load = commands.add_parser("load", help="have images on every node, now and in clusters to come")
    load.add_argument(
        "images", nargs="+", metavar="IMAGE", help="a name in buildah's store, or a docker- or OCI-archive"
    )
    enter = commands.add_parser("exec", help="run a command in a machine (cp, node-1, …)")
    enter.add_argument("machine")
    enter.add_argument("words", nargs=argparse.REMAINDER, metavar="-- COMMAND")

    for name, text in (
        ("cut", "pull a node's cable"),
        ("heal", "plug it in again"),
        ("stop-kubelet", "kill a node's kubelet and keep it down"),
        ("start-kubelet", "let it run again"),
        ("power-off", "kill everything on a node at once"),
        ("boot", "switch a node on again"),
    ):
        commands.add_parser(name, help=text).add_argument("node")
    for name, text in (("stop-daemon", "kill a daemon and keep it down"), ("start-daemon", "let it run again")):
        daemon = commands.add_parser(name, help=text)
        daemon.add_argument("machine")
        daemon.add_argument("daemon")
    kill = commands.add_parser("kill-pod-process", help="signal every process of a container")
    kill.add_argument("pod", metavar="NAMESPACE/POD")
    kill.add_argument("--container", help="default: the first")
    kill.add_argument("--signal", choices=SIGNALS, default="KILL")
    return root


def run(arguments: argparse.Namespace) -> None:
    progress = Progress()
    command = arguments.command
    if command == "build":
        for name, path in binaries.build(binaries.select(arguments.components), progress=progress).items():
            print(f"{name} {path}")
        return
    if command == "up":
        cluster = Cluster(ClusterSpec(name=arguments.name, nodes=arguments.nodes), progress=progress)
        cluster.up(recreate=arguments.recreate)
        print(f"export KUBECONFIG={cluster.kubeconfig}")
        return
    cluster = Cluster.named(ClusterSpec(name=arguments.name).name, progress=progress)
    if command == "kill-pod-process":
        namespace, _, pod = arguments.pod.rpartition("/")
        count = cluster.kill_pod_process(
            namespace or "default", pod, container=arguments.container, signal=arguments.signal
        )
        print(f"SIG{arguments.signal} to {count} processes")
    elif command == "exec":
        words = arguments.words[1:] if arguments.words[:1] == ["--"] else arguments.words
        line = cluster.machine_of_running(arguments.machine).command(*(words or ["bash"]))
        os.execvp(line[0], line)  # noqa: S606 - no shell is wanted
    elif command == "kubeconfig":
        cluster.record()
        print(cluster.kubeconfig)
    elif command == "status":
        print(cluster.status(), end="")
    elif command == "load":
        cluster.load(arguments.images)
    elif command in ("stop-daemon", "start-daemon"):
        getattr(cluster, command.replace("-", "_"))(arguments.machine, arguments.daemon)
    elif command == "down":
        cluster.down()
    else:
        getattr(cluster, command.replace("-", "_"))(arguments.node)


def main(arguments: Sequence[str] | None = None) -> int:
    try:
        run(parser().parse_args(arguments))
    except ClusterError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; `down` clears up, and so does the next `up`", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
