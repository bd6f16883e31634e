"""PyKEEN's side, through its public interface and with nothing it could do without: no progress bars, no sub-batches,
no memory search, no constraint on TransE's entities. Ours has none, and PyKEEN would normalise the whole table in every
step.

Its numbers per entity are complex for ComplEx and RotatE, so 512 real ones are `embedding_dim=256`. Its evaluation runs
in batches of 32, which is what it chooses on a CPU.
"""

import tempfile
import time
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks.side_by_side.data import graph_of
from benchmarks.side_by_side.ours import Options, Round

MODELS = {"transe": "TransE", "complex": "ComplEx", "rotate": "RotatE"}
MARGINS = {"transe": 9.0, "complex": 0.0, "rotate": 9.0}


def train(options: Options) -> Round:
    """Steps of its sLCWA loop, per positive triple: from the end of an epoch's first batch to that of its last."""
    graph, batch, steps = graph_of(options["source"]), options["batch"], options["steps"]
    training = import_module("pykeen.training")
    factory = _factory(options, (steps + 1) * batch)
    loop = training.SLCWATrainingLoop(
        model=_model(options, factory),
        triples_factory=factory,
        optimizer="adagrad",
        optimizer_kwargs={"lr": 0.1},
        negative_sampler="basic",
        negative_sampler_kwargs={"num_negs_per_pos": options["negatives"]},
        automatic_memory_optimization=False,
    )
    folder = tempfile.TemporaryDirectory(prefix="distkgd-bench-")
    marks: list[float] = []
    clock = type("Clock", (training.TrainingCallback,), {"post_batch": lambda *_, **__: marks.append(_now())})
    epochs = 0
    assert len(graph.train) >= (steps + 1) * batch

    def run() -> dict[str, float]:
        nonlocal epochs
        epochs += 1
        marks.clear()
        loop.train(
            triples_factory=factory,
            num_epochs=epochs,
            batch_size=batch,
            continue_training=epochs > 1,
            use_tqdm=False,
            use_tqdm_batch=False,
            pin_memory=False,
            checkpoint_directory=folder.name,
            callbacks=clock(),
        )
        assert len(marks) == steps + 1
        return {"seconds": (marks[-1] - marks[0]) / (steps * batch)}

    run()
    return run


def evaluate(options: Options) -> Round:
    """Its rank-based evaluator, filtered by all splits, per query."""
    graph, factory = graph_of(options["source"]), _factory(options)
    model = _model(options, factory)
    evaluator = import_module("pykeen.evaluation").RankBasedEvaluator(filtered=True)
    triples = graph.test[: options["triples"]]

    def run() -> dict[str, float]:
        started = time.perf_counter()
        evaluator.evaluate(
            model,
            triples,
            batch_size=min(32, len(triples)),
            additional_filter_triples=[graph.train, graph.valid, graph.test],
            use_tqdm=False,
        )
        return {"seconds": (time.perf_counter() - started) / (2 * len(triples))}

    run()
    return run


def sample(options: Options) -> Round:
    """Batches of one pass with `BasicNegativeSampler`'s negatives, per positive triple."""
    factory, batch = _factory(options), options["batch"]
    instances = import_module("pykeen.triples.instances").BatchedSLCWAInstances.from_triples_factory(
        factory,
        batch_size=batch,
        drop_last=True,
        negative_sampler="basic",
        negative_sampler_kwargs={"num_negs_per_pos": options["negatives"]},
    )

    def run() -> dict[str, float]:
        started = time.perf_counter()
        batches = sum(1 for _ in instances)
        return {"seconds": (time.perf_counter() - started) / (batches * batch)}

    run()
    return run


def load(options: Options) -> Round:
    """`TriplesFactory.from_path`, per triple; it reads the training file, ours reads small held-out files too."""
    path = Path(options["folder"]) / "train.tsv"
    read = import_module("pykeen.triples").TriplesFactory.from_path

    def run() -> dict[str, float]:
        started = time.perf_counter()
        found = read(path)
        return {"seconds": (time.perf_counter() - started) / found.num_triples}

    return run


def serve(options: Options) -> Round:
    """`predict_target` of tails by ids, per query; its answer is a sorted frame of all entities."""
    graph, factory = graph_of(options["source"]), _factory(options)
    model = _model(options, factory)
    ask = import_module("pykeen.predict").predict_target
    questions = graph.test[: options["queries"], :2].tolist()

    def run() -> dict[str, float]:
        started = time.perf_counter()
        for head, relation in questions:
            ask(model, head=head, relation=relation).df.head(10)
        return {"seconds": (time.perf_counter() - started) / len(questions)}

    run()
    return run


def _factory(options: Options, triples: int | None = None) -> Any:
    graph = graph_of(options["source"])
    return import_module("pykeen.triples").CoreTriplesFactory(
        mapped_triples=graph.train[:triples],
        num_entities=graph.num_entities,
        num_relations=graph.num_relations,
    )


def _model(options: Options, factory: Any) -> Any:
    name, dim = options["scorer"], options["dim"]
    own = {"scoring_fct_norm": 1, "entity_constrainer": None} if name == "transe" else {}
    return getattr(import_module("pykeen.models"), MODELS[name])(
        triples_factory=factory,
        embedding_dim=dim if name == "transe" else dim // 2,
        loss="nssa",
        loss_kwargs={"margin": MARGINS[name], "adversarial_temperature": 1.0},
        random_seed=0,
        **own,
    )


def _now() -> float:
    return time.perf_counter()


ARMS: Mapping[str, Callable[[Options], Round]] = {
    "train": train,
    "evaluate": evaluate,
    "sample": sample,
    "load": load,
    "serve": serve,
}
