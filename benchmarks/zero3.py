"""Plain DeepSpeed ZeRO-3 on an nn.Embedding of all entities beside our sharded table: same model, same batches.

    python benchmarks/zero3.py compare     # 1 M entities x 64 numbers, 2 CPU ranks, adagrad and adam; about two minutes

DistMult, 1024 queries per step, 1024 negatives shared by all of them, softmax loss, float32. Each rank of each run is a
fresh process. Result in benchmarks/results/zero3.json.
"""

import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import polars as pl
import torch
import torch.nn.functional as F
import typer
from foundation import ROOT, save
from torch import Tensor, nn

from distkgd.common.console import Display
from distkgd.data import Graph, Vocabulary
from distkgd.data.filters import KnownAnswers
from distkgd.data.sampling import Sampler
from distkgd.distributed.optim.deepspeed_engine import import_deepspeed
from distkgd.distributed.ranks import Ranks, join_ranks, leave_ranks
from distkgd.models.model import new_model
from distkgd.pipeline.config import parse_config
from distkgd.pipeline.stage_job import Run, build_job, stage_seed
from distkgd.pipeline.stages import Stage
from distkgd.scorers import build_scorer
from distkgd.tracking.mlflow_runs import open_tracking
from distkgd.training.job import Progress
from distkgd.training.loop import train_step

QUERIES, NEGATIVES, RELATIONS, LR = 1024, 1024, 16, 0.1
INIT_SCALE = 0.5  # so large that losses differ from batch to batch, and the relations' steps show in them
app = typer.Typer(help=__doc__)


@dataclass(frozen=True)
class Spec:
    """One run: system is "sharded table" or "ZeRO-3"; the steps of the warm-up are not timed."""

    system: str
    optimizer: str
    entities: int
    dim: int
    world: int = 2
    warmup: int = 3
    steps: int = 5


@app.command()
def compare(entities: int = 1_000_000, dim: int = 64, optimizers: str = "adagrad,adam") -> None:
    """Both systems with every optimiser."""
    runs = []
    for optimizer in optimizers.split(","):
        pair = [run(Spec(system, optimizer, entities, dim)) for system in ("sharded table", "ZeRO-3")]
        runs += pair
        if optimizer == "adagrad":
            # Adam differs by intent: ours moves the moments of a row only in steps that touch it.
            losses = [torch.tensor(one["losses"]) for one in pair]
            torch.testing.assert_close(*losses, rtol=1e-5, atol=0.0)
    content = {"deepspeed": version("deepspeed"), "queries": QUERIES, "negatives": NEGATIVES, "runs": runs}
    save("zero3", content)


