"""The Python API: the answers of formulas written out, for every way to give words, and its doctests."""

import doctest
import importlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

import distkgd
from distkgd.data import Graph, Vocabulary, load_graph
from distkgd.data.filters import KnownAnswers, Queries
from distkgd.distributed.ranks import Ranks
from distkgd.distributed.tables import ShardedTable
from distkgd.errors import ConfigError, DataError, ModelError
from distkgd.evaluation import prediction, trained_model
from distkgd.models.model import Model
from distkgd.models.model_folder import save_model
from distkgd.scorers import SCORERS, build_scorer
from tests.docs.pages import blocks, section
from tests.jobs import toy_model
from tests.toys import labels_of, toy_graph

ENTITIES, RELATIONS = 41, 5


@pytest.fixture(scope="module")
def graph() -> Graph:
    return toy_graph(ENTITIES, RELATIONS)


def saved(folder: Path, graph: Graph, scorer: str, reciprocal: bool = True, dim: int = 8) -> distkgd.TrainedModel:
    """A loaded toy model; the numbers of its rows are random."""
    save_model(folder, toy_model(graph, scorer, dim, reciprocal=reciprocal), graph, {"source": str(folder / "data")})
    return distkgd.load(folder)


@pytest.fixture(scope="module")
def made(graph: Graph, tmp_path_factory: pytest.TempPathFactory) -> distkgd.TrainedModel:
    """A ComplEx whose data set lies beside it."""
    folder = tmp_path_factory.mktemp("api") / "model"
    model = saved(folder, graph, "complex")
    (folder / "data").mkdir()
    for split in ("train", "valid", "test"):
        triples = getattr(graph, split).tolist()
        lines = (
            f"{graph.entities.name(h)}\t{graph.relations.name(r)}\t{graph.entities.name(t)}\n" for h, r, t in triples
        )
        (folder / "data" / f"{split}.tsv").write_text("".join(lines))
    return model


def capitals(folder: Path) -> None:
    """The model of the module's examples, and its data set."""
    names = ["berlin", "france", "germany", "italy", "paris", "rome"]
    entities, relations = Vocabulary(pl.Series(names)), Vocabulary(pl.Series(["capital_of", "in"]))
    rows = {"paris": [1, 0], "france": [1, 5], "rome": [3, 0], "italy": [3, 5], "berlin": [6, 0], "germany": [6, 5]}
    table = torch.tensor([rows[name] for name in names], dtype=torch.float32)
    relation = torch.tensor([[0.0, 5.0], [1.0, 4.0]])
    model = Model(build_scorer("transe", 2), ShardedTable(table, 6, Ranks()), relation, 2, False)
    graph = Graph("capitals", *(torch.empty(0, 3).long() for _ in range(3)), entities, relations, "0" * 64, ())
    data = folder / "data"
    data.mkdir(parents=True)
    triples = "paris\tcapital_of\tfrance\nrome\tcapital_of\titaly\nberlin\tcapital_of\tgermany\nrome\tin\titaly\n"
    (data / "train.tsv").write_text(triples)
    save_model(folder / "runs/capitals/stages/student/model", model, graph, {"source": str(data)})


