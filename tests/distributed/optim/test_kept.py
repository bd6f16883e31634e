"""Rows of a graph that has grown: those that were there stay where they are, or are pulled back."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from distkgd.distributed.optim.kept import KeptRows
from distkgd.distributed.ranks import Ranks
from distkgd.errors import ConfigError
from distkgd.models.model import Model
from distkgd.models.model_folder import save_model
from distkgd.models.newcomers import Grown
from distkgd.training.job import Progress
from distkgd.training.loop import train_step
from tests.invariants.test_resume import train_stopped, train_with_stops
from tests.jobs import toy_model
from tests.ranks import run_on_ranks, run_on_threads
from tests.toys import toy_graph, toy_job, train_some

NEW, NEW_RELATION = [3, 17, 40], [1]
STEPS, LR = 5, 0.05


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Model]:
    """A model of the toy graph, some of which is new, and its folder."""
    graph, folder = toy_graph(), str(tmp_path_factory.mktemp("kept") / "first")
    model = toy_model(graph, dim=8, dtype=torch.float32)
    Grown(model, torch.tensor(NEW), torch.tensor(NEW_RELATION)).save(folder, graph, "toy")
    return folder, model


def config_of(folder: str, old_rows: str, optimizer: str = "sgd", **more: Any) -> dict[str, Any]:
    stage = {"dim": 8, "batch_size": 24, "negatives": {"kind": "all"}, "first_rows": folder, "old_rows": old_rows}
    return {"student": {**stage, "optimizer": {"name": optimizer, "lr": LR}, **more}}


def moved(found: list[dict[str, Any]], model: Model, graph_relations: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which entities, and which relations, are no longer what they were, bit by bit."""
    rows = torch.cat([one["tables"]["student"] for one in found])
    relation = next(value for key, value in found[0]["tensors"].items() if key == "student.relation")
    assert len(relation) == 2 * graph_relations
    return (rows != model.entity.weight).any(1), (relation != model.relation).any(1)


@pytest.mark.parametrize(
    ("optimizer", "world", "more"),
    [
        ("sgd", 1, {}),
        ("adagrad", 2, {"accumulate": 2, "regulariser": {"name": "n3", "weight": 0.1}}),
        ("rowwise_adagrad", 2, {"negatives": {"kind": "chunk", "num": 9, "chunk": 4}}),
        ("adam", 2, {"row_dtype": "bfloat16", "method": "metasd", "distill": {"prune": {"rate": 0.5}}}),
        ("adam", 1, {"method": "bkd", "dropout": 0.2}),
    ],
)
def test_frozen_rows_stay_bit_by_bit_and_new_ones_move(
    begun: tuple[str, Model], optimizer: str, world: int, more: dict[str, Any]
) -> None:
    folder, model = begun
    config = config_of(folder, "frozen", optimizer, **more)
    config["student"]["optimizer"]["clip"] = 0.5
    if more.get("row_dtype"):
        model = toy_model(toy_graph(), dim=8, dtype=torch.float32)
        model.entity.weight.copy_(model.entity.weight.bfloat16())
    entities, relations = moved(run_on_threads(world, train_some, config=config, steps=STEPS), model, 5)
    assert entities.nonzero().flatten().tolist() == NEW
    assert relations.nonzero().flatten().tolist() == [1, 6]  # the relation, and its inverse
    free = moved(run_on_threads(world, train_some, config=config_of(folder, "free", optimizer), steps=STEPS), model, 5)
    assert free[0].sum() > 30 and free[1].all()


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="pip install 'distkgd[deepspeed]'")
def test_deepspeed_leaves_frozen_relations_alone(begun: tuple[str, Model]) -> None:
    config = config_of(begun[0], "frozen", "adam") | {"engine": {"name": "deepspeed", "zero": 1}}
    entities, relations = moved(run_on_ranks(2, train_some, config=config, steps=STEPS), begun[1], 5)
    assert entities.nonzero().flatten().tolist() == NEW and relations.nonzero().flatten().tolist() == [1, 6]


def anchored(ranks: Ranks, config: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    job = toy_job(config, ranks, Path("/nonexistent"))
    progress = Progress()
    for progress.step in range(STEPS):
        train_step(job, progress, 0)
    return job.method.student.entity.weight.clone(), job.method.student.relation.detach().clone()


@pytest.mark.parametrize("world", [1, 2])
def test_an_anchor_is_the_gradient_of_a_square(begun: tuple[str, Model], world: int) -> None:
    folder, model = begun
    found = run_on_threads(world, anchored, config=config_of(folder, "anchored", anchor=2.0))
    # The naive side: free steps of one rank, and the pull by hand.
    job = toy_job(config_of(folder, "free"), Ranks(), Path("/nonexistent"))
    student, progress = job.method.student, Progress()
    old = [torch.ones(len(table), 1) for table in (model.entity.weight, model.relation)]
    old[0][NEW], old[1][[1, 6]] = 0.0, 0.0
    for progress.step in range(STEPS):
        pairs = [(student.entity.weight, model.entity.weight), (student.relation.data, model.relation)]
        pulls = [2.0 * which * (now - first) for which, (now, first) in zip(old, pairs, strict=True)]
        train_step(job, progress, 0)
        for (now, _), pull in zip(pairs, pulls, strict=True):
            now.sub_(LR * pull)
    torch.testing.assert_close(torch.cat([rows for rows, _ in found]), student.entity.weight, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found[0][1], student.relation.data, atol=1e-5, rtol=1e-4)
    free = anchored(Ranks(), config_of(folder, "free"))[0]
    assert (free - student.entity.weight).abs().max() > 1e-3


def test_a_repeated_row_is_pulled_once() -> None:
    kept = KeptRows(torch.tensor([True, True, False]), torch.zeros(3, 2), 0.5)
    grad = kept.pulled(torch.tensor([0, 1, 1]), torch.ones(3, 2), torch.zeros(3, 2))
    assert grad.tolist() == [[0.5, 0.5], [0.5, 0.5], [0.0, 0.0]]


@pytest.mark.parametrize("how", ["frozen", "anchored"])
def test_a_resumed_stage_keeps_the_same_rows(begun: tuple[str, Model], how: str, tmp_path: Path) -> None:
    config = config_of(begun[0], how, "adagrad", epochs=2, validate_every=1)
    whole = train_with_stops(Ranks(), config, str(tmp_path / "whole"), 0)
    parts = train_stopped(Ranks(), config, str(tmp_path / "parts"), (3,), 0)
    assert torch.equal(whole["rows"], parts["rows"]) and torch.equal(whole["relation"], parts["relation"])
    assert whole["state"] == parts["state"]


def test_rows_whose_age_nobody_knows_are_refused(tmp_path: Path) -> None:
    graph = toy_graph()
    save_model(tmp_path / "model", toy_model(graph, dim=8, dtype=torch.float32), graph, {})
    with pytest.raises(ConfigError, match="which rows are new"):
        toy_job(config_of(str(tmp_path / "model"), "frozen"), Ranks(), tmp_path)
    with pytest.raises(ConfigError, match="set both"):
        toy_job({"student": {"dim": 8, "old_rows": "frozen"}}, Ranks(), tmp_path)
