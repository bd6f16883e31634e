"""A finished run of a teacher, a student and a direct model on a toy graph."""

from pathlib import Path
from typing import Any

from distkgd.common.console import Display
from distkgd.config.tree import merge
from distkgd.distributed.ranks import Ranks
from distkgd.pipeline.config import parse_config
from distkgd.pipeline.plan import run_plan
from tests.toys import toy_graph

STAGE = {"batch_size": 100, "epochs": 2, "validate_every": 1}
TREE = {
    "name": "toy",
    "data": "toy",  # nothing that could be found again: what asks for it need not read the standard library
    "teacher": {**STAGE, "dim": 12},
    "student": {**STAGE, "dim": 6, "method": "bkd"},
    "baseline": True,
    "mlflow": {"enabled": False},
    "report": {"html": False},
}


def run_toy(folder: Path, resume: bool = False, ranks: Ranks | None = None, **changes: Any) -> dict[str, Any]:
    """The report of the run in `folder`; `changes` go over its config."""
    config = parse_config(merge(TREE, changes), "test")
    return run_plan(config, toy_graph(), ranks or Ranks(), folder, resume=resume, display=Display(False)).to_json()
