"""TorchKGE's side. It has no RotatE, and no negatives shared by a batch or chunk.

Its data loader draws one negative per triple, so batches are made by its sampler and given to its `Trainer`. Its TransE
normalises the entities it looks up, which is part of that model; of its losses, which sum over pairs, LogisticLoss is
the nearest.
Evaluation makes [batch, entities, dim] tensors: batches of 8 keep them at 0.7 GB for 512 numbers.
"""

import time
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from benchmarks.side_by_side.data import graph_of
from benchmarks.side_by_side.ours import Options, Round

EVALUATION_BATCH = 8


def train(options: Options) -> Round:
    """Steps of its trainer with its uniform sampler, per positive triple."""
    graph, batch, steps = graph_of(options["source"]), options["batch"], options["steps"]
    model, kg = _model(options), _knowledge_graph(options, graph.train)
    sampler = import_module("torchkge.sampling").UniformNegativeSampler(kg, n_neg=options["negatives"])
    trainer = import_module("torchkge.utils.training").Trainer(
        model,
        import_module("torchkge.utils.losses").LogisticLoss(),
        kg,
        1,
        batch,
        torch.optim.Adagrad(model.parameters(), lr=0.1),
        sampling_type="unif",
    )
    at = 0

    def run() -> dict[str, float]:
        nonlocal at
        started = time.perf_counter()
        for _ in range(steps):
            at = at if at + batch <= len(graph.train) else 0
            head, relation, tail = graph.train[at : at + batch].T.contiguous().unbind(0)
            at += batch
            nh, nt = sampler.corrupt_batch(head, tail, relation)
            trainer.process_batch({"h": head, "t": tail, "r": relation, "nh": nh, "nt": nt})
        return {"seconds": (time.perf_counter() - started) / (steps * batch)}

    run()
    return run


def evaluate(options: Options) -> Round:
    """Its link-prediction evaluator, per query; raw and filtered ranks come together there."""
    graph = graph_of(options["source"])
    model, triples = _model(options), graph.test[: options["triples"]]
    everything = _knowledge_graph(options, torch.cat([graph.train, graph.valid, graph.test]))
    known = {key: getattr(everything, key) for key in ("dict_of_heads", "dict_of_tails", "dict_of_rels")}
    kg = _knowledge_graph(options, triples, **known)
    make = import_module("torchkge.evaluation").LinkPredictionEvaluator

    def run() -> dict[str, float]:
        started = time.perf_counter()
        with torch.no_grad():
            make(model, kg).evaluate(b_size=EVALUATION_BATCH, verbose=False)
        return {"seconds": (time.perf_counter() - started) / (2 * len(triples))}

    run()
    return run


def _knowledge_graph(options: Options, triples: Tensor, **known: Any) -> Any:
    graph = graph_of(options["source"])
    head, relation, tail = triples.T.contiguous().unbind(0)
    return import_module("torchkge.data_structures").KnowledgeGraph(
        kg={"heads": head, "tails": tail, "relations": relation},
        ent2ix={i: i for i in range(graph.num_entities)},
        rel2ix={i: i for i in range(graph.num_relations)},
        **known,
    )


def _model(options: Options) -> Any:
    graph, dim = graph_of(options["source"]), options["dim"]
    models = import_module("torchkge.models")
    if options["scorer"] == "transe":
        return models.TransEModel(dim, graph.num_entities, graph.num_relations, dissimilarity_type="L1")
    return models.ComplExModel(dim // 2, graph.num_entities, graph.num_relations)


ARMS: Mapping[str, Callable[[Options], Round]] = {"train": train, "evaluate": evaluate}
