"""A finished model on a newer graph: `distkgd update` as a file, for torchrun."""

import os
import signal
import sys

if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # Ctrl-C may come in the imports

from distkgd.commands.cli import run_main
from distkgd.commands.update import main

if __name__ == "__main__":
    sys.exit(run_main(main))
