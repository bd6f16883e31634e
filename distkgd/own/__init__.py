"""Your own graph by one command: `launch/distill.py --data my_triples.tsv --to 32`, without a config file."""

from distkgd.own.command import NOT_REACHABLE, Outcome, run_config, run_own
from distkgd.own.wishes import Budget, Wishes, wishes_of

__all__ = ["NOT_REACHABLE", "Budget", "Outcome", "Wishes", "run_config", "run_own", "wishes_of"]
