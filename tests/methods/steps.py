"""One step of a method on any number of ranks, beside what its formula says; importable by rank processes."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from distkgd.data import Graph
from distkgd.data.soft_labels import FILES, training_queries, write_about
from distkgd.distributed.ranks import Ranks
from distkgd.methods.base import trained_models
from distkgd.models.model import Model
from distkgd.training.job import Job, Progress
from distkgd.training.loop import train_step
from tests.covering import all_pairs
from tests.jobs import Asked, NaiveModel, spelled_out
from tests.ranks import run_on_threads
from tests.toys import in_blocks, toy_graph, toy_job

GRAPH = toy_graph(entities=15, relations=3, triples=130)
REGIMES: dict[str, dict[str, Any]] = {
    "all": {"kind": "all", "filtered": True},
    "batch": {"kind": "batch", "num": 20},
    "chunk": {"kind": "chunk", "num": 9, "chunk": 2, "sides": "uniform"},
    "triple": {"kind": "triple", "num": 5, "filtered": True},
}


def plain_sgd(method: str, distill: Mapping[str, Any], regime: str, **more: Any) -> dict[str, Any]:
    """A stage in float64 one step of which is the gradient, negated."""
    stage = {"scorer": "complex", "dim": 6, "method": method, "distill": distill, "negatives": REGIMES[regime]}
    stage |= {"init_scale": 0.8, "batch_size": 12, "epochs": 4, "optimizer": {"name": "sgd", "lr": 1.0}}
    return {"dtype": "float64", "student": stage | more}


def learned(job: Job) -> dict[str, Tensor]:
    """Every tensor of the job that an optimiser moves, entity rows as this rank has them."""
    tensors = {f"{group}.entity": one.table.weight for group, one in job.rows.items()}
    tensors |= {f"{group}.{name}": t for group, one in job.dense.items() for name, t in one.tensors.items()}
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def one_step(ranks: Ranks, config: dict[str, Any], step: int = 0) -> dict[str, Any]:
    """Losses and this rank's share of the gradients of one step."""
    job = toy_job(config, ranks, Path("/nonexistent"), GRAPH)
    before = learned(job)
    losses = train_step(job, Progress(step=step), 0)[0]
    job.prefetcher.drop()
    lr = {"evaluators": getattr(job.method.settings, "evaluator_lr", 1.0)}
    moved = {name: (before[name] - now) / lr.get(name.split(".")[0], 1.0) for name, now in learned(job).items()}
    return {"losses": losses, "gradients": moved}


Sharding = tuple[int, str, int | None]  # how many ranks, what travels, in blocks of how many numbers


def over_shardings(names: str, *values: Iterable[Any]) -> pytest.MarkDecorator:
    """Parametrises a test by `names` and its `sharding`, any two values of any two of them together."""
    rows = all_pairs(*values, [1, 3], ["rows", "queries"], [None, 20])
    return pytest.mark.parametrize([*names.split(), "sharding"], [(*row[:-3], row[-3:]) for row in rows])


def on_ranks(sharding: Sharding, fn: Callable[..., Any], config: dict[str, Any], **arguments: Any) -> list[Any]:
    """What fn(ranks, config, …) finds on each rank."""
    world, move, at_once = sharding
    moved = config | {"student": config["student"] | {"move": move}}
    with in_blocks(at_once):
        return run_on_threads(world, fn, config=moved, **arguments)


@dataclass(frozen=True)
class Naive:
    """Copies of a job's models for the formulas of one step, and the queries of its batch.

    models: those that learn, by group. teachers: finished ones, or of `models` those that they are.
    evaluators: by name.
    """

    job: Job
    step: int
    models: dict[str, NaiveModel]
    teachers: list[NaiveModel]
    evaluators: dict[str, Tensor]
    asked: list[Asked]

    def mean(self, of_query: Callable[[Asked], Tensor]) -> Tensor:
        """Over the global batch's queries."""
        return torch.stack([of_query(query) for query in self.asked]).mean()


