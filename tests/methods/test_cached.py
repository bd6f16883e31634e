"""Soft labels in files: as the teacher itself with all entities, as one outcome what they do not name, with few."""

import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor

from distkgd.data.soft_labels import FILES, SoftLabels, digest_of, training_queries, write_about
from distkgd.distributed.ranks import Ranks
from distkgd.distributed.reductions import query_blocks
from distkgd.errors import ConfigError, DataError
from distkgd.evaluation.soft_labels import averaged, write_labels
from distkgd.models.model_folder import save_model
from distkgd.pipeline.config import parse_config
from tests.jobs import Asked, NaiveModel, toy_model
from tests.methods.steps import (
    GRAPH,
    Naive,
    Sharding,
    assert_step_is,
    cross_entropy,
    kl,
    one_step,
    over_shardings,
    plain_sgd,
    toy_labels,
)
from tests.ranks import run_on_threads
from tests.toys import toy_graph

TEACHER = toy_model(GRAPH, "complex", 8, seed=4)
NAIVE = NaiveModel(TEACHER)
FEW = 4


def written(folder: Path, k: int, temperature: float) -> str:
    return toy_labels(folder, TEACHER, GRAPH, k, temperature)


def soft(naive: Naive, query: Asked, k: int, temperature: float) -> Tensor:
    """T^2 KL over the candidates that have labels, and all others as one outcome."""
    theirs = NAIVE.scores(query, range(GRAPH.num_entities)).detach() / temperature
    named = set(theirs.topk(k).indices.tolist())
    everyone = [query.answer, *query.negatives]
    z = naive.models["student"].scores(query, everyone) / temperature
    p = [torch.exp(theirs[e]) for e in everyone if e in named]
    q = [torch.exp(z[i]) for i, e in enumerate(everyone) if e in named]
    if others := [torch.exp(z[i]) for i, e in enumerate(everyone) if e not in named]:
        unnamed = [torch.exp(theirs[e]) for e in range(GRAPH.num_entities) if e not in named]
        p.append(sum(unnamed) * len(others) / len(unnamed))
        q.append(sum(others))
    p, q = (torch.stack(x) / sum(x) for x in (p, q))
    return temperature**2 * (p * (torch.log(p) - torch.log(q))).sum()


@over_shardings("k kind", [FEW, GRAPH.num_entities], ["all", "batch"])
def test_a_step_learns_from_the_named_entities_and_all_others_as_one(
    k: int, kind: str, sharding: Sharding, tmp_path: Path
) -> None:
    labels = written(tmp_path / "labels", k, 2.0)
    options = {"labels": labels, "temperature": 2.0, "weight": 0.7, "hard_weight": 0.3}

    def terms(naive: Naive) -> dict[str, Tensor]:
        student = naive.models["student"]
        return {
            "soft": 0.7 * naive.mean(lambda query: soft(naive, query, k, 2.0)),
            "hard": 0.3 * naive.mean(lambda query: cross_entropy(student, query)),
        }

    assert_step_is(plain_sgd("bkd", options, kind), terms, sharding)


