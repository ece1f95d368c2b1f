"""``kvplane-ring``: ``serve`` runs one rank as its environment says; ``local`` runs a whole ring on this machine."""

import argparse
import logging
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from kvplane_api.names import PORT_ENGINE
from kvplane_runtime.ring import settings as ring_settings
from kvplane_runtime.ring.local import Local, Trial
from kvplane_runtime.ring.settings import SettingsError


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command; leaves with status 2 and a sentence if it cannot be meant."""
    parser = argparse.ArgumentParser(
        prog="kvplane-ring", description="Exact attention over N processes, with the KV cache sharded by sequence."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser(
        "serve",
        help="one rank, as WORLD_SIZE, the host name and KVPLANE_RING_* say",
        description="Runs one rank. In a StatefulSet the pod's environment says all; KVPLANE_RING_MODEL is the model's folder.",
    )
    local = commands.add_parser(
        "local",
        help="a whole ring on this machine",
        description="Runs all ranks of a ring on loopback, for a trial, and starts a rank again that has ended. "
        "Every KVPLANE_RING_* of the environment holds for all of them.",
    )
    local.add_argument("--ranks", type=int, default=2, help="processes [%(default)s]")
    local.add_argument("--model", type=Path, required=True, help="folder with config.json, safetensors and tokenizer")
    local.add_argument("--port", type=int, default=PORT_ENGINE, help="of the API on 127.0.0.1 [%(default)s]")
    parsed = parser.parse_args(arguments)
    if parsed.command == "local":
        if parsed.ranks < 1:
            parser.error(f"--ranks is {parsed.ranks}; a ring has at least one.")
        if not (parsed.model / "config.json").is_file():
            parser.error(
                f"--model is {parsed.model}, and there is no {parsed.model / 'config.json'}; give a model's folder."
            )
    return parsed


def serve(environment: Mapping[str, str]) -> int:
    """One rank; the exit status."""
    try:
        settings = ring_settings.from_environment(environment, hostname=socket.gethostname())
    except SettingsError as error:
        print(f"kvplane-ring: {error}", file=sys.stderr)
        return 2
    from kvplane_runtime.ring import process  # noqa: PLC0415  (torch takes seconds; settings are judged at once)

    return process.main(settings)


def main() -> int:
    """The console script; 0 after a stop by signal."""
    parsed = parse(sys.argv[1:])
    if parsed.command == "serve":
        _end(serve(os.environ))
    given = {name: value for name, value in os.environ.items() if name.startswith("KVPLANE_RING_")}
    trial = Trial(ranks=parsed.ranks, model=parsed.model.resolve(), port=parsed.port, settings=given)
    return Local(trial, out=sys.stdout).run()


def _end(status: int) -> NoReturn:
    """Ends without the interpreter's own end: a thread still in torch, as one of a ring that breaks is, would abort it."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    sys.exit(main())