def naive_of(config: dict[str, Any], step: int) -> Naive:
    """The naive side of `one_step`."""
    job = toy_job(config, Ranks(), Path("/nonexistent"), GRAPH)
    models = {group: NaiveModel(model) for group, model in trained_models(job.method).items()}
    group_of = {id(model): group for group, model in trained_models(job.method).items()}
    teachers = [models[group_of[id(t)]] if id(t) in group_of else NaiveModel(t) for t in job.method.teachers]
    groups = job.method.groups.values()
    evaluators = {k: t.detach().clone().requires_grad_() for group in groups for k, t in group.tensors.items()}
    return Naive(job, step, models, teachers, evaluators, spelled_out(job.input_builder, step))


def cross_entropy(model: NaiveModel, query: Asked) -> Tensor:
    """-log of the answer's share of exp(score) among all candidates."""
    z = model.scores(query, [query.answer, *query.negatives])
    return torch.log(torch.exp(z).sum()) - z[0]


def kl(theirs: Tensor, own: Tensor, temperature: float) -> Tensor:
    """T^2 KL(theirs || own) of the softmaxes of two lists of scores at temperature T."""
    p, q = (torch.exp(z / temperature) / torch.exp(z / temperature).sum() for z in (theirs, own))
    return temperature**2 * (p * (torch.log(p) - torch.log(q))).sum()


def on_one_scale(scores: Sequence[Tensor], weights: Sequence[float]) -> list[Tensor]:
    """Each teacher's scores of the answer and the other candidates as z-scores, in their average deviation and mean."""
    shares = [w / sum(weights) for w in weights]
    deviation, mean = (
        sum((w * of(z) for w, z in zip(shares, scores, strict=True)), torch.tensor(0.0))
        for of in (lambda z: z.std(correction=0), torch.mean)
    )
    return [(z - z.mean()) / z.std(correction=0) * deviation + mean for z in scores]


def toy_labels(folder: Path, teacher: Model, graph: Graph, k: int, temperature: float) -> str:
    """Soft labels of a ComplEx, DistMult or TransE teacher, as a stranger would write them with NumPy; in float64."""
    folder.mkdir()
    asked, naive = training_queries(graph), NaiveModel(teacher)
    queries = [Asked(anchor, relation, side, 0, [], set()) for relation, side, anchor in asked.tolist()]
    logits = torch.stack([naive.scores(query, range(graph.num_entities)).detach() for query in queries]) / temperature
    best = logits.topk(k, 1)
    rest = torch.logsumexp(logits.scatter(1, best.indices, -torch.inf), 1)
    for name, array in zip(FILES, (asked, best.indices, best.values, rest), strict=True):
        np.save(folder / f"{name}.npy", array.numpy())
    write_about(folder, graph, temperature, {})
    return str(folder)


def assert_step_is(
    config: dict[str, Any],
    formula: Callable[[Naive], dict[str, Tensor]],
    sharding: Sharding = (3, "queries", None),
    step: int = 0,
) -> dict[str, float]:
    """Loss terms and gradients of one step are those of `formula`.

    formula: -> its terms by name. Returns their values. What a method only reports has a "/" in its name.
    """
    naive = naive_of(config, step)
    expected = formula(naive)
    sum(expected.values(), torch.zeros(())).backward()
    gradients = {
        f"{group}.{part}": getattr(model, part).grad
        for group, model in naive.models.items()
        for part in ("entity", "relation")
    }
    gradients |= {f"evaluators.{name}": tensor.grad for name, tensor in naive.evaluators.items()}
    values = {name: float(value.detach()) for name, value in expected.items()}
    found = on_ranks(sharding, one_step, config, step=step)
    terms = {name: value for name, value in found[0]["losses"].items() if "/" not in name}
    assert terms == pytest.approx(values, rel=1e-9, abs=1e-12)
    assert found[0]["gradients"].keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert gradient is not None and gradient.abs().max() > 1e-6, name
        parts = [one["gradients"][name] for one in found]
        for part in [torch.cat(parts)] if name.endswith(".entity") else parts:
            torch.testing.assert_close(part, gradient, rtol=1e-9, atol=1e-11)
    return values
