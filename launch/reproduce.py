"""A table or figure of a paper: `distkgd reproduce` as a file."""

import os
import signal
import sys

if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # Ctrl-C may come in the imports

from distkgd.commands.ablate import reproduce as main
from distkgd.commands.cli import run_main

if __name__ == "__main__":
    sys.exit(run_main(main))
