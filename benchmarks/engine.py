"""What the sharded engine costs; results in benchmarks/results/, with the machine and versions.

python benchmarks/engine.py memory     # peak memory of a 1-vs-all KL step at 0.25, 1 and 2.5 M entities
python benchmarks/engine.py traffic    # bytes at the collectives beside the cost model: every loss, move, 2 and 3 ranks
python benchmarks/engine.py speed      # 2 ranks of one thread beside 1 process of two threads
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import typer

from benchmarks.foundation import ROOT, save
from distkgd.config import parse_config
from distkgd.display import Display
from distkgd.distributed.cost import traffic as expected_traffic
from distkgd.distributed.ranks import Ranks, join_ranks, leave_ranks
from distkgd.exchange import expected_memory, shape_of
from distkgd.graph.filters import KnownAnswers
from distkgd.graph.sampling import Sampler
from distkgd.methods import build_method
from distkgd.model import Model, SceneBuilder, new_model
from distkgd.scorers import build_scorer
from distkgd.tracking import open_tracking
from distkgd.train import Job, Progress, train_step

RELATIONS = 50
app = typer.Typer(help=__doc__)


def bare_job(stage: Mapping[str, Any], entities: int, triples: int, ranks: Ranks, teacher_dim: int = 0) -> Job:
    """A job on random triples, without names or files: what a step costs, and nothing else.

    stage: a student's config, as in YAML. teacher_dim: of an untrained teacher with the student's scorer.
    """
    taught = {"teacher": "untrained"} if teacher_dim else {}
    config = parse_config({**taught, "student": dict(stage)}, "benchmark").student
    generator = torch.Generator().manual_seed(0)
    sizes = torch.tensor([entities, RELATIONS, entities])
    train = (torch.rand(triples, 3, generator=generator, dtype=torch.float64) * sizes).long()

    def fresh(dim: int, seed: int) -> Model:
        scorer = build_scorer(config.scorer, dim, config.margin, config.norm)
        rows = torch.bfloat16 if config.row_dtype == "bfloat16" else None
        options = {"reciprocal": config.reciprocal, "seed": seed, "row_dtype": rows}
        return new_model(scorer, entities, RELATIONS, ranks, **options)

    method = build_method(config, fresh(config.dim, 0), [fresh(teacher_dim, 1)] if teacher_dim else [])
    negatives = config.negatives
    sampler = Sampler(train, entities, RELATIONS, batch_size=config.batch_size, sides=negatives.sides, seed=0)
    scenes = SceneBuilder(
        sampler,
        KnownAnswers(train, entities),
        ranks,
        kind=negatives.kind,
        num=negatives.num,
        chunk=negatives.chunk,
        filtered=negatives.filtered,
        label_shares=False,
        move=config.move if config.move != "auto" else "rows" if negatives.kind in ("chunk", "triple") else "queries",
    )
    folder = Path(tempfile.gettempdir()) / "distkgd-benchmark"
    tracking = open_tracking(run_folder=folder, name="benchmark", uri=None, enabled=False, active=False)
    return Job(
        name="student",
        config=config,
        method=method,
        scenes=scenes,
        ranks=ranks,
        folder=folder,
        digest="",
        keep=2,
        validate=None,
        tracking=tracking.stage("student", {}, {}),
        display=Display(False),
    )


def peak() -> int:
    """VmHWM of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024


def child(spec: Mapping[str, Any], world: int, threads: int) -> list[dict[str, Any]]:
    """What `measure` of `spec` says on each rank, in fresh processes."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable]
        if world > 1:
            command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
        command += ["-m", "benchmarks.engine", "measure", json.dumps(dict(spec)), folder]
        env = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
        subprocess.run(command, check=True, cwd=ROOT, env=env)
        return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(world)]


@app.command(hidden=True)
def measure(spec: str, out: Path) -> None:
    """One process of a measurement: `steps` steps of a bare job after `warm` ones."""
    given = json.loads(spec)
    ranks = join_ranks("cpu")
    job = bare_job(given["stage"], given["entities"], given["triples"], ranks, given.get("teacher_dim", 0))
    progress, seconds = Progress(), []
    before = peak()
    for step in range(given.get("warm", 1) + given["steps"]):
        if step == given.get("warm", 1):
            ranks.traffic.clear()
        progress.step = step
        started = time.monotonic()
        train_step(job, progress, 0)
        seconds.append(time.monotonic() - started)
    seconds = seconds[given.get("warm", 1) :]
    job.lookahead.drop()
    shape = shape_of(job.scenes, job.method, job.config)
    found = {
        "seconds": seconds,
        "triples_per_second": job.config.batch_size / statistics.median(seconds),
        "peak": peak(),
        "peak_before_steps": before,
        "sent": {kind: n / given["steps"] for kind, n in ranks.traffic.items()},
        "expected_sent": expected_traffic(shape, job.scenes.move),
        "expected_memory": expected_memory(job.scenes, shape),
    }
    (out / f"{ranks.rank}.json").write_text(json.dumps(found))
    leave_ranks(ranks)


KL_STEP = {"scorer": "complex", "dim": 32, "method": "bkd", "batch_size": 512, "negatives": {"kind": "all"}}


@app.command()
def memory(sizes: str = "250000,1000000,2500000", worlds: str = "1,2") -> None:
    """Peak memory of a 1-vs-all KL step: 512 triples, so 1024 queries, teacher of 64 numbers, student of 32."""
    rows = []
    for world in map(int, worlds.split(",")):
        for entities in map(int, sizes.split(",")):
            spec = {"stage": KL_STEP, "entities": entities, "triples": 100_000, "teacher_dim": 64, "steps": 1}
            found = child(spec, world, 2 // world)
            most = max(found, key=lambda one: one["peak"])
            shard = sum(most["expected_memory"][kind] for kind in ("tables", "state", "gradients"))
            rows.append(
                {
                    "world": world,
                    "entities": entities,
                    "peak": most["peak"],
                    "tables_state_gradient": shard,
                    "left_over": most["peak"] - shard,
                    "seconds": statistics.median(most["seconds"]),
                }
            )
            print(
                f"{world} ranks, {entities:,} entities: peak {most['peak'] / 1e6:,.0f} MB, "
                f"tables + state + gradient {shard / 1e6:,.0f} MB, left over {rows[-1]['left_over'] / 1e6:,.0f} MB"
            )
            save("memory", {"step": KL_STEP, "teacher_dim": 64, "queries": 1024, "rows": rows})


if __name__ == "__main__":
    app()