def test_the_examples_of_the_module_are_true(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    capitals(tmp_path)
    monkeypatch.chdir(tmp_path)
    found = doctest.testmod(
        importlib.import_module("distkgd.api"), extraglobs={"quiet": {"mlflow": {"enabled": False}}}
    )
    assert found.attempted == 20 and found.failed == 0


def test_the_example_of_the_documentation_runs_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (found,) = blocks(section("docs/use.md", "In Python"), "python")
    pytest.importorskip("pandas")
    graph = toy_graph(ENTITIES, RELATIONS)
    words = set(re.findall(r'"((?:module|class):\w+)"', found))
    assert words >= {"module:json", "module:re", "class:int"}
    names = pl.Series(sorted({*words, *(f"e{i:02d}" for i in range(ENTITIES - len(words)))}))
    entities, relations = Vocabulary(names), Vocabulary(pl.Series(["imports", "inherits", "r2", "r3", "r4"]))
    named = Graph("toy", graph.train, graph.valid, graph.test, entities, relations, graph.sha256, ())
    folder = tmp_path / "runs/demo/stages/student/model"
    saved(folder, named, "complex", dim=16)
    (folder / "data").mkdir()
    for split in ("train", "valid", "test"):
        lines = (
            f"{entities.name(h)}\t{relations.name(r)}\t{entities.name(t)}\n"
            for h, r, t in getattr(graph, split).tolist()
        )
        (folder / "data" / f"{split}.tsv").write_text("".join(lines))
    monkeypatch.chdir(tmp_path)
    *lines, last = found.strip().splitlines()
    said: dict[str, Any] = {}
    for line in [*lines, last]:
        if line and not line.startswith(("import", "m = ", "m.crop")):
            said[line] = eval(line.partition("#")[0], said)
        elif line:
            exec(line, said)
    answers = [value for line, value in said.items() if line.startswith("m.")]
    assert len(answers[0][0]) == 10 and list(answers[1]["tail"].unique()) == ["class:int", "class:str"]
    assert answers[2].shape == (1,) and answers[3].names[0].__len__() == 5
    assert distkgd.load(tmp_path / "small").scorer.dim == 8


# -- predict ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["head", "tail"])
@pytest.mark.parametrize(
    ("scorer", "reciprocal"),
    [(name, way) for name, scorer in SCORERS.items() for way in (True, False) if way or not scorer.tails_only],
)
def test_predictions_and_scores_are_the_formulas(
    scorer: str, reciprocal: bool, side: str, graph: Graph, tmp_path: Path
) -> None:
    m = saved(tmp_path / "model", graph, scorer, reciprocal)
    given: dict[str, Any] = {side: [3, 40]}
    found = m.predict(**given, relation=[1, 4], k=ENTITIES, ids=True)
    for row, (anchor, r) in enumerate(((3, 1), (40, 4))):
        a, all_ = m.entity_rows[anchor], m.entity_rows
        if side == "tail" and reciprocal:
            wanted = m.scorer.score(a, m.relation_rows[r + RELATIONS], all_)
        elif side == "tail":
            wanted = m.scorer.score(all_, m.relation_rows[r], a)
        else:
            wanted = m.scorer.score(a, m.relation_rows[r], all_)
        best = wanted.sort(descending=True)
        assert found.ids[row].tolist() == best.indices.tolist()
        torch.testing.assert_close(found.scores[row], best.values, rtol=1e-7, atol=1e-7)
        triples = [(c, r, anchor) if side == "tail" else (anchor, r, c) for c in range(ENTITIES)]
        scores = m.score(triples, ask="head" if side == "tail" else "tail", ids=True)
        torch.testing.assert_close(scores, wanted, rtol=1e-7, atol=1e-7)


WAYS: dict[str, Callable[[list[int], list[str]], Any]] = {
    "ids": lambda ids, names: ids,
    "names": lambda ids, names: names,
    "loose names": lambda ids, names: [name.upper() for name in names],
    "both": lambda ids, names: [names[0], *ids[1:]],
    "tensor": lambda ids, names: torch.tensor(ids, dtype=torch.int32),
    "array": lambda ids, names: np.array(ids),
    "array of names": lambda ids, names: np.array(names),
    "polars": lambda ids, names: pl.Series(names),
    "tuple": lambda ids, names: tuple(names),
    "generator": lambda ids, names: (name for name in names),
}


@pytest.mark.parametrize("way", [*WAYS, "pandas"])
def test_words_come_in_many_ways(way: str, made: distkgd.TrainedModel) -> None:
    ids, relations = [7, 0, 40, 7], [0, 1, 4, 2]
    give = WAYS[way] if way != "pandas" else (lambda ids, names: pytest.importorskip("pandas").Series(names))
    heads = give(ids, [made.entities.name(i) for i in ids])
    rels = give(relations, [made.relations.name(i) for i in relations])
    wanted = made.predict(head=ids, relation=relations, k=3, ids=True)
    found = made.predict(head=heads, relation=rels, k=3, ids=True)
    assert torch.equal(found.ids, wanted.ids) and torch.equal(found.scores, wanted.scores)
    assert found.questions == wanted.questions and len(found) == 4
    assert found.questions[0] == {"head": "e007", "relation": "r000"}


def test_triples_come_as_lists_tensors_arrays_and_frames(made: distkgd.TrainedModel) -> None:
    pandas = pytest.importorskip("pandas")
    triples = [(3, 1, 4), (1, 0, 40), (9, 2, 6)]
    names = [(f"e{h:03d}", f"r{r:03d}", f"e{t:03d}") for h, r, t in triples]
    wanted = made.score(triples, ids=True)
    assert wanted.shape == (3,) and len(set(wanted.tolist())) == 3
    columns = ["head", "relation", "tail"]
    given = [
        names,
        torch.tensor(triples),
        np.array(triples),
        np.array(names),
        pandas.DataFrame(names, columns=columns),
        pandas.DataFrame(triples, columns=columns)[["tail", "head", "relation"]],
        pl.DataFrame(names, schema=columns, orient="row"),
    ]
    for way in given:
        assert torch.equal(made.score(way, ids=True), wanted)
    assert made.score([]).shape == (0,)
    with pytest.raises(DataError, match="columns head, relation and tail"):
        made.score(pandas.DataFrame(names))
    with pytest.raises(DataError, match=r"one triple is given as \[triple\]"):
        made.score(names[0])


def test_one_relation_is_asked_of_many_heads(made: distkgd.TrainedModel) -> None:
    many = made.predict(head=[1, 2, 3], relation="r001", k=4, ids=True)
    assert torch.equal(many.ids[1], made.predict(head=2, relation=1, k=4, ids=True).ids[0])
    with pytest.raises(ConfigError, match="3 of head and 2 of relation"):
        made.predict(head=[1, 2, 3], relation=[0, 1], ids=True)
    for wrong in ({"head": 1, "tail": 2}, {}):
        with pytest.raises(ConfigError, match="exactly one of head and tail"):
            made.predict(relation=0, **wrong)
    assert made.predict(head=[], relation=1, ids=True).ids.shape == (0, 10)


def test_more_answers_than_there_are_entities_are_all_of_them(made: distkgd.TrainedModel) -> None:
    found = made.predict(head=[1, 2], relation=1, k=10**12, ids=True)
    assert found.ids.shape == (2, ENTITIES) and sorted(found.ids[0].tolist()) == list(range(ENTITIES))
    nobody = made.predict(head=["nobody", "no one"], relation="r001", k=10**12)
    assert len(nobody.errors) == 2


def test_more_questions_than_are_asked_at_once_keep_their_order(
    made: distkgd.TrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    heads = [i % ENTITIES for i in range(50)]
    whole = made.predict(head=heads, relation=2, k=3, exclude_known=True, ids=True)
    near, scores = made.nearest(heads, 3, ids=True), made.score([(h, 0, 1) for h in heads], ids=True)
    monkeypatch.setattr(trained_model, "QUESTIONS_AT_ONCE", 7)
    monkeypatch.setattr(prediction, "SCORES_AT_ONCE", 70)
    assert torch.equal(made.predict(head=heads, relation=2, k=3, exclude_known=True, ids=True).ids, whole.ids)
    assert torch.equal(made.nearest(heads, 3, ids=True).ids, near.ids)
    assert torch.equal(made.score([(h, 0, 1) for h in heads], ids=True), scores)


@pytest.mark.parametrize("side", ["head", "tail"])
def test_known_answers_are_left_out(side: str, made: distkgd.TrainedModel) -> None:
    graph = load_graph(made.config["source"])
    given: dict[str, Any] = {side: list(range(ENTITIES))}
    found = made.predict(**given, relation=3, k=ENTITIES, exclude_known=True, ids=True)
    anchor = torch.arange(ENTITIES)
    queries = Queries(anchor, torch.full_like(anchor, 3), torch.full_like(anchor, int(side == "tail")), anchor)
    everything = torch.cat([graph.train, graph.valid, graph.test])
    query, answer = KnownAnswers(everything, ENTITIES).pairs(queries)
    assert len(answer) > 20
    known: dict[int, set[int]] = {i: set() for i in range(ENTITIES)}
    for q, a in zip(query.tolist(), answer.tolist(), strict=True):
        known[q].add(a)
    for row, ids in enumerate(found.ids.tolist()):
        kept = [i for i in ids if i >= 0]
        assert set(kept) == set(range(ENTITIES)) - known[row] and ids[len(kept) :] == [-1] * len(known[row])
        assert found.names[row] == [made.entities.name(i) for i in kept]


def test_known_answers_of_data_that_is_not_at_hand_cannot_be_left_out(graph: Graph, tmp_path: Path) -> None:
    m = saved(tmp_path / "model", graph, "complex")
    with pytest.raises(ConfigError, match="NAME_OR_FOLDER"):
        m.predict(head=1, relation=1, exclude_known=True, ids=True)
    with pytest.raises(DataError, match="nowhere"):
        distkgd.load(tmp_path / "model", data="nowhere").predict(head=1, relation=1, exclude_known=True, ids=True)


def test_answers_are_a_frame(made: distkgd.TrainedModel) -> None:
    pytest.importorskip("pandas")
    found = made.predict(tail=["e001", "e002"], relation="r001", k=3)
    frame = found.frame()
    assert frame.columns.tolist() == ["tail", "relation", "head", "label", "rank", "id", "score"]
    assert frame["tail"].tolist() == ["e001"] * 3 + ["e002"] * 3 and frame["rank"].tolist() == [1, 2, 3] * 2
    assert frame["id"].tolist() == found.ids.flatten().tolist()
    triples = frame[["head", "relation", "tail"]]
    torch.testing.assert_close(made.score(triples, ask="head"), found.scores.flatten())


# -- words that are refused -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("e0077", "no entity of the model.*e007"),
        (41, "id 41 is outside the model, which has the ids 0 … 40"),
        (-1, "id -1 is outside the model"),
        (2.5, "2.5 is neither a text nor a whole number"),
        (None, "give exactly one"),
        (True, "True is neither"),
        (float("nan"), "nan is neither"),
        (np.int64(41), "id 41 is outside"),
        (torch.tensor(41), "id 41 is outside"),
        (1e300, "has lost its last digits"),
    ],
)
def test_words_that_mean_nothing_are_named(words: Any, said: str, made: distkgd.TrainedModel) -> None:
    with pytest.raises((DataError, ConfigError), match=said):
        made.predict(head=words, relation="r000", ids=True)
    if words is None:
        return
    found = made.predict(head=["e001", words, 3], relation="r000", k=2, ids=True)
    assert list(found.errors) == [1] and re.search(said, found.errors[1])
    assert found.names == [made.predict(head=name, relation="r000", k=2).names[0] if name else [] for name in NAMES]
    frame = found.frame()
    assert frame["error"].notna().tolist() == [False, False, True, False, False] and frame["head"][2] == str(words)


