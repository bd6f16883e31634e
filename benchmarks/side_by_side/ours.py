"""Our side of every task. `ARMS`: name -> a function that prepares one and returns its round.

A round does some work and says {"seconds": per unit of the task, …}. Preparing includes one round that is not timed, so
that compiled kernels and buffers are there.
"""

import itertools
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.side_by_side.data import graph_of
from benchmarks.side_by_side.jobs import bare_job
from benchmarks.side_by_side.roofline import gemm_rate, measure_ceilings
from benchmarks.side_by_side.tasks import PREDICTED_AT_ONCE
from distkgd.data.filters import KnownAnswers, Queries
from distkgd.data.reading.folders import read_folder
from distkgd.distributed.checkpoint.tables import Rows
from distkgd.distributed.checkpoint.writer import State, Writer
from distkgd.distributed.ranks import Ranks
from distkgd.distributed.reductions.loss_requests import reduce_over_candidates
from distkgd.evaluation.prediction import top_k
from distkgd.evaluation.ranking import ranks_of
from distkgd.kernels.build import library
from distkgd.models.model import Model, new_model
from distkgd.models.model_folder import load_model
from distkgd.scorers import build_scorer
from distkgd.training.job import Job, Progress
from distkgd.training.loop import train_step

Options = Mapping[str, Any]
Round = Callable[[], dict[str, float]]


def train(options: Options) -> Round:
    """Steps of the training loop, per positive triple. stage: as in YAML; steps: of a round."""
    job, progress = _job(options), Progress()
    steps, size = options["steps"], job.config.batch_size

    def run() -> dict[str, float]:
        started = time.perf_counter()
        for _ in range(steps):
            train_step(job, progress, 0)
            progress.step += 1
        return {"seconds": (time.perf_counter() - started) / (steps * size)}

    run()
    return run


def distil_apart(options: Options) -> Round:
    """A student's direct step and its teacher's forward pass on the same step inputs, per positive triple.

    The forward pass asks the teacher for its own loss: all scores and their sum, as a teacher's share of a
    distillation step, and no gradient.
    """
    direct = {key: value for key, value in options["stage"].items() if key != "method"}
    job, teacher = _job({**options, "stage": direct}), _job({**options, "stage": direct | {"dim": options["teacher"]}})
    steps, size, progress = options["steps"], job.config.batch_size, Progress()

    def run() -> dict[str, float]:
        seconds = 0.0
        for _ in range(steps):
            inputs = teacher.input_builder.inputs(teacher.input_builder.parts(progress.step, 1)[0])
            started = time.perf_counter()
            with torch.no_grad():
                method = teacher.method
                reduce_over_candidates(
                    {"hard": method.task.request(method.task.view(method.student, inputs, grad=False))}
                )
            train_step(job, progress, 0)
            seconds += time.perf_counter() - started
            progress.step += 1
        return {"seconds": seconds / (steps * size)}

    run()
    return run


def evaluate(options: Options) -> Round:
    """Filtered ranks of test triples, per query (two of a triple)."""
    graph, ranks = graph_of(options["source"]), Ranks()
    model = _model(options)
    known = KnownAnswers(torch.cat([graph.train, graph.valid, graph.test]), graph.num_entities)
    triples = graph.test[: options["triples"]]

    def run() -> dict[str, float]:
        started = time.perf_counter()
        ranks_of(model, triples, known, ranks)
        return {"seconds": (time.perf_counter() - started) / (2 * len(triples))}

    run()
    return run


def sample(options: Options) -> Round:
    """Scenes of one pass over the training triples, which includes what to look up where; per positive triple."""
    job = _job(options)
    first = itertools.count()
    steps = len(graph_of(options["source"]).train) // job.config.batch_size

    def run() -> dict[str, float]:
        epoch = next(first)
        started = time.perf_counter()
        for step in range(epoch * steps, (epoch + 1) * steps):
            job.input_builder.inputs(job.input_builder.parts(step, 1)[0])
        return {"seconds": (time.perf_counter() - started) / (steps * job.config.batch_size)}

    run()
    return run


def load(options: Options) -> Round:
    """Reading a folder of text into integers and vocabularies, per triple."""
    library("names")  # compiled once per machine, not once per reading

    def run() -> dict[str, float]:
        started = time.perf_counter()
        graph = read_folder(Path(options["folder"]))
        return {"seconds": (time.perf_counter() - started) / len(graph.train)}

    return run


