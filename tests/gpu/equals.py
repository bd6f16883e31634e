"""The same training on the CPU and on the pretend device, compared in the process that has the device."""

from pathlib import Path
from typing import Any

import torch

from distkgd.distributed.ranks import Ranks
from distkgd.pipeline.config import StageConfig
from distkgd.pipeline.stages import Stage
from tests.gpu.cases import job_of
from tests.gpu.counts import COUNTS
from tests.gpu.device import fetched, install
from tests.gpu.kernels import kernels_there
from tests.toys import take_steps, toy_job, toy_run

STEPS = 3
Found = dict[str, Any]


def both(ranks: Ranks, config: dict[str, Any]) -> tuple[Found, Found]:
    """What a toy's steps leave on the CPU and on the device of `ranks`: [losses, tables, tensors, valid]."""
    one, two = (take_steps(toy_job(config, place, Path("/nonexistent")), STEPS) for place in (Ranks(), ranks))
    return one, on_host(two)


def both_shipped(ranks: Ranks, stage: dict[str, Any], teachers: list[dict[str, Any]]) -> tuple[Found, Found]:
    """`both` of a stage of `shipped_stages`."""
    config = StageConfig.model_validate(stage)
    taught = [StageConfig.model_validate(teacher) for teacher in teachers]
    found = []
    for place in (Ranks(), ranks):
        run = toy_run({"dtype": "float64", "student": {}}, place, Path("/nonexistent"))
        names = tuple(f"teacher{i}" for i in range(len(taught)))
        found.append(take_steps(job_of(run, Stage("student", config, names), taught), STEPS))
    return found[0], on_host(found[1])


def on_host(found: Found) -> Found:
    """What steps on the device leave, fetched; all tables are checked to lie there."""
    for kind in ("tables", "tensors"):
        strangers = [name for name, tensor in found[kind].items() if tensor.device.type == "cpu"]
        assert not strangers, f"{kind} that should lie on the device: {strangers}"
    out: Found = fetched(found)
    out["losses"] = [{name: float(number) for name, number in terms.items()} for terms in out["losses"]]
    assert all(torch.isfinite(table).all() for table in out["tables"].values())
    return out


def both_with_kernels(config: dict[str, Any]) -> tuple[Found, Found, set[str]]:
    """`both` in a process with TRITON_INTERPRET=1, whose device runs our Triton kernels; and which of them it ran."""
    ranks = Ranks(device=install())
    COUNTS.reset()
    with kernels_there(values=True):
        one, two = both(ranks, config)
    return one, two, {name for _, name in COUNTS.launches if name.endswith("_code")}
