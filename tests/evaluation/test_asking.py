"""What a loaded model is asked beside links: relations, embeddings, names. Formulas are written out."""

import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest
import torch

import distkgd
from distkgd.data import Graph, Vocabulary
from distkgd.errors import ConfigError, DataError
from distkgd.evaluation.name_search import search
from distkgd.models.model_folder import save_model
from tests.jobs import toy_model
from tests.toys import toy_graph

ENTITIES, RELATIONS = 31, 5


@pytest.fixture(scope="module")
def graph() -> Graph:
    return toy_graph(ENTITIES, RELATIONS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, graph: Graph) -> Path:
    """A data set whose names are the graph's."""
    made = tmp_path_factory.mktemp("data")
    for split in ("train", "valid", "test"):
        rows = getattr(graph, split).tolist()
        lines = (f"{graph.entities.name(h)}\t{graph.relations.name(r)}\t{graph.entities.name(t)}\n" for h, r, t in rows)
        (made / f"{split}.tsv").write_text("".join(lines))
    return made


def saved(place: Path, graph: Graph, scorer: str, data: Path, **how: bool) -> distkgd.TrainedModel:
    save_model(place, toy_model(graph, scorer, 8, **how), graph, {"source": str(data)})
    return distkgd.load(place)


@pytest.mark.parametrize(("scorer", "reciprocal"), [("complex", True), ("complex", False), ("rotate", False)])
def test_relations_are_ranked_by_the_formula(
    scorer: str, reciprocal: bool, graph: Graph, folder: Path, tmp_path: Path
) -> None:
    m = saved(tmp_path / "model", graph, scorer, folder, reciprocal=reciprocal)
    pairs = [(3, 30), (7, 7), (0, 12)]
    found = m.predict_relation(head=[h for h, _ in pairs], tail=[t for _, t in pairs], k=RELATIONS, ids=True)
    for row, (h, t) in enumerate(pairs):
        head, tail = m.entity_rows[h], m.entity_rows[t]
        wanted = m.scorer.score(head, m.relation_rows[:RELATIONS], tail)
        if reciprocal:
            wanted = (wanted + m.scorer.score(tail, m.relation_rows[RELATIONS:], head)) / 2
        best = wanted.sort(descending=True)
        assert found.ids[row].tolist() == best.indices.tolist()
        torch.testing.assert_close(found.scores[row], best.values, rtol=1e-6, atol=1e-6)
    assert found.answered == "relation" and found.names[0][0] == m.relations.name(int(found.ids[0, 0]))
    assert found.table()["relation"].to_list()[:RELATIONS] == found.names[0]


def test_relations_that_are_known_can_be_left_out_and_unknown_words_fail_alone(
    graph: Graph, folder: Path, tmp_path: Path
) -> None:
    m = saved(tmp_path / "model", graph, "complex", folder)
    h, _, t = graph.test[0].tolist()
    every = torch.cat([graph.train, graph.valid, graph.test])
    known = every[(every[:, 0] == h) & (every[:, 2] == t), 1].unique().tolist()
    asked = {"head": [m.entities.name(h), "nobody"], "tail": m.entities.name(t)}
    found = m.predict_relation(**asked, k=RELATIONS, exclude_known=True)
    assert sorted(i for i in found.ids[0].tolist() if i >= 0) == [r for r in range(RELATIONS) if r not in known]
    assert known and list(found.errors) == [1] and found.names[1] == []
    table = found.table()
    assert table["error"].is_not_null().to_list() == [False] * (RELATIONS - len(known)) + [True]
    with pytest.raises(ConfigError, match="2 of head and 3 of tail"):
        m.predict_relation(head=[0, 1], tail=[0, 1, 2], ids=True)


def test_an_embedding_is_the_coordinates_of_a_row(graph: Graph, folder: Path, tmp_path: Path) -> None:
    m = saved(tmp_path / "model", graph, "rotate", folder, reciprocal=False)
    assert torch.equal(m.embedding("e004"), m.entity_rows[4]) and m.embedding("e004").shape == (8,)
    assert torch.equal(m.embedding(["e004", "e001"]), m.entity_rows[[4, 1]])
    with pytest.warns(UserWarning, match="1 of 2: .*nobody"):
        found = m.embedding(["nobody", "e001"])
    assert found[0].isnan().all() and torch.equal(found[1], m.entity_rows[1])
    with pytest.raises(DataError, match="nobody"):
        m.embedding("nobody")


def test_biases_are_no_part_of_an_embedding(graph: Graph, folder: Path, tmp_path: Path) -> None:
    m = saved(tmp_path / "model", graph, "rote", folder)
    assert m.scorer.biases and torch.equal(m.embedding(4, ids=True), m.entity_rows[4, m.scorer.biases :])


def test_a_search_finds_the_strictest_first() -> None:
    names = ["Q1", "Q2", "Q3", "Q4", "paris_hilton", "q6"]
    labels = ["Paris", "Comparison", "Parish", None, "celebrity", "Pxris"]
    words = Vocabulary(pl.Series(names), pl.Series(labels))
    found = search(words, "paris", 10)
    assert [(match.name, match.how) for match in found[:3]] == [
        ("Q1", "exact"),
        ("Q3", "prefix"),
        ("paris_hilton", "prefix"),
    ]
    assert [match.how for match in found[3:]] == ["substring", "fuzzy"] and found[3].label == "Comparison"
    assert found[4] == ("q6", "Pxris", 5, "fuzzy")
    assert [match.name for match in search(words, "PARIS hil", 1)] == ["paris_hilton"]
    assert search(words, "zzzzz", 3) == [] and len(search(words, "paris", 2)) == 2
    with pytest.raises(ConfigError, match="holds no letters"):
        search(words, " _", 3)


def test_the_package_is_imported_without_torch_and_lists_what_it_has() -> None:
    code = (
        "import sys, distkgd; names = dir(distkgd); assert 'torch' not in sys.modules and 'polars' not in sys.modules; "
        "assert set(distkgd.__all__) <= set(names); [getattr(distkgd, name) for name in distkgd.__all__]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
