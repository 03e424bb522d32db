"""`salsa-node` and `python -m salsa_node`: the commands, loaded without a pause for garbage."""

from __future__ import annotations

import gc


def main() -> None:
    """The entry point. What is loaded for a command stays until it ends, so the collector never looks through it."""
    gc.disable()
    from salsa_node import cli

    gc.freeze()
    gc.enable()
    cli.main()


if __name__ == "__main__":
    main()
