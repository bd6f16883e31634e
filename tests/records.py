"""Results of stages and reports of runs that nobody has trained."""

from collections.abc import Mapping
from typing import Any

from distkgd.reporting.run_report import RunReport

RUN: dict[str, Any] = {
    "name": "toy",
    "data": {"name": "toy", "sha256": "0" * 64}
    | {f"num_{kind}": 9 for kind in ("entities", "relations", "train", "valid", "test")},
    "protocol": {"ties": "realistic", "filter": "filtered"},
    "seed": 0,
    "world": 1,
    "device": "cpu",
}
STAGE: dict[str, Any] = {
    "name": "student",
    "method": "bkd",
    "scorer": "complex",
    "dim": 8,
    "bytes": 9,
    "teachers": [],
    "digest": "0" * 64,
}


def report_of(tree: Mapping[str, Any]) -> RunReport:
    """A report of what report.json might hold; what it leaves out is as in `RUN` and `STAGE`."""
    stages = [{key: value for key, value in STAGE.items() if key != "digest"} | stage for stage in tree["stages"]]
    return RunReport.model_validate(RUN | dict(tree) | {"stages": stages})