NAMES = ("e001", "", "e003")


def numbered(folder: Path, names: list[str], labels: dict[int, str] | None = None) -> distkgd.TrainedModel:
    """A ComplEx of entities with these names, and of relations 0 … 2."""
    toy = toy_graph(len(names), 3)
    entities = Vocabulary(pl.Series(names), None if labels is None else labels_of(len(names), labels))
    relations = Vocabulary(pl.Series(["0", "1", "2"]))
    graph = Graph("toy", toy.train, toy.valid, toy.test, entities, relations, toy.sha256, ())
    save_model(folder, toy_model(graph), graph, {})
    return distkgd.load(folder)


def test_a_whole_number_is_the_name_that_is_written_so_unless_rows_are_asked_for(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    names = sorted(map(str, range(30)))  # "10" comes before "2", so that no row but a few has its own number
    m = numbered(tmp_path / "model", names)
    triples = [(2, 1, 17), (10, 2, 5), (9, 0, 3)]
    columns = ["head", "relation", "tail"]
    wanted = m.score([tuple(map(str, triple)) for triple in triples])
    frame = pl.DataFrame(triples, schema=columns, orient="row")
    frame.write_parquet(tmp_path / "asked.parquet")
    ways = [triples, torch.tensor(triples), np.array(triples), frame, pandas.DataFrame(triples, columns=columns)]
    ways += [pl.read_parquet(tmp_path / "asked.parquet"), pandas.DataFrame(triples, columns=columns, dtype=float)]
    for way in ways:
        assert torch.equal(m.score(way), wanted)
        rows = [(names.index(str(h)), r, names.index(str(t))) for h, r, t in triples]
        assert torch.equal(m.score(rows, ids=True), wanted) and not torch.equal(m.score(way, ids=True), wanted)
    assert m.predict(head=[2, 10], relation=1, k=3).questions[1] == {"head": "10", "relation": "1"}
    assert m.predict(head=2, relation=1, ids=True).questions == [{"head": names[2], "relation": "1"}]
    assert m.nearest(10, 2).names == m.nearest("10", 2).names == m.nearest(names.index("10"), 2, ids=True).names
    with pytest.raises(DataError, match=r"no entity of the model .* is called '30'.*ids=True"):
        m.nearest(30)


def test_a_number_is_no_row_number_where_no_name_is_one(made: distkgd.TrainedModel) -> None:
    for ask in (
        lambda: made.score([(3, 1, 4)]),
        lambda: made.score(torch.tensor([[3, 1, 4]])),
        lambda: made.predict(head=[3, 4], relation="r001"),
        lambda: made.predict(head="e001", relation=1),
        lambda: made.nearest(3),
    ):
        with pytest.raises(DataError, match=r"is a number, and none of the model's names is one.*ids=True.*--ids"):
            ask()


def test_a_number_may_be_a_label_but_never_the_end_of_a_name(tmp_path: Path) -> None:
    m = numbered(tmp_path / "model", [f"m/{i}" for i in range(20)], {4: "1984", 7: "river"})
    assert m.predict(head=1984, relation=0, k=1).questions == [{"head": "m/4", "relation": "0"}]
    found = m.predict(head=[1984, 9], relation=0, k=1)
    assert list(found.errors) == [1] and m.predict(head="9", relation=0, k=1).questions[0]["head"] == "m/9"


def test_a_name_nobody_knows_fails_its_own_row_of_a_batch(made: distkgd.TrainedModel) -> None:
    triples = [("e003", "r001", "e004"), ("nobody", "r001", "e004"), ("e003", "r009", "e004"), ("e001", "r000", "e040")]
    with pytest.warns(UserWarning, match="2 of 4 triples have no score; triple 1: no entity .* 'nobody'"):
        scores = made.score(triples)
    assert scores.isnan().tolist() == [False, True, True, False]
    assert torch.equal(scores[[0, 3]], made.score([triples[0], triples[3]]))
    unknown = made.unknown(triples)
    assert list(unknown) == [1, 2] and "'nobody'" in unknown[1] and "'r009'" in unknown[2]
    near = made.nearest(["nobody", "e003"], 2)
    assert near.names == [[], made.nearest("e003", 2).names[0]] and list(near.errors) == [0]
    found = made.predict(head=["e001", "e002"], relation=["r009"], k=2)
    assert found.names == [[], []] and list(found.errors) == [0, 1]
    with pytest.raises(DataError, match="'r009'"):
        made.predict(head=["e001", "e002"], relation="r009")


def test_a_shared_label_is_refused_with_the_names_to_choose_from(graph: Graph, tmp_path: Path) -> None:
    model = toy_model(graph)
    labelled = Vocabulary(graph.entities.names, labels_of(graph.num_entities, {0: "bank", 3: "bank", 5: "river"}))
    with_labels = Graph("toy", graph.train, graph.valid, graph.test, labelled, graph.relations, graph.sha256, ())
    save_model(tmp_path / "model", model, with_labels, {})
    m = distkgd.load(tmp_path / "model")
    with pytest.raises(DataError, match="2 entities fit 'bank': 'e000', 'e003'"):
        m.predict(head="bank", relation="r000")
    found = m.predict(head="river", relation="r000", k=2)
    assert found.questions == [{"head": "e005", "relation": "r000"}]


def test_k_below_one_and_a_folder_without_a_model_are_refused(made: distkgd.TrainedModel, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="k=0"):
        made.predict(head="e001", relation="r000", k=0)
    with pytest.raises(ConfigError, match="k=-2"):
        made.nearest("e001", -2)
    with pytest.raises(ModelError, match="holds no model"):
        distkgd.load(tmp_path)


# -- nearest, crop, save --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scorer", ["complex", "transe", "pairre", "rotate", "rote"])
def test_the_nearest_are_those_of_a_sort(scorer: str, graph: Graph, tmp_path: Path) -> None:
    m = saved(tmp_path / "model", graph, scorer)
    rows = m.scorer.coordinates(m.entity_rows)
    for entity in (0, 17):
        if scorer in ("complex", "pairre"):
            like = torch.nn.functional.cosine_similarity(rows[entity], rows)
        else:
            like = -(rows - rows[entity]).square().sum(1).sqrt()
        like[entity] = -torch.inf
        found = m.nearest(entity, ENTITIES, ids=True)
        assert found.ids[0].tolist() == like.sort(descending=True).indices[:-1].tolist()
        torch.testing.assert_close(found.scores[0], like.sort(descending=True).values[:-1])
        assert found.answered == "neighbour" and found.questions == [{"entity": f"e{entity:03d}"}]


@pytest.mark.parametrize("scorer", ["complex", "transe", "rescal", "rote"])
def test_a_crop_is_a_model_of_its_first_columns_and_can_be_saved(scorer: str, graph: Graph, tmp_path: Path) -> None:
    m = saved(tmp_path / "model", graph, scorer)
    small = m.crop(4)
    scorer_4 = m.scorer.crop(4)
    columns = m.scorer.crop_columns(4)
    wanted = scorer_4.score(
        m.entity_rows[3, : scorer_4.entity_size], m.relation_rows[1, columns], m.entity_rows[9, : scorer_4.entity_size]
    )
    assert small.score([(3, 1, 9)], ids=True).item() == pytest.approx(wanted.item())
    assert m.score([(3, 1, 9)], ids=True).item() != pytest.approx(wanted.item())
    small.save(tmp_path / "small")
    again = distkgd.load(tmp_path / "small")
    assert again.scorer.dim == 4 and torch.equal(again.score([(3, 1, 9)], ids=True), small.score([(3, 1, 9)], ids=True))
    assert again.config["source"] == m.config["source"]
    with pytest.raises(ConfigError, match="exists"):
        small.save(tmp_path / "small")
    with pytest.raises(ConfigError, match="at most 8"):
        m.crop(10)
