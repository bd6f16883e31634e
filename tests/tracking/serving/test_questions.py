"""What an endpoint is asked and answers, without a server: the same as `predict`, and errors that name the cause."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch

import distkgd
from distkgd.data import Graph, Vocabulary
from distkgd.errors import ConfigError, DataError, ModelError
from distkgd.evaluation import known_triples
from distkgd.evaluation.trained_model import keep_known
from distkgd.models.model_folder import save_model
from distkgd.tracking.serving.openapi import openapi
from distkgd.tracking.serving.questions import DEFAULT_K, KEYS, answer_questions
from tests.jobs import toy_model
from tests.toys import labels_of, toy_graph

NAN = float("nan")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> distkgd.TrainedModel:
    folder = tmp_path_factory.mktemp("questions") / "model"
    graph = toy_graph()
    save_model(folder, toy_model(graph), graph, {})
    return distkgd.load(folder)


def test_answers_come_in_the_order_of_the_questions_whatever_is_asked(model: distkgd.TrainedModel) -> None:
    questions: list[dict[str, Any]] = [
        {"head": "e003", "relation": "r001", "k": 4},
        {"relation": "r002", "tail": "e007"},
        {"head": "e004", "relation": "r000", "k": 4.0, "tail": None},
        {"head": NAN, "tail": "e009", "relation": "r002", "k": NAN},
        {"head": "e003", "relation": "R002", "k": 100},
    ]
    answers = answer_questions(model, questions)
    for question, answer in zip(questions, answers, strict=True):
        given = "head" if isinstance(question.get("head"), str) else "tail"
        k = int(question["k"]) if question.get("k", NAN) == question.get("k", NAN) and "k" in question else DEFAULT_K
        found = model.predict(**{given: question[given]}, relation=question["relation"], k=k)
        assert answer["names"] == found.names[0] and answer["ids"] == found.ids[0].tolist()
        assert answer["scores"] == pytest.approx(found.scores[0].tolist())
        assert answer[given] == question[given] and answer["asked"] == ("tail" if given == "head" else "head")
        assert answer["relation"] == question["relation"].lower() and "labels" not in answer
    assert [len(answer["ids"]) for answer in answers] == [4, 10, 4, 10, 41]
    assert answer_questions(model, []) == []


def test_names_stand_beside_their_own_scores_where_others_are_no_numbers(tmp_path: Path) -> None:
    graph = toy_graph()
    save_model(tmp_path / "model", toy_model(graph, "distmult"), graph, {})
    broken = distkgd.load(tmp_path / "model")
    whole = distkgd.load(tmp_path / "model").predict(head="e000", relation="r001", k=41)
    wanted = dict(zip(whole.names[0], whole.scores[0].tolist(), strict=True))
    broken.entity_rows[3] = torch.nan
    broken.entity_rows[40] = torch.nan
    answers = broken.predict(head="e000", relation="r001", k=41)
    served = answer_questions(broken, [{"head": "e000", "relation": "r001", "k": 41}])[0]
    for names, scores in ((answers.names[0], answers.scores[0].tolist()), (served["names"], served["scores"])):
        found = dict(zip(names, scores, strict=False))
        assert len(found) == 39 and not {"e003", "e040"} & set(found)
        assert found == pytest.approx({name: wanted[name] for name in found})
    assert len(served["scores"]) == len(served["ids"]) == 39
    assert answers.frame()["tail"].tolist() == answers.names[0]


def test_labels_are_understood_and_answered_where_the_model_has_any(tmp_path: Path) -> None:
    toy = toy_graph()
    labelled = Vocabulary(toy.entities.names, labels_of(41, {0: "river", 5: "bank"}))
    graph = Graph("toy", toy.train, toy.valid, toy.test, labelled, toy.relations, toy.sha256, ())
    save_model(tmp_path / "model", toy_model(toy), graph, {})
    (answer,) = answer_questions(
        distkgd.load(tmp_path / "model"), [{"head": "bank", "relation": "r000", "k": len(toy.entities)}]
    )
    assert answer["head"] == "e005" and dict(zip(answer["ids"], answer["labels"], strict=True))[0] == "river"


@pytest.mark.parametrize(
    ("question", "error", "said"),
    [
        ({"head": "e0033", "relation": "r001"}, DataError, "no entity of the model.*'e0033'; nearest: 'e033', 'e003'"),
        ({"head": "e003", "relation": "r01"}, DataError, "no relation of the model.*'r01'; nearest: 'r001'"),
        (
            {"head": "e003", "tail": "e004", "relation": "r001"},
            ConfigError,
            "two of head, relation and tail.*'head', 'relation', 'tail'",
        ),
        ({"relation": "r001"}, ConfigError, "two of head, relation and tail.*one has 'relation'"),
        ({}, ConfigError, "nothing"),
        ({"head": "e003"}, ConfigError, "this one has 'head'"),
        *(
            ({"head": "e003", wrong: "r001"}, ConfigError, f"no '{wrong}'; did you mean '{near}'[?] Allowed: head, rel")
            for wrong, near in (
                ("realtion", "relation"),
                ("Relation", "relation"),
                ("tails", "tail"),
                ("exclude", "exclude_known"),
            )
        ),
        ("e003", ConfigError, "'e003' is no question; a question is a mapping with head, relation, tail, k"),
        ({"head": "e003", "relation": "r001", "exclude_known": 1}, ConfigError, "exclude_known: 1; allowed are true"),
        ({"head": "e003", "relation": "r001", "exclude_known": True}, ConfigError, "distkgd register MODEL --known"),
        ({"head": 3, "relation": "r001"}, DataError, 'head: 3 is a number, .*"ids": true in a question'),
        ({"head": 41, "relation": "r001", "ids": True}, DataError, "id 41 is outside the model"),
        ({"head": True, "relation": "r001"}, ConfigError, "head: True is no text"),
        ({"head": "e003", "relation": "r001", "ids": "yes"}, ConfigError, "ids: 'yes'; allowed are true"),
        ({"head": "e003", "relation": ["r001"]}, ConfigError, "no text"),
        *(
            ({"head": "e003", "relation": "r001", "k": k}, ConfigError, r"k: .* whole number >= 1")
            for k in (0, -1, 2.5, True, "many", float("inf"))
        ),
    ],
)
def test_what_is_no_question_is_refused(
    question: dict[str, Any], error: type[Exception], said: str, model: distkgd.TrainedModel
) -> None:
    with pytest.raises(error, match=said):
        answer_questions(model, [question])
    good: dict[str, Any] = {"head": "e001", "relation": "r000"}
    first, failed, last = answer_questions(model, [good, question, good])
    assert list(failed) == ["error"] and re.search(said, failed["error"])
    assert first["names"] == last["names"] == model.predict(**good).names[0]


def test_a_question_without_a_relation_asks_for_relations(model: distkgd.TrainedModel) -> None:
    head, pair = {"head": "e003", "relation": "r001"}, {"head": "e003", "tail": "e007", "k": 3}
    first, second = answer_questions(model, [pair, head])
    wanted = model.predict_relation(head="e003", tail="e007", k=3)
    assert first == {
        "head": "e003",
        "tail": "e007",
        "asked": "relation",
        "names": wanted.names[0],
        "ids": wanted.ids[0].tolist(),
        "scores": pytest.approx(wanted.scores[0].tolist()),
    }
    assert second["asked"] == "tail"


def test_known_triples_are_left_out_where_the_model_has_them_beside_it(tmp_path: Path) -> None:
    graph = toy_graph()
    folder = tmp_path / "data"
    folder.mkdir()
    for split in ("train", "valid", "test"):
        rows = (f"e{h:03d}\tr{r:03d}\te{t:03d}\n" for h, r, t in getattr(graph, split).tolist())
        (folder / f"{split}.tsv").write_text("".join(rows))
    save_model(tmp_path / "model", toy_model(graph), graph, {"source": str(folder)})
    beside = distkgd.load(tmp_path / "model")
    h, r, t = graph.test[0].tolist()
    known = {"head": f"e{h:03d}", "relation": f"r{r:03d}", "k": 41}
    pair = {"head": f"e{h:03d}", "tail": f"e{t:03d}", "exclude_known": True}
    asked = [known, known | {"exclude_known": True}, pair]
    everything, without, relations = answer_questions(beside, asked)
    every = torch.cat([graph.train, graph.valid, graph.test])
    true = {f"e{row[2]:03d}" for row in every.tolist() if row[:2] == [h, r]}
    assert f"e{t:03d}" in true and set(everything["names"]) - set(without["names"]) == true
    assert without["names"] == [name for name in everything["names"] if name not in true]
    assert f"r{r:03d}" not in relations["names"] and relations["names"]

    keep_known(tmp_path / "model")
    shutil.rmtree(folder)
    assert answer_questions(distkgd.load(tmp_path / "model"), asked) == [everything, without, relations]
    file = tmp_path / "model" / known_triples.FILE
    file.write_bytes(file.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(ModelError, match=known_triples.FILE):
        known_triples.read(tmp_path / "model")
    file.unlink()
    with pytest.raises(ConfigError, match="distkgd register MODEL --known"):
        keep_known(tmp_path / "model")


def test_the_document_allows_what_is_a_question_and_describes_every_answer(model: distkgd.TrainedModel) -> None:
    schemas = openapi()["components"]["schemas"]
    question, answer = schemas["Question"], schemas["Answer"]
    assert not question["additionalProperties"] and set(question["properties"]) == set(KEYS)
    pairs: list[dict[str, Any]] = [{"head": "e003", "relation": "r001"}, {"head": "e003", "tail": "e007"}]
    for given in (*pairs, {"relation": "r001", "tail": "e007"}):
        assert {"required": [*given]} in question["anyOf"]
        (found,) = answer_questions(model, [given])
        assert set(found) <= set(answer["properties"]) and found["asked"] in answer["properties"]["asked"]["enum"]
    assert question["properties"]["k"]["default"] == DEFAULT_K
    for reference in re.findall(r"#/components/schemas/(\w+)", json.dumps(openapi())):
        assert reference in schemas


def test_a_number_in_a_question_is_a_name_unless_it_says_ids(tmp_path: Path) -> None:
    toy = toy_graph(12)
    names = Vocabulary(pl.Series(sorted(map(str, range(12)))))
    graph = Graph("toy", toy.train, toy.valid, toy.test, names, toy.relations, toy.sha256, ())
    save_model(tmp_path / "model", toy_model(toy), graph, {})
    m = distkgd.load(tmp_path / "model")
    row = {"head": 10, "relation": 1, "ids": True}
    found = answer_questions(m, [{"head": 10, "relation": "r001"}, {"head": 10.0, "relation": "r001"}, row])
    assert [answer["head"] for answer in found] == ["10", "10", "8"]
    assert found[0]["names"] == m.predict(head="10", relation="r001").names[0] == found[1]["names"]
    assert found[2]["names"] == m.predict(head="8", relation="r001").names[0]