def checkpoint(options: Options) -> Round:
    """A checkpoint of table and state until it is durable, checked and published, per byte.

    blocked: seconds per byte until training may go on.
    """
    folder = tempfile.TemporaryDirectory(prefix="distkgd-bench-")
    tables = checkpoint_tensors(options)
    size, step = sum(x.nbytes for x in tables.values()), itertools.count(1)
    writer = Writer(Path(folder.name), Ranks(), keep=1)

    def run() -> dict[str, float]:
        state = State({name: Rows(x, 0, len(x)) for name, x in tables.items()})
        started = time.perf_counter()
        writer.save(next(step), state)
        blocked = time.perf_counter() - started
        writer.wait()
        seconds = time.perf_counter() - started
        assert folder.name  # it lives as long as the round does
        return {"seconds": seconds / size, "blocked": blocked / size}

    run()
    return run


def serve(options: Options) -> Round:
    """The ten best tails of one query at a time, per query."""
    graph, model = graph_of(options["source"]), _model(options)
    columns = [graph.test[i : i + 1].unbind(1) for i in range(options["queries"])]
    queries = [Queries(head, relation, torch.zeros_like(head), tail) for head, relation, tail in columns]

    def run() -> dict[str, float]:
        started = time.perf_counter()
        for query in queries:
            top_k(model, query, 10)
        return {"seconds": (time.perf_counter() - started) / len(queries)}

    run()
    return run


def inference(options: Options) -> Round:
    """The ten best tails of every test query, some at once, per query (DualDE Table 6).

    all: seconds of all of them. bytes: of the tables. model: folder of a finished model, in place of a made one of
    `scorer` and `dim`. queries: so many of the test split, 0: all. device: where it runs.
    """
    graph, device = graph_of(options["source"]), torch.device(options["device"])
    if "model" in options:
        model = load_model(Path(options["model"]), Ranks(device=device)).model
    else:
        model = _model(options, device)
    head, relation, tail = graph.test[: options["queries"] or None].to(device).unbind(1)
    columns = [column.split(PREDICTED_AT_ONCE) for column in (head, relation, torch.zeros_like(head), tail)]
    chunks = [Queries(*parts) for parts in zip(*columns, strict=True)]

    def run() -> dict[str, float]:
        started = time.perf_counter()
        for queries in chunks:
            top_k(model, queries, 10)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        tables = model.entity.weight, model.relation
        held = sum(table.numel() * table.element_size() for table in tables)
        return {"seconds": seconds / len(head), "all": seconds, "bytes": float(held), "queries": float(len(head))}

    run()
    return run


def checkpoint_tensors(options: Options) -> dict[str, Tensor]:
    """A table and its Adagrad state."""
    shape = options["entities"], options["dim"]
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name in ("weight", "weight.sum")}


def _job(options: Options) -> Job:
    graph = graph_of(options["source"])
    taught = options.get("teacher", 0) if options["stage"].get("method", "scratch") != "scratch" else 0
    return bare_job(options["stage"], graph.train, graph.num_entities, graph.num_relations, Ranks(), taught)


def _model(options: Options, device: torch.device | None = None) -> Model:
    graph, scorer = graph_of(options["source"]), build_scorer(options["scorer"], options["dim"])
    ranks = Ranks(device=device or "cpu")
    return new_model(scorer, graph.num_entities, graph.num_relations, ranks, reciprocal=False, seed=0)


def ceilings(options: Options) -> Round:
    """What this machine reaches at best (see roofline.py)."""
    return lambda: vars(measure_ceilings(options["numbers"])).copy()


def products(options: Options) -> Round:
    """Matrix products, per FLOP, at the rate of the moment."""
    return lambda: {"seconds": 1.0 / gemm_rate(options["numbers"])}


ARMS: Mapping[str, Callable[[Options], Round]] = {
    "train": train,
    "distil_apart": distil_apart,
    "evaluate": evaluate,
    "sample": sample,
    "load": load,
    "checkpoint": checkpoint,
    "serve": serve,
    "inference": inference,
    "ceilings": ceilings,
    "products": products,
}
