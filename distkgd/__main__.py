"""`python -m distkgd` and the command `distkgd`."""

import os
import signal
import sys


def main() -> None:
    """Run the command line of this process, and exit."""
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # Ctrl-C may come in the imports
    from distkgd.commands.app import build_app
    from distkgd.commands.cli import run_app

    sys.exit(run_app(build_app(), name="distkgd"))


if __name__ == "__main__":
    main()
