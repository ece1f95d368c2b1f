"""The operator as it ships, but for the addresses of the pods' sidecars, which all lead to the one at KVPLANE_BENCH_SIDECARS."""

import asyncio
import logging
import os
import sys

from bench.operator.autoscaled import SIDECARS
from kvplane_operator.__main__ import run
from kvplane_operator.settings import OperatorSettings


def main() -> None:
    sidecars, settings = os.environ[SIDECARS], OperatorSettings()
    logging.basicConfig(level=settings.log_level, stream=sys.stderr)
    logging.getLogger("kopf").setLevel(logging.WARNING)
    sys.exit(asyncio.run(run(settings, resolve=lambda ip: f"{sidecars}/{ip}")))


if __name__ == "__main__":
    main()
