"""`make demo`: from nothing to a token served by vLLM on a real Kubernetes, with the time of each step.

up: cluster, images, chart, a small Llama made in code, an LLMService, a streamed chat completion, and what to try next.
The cluster stays up until `down`. MODEL=hf://ORG/NAME serves a real model where a hub can be reached.
"""

import argparse
import json
import os
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from e2e.cluster import provider
from e2e.cluster.errors import ClusterError
from e2e.cluster.progress import Progress
from e2e.cluster.spec import ClusterSpec
from e2e.stack import Stack, cpu_service, prepare_images, prepare_machine
from images.build import ImageBuildError
from kvplane_api import names

SPEC: Final = ClusterSpec(name="demo", nodes=2)
NAMESPACE: Final = "kvplane-demo"
SERVICE: Final = "chat"
PROMPT: Final = "Why does a KV cache need a plan?"


def up() -> None:
    """Bring everything up and serve a token; leaves it up."""
    progress = Progress()
    progress.say("kvplane demo: cluster, images, chart, model, token. Nothing leaves this machine.")
    cluster = provider.resolve(SPEC, progress=progress)
    prepare_machine(progress)
    images = prepare_images(progress)
    cluster.load(images.all)
    cluster.up()
    stack = Stack.on(cluster.kubeconfig, progress)
    with progress.step("Helm chart kvplane"):
        stack.install(images)
    stack.make_namespace(NAMESPACE)
    model = os.environ.get("MODEL") or f"oci://{images.model}"
    service = cpu_service(SERVICE, NAMESPACE, model)
    stack.apply(service)
    progress.say(f"\n$ kubectl apply -f -\n{json.dumps(service, indent=2)}\n")
    stack.wait_ready(NAMESPACE, SERVICE)
    with stack.forward(NAMESPACE, f"service/{SERVICE}", names.PORT_SERVING) as url:
        progress.say(f"\n> {PROMPT}")
        first = True
        for piece in stream_chat(url, PROMPT):
            if first:
                seconds = progress.seconds()
                first = False
            print(piece, end="", flush=True)
        print()
    progress.say(f"\nFirst token {seconds:.0f} s after the start.")
    if not os.environ.get("MODEL"):
        progress.say("The model is a small Llama with random weights, made a moment ago: what it says means nothing.")
    _show(stack)
    _what_next(cluster.kubeconfig, stack)


def down() -> None:
    """Remove the demo's cluster."""
    provider.resolve(SPEC).down()


def stream_chat(url: str, prompt: str, *, max_tokens: int = 32) -> Iterator[str]:
    """The pieces of a streamed chat completion as they arrive."""
    body = {
        "model": SERVICE,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": max_tokens,
        "stream": True,
    }
    request = urllib.request.Request(  # noqa: S310  the address is the port-forward's
        f"{url}/v1/chat/completions", data=json.dumps(body).encode(), headers={"Content-Type": "application/json"}
    )
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=120) as answer:
        for line in answer:
            if line.startswith(b"data: ") and line.strip() != b"data: [DONE]":
                for choice in json.loads(line[6:])["choices"]:
                    yield choice["delta"].get("content") or ""


def _show(stack: Stack) -> None:
    """The KV metrics and the objects made."""
    pod = stack.get(NAMESPACE, "pods", "-l", f"{names.LABEL_SERVICE}={SERVICE}")[0]["metadata"]["name"]
    with stack.forward(NAMESPACE, f"pod/{pod}", names.PORT_ADMIN) as url:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        lines = opener.open(f"{url}/metrics", timeout=10).read().decode().splitlines()
    wanted = ("kvplane_kv_cache", "kvplane_preemptions", "kvplane_prefix_cache", "kvplane_generation_tokens_total")
    print("\nKV metrics of the sidecar (GET :8001/metrics of the pod):")
    print("\n".join(f"  {line}" for line in lines if line.startswith(wanted) and "_created" not in line))
    print("\n$ kubectl get llms,deployments,services,configmaps,pods -n kvplane-demo")
    print(stack.kubectl("get", "llms,deployments,services,configmaps,pods", "-n", NAMESPACE))


def _what_next(kubeconfig: Path, stack: Stack) -> None:
    bin_directory = Path(stack.programs["kubectl"]).parent
    print(
        f"""Try next (kubectl and helm of the demo are in the PATH below):

  export KUBECONFIG={kubeconfig}
  export PATH={bin_directory}:{Path(stack.programs["helm"]).parent}:$PATH

  kubectl get llms -A -o wide                                 # how it is
  kubectl describe llms {SERVICE} -n {NAMESPACE}               # why
  kubectl explain llmservice.spec --recursive                 # what can be asked for
  kubectl scale llms {SERVICE} -n {NAMESPACE} --replicas=2     # a second replica
  kubectl port-forward -n {NAMESPACE} service/{SERVICE} 8000    # then: curl localhost:8000/v1/models

make demo-down removes it all."""
    )


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m e2e.demo", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("command", choices=("up", "down"))
    try:
        {"up": up, "down": down}[parser.parse_args().command]()
    except (ClusterError, ImageBuildError) as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
