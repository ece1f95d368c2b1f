"""What ``helm test`` runs: is this installation able to serve LLMServices? ``python -m kvplane_operator.selftest``

It runs with the operator's own rights and asks what the operator needs: the API server serves LLMServices and lets them
be listed, a leader renews the Lease, health and metrics answer through the Service. Each check is tried again until it
holds or the time is over, since an installation may just be starting. The first check that does not hold ends the run
with exit code 1 and a sentence that says what to look at.
"""

import argparse
import asyncio
import sys
from collections.abc import Awaitable, Callable
from typing import Final

import aiohttp

from kvplane_api import names
from kvplane_operator.cluster import ApiError, Cluster, connect
from kvplane_operator.settings import OperatorSettings

_PAUSE_SECONDS: Final = 1.0
_REQUEST_SECONDS: Final = 5.0


class NotWorkingError(Exception):
    """A check does not hold; the message says what is wrong and where to look."""


async def served(cluster: Cluster, settings: OperatorSettings) -> str:
    """The CRD is established, and the operator may list its objects where it watches."""
    if not await cluster.serves_llmservices():
        raise NotWorkingError(
            f"The API server does not serve {names.PLURAL}.{names.GROUP}: install the chart with crds.install=true, or apply "
            "crds/llmservices.yaml."
        )
    count = 0
    for namespace in settings.watch_namespaces or (None,):
        count += len((await cluster.list_metadata(names.KIND, namespace, selector=None)).objects)
    where = ", ".join(settings.watch_namespaces) or "all namespaces"
    return f"The API server serves {names.PLURAL}.{names.GROUP}; {count} of them in {where}."


async def led(cluster: Cluster, settings: OperatorSettings) -> str:
    """Somebody holds the Lease and renews it: seen as a change within its own duration, so clocks need not agree."""
    lease_name = f"{settings.lease_namespace}/{settings.lease_name}"
    before = await cluster.get_lease(settings.lease_namespace, settings.lease_name)
    if before is None or not before["spec"].get("holderIdentity"):
        raise NotWorkingError(f"Nobody holds the Lease {lease_name}: look at the operator's pods and their logs.")
    for _ in range(settings.lease_seconds):
        await asyncio.sleep(_PAUSE_SECONDS)
        now = await cluster.get_lease(settings.lease_namespace, settings.lease_name)
        if now is not None and now["metadata"]["resourceVersion"] != before["metadata"]["resourceVersion"]:
            return f"{now['spec'].get('holderIdentity') or 'A new leader'} leads and renews the Lease {lease_name}."
    holder = before["spec"]["holderIdentity"]
    raise NotWorkingError(
        f"{holder} holds the Lease {lease_name} and did not renew it for {settings.lease_seconds} s: look at its log."
    )


async def answers(url: str, *, containing: str) -> str:
    """The operator answers over its Service."""
    timeout = aiohttp.ClientTimeout(total=_REQUEST_SECONDS)
    try:
        async with aiohttp.ClientSession(timeout=timeout) as session, session.get(url) as response:
            text = await response.text()
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        raise NotWorkingError(
            f"{url} does not answer: {error!r}. Look at the operator's pods and its Service."
        ) from error
    if response.status != 200:
        raise NotWorkingError(f"{url} answers {response.status}: {text.strip()[:300]}")
    if containing not in text:
        raise NotWorkingError(f"{url} answers, but without {containing!r}: something else listens there.")
    return f"{url} answers."


async def check(cluster: Cluster, settings: OperatorSettings, *, health: str, metrics: str, seconds: float) -> None:
    """Print a line for each check that holds.

    Raises:
        NotWorkingError: a check did not hold before the time was over.
    """
    checks: tuple[Callable[[], Awaitable[str]], ...] = (
        lambda: served(cluster, settings),
        lambda: led(cluster, settings),
        lambda: answers(f"{health}/livez", containing="ok"),
        lambda: answers(f"{health}/readyz", containing="ok"),
        lambda: answers(f"{metrics}/metrics", containing="kvplane_operator_leading"),
    )
    deadline = asyncio.get_running_loop().time() + seconds
    for one in checks:
        print(await _until_it_holds(one, deadline), flush=True)


async def _until_it_holds(one: Callable[[], Awaitable[str]], deadline: float) -> str:
    while True:
        try:
            return await one()
        except (NotWorkingError, ApiError) as error:
            if asyncio.get_running_loop().time() >= deadline:
                raise NotWorkingError(str(error)) from error
        await asyncio.sleep(_PAUSE_SECONDS)


async def run(settings: OperatorSettings, *, host: str, seconds: float) -> int:
    """Exit code 0 if everything holds, else 1."""
    api = await connect()
    try:
        await check(
            Cluster(api, timeout_seconds=settings.request_timeout_seconds),
            settings,
            health=f"http://{host}:{settings.health_port}",
            metrics=f"http://{host}:{settings.metrics_port}",
            seconds=seconds,
        )
    except NotWorkingError as error:
        print(f"FAILED: {error}", file=sys.stderr, flush=True)
        return 1
    finally:
        await api.close()
    return 0


def main() -> None:
    """Check the installation that the environment describes, as the operator's settings do."""
    parser = argparse.ArgumentParser(prog="python -m kvplane_operator.selftest", description=main.__doc__)
    parser.add_argument("--operator", required=True, metavar="HOST", help="the operator's Service")
    parser.add_argument("--seconds", type=float, default=60.0, help="how long a check may take to hold [60]")
    arguments = parser.parse_args()
    sys.exit(asyncio.run(run(OperatorSettings(), host=arguments.operator, seconds=arguments.seconds)))


if __name__ == "__main__":
    main()
