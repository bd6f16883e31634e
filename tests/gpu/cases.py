"""Training steps of WN18RR's size whose launches and synchronisations are counted, and how one is counted."""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from distkgd.data import Graph, load_graph
from distkgd.distributed.ranks import Ranks
from distkgd.evaluation.ranking import ranks_of
from distkgd.pipeline.config import StageConfig
from distkgd.pipeline.stage_job import Run, build_job, fresh_model
from distkgd.pipeline.stages import Stage
from distkgd.training.job import Job, Progress
from distkgd.training.loop import train_step
from tests.gpu.counts import COUNTS
from tests.gpu.kernels import kernels_there
from tests.gpu.shapes import shapes_only
from tests.toys import toy_run

DATA = "powerlaw:entities=40943,triples=86835,relations=11,skew=0.8,seed=0,valid=600,test=600"
OWN = {"kind": "triple", "num": 64}
CHUNK = {"kind": "chunk", "num": 256, "chunk": 64}
EVERY = {"kind": "all"}
SOFTMAX, SELF_ADVERSARIAL = {"name": "softmax"}, {"name": "self_adversarial"}
SECOND = {"stage_one": False, "stage_two": {"epochs": 1000}}


def stages(method: str = "scratch", distill: dict[str, Any] | None = None, **options: Any) -> dict[str, Any]:
    """The config of a student: 512 numbers a row, or 64 that a teacher of 512 teaches."""
    shape = {"scorer": "complex", "reciprocal": False, "batch_size": 1024, "negatives": OWN, "validate_every": 0}
    shape |= {"optimizer": {"name": "adam", "lr": 0.001}, "loss": {"name": "softplus"}, "epochs": 3000} | options
    if method == "scratch":
        return {"student": shape | {"dim": 512}}
    return {"teacher": shape | {"dim": 512}, "student": shape | {"dim": 64, "method": method, "distill": distill or {}}}


STEPS: dict[str, dict[str, Any]] = {
    "complex, own negatives": stages(),
    "complex, own negatives, reciprocal": stages(reciprocal=True),
    "complex, chunks": stages(negatives=CHUNK),
    "complex, shared negatives": stages(negatives={"kind": "batch", "num": 4096}, loss=SOFTMAX),
    "complex, 1-vs-all": stages(negatives=EVERY, loss=SOFTMAX, reciprocal=True),
    "complex, k-vs-all": stages(negatives=EVERY | {"labels": "known"}, loss={"name": "bce"}, reciprocal=True),
    "transe, own negatives": stages(scorer="transe"),
    "transe, chunks": stages(scorer="transe", negatives=CHUNK),
    "rotate, own negatives": stages(scorer="rotate", loss=SELF_ADVERSARIAL),
    "bkd, own negatives": stages("bkd"),
    "bkd, 1-vs-all": stages("bkd", negatives=EVERY, loss=SOFTMAX),
    "dualde, stage one": stages("dualde", {"stage_two": {"start": 2000, "epochs": 1000}}),
    "dualde, stage two": stages("dualde", SECOND),
    "dualde, soft kl": stages(
        "dualde", {"soft": "kl", "structure": False}, negatives={"kind": "batch", "num": 2048}, loss=SOFTMAX
    ),
}
RANKED = {f"ranking {scorer}": stages(scorer=scorer) for scorer in ("complex", "transe", "rotate")}
# The parts of a global batch of 1024.
ON_TWO = "two ranks: "
SPREAD = {
    f"{ON_TWO}{name}": STEPS[name]
    for name in ("complex, own negatives", "complex, chunks", "complex, 1-vs-all", "bkd, 1-vs-all", "dualde, stage two")
} | {f"{ON_TWO}complex, own negatives, rows": stages(move="rows")}
# Without our Triton kernels.
BY_TORCH = ", plain"
PLAIN = {
    f"{name}{BY_TORCH}": STEPS[name] for name in ("transe, own negatives", "transe, chunks", "rotate, own negatives")
}
CASES = STEPS | RANKED | SPREAD | PLAIN


@dataclass(frozen=True)
class Counted:
    """Of one step, or of the ranking of 512 triples, on one rank. lines: of each function, and how much each asked for.

    launched_at, synced_at, sent_at: function -> how many launches, synchronisations and collectives are its own.
    """

    launches: int
    syncs: int
    collectives: int
    bytes: int
    flops: int
    launched_at: dict[str, int]
    synced_at: dict[str, int]
    sent_at: dict[str, int]
    lines: dict[str, list[str]]

    @property
    def told(self) -> str:
        """In a line."""
        counts = f"{self.launches} launches, {self.syncs} syncs, {self.collectives} collectives"
        return f"{counts}, {self.bytes / 1e9:.2f} GB, {self.flops / 1e9:.1f} GFLOP"


def count(ranks: Ranks, name: str) -> Counted:
    """What a case asks of the pretend device of `ranks`."""
    with shapes_only(), nullcontext() if name.endswith(BY_TORCH) else kernels_there():
        return _count(ranks, name)


def _count(ranks: Ranks, name: str) -> Counted:
    run = toy_run(CASES[name], ranks, Path("/nonexistent"), graph())
    if name.startswith("ranking"):
        model = fresh_model(run, run.config.student, run.config.student.dim, 0)
        triples = run.graph.test[:512].to(ranks.device)
        return counted(lambda: ranks_of(model, triples, run.all_answers, ranks))
    job, progress = taught_job(run), Progress()
    train_step(job, progress, 0)  # the first makes what the others find
    progress.step += 1
    return counted(lambda: train_step(job, progress, 0))


def taught_job(run: Run) -> Job:
    """The job of a run's student, whose teachers are not trained."""
    stages = {stage.name: stage for stage in run.stages}
    student = stages["student"]
    return job_of(run, student, [stages[name].config for name in student.teachers])


def job_of(run: Run, stage: Stage, teachers: Sequence[StageConfig]) -> Job:
    """A job whose teachers are as untrained as its student."""
    models = [fresh_model(run, one, one.dim, seed) for seed, one in enumerate(teachers)]
    return build_job(run, stage, "digest", run.tracking.stage(stage.name, {}, {}), models)


def counted(work: Callable[[], Any]) -> Counted:
    """What `work` asks of the pretend device."""
    COUNTS.reset()
    work()
    totals: list[Counter[str]] = []
    lines: dict[str, Counter[str]] = defaultdict(Counter)
    for counter in (COUNTS.launches, COUNTS.syncs, COUNTS.collectives):
        totals.append(Counter())
        for (site, what), number in counter.items():
            totals[-1][site.name] += number
            lines[site.name][f"{site}: {what}"] += number
    return Counted(
        *(total.total() for total in totals),
        COUNTS.bytes,
        COUNTS.flops,
        *(dict(sorted(total.items())) for total in totals),
        {name: [f"{n} x {line}" for line, n in found.most_common()] for name, found in lines.items()},
    )


@cache
def graph() -> Graph:
    """Of WN18RR's size."""
    return load_graph(DATA)
