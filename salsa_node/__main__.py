"""`salsa-node` and `python -m salsa_node`: the commands, without a pause for what the interpreter would tidy up."""

from __future__ import annotations

import gc
import os
import sys
import threading


def main() -> None:
    """The entry point.

    What is loaded for a command stays until it ends, so the collector never looks through it; and where nothing else
    goes on in the process it ends at once, as taking its modules apart takes a tenth of a second.
    """
    gc.disable()
    from salsa_node import cli

    gc.freeze()
    gc.enable()
    try:
        cli.main()
    except SystemExit as ended:
        if threading.active_count() > 1 or "torch" in sys.modules or not isinstance(ended.code, int | None):
            raise
        _leave(ended.code or 0)


def _leave(code: int) -> None:
    """End this process with that code; what was printed has gone out, or nobody reads it any more."""
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except BrokenPipeError:
        code = code or 1
    os._exit(code)


if __name__ == "__main__":
    main()
