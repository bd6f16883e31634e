"""Models asked from their files, without being loaded: the same ranks, scores and answers as when they are."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from distkgd.data import Graph
from distkgd.data.filters import KnownAnswers, both_sides
from distkgd.distributed.checkpoint.tables import read_table, write_tensors
from distkgd.distributed.ranks import Ranks
from distkgd.errors import ModelError
from distkgd.evaluation.prediction import top_k
from distkgd.evaluation.ranking import ranks_of
from distkgd.models.export.source import open_source
from distkgd.models.model import Model, new_model
from distkgd.models.model_folder import save_model, sha256_of
from distkgd.reporting.html import ask as module
from distkgd.reporting.html.ask import ask
from distkgd.scorers import SCORERS, build_scorer
from tests.toys import toy_graph

GRAPH = toy_graph()
EVERYTHING = torch.cat([GRAPH.train, GRAPH.valid, GRAPH.test])
DIM = 16


def saved(folder: Path, scorer: str, graph: Graph = GRAPH, reciprocal: bool = False) -> Model:
    """A model that was not trained, in two files of entities and written to `folder`."""
    made = build_scorer(scorer, DIM)
    reciprocal = reciprocal or made.tails_only
    numbers = graph.num_entities, graph.num_relations
    model = new_model(made, *numbers, Ranks(), reciprocal=reciprocal, seed=3, init_scale=0.5)
    save_model(folder, model, graph, {})
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (whole,) = config["files"]["entity"]
    rows = read_table(folder, [whole], "entity", 0, graph.num_entities)
    (folder / whole).unlink()
    config["files"]["entity"] = ["entity-a.safetensors", "entity-b.safetensors"]
    for name, part in zip(config["files"]["entity"], (rows[:17], rows[17:]), strict=True):
        write_tensors(folder / name, {"entity": part.contiguous()})
        config["sha256"][name] = sha256_of(folder / name)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return model


@pytest.mark.parametrize("scorer", SCORERS)
def test_ranks_scores_and_answers_are_those_of_the_loaded_model(
    scorer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SCORES_AT_ONCE", 7 * 2 * len(GRAPH.test))  # blocks of 7 rows
    model = saved(tmp_path / "model", scorer)
    queries = both_sides(GRAPH.test)
    other = torch.arange(len(queries.anchor)) % GRAPH.num_entities
    known = KnownAnswers(EVERYTHING, GRAPH.num_entities)
    source = open_source(tmp_path / "model")
    for filter_, ties in (("filtered", "realistic"), ("filtered", "optimistic"), ("raw", "pessimistic")):
        found = ask(source, queries, other, known if filter_ == "filtered" else None, ties=ties, k=3)  # type: ignore[arg-type]
        expected = ranks_of(model, GRAPH.test, known, Ranks(), ties=ties, filter_=filter_)  # type: ignore[arg-type]
        torch.testing.assert_close(found.rank, expected.reshape(-1))
    with torch.no_grad():
        rows = model.entity.weight
        relation = model.relation[model.relation_ids(queries)]
        own = model.answer_scores(queries, rows[queries.anchor], relation, rows[queries.answer])
        beside = model.answer_scores(queries, rows[queries.anchor], relation, rows[other])
    torch.testing.assert_close((found.own, found.other), (own, beside))
    scores, ids = top_k(model, queries, 3)
    assert (ids == found.ids).float().mean() > 0.97  # an answer's own score is rounded differently
    torch.testing.assert_close(found.scores, scores, rtol=1e-4, atol=1e-4)


def test_answers_leave_out_the_other_known_ones_and_keep_the_true_one(tmp_path: Path) -> None:
    model = saved(tmp_path / "model", "complex", reciprocal=True)
    queries = both_sides(GRAPH.train[:40])
    known = KnownAnswers(EVERYTHING, GRAPH.num_entities)
    number = GRAPH.num_entities
    found = ask(open_source(tmp_path / "model"), queries, queries.answer, known, ties="realistic", k=number)
    position, entity = known.pairs(queries)
    others = entity != queries.answer[position]
    _, expected = top_k(model, queries, number, (position[others], entity[others]))
    best = [[i for i, z in zip(*row, strict=True) if z > -torch.inf] for row in _rows(found.ids, found.scores)]
    counts = known.counts(queries).tolist()
    for ours, theirs, answer, count in zip(best, expected.tolist(), queries.answer.tolist(), counts, strict=True):
        assert answer in ours and len(ours) == number - count + 1
        assert set(ours) == set(theirs[: len(ours)])


def _rows(ids: torch.Tensor, scores: torch.Tensor) -> Any:
    return zip(ids.tolist(), scores.tolist(), strict=True)


def test_a_crop_is_asked_like_the_model_it_makes(tmp_path: Path) -> None:
    model = saved(tmp_path / "model", "complex")
    queries = both_sides(GRAPH.test[:10])
    source = open_source(tmp_path / "model").crop(6)
    found = ask(source, queries, queries.answer, None, ties="realistic", k=3)
    expected = ranks_of(model.crop(6), GRAPH.test[:10], KnownAnswers(EVERYTHING, 41), Ranks(), filter_="raw")
    torch.testing.assert_close(found.rank, expected.reshape(-1))


def test_rows_are_read_by_number_in_any_order_and_more_than_once(tmp_path: Path) -> None:
    model = saved(tmp_path / "model", "distmult")
    ids = torch.tensor([40, 0, 17, 16, 17])
    assert torch.equal(open_source(tmp_path / "model").entity.rows(ids), model.entity.weight[ids])


def test_a_changed_table_is_named(tmp_path: Path) -> None:
    saved(tmp_path / "model", "distmult")
    path = tmp_path / "model" / "entity-b.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    queries = both_sides(GRAPH.test[:3])
    with pytest.raises(ModelError, match=r"entity-b\.safetensors: sha256 differs"):
        ask(open_source(tmp_path / "model"), queries, queries.answer, None, ties="realistic", k=1)
