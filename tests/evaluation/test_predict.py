"""The best candidates of a query, and how words become a query."""

from importlib import import_module
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch

from distkgd.data import Graph, Vocabulary
from distkgd.data.filters import KnownAnswers, Queries
from distkgd.distributed.ranks import Ranks
from distkgd.errors import ConfigError, DataError, ModelError
from distkgd.evaluation.entity_lookup import find_rows, only_row
from distkgd.evaluation.prediction import data_of, predict, table, top_k
from distkgd.models.model import Model, new_model
from distkgd.models.model_folder import LoadedModel, save_model
from distkgd.scorers import SCORERS, build_scorer
from tests.ranks import run_on_ranks
from tests.toys import toy_graph

ENTITIES, RELATIONS = 37, 4


def model_of(scorer: str, ranks: Ranks, reciprocal: bool) -> Model:
    made = build_scorer(scorer, 16)
    return new_model(
        made, ENTITIES, RELATIONS, ranks, reciprocal=reciprocal, seed=3, init_scale=0.5, dtype=torch.float64
    )


def some_queries() -> Queries:
    anchor = torch.tensor([0, 5, 36, 5, 17, 17])
    return Queries(anchor, torch.tensor([0, 3, 2, 3, 1, 1]), torch.tensor([0, 1, 0, 0, 1, 0]), torch.zeros_like(anchor))


def naive_scores(model: Model, queries: Queries) -> torch.Tensor:
    """[Q, N] one triple at a time, straight from the scorer's formula."""
    rows = []
    for anchor, relation, side in zip(*(column.tolist() for column in queries[:3]), strict=True):
        a = model.entity.weight[anchor]
        scores = []
        for c in model.entity.weight:
            if model.reciprocal:
                scores.append(model.scorer.score(a, model.relation[relation + RELATIONS * side], c))
            else:
                h, t = (c, a) if side else (a, c)
                scores.append(model.scorer.score(h, model.relation[relation], t))
        rows.append(torch.stack(scores))
    return torch.stack(rows)


