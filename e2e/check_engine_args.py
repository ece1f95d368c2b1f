"""Asks vLLM's own parser whether it takes a command line; run by the engine image's python, with nothing of kvplane.

    echo '["acme/tiny", "--max-model-len", "auto"]' | python check_engine_args.py

Standard input is the JSON list of the arguments after ``vllm serve``, or a list of such lists. The exit status is 0 if
all are taken, 2 with the parser's message on standard error if one is not. Nothing is loaded and no device is touched,
but the import alone takes 10-30 s on a slow machine: hand over all lists at once.
"""

import json
import sys

from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.utils.argparse_utils import FlexibleArgumentParser


def main() -> None:
    """Parse each list as ``vllm serve`` would."""
    given = json.load(sys.stdin)
    parser = make_arg_parser(FlexibleArgumentParser(prog="vllm serve"))
    for arguments in given if given and isinstance(given[0], list) else [given]:
        parsed = parser.parse_args(arguments)
        # What `vllm serve` does with its positional argument.
        if parsed.model_tag is not None:
            parsed.model = parsed.model_tag
        validate_parsed_serve_args(parsed)
        print(json.dumps({"model": parsed.model, "max_model_len": parsed.max_model_len, "host": parsed.host}))


if __name__ == "__main__":
    main()
