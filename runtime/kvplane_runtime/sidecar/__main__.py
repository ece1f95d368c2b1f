"""``kvplane-sidecar``: settings from flags and environment, then :func:`kvplane_runtime.sidecar.app.run`."""

import argparse
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import uvloop

from kvplane_api.names import (
    ENV_CONFIG_FILE,
    ENV_POD_NAME,
    ENV_POOL,
    POOL_PAGED,
    POOL_RING,
    PORT_ADMIN,
    PORT_ENGINE,
    PORT_SERVING,
)
from kvplane_runtime.proxy.server import prepare_process
from kvplane_runtime.sidecar.app import Settings, run
from kvplane_runtime.sidecar.config import ConfigError


def parse(arguments: Sequence[str], environment: Mapping[str, str]) -> Settings:
    """Settings for this process; leaves with status 2 and a sentence if one is missing."""
    parser = argparse.ArgumentParser(
        prog="kvplane-sidecar",
        description="Proxy, drain and KV metrics beside one inference engine. In a pod the operator sets the environment; "
        "the port flags are for running it elsewhere.",
    )
    parser.add_argument(
        "--config", type=Path, default=environment.get(ENV_CONFIG_FILE), help=f"configuration file [${ENV_CONFIG_FILE}]"
    )
    parser.add_argument("--pod", default=environment.get(ENV_POD_NAME), help=f"name of this pod [${ENV_POD_NAME}]")
    parser.add_argument(
        "--pool",
        default=environment.get(ENV_POOL) or POOL_PAGED,
        help=f"what the engine is: {POOL_PAGED}, or {POOL_RING} for a rank of a ring [${ENV_POOL}, else {POOL_PAGED}]",
    )
    parser.add_argument("--host", help="address to listen on [every address]")
    parser.add_argument("--port", type=int, default=PORT_SERVING, help="client port [%(default)s]")
    parser.add_argument("--admin-port", type=int, default=PORT_ADMIN, help="admin port [%(default)s]")
    parser.add_argument(
        "--engine-port", type=int, default=PORT_ENGINE, help="the engine's port on 127.0.0.1 [%(default)s]"
    )
    parsed = parser.parse_args(arguments)
    if not parsed.config:
        parser.error(f"no configuration file is given; set {ENV_CONFIG_FILE} or --config.")
    if not parsed.pod:
        parser.error(f"no pod name is given; set {ENV_POD_NAME} (from metadata.name) or --pod.")
    if parsed.pool not in (POOL_PAGED, POOL_RING):
        parser.error(f"the pool is {parsed.pool!r}; set {ENV_POOL} or --pool to {POOL_PAGED} or {POOL_RING}.")
    return Settings(
        config_file=Path(parsed.config),
        pod=parsed.pod,
        host=parsed.host,
        port=parsed.port,
        admin_port=parsed.admin_port,
        engine_port=parsed.engine_port,
        ring=parsed.pool == POOL_RING,
    )


def main() -> int:
    """Runs the sidecar; 0 after a stop by signal, 1 if it could not start."""
    settings = parse(sys.argv[1:], os.environ)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    prepare_process()
    try:
        uvloop.run(run(settings))
    except (ConfigError, OSError) as error:
        print(f"kvplane-sidecar: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