def ask(ranks: Ranks, scorer: str, reciprocal: bool, k: int, **more: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return top_k(model_of(scorer, ranks, reciprocal), some_queries(), k, **more)


@pytest.mark.parametrize(
    ("scorer", "reciprocal"),
    [(name, way) for name, scorer in SCORERS.items() for way in (True, False) if way or not scorer.tails_only],
)
def test_top_k_is_a_sort_of_the_scores_of_all_entities(scorer: str, reciprocal: bool) -> None:
    wanted = naive_scores(model_of(scorer, Ranks(), reciprocal), some_queries()).sort(1, descending=True)
    scores, ids = ask(Ranks(), scorer, reciprocal, 9)
    torch.testing.assert_close(scores, wanted.values[:, :9], rtol=1e-6, atol=1e-6)
    assert ids.tolist() == wanted.indices[:, :9].tolist()


@pytest.mark.parametrize("scores_at_once", [1, 6 * 10, 6 * 36])
@pytest.mark.parametrize("scorer", ["complex", "transe", "rotate"])
def test_blocks_do_not_change_the_answer(scorer: str, scores_at_once: int) -> None:
    whole = ask(Ranks(), scorer, False, 7)
    blocks = ask(Ranks(), scorer, False, 7, scores_at_once=scores_at_once)
    assert blocks[1].tolist() == whole[1].tolist()
    torch.testing.assert_close(blocks[0], whole[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("k", [4, 20])  # 20 is more than a shard of three holds
def test_any_number_of_ranks_gives_the_same_answer(k: int) -> None:
    exclude = (torch.tensor([0, 0, 2]), torch.tensor([1, 30, 4]))
    one = ask(Ranks(), "complex", True, k, exclude=exclude)
    for scores, ids in run_on_ranks(3, ask, scorer="complex", reciprocal=True, k=k, exclude=exclude):
        assert ids.tolist() == one[1].tolist()
        torch.testing.assert_close(scores, one[0], rtol=1e-9, atol=1e-9)


def test_excluded_entities_come_last_with_score_minus_infinity() -> None:
    model, queries = model_of("distmult", Ranks(), True), some_queries()
    first = top_k(model, queries, 3)[1]
    exclude = (torch.tensor([0, 0, 4]), torch.tensor([int(first[0, 0]), int(first[0, 2]), int(first[4, 1])]))
    wanted = naive_scores(model, queries)
    wanted[exclude] = -torch.inf
    for scores_at_once in (30, 1 << 20):
        scores, ids = top_k(model, queries, ENTITIES, exclude, scores_at_once)
        assert ids[1].tolist() == wanted[1].sort(descending=True).indices.tolist()
        assert ids[0, :10].tolist() == wanted[0].sort(descending=True).indices[:10].tolist()
        assert (scores[0] == -torch.inf).sum() == 2 and set(ids[0, -2:].tolist()) == set(first[0, [0, 2]].tolist())
        assert int(first[4, 1]) not in ids[4, :-1].tolist()


def test_equal_scores_are_ordered_by_id_in_any_blocks() -> None:
    model, queries = model_of("distmult", Ranks(), True), some_queries()
    # Whole numbers: their products have no rounding that could tell equal rows of different blocks apart.
    for tensor, scale in ((model.entity.weight, 2.0), (model.relation, 20.0)):
        tensor.mul_(scale).round_()
    model.entity.weight[10:30] = model.entity.weight[20]
    wanted = naive_scores(model, queries).sort(dim=1, descending=True, stable=True).indices
    for scores_at_once in (1, 6 * 7, 1 << 20):
        for k in range(1, ENTITIES):  # also where the cut goes through equal ones
            assert top_k(model, queries, k, None, scores_at_once)[1].tolist() == wanted[:, :k].tolist()


@pytest.mark.parametrize("scores_at_once", [1, 1 << 22])
def test_scores_that_are_no_numbers_come_last(scores_at_once: int) -> None:
    model, queries = model_of("distmult", Ranks(), True), some_queries()
    expected, order = top_k(model, queries, 41)
    model.entity.weight[7] = torch.nan
    queries = Queries(*(column[(queries.anchor != 7)] for column in queries))
    kept = order[some_queries().anchor != 7]
    scores, ids = top_k(model, queries, 41, scores_at_once=scores_at_once)
    assert (ids[:, -1] == 7).all() and (scores[:, -1] == -torch.inf).all()
    for found, wanted in zip(ids[:, :-1].tolist(), kept.tolist(), strict=True):
        assert found == [i for i in wanted if i != 7]
    assert expected.isfinite().all()


def test_more_answers_than_entities_are_all_entities() -> None:
    assert top_k(model_of("distmult", Ranks(), True), some_queries(), 500)[0].shape == (6, ENTITIES)


# -- words ----------------------------------------------------------------------------------------------------------


def vocabulary(**labels: str | None) -> Vocabulary:
    return Vocabulary(pl.Series(list(labels)), pl.Series(list(labels.values()), dtype=pl.String))


def test_an_exact_name_wins_over_a_label_and_a_label_over_a_loose_match() -> None:
    words = vocabulary(dog="x", e1="dog", e2="Dog House", e3="dog house", **{"DOG HOUSE": None})
    assert find_rows(words, "entity", "dog") == [0]
    assert find_rows(words, "entity", "dog house") == [3]
    assert find_rows(words, "entity", "DOG HOUSE") == [4]
    assert find_rows(words, "entity", "_dOg_house ") == [4]
    assert find_rows(vocabulary(a="Cat", b="Cow"), "entity", "_CAT") == [0]


def test_only_a_word_that_is_no_name_and_no_label_has_all_names_written_loosely() -> None:
    words = vocabulary(a="Cat", b="Cow")
    for text, row in (("b", 1), ("Cow", 1)):
        assert find_rows(words, "entity", text) == [row] and "loose" not in vars(words)
    assert find_rows(words, "entity", "cow") == [1] and "loose" in vars(words)


def test_entities_with_one_label_are_all_found() -> None:
    words = vocabulary(a="bank", b="bank", c="bank", d="river")
    assert find_rows(words, "entity", "bank") == [0, 1, 2]


@pytest.mark.parametrize("text", ["_hypernym", "hypernym", "Hypernym", " HYPERNYM"])
def test_a_relation_may_be_written_loosely(text: str) -> None:
    assert only_row(Vocabulary(pl.Series(["_also_see", "_hypernym"])), "relation", text) == 1
    assert only_row(Vocabulary(pl.Series(["_also_see", "_hypernym"])), "relation", "also see") == 0


def test_the_end_of_a_path_is_enough_when_only_one_relation_ends_so() -> None:
    paths = Vocabulary(pl.Series(["/film/film/genre", "/film/film/language", "/tv/program/genre", "/x/subgenre"]))
    assert only_row(paths, "relation", "language") == 1
    assert only_row(paths, "relation", "film/genre") == 0
    with pytest.raises(DataError, match=r"2 relations fit 'genre'.*/film/film/genre.*/tv/program/genre.*give one"):
        only_row(paths, "relation", "genre")
    assert find_rows(Vocabulary(pl.Series(["class:collections.OrderedDict"])), "entity", "ordereddict") == [0]


@pytest.mark.parametrize("text", ["hypernim", "", "/", "_"])
def test_an_unknown_word_is_an_error_that_knows_its_neighbours(text: str) -> None:
    words = Vocabulary(pl.Series(["_also_see", "_hypernym"]))
    with pytest.raises(DataError, match="no relation of the model") as error:
        only_row(words, "relation", text)
    assert ("_hypernym" in str(error.value)) == (text == "hypernim")
    with pytest.raises(DataError, match="no entity of the model"):
        find_rows(words, "entity", text)


# -- questions ------------------------------------------------------------------------------------------------------


@pytest.fixture
def graph() -> Graph:
    return toy_graph(entities=ENTITIES, relations=RELATIONS)


@pytest.fixture
def loaded(graph: Graph) -> LoadedModel:
    return LoadedModel(model_of("complex", Ranks(), False), graph.entities, graph.relations, {"source": "nowhere"})


@pytest.mark.parametrize("side", [0, 1])
def test_known_triples_are_marked_by_their_split_and_can_be_dropped(
    graph: Graph, loaded: LoadedModel, side: int
) -> None:
    triple = graph.test[0].tolist()
    words = {"head": None, "tail": None, ("tail" if side else "head"): graph.entities.name(triple[2 * side])}
    asked = {**words, "relation": graph.relations.name(triple[1]), "top": ENTITIES}
    found = predict(loaded, graph, **asked)
    assert [a.rank for a in found.answers] == list(range(1, ENTITIES + 1))
    marked = {a.name: a.known for a in found.answers if a.known}
    assert marked[graph.entities.name(triple[2 - 2 * side])] == "test"
    number = torch.tensor([triple[2 * side]]), torch.tensor([triple[1]]), torch.tensor([side])
    everything = torch.cat([graph.train, graph.valid, graph.test])
    _, answers = KnownAnswers(everything, ENTITIES).pairs(Queries(*number, number[0]))
    assert set(marked) == {graph.entities.name(int(i)) for i in answers}
    fresh = predict(loaded, graph, **asked, exclude_known=True)
    assert [a.name for a in fresh.answers] == [a.name for a in found.answers if not a.known]


def test_a_question_has_exactly_one_gap(graph: Graph, loaded: LoadedModel) -> None:
    for head, tail in ((None, None), ("e001", "e002")):
        with pytest.raises(ConfigError, match="exactly one of --head and --tail"):
            predict(loaded, graph, head=head, relation="r001", tail=tail)


def test_without_data_nothing_is_marked_and_nothing_can_be_dropped(loaded: LoadedModel) -> None:
    nothing, note = data_of(loaded, "the model", None)
    assert nothing is None and "nowhere" in note
    found = predict(loaded, None, head="e001", relation="r001", tail=None, top=3)
    assert [a.known for a in found.answers] == [None] * 3
    assert [str(c.header) for c in table(found).columns] == ["rank", "score", "name"]
    with pytest.raises(ConfigError, match="--data"):
        predict(loaded, None, head="e001", relation="r001", tail=None, exclude_known=True)


def test_data_that_the_user_names_must_be_there_and_fit(loaded: LoadedModel, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="elsewhere"):
        data_of(loaded, "the model", "elsewhere")
    (tmp_path / "train.tsv").write_text("a\tr\tb\n", encoding="utf-8")
    with pytest.raises(ModelError, match="other entities"):
        data_of(loaded, "the model", str(tmp_path))
    own = LoadedModel(loaded.model, loaded.entities, loaded.relations, {"source": str(tmp_path)})
    assert data_of(own, "the model", None)[0] is None


def test_a_shared_label_is_told_with_the_names_to_choose_from(graph: Graph, loaded: LoadedModel) -> None:
    labels = pl.Series(["bank"] * 8 + ["x"] * (ENTITIES - 8))
    shared = LoadedModel(loaded.model, Vocabulary(graph.entities.names, labels), graph.relations, {})
    found = predict(shared, graph, head="bank", relation="R000", tail=None, top=2)
    counts = torch.bincount(graph.train[:, [0, 2]].reshape(-1), minlength=ENTITIES)[:8]
    best = int(counts.argmax())
    assert f"(bank [e{best:03d}], r000, ?)" == found.question
    assert "8 entities are called 'bank'" in found.notes[0] and "and 2 more" in found.notes[0]
    others = sorted(set(range(8)) - {best}, key=lambda row: (-int(counts[row]), row))
    assert ", ".join(f"bank [e{row:03d}]" for row in others[:5]) in found.notes[0]
    assert {a.label for a in found.answers} <= {"bank", "x"}


# -- the launcher ---------------------------------------------------------------------------------------------------


def ask_by_launcher(capsys: pytest.CaptureFixture[str], model: Path, **asked: Any) -> tuple[int, str, str]:
    """Exit code, output and messages of launch/predict.py."""
    options = {"head": None, "tail": None, "top": 3, "data": None, "exclude_known": False, "ids": False}
    with pytest.raises(SystemExit) as ended:
        import_module("launch.predict").main(model, **options | asked)
    told = capsys.readouterr()
    assert isinstance(ended.value.code, int)
    return ended.value.code, told.out, " ".join(told.err.split())


def test_the_launcher_answers_the_other_questions_where_one_name_is_unknown(
    graph: Graph, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_model(tmp_path / "model", model_of("complex", Ranks(), False), graph, {})
    code, out, told = ask_by_launcher(capsys, tmp_path / "model", head=["e001", "nobody", "e002"], relation="r001")
    assert code == 1 and "(e001, r001, ?)" in out and "(e002, r001, ?)" in out and "nobody" not in out
    assert "error: no entity of the model (37) is called 'nobody'" in told
    code, out, told = ask_by_launcher(capsys, tmp_path / "model", tail=["nobody", "none"], relation="r001")
    assert code == 2 and not out and told.count("error: ") == 2
    assert ask_by_launcher(capsys, tmp_path / "model", tail=["e001", "e002"], relation="r001")[0] == 0


def test_the_launcher_takes_a_number_for_a_name_unless_it_is_told_that_rows_are_numbered(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    toy = toy_graph(entities=ENTITIES, relations=RELATIONS)
    names = Vocabulary(pl.Series(sorted(map(str, range(100, 100 + ENTITIES)))))
    graph = Graph("toy", toy.train, toy.valid, toy.test, names, toy.relations, toy.sha256, ())
    save_model(tmp_path / "model", model_of("complex", Ranks(), False), graph, {})
    code, out, _ = ask_by_launcher(capsys, tmp_path / "model", head=["107"], relation="r001")
    assert code == 0 and "(107, r001, ?)" in out
    code, out, _ = ask_by_launcher(capsys, tmp_path / "model", head=["7"], relation="1", ids=True)
    assert code == 0 and "(107, r001, ?)" in out
    code, out, told = ask_by_launcher(capsys, tmp_path / "model", head=["7"], relation="r001")
    assert code == 2 and not out and "called '7'" in told and "--ids with distkgd predict" in told
    code, _, told = ask_by_launcher(capsys, tmp_path / "model", head=["107"], relation="r001", ids=True)
    assert code == 2 and "id 107 is outside" in told