@pytest.mark.parametrize("kind", ["all", "batch"])
def test_block_by_block_of_queries_it_is_the_same_step(kind: str, tmp_path: Path) -> None:
    """Large batches are met in blocks of queries (`query_blocks`)."""
    options = {"labels": written(tmp_path / "labels", FEW, 1.0)}
    for config in (plain_sgd("bkd", options, kind, move=move) for move in ("rows", "queries")):
        whole = one_step(Ranks(), config)
        with patch.object(query_blocks, "_number_of_blocks", lambda *_: 3):
            cut = run_on_threads(2, one_step, config=config)
        assert cut[0]["losses"] == pytest.approx(whole["losses"], rel=1e-9)
        entity = torch.cat([one["gradients"]["student.entity"] for one in cut])
        torch.testing.assert_close(entity, whole["gradients"]["student.entity"], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", ["all", "batch"])
def test_labels_of_all_entities_are_the_teacher_itself(kind: str, tmp_path: Path) -> None:
    labels = written(tmp_path / "labels", GRAPH.num_entities, 1.0)

    def terms(naive: Naive) -> dict[str, Tensor]:
        def of(query: Asked) -> Tensor:
            everyone = [query.answer, *query.negatives]
            return kl(NAIVE.scores(query, everyone).detach(), naive.models["student"].scores(query, everyone), 1.0)

        return {"soft": naive.mean(of)}

    assert_step_is(plain_sgd("bkd", {"labels": labels, "hard_weight": 0.0}, kind), terms)


def test_what_is_written_of_models_is_what_a_stranger_writes(tmp_path: Path) -> None:
    for name, model in (("one", TEACHER), ("two", toy_model(GRAPH, "transe", 6, reciprocal=False, seed=5))):
        save_model(tmp_path / name, model, GRAPH, {"source": "toy"})
    graph = str(tmp_path / "graph")
    Path(graph).mkdir()
    for split in ("train", "valid", "test"):
        rows = getattr(GRAPH, split).tolist()
        names = (GRAPH.entities.names, GRAPH.relations.names)
        lines = [f"{names[0][h]}\t{names[1][r]}\t{names[0][t]}\n" for h, r, t in rows]
        (tmp_path / "graph" / f"{split}.txt").write_text("".join(lines), encoding="utf-8")
    number = write_labels([tmp_path / "one"], tmp_path / "mine", k=FEW, temperature=2.0, data=graph)
    mine, theirs = (SoftLabels(folder) for folder in (tmp_path / "mine", written(tmp_path / "theirs", FEW, 2.0)))
    mine.check(GRAPH, 2.0)
    assert number == len(training_queries(GRAPH)) and mine.k == FEW
    for name in FILES:
        a, b = (np.load(one.folder / f"{name}.npy") for one in (mine, theirs))
        np.testing.assert_allclose(a, b, rtol=1e-5)
    both = [torch.tensor([[1.0, 3.0]]), torch.tensor([[40.0, 20.0]])]
    assert averaged(both, [3.0, 1.0], "none").tolist() == [[10.75, 7.25]]
    assert averaged(both, [3.0, 1.0], "zscore").diff().item() == pytest.approx((0.75 - 0.25) * (0.75 * 2 + 0.25 * 20))
    write_labels([tmp_path / "one", tmp_path / "two"], tmp_path / "m", k=2, weights=[1, 0.25], data=graph)
    with pytest.raises(ConfigError, match="one finite number for each model, not all 0: 1 for 2"):
        write_labels([tmp_path / "one", tmp_path / "two"], tmp_path / "n", k=2, weights=[1.0], data=graph)


def broken(folder: Path, how: str) -> None:
    if how == "sha256":
        np.save(folder / "rest.npy", np.load(folder / "rest.npy") + 1)
        return
    if how == "missing":
        for name in FILES:
            np.save(folder / f"{name}.npy", np.load(folder / f"{name}.npy")[1:])
    elif how == "order":
        np.save(folder / "queries.npy", np.load(folder / "queries.npy")[::-1].copy())
    elif how == "k":
        np.save(folder / "entities.npy", np.load(folder / "entities.npy")[:, 1:])
    elif how == "ids":
        np.save(folder / "entities.npy", np.load(folder / "entities.npy") + 10)
    elif how == "nan":
        np.save(folder / "logits.npy", np.load(folder / "logits.npy") * np.nan)
    write_about(folder, GRAPH, 2.0, {})


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("sha256", "rest.npy: its sha256 differs"),
        ("missing", r"lacks 1 of \d+ training queries, the first is \(e"),
        ("order", "rows must ascend"),
        ("k", r"logits.npy is float64 \[\d+, 4\]|entities.npy is int64 \[\d+, 3\], and must be int \[\d+, 4\]"),
        ("ids", "entities.npy: ids must be -1 to 14"),
        ("nan", "logits.npy holds NaN"),
    ],
)
def test_files_that_are_wrong_are_named(how: str, said: str, tmp_path: Path) -> None:
    folder = Path(written(tmp_path / "labels", FEW, 2.0))
    broken(folder, how)
    with pytest.raises(DataError, match=said):
        SoftLabels(folder).check(GRAPH, 2.0)


def test_labels_of_another_graph_or_temperature_are_refused(tmp_path: Path) -> None:
    labels = SoftLabels(written(tmp_path / "labels", FEW, 2.0))
    labels.check(GRAPH, 2.0)
    with pytest.raises(DataError, match="labels of other entities than toy"):
        labels.check(toy_graph(entities=16, relations=3, triples=130), 2.0)
    with pytest.raises(DataError, match=r"labels of temperature 2.0, and the stage's is 1.0"):
        labels.check(GRAPH, 1.0)
    with pytest.raises(DataError, match="holds no soft labels"):
        SoftLabels(tmp_path)
    about = json.loads((labels.folder / "labels.json").read_text(encoding="utf-8"))
    assert about["entities"] == digest_of(GRAPH.entities)


@pytest.mark.parametrize(
    ("stage", "said"),
    [
        ({"method": "bkd", "distill": {"labels": "x", "divergence": "js"}}, "labels are for divergence: kl"),
        (
            {"method": "bkd", "distill": {"labels": "x"}, "negatives": {"kind": "triple"}},
            "negatives.kind: all or batch",
        ),
        ({"method": "dualde", "distill": {"labels": "x"}}, "labels"),
    ],
)
def test_what_labels_are_not_for_is_refused(stage: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse_config({"student": stage}, "test")


def test_labels_stand_in_place_of_a_teacher() -> None:
    student = {"method": "bkd", "distill": {"labels": "x"}}
    assert parse_config({"student": student}, "test").student.distill.labels == "x"
    with pytest.raises(ConfigError, match="bkd with labels from files needs no teacher, and got 1"):
        parse_config({"teacher": "a/path", "student": student}, "test")
    with pytest.raises(ConfigError, match="needs a teacher"):
        parse_config({"student": {"method": "bkd"}}, "test")