def run(spec: Spec) -> dict[str, Any]:
    """The spec and what its ranks say: lists have one entry per rank, in MB, seconds and MB handed to collectives."""
    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
        free.close()
        shared = os.environ | {"WORLD_SIZE": str(spec.world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command = [sys.executable, __file__, "one-rank", json.dumps(asdict(spec)), folder]
        ranks = [
            subprocess.Popen(command, cwd=ROOT, env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(spec.world)
        ]
        if any([rank.wait() for rank in ranks]):
            raise SystemExit(f"{spec.system} with {spec.optimizer} failed; what it said stands above")
        found = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(spec.world)]
    row = asdict(spec) | {key: [one[key] for one in found] for key in found[0]}
    row["losses"] = row["losses"][0]
    most = {key: max(row[key]) for key in ("peak_mb", "own_mb", "step_seconds", "step_mb")}
    print(
        f"{spec.system:13} {spec.optimizer:8} peak {most['peak_mb']:,.0f} MB, without imports and graph "
        f"{most['own_mb']:,.0f} MB; a step takes {most['step_seconds']:.3f} s and sends {most['step_mb']:,.2f} MB"
    )
    return row


@app.command(hidden=True)
def one_rank(spec: str, out: Path) -> None:
    """One rank of one run; leaves a file."""
    given = Spec(**json.loads(spec))
    torch.set_num_threads(1)
    ranks = join_ranks("cpu")
    build = sharded_table if given.system == "sharded table" else zero3
    if given.system == "ZeRO-3":
        import_deepspeed(ranks.device)
    graph = random_graph(given.entities)
    before = peak_mb()
    step, sent = build(given, graph, ranks)
    losses, seconds, handed = [], [], []
    for i in range(given.warmup + given.steps):
        ranks.barrier()
        started, counted = time.monotonic(), sent()
        losses.append(step(i))
        seconds.append(time.monotonic() - started)
        handed.append(sent() - counted)
    found = {
        "peak_mb": peak_mb(),
        "own_mb": peak_mb() - before,
        "step_seconds": statistics.median(seconds[given.warmup :]),
        "step_mb": statistics.mean(handed[given.warmup :]) / 1e6,
        "losses": losses,
    }
    (out / f"{ranks.rank}.json").write_text(json.dumps(found))
    leave_ranks(ranks)


def random_graph(entities: int) -> Graph:
    """20,000 random triples."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.tensor([entities, RELATIONS, entities])
    triples = (torch.rand(20_000, 3, generator=generator, dtype=torch.float64) * sizes).long()
    names = [pl.select(pl.format(f"{kind}{{}}", pl.int_range(n))) for kind, n in (("e", entities), ("r", RELATIONS))]
    vocabularies = [Vocabulary(frame.to_series()) for frame in names]
    return Graph("random", triples, triples[:0], triples[:0], *vocabularies, "0" * 64, ())


def peak_mb() -> float:
    """VmHWM of this process, in MB."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) * 1024 / 1e6


# -- the two systems; each gives (step number -> loss of the global batch, () -> bytes sent so far) -------------------


def sharded_table(spec: Spec, graph: Graph, ranks: Ranks) -> tuple[Callable[[int], float], Callable[[], float]]:
    """A stage of distkgd, stepped by its training loop."""
    student = {
        "scorer": "distmult",
        "dim": spec.dim,
        "reciprocal": False,
        "init_scale": INIT_SCALE,
        "batch_size": QUERIES,
        "negatives": {"kind": "batch", "num": NEGATIVES, "sides": "uniform"},
        "optimizer": {"name": spec.optimizer, "lr": LR},
        "validate_every": 0,
    }
    config = parse_config({"mlflow": {"enabled": False}, "student": student}, "benchmark")
    folder = Path(tempfile.gettempdir())
    tracking = open_tracking(run_folder=folder, name="zero3", uri=None, enabled=False, active=False)
    known = KnownAnswers(graph.train, graph.num_entities)
    made = Run(config, graph, ranks, folder, tracking, Display(False), known, known)
    job = build_job(made, Stage("student", config.student, ()), "", tracking.stage("student", {}, {}), [])
    progress = Progress()

    def step(number: int) -> float:
        progress.step = number
        terms, _ = train_step(job, progress, 0)
        return sum(terms.values())

    return step, lambda: sum(ranks.traffic.values())


class PlainDistMult(nn.Module):
    """What one writes without this package: every rank looks all its rows up in one embedding of all entities."""

    def __init__(self, entity: Tensor, relation: Tensor) -> None:
        super().__init__()
        self.entity = nn.Embedding(*entity.shape, _weight=entity)
        self.relation = nn.Embedding(*relation.shape, _weight=relation)

    def forward(self, anchor: Tensor, relation: Tensor, answer: Tensor, negatives: Tensor) -> Tensor:
        """[]: mean softmax loss of this rank's queries; a negative that is a query's own answer does not count."""
        rows = self.entity(torch.cat([anchor, answer, negatives])).split([len(anchor), len(answer), len(negatives)])
        query = rows[0] * self.relation(relation)
        positive = (query * rows[1]).sum(1, keepdim=True)
        scores = (query @ rows[2].T).masked_fill(answer.unsqueeze(1) == negatives, -torch.inf)
        return F.cross_entropy(torch.cat([positive, scores], 1), torch.zeros_like(answer))


def zero3(spec: Spec, graph: Graph, ranks: Ranks) -> tuple[Callable[[int], float], Callable[[], float]]:
    """An nn.Embedding made under zero.Init and trained by a DeepSpeed engine at its default sizes."""
    deepspeed = import_deepspeed(ranks.device)
    config = {
        "train_micro_batch_size_per_gpu": QUERIES // ranks.world,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": 3},
    }
    seed = stage_seed(0, "student")
    with deepspeed.zero.Init(config_dict_or_path=config):
        scorer = build_scorer("distmult", spec.dim)
        options = {"reciprocal": False, "seed": seed, "init_scale": INIT_SCALE}
        start = new_model(scorer, graph.num_entities, RELATIONS, Ranks(), **options)
        model = PlainDistMult(start.entity.weight, start.relation)
        del start
    makers = {"adagrad": partial(torch.optim.Adagrad, eps=1e-10), "adam": torch.optim.Adam}
    optimizer = makers[spec.optimizer](model.parameters(), lr=LR)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    sampler = Sampler(graph.train, graph.num_entities, RELATIONS, batch_size=QUERIES, sides="uniform", seed=seed)
    heard = listen(deepspeed.comm.comm.cdb, ranks)

    def step(number: int) -> float:
        batch = sampler.batch(number)
        mine = slice(*ranks.share(QUERIES))
        queries = batch.queries
        negatives = sampler.negatives(number, NEGATIVES)[0]
        loss = engine(queries.anchor[mine], queries.relation[mine], queries.answer[mine], negatives)
        engine.backward(loss)
        engine.step()
        return float(ranks.all_reduce(loss.detach().clone())) / ranks.world

    return step, lambda: sum(heard)


def listen(backend: Any, ranks: Ranks) -> list[float]:
    """Bytes that each of DeepSpeed's collectives hands to other ranks, counted as `Ranks.traffic` counts."""
    others = ranks.world - 1
    # name -> (the argument that is sent, its position, how often its bytes leave this rank; an all-reduce as a ring)
    kinds = {
        "all_reduce": ("tensor", 0, 2 * others / ranks.world),
        "all_gather": ("tensor", 1, others),
        "all_gather_into_tensor": ("input_tensor", 1, others),
        "reduce_scatter_tensor": ("input_tensor", 1, others / ranks.world),
        "broadcast": ("tensor", 0, others / ranks.world),
    }
    heard: list[float] = []

    def wrap(call: Callable[..., Any], argument: str, position: int, times: float) -> Callable[..., Any]:
        def wrapped(*args: Any, **options: Any) -> Any:
            tensor = options[argument] if argument in options else args[position]
            heard.append(tensor.numel() * tensor.element_size() * times)
            return call(*args, **options)

        return wrapped

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a collective that this benchmark does not count")

    for name, how in kinds.items():
        setattr(backend, name, wrap(getattr(backend, name), *how))
    for name in (
        "all_gather_base",
        "all_gather_coalesced",
        "all_to_all",
        "all_to_all_single",
        "reduce",
        "reduce_scatter",
    ):
        setattr(backend, name, refuse)
    return heard


if __name__ == "__main__":
    app()
