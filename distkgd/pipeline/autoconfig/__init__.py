"""Your own graph by one command: `distkgd distill --data my_triples.tsv --to 32`, without a config file."""

from distkgd.pipeline.autoconfig.command import NOT_REACHABLE, Outcome, run_config, run_own
from distkgd.pipeline.autoconfig.request import Budget, DistillRequest, request_of

__all__ = ["NOT_REACHABLE", "Budget", "DistillRequest", "Outcome", "request_of", "run_config", "run_own"]
