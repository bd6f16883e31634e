"""A toy is trained, registered, served by `mlflow models serve`, and asked over HTTP."""

import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import psutil
import pytest

import distkgd
from distkgd.reporting.html import keep_measured
from distkgd.tracking.serving import speed
from distkgd.tracking.serving.entries import read_run
from distkgd.tracking.serving.openapi import openapi
from distkgd.tracking.serving.server import HOST, ServerError, ask, connect, serving
from distkgd.tracking.serving.speed import measure
from tests.tracking.serving.runs import run_toy

mlflow = pytest.importorskip("mlflow")


@pytest.fixture(scope="module")
def place(schema: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tracked run and its store."""
    folder = tmp_path_factory.mktemp("endpoint")
    shutil.copy(schema, folder / "mlflow.db")
    run_toy(folder / "run", mlflow={"enabled": True, "uri": f"sqlite:///{folder / 'mlflow.db'}"})
    return folder


@pytest.fixture(scope="module")
def port(place: Path) -> Iterator[int]:
    with serving("models:/toy@champion", f"sqlite:///{place / 'mlflow.db'}", threads=1) as port:
        yield port


@pytest.fixture(scope="module")
def model(place: Path) -> distkgd.TrainedModel:
    """What the champion was registered from."""
    client = mlflow.MlflowClient(f"sqlite:///{place / 'mlflow.db'}")
    stage = client.get_model_version_by_alias("toy", "champion").tags["stage"]
    return distkgd.load(place / "run/stages" / stage)


def patient(port: int) -> HTTPConnection:
    """A connection that waits for minutes: what is answered at once may take long on a busy machine."""
    connection = connect(port)
    connection.timeout = 240.0
    return connection


def posted(port: int, body: Any) -> tuple[int, Any]:
    connection = patient(port)
    connection.request("POST", "/invocations", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    found = response.status, json.loads(response.read())
    connection.close()
    return found


@pytest.mark.parametrize("given", ["head", "tail"])
def test_it_answers_as_the_model_does(given: str, port: int, model: distkgd.TrainedModel) -> None:
    for entity in ("e003", "e040"):
        connection = patient(port)
        status, found = ask(connection, [{given: entity, "relation": "r002", "k": 10}])
        connection.close()
        wanted = model.predict(**{given: entity}, relation="r002", k=10)  # type: ignore[arg-type]
        (answer,) = found["predictions"]
        assert status == 200
        assert answer["names"] == wanted.names[0] and answer["ids"] == wanted.ids[0].tolist()
        assert answer["scores"] == pytest.approx(wanted.scores[0].tolist())
        assert answer[given] == entity and answer["asked"] == ("tail" if given == "head" else "head")


def test_clients_at_once_get_their_own_answers(port: int, model: distkgd.TrainedModel) -> None:
    entities = [f"e{i:03d}" for i in range(40)]
    with ThreadPoolExecutor(8) as clients:
        found = list(clients.map(lambda e: posted(port, {"inputs": [{"head": e, "relation": "r003"}]}), entities))
    wanted = model.predict(head=entities, relation="r003").names
    assert [answer["predictions"][0]["names"] for _, answer in found] == wanted


@pytest.mark.parametrize(
    "body",
    [
        {"dataframe_records": [{"head": "e001", "relation": "r001"}, {"tail": "e002", "relation": "r000"}]},
        {"inputs": [{"head": "e001", "relation": "r001"}, {"tail": "e002", "relation": "r000"}]},
        {
            "dataframe_split": {
                "columns": ["head", "tail", "relation"],
                "data": [["e001", None, "r001"], [None, "e002", "r000"]],
            }
        },
    ],
    ids=lambda body: next(iter(body)),
)
def test_several_questions_come_in_one_request_in_each_of_mlflows_ways(
    body: dict[str, Any], port: int, model: distkgd.TrainedModel
) -> None:
    status, found = posted(port, body)
    assert status == 200, found
    tails, heads = found["predictions"]
    assert tails["names"] == model.predict(head="e001", relation="r001").names[0]
    assert heads["names"] == model.predict(tail="e002", relation="r000").names[0]


@pytest.mark.parametrize(
    ("question", "said"),
    [
        (
            {"head": "e0033", "relation": "r001"},
            "no entity of the model (41) is called 'e0033'; nearest: 'e033', 'e003'",
        ),
        ({"tail": "e003", "relation": "r01"}, "no relation of the model (5) is called 'r01'; nearest: 'r001'"),
        ({"head": "e003", "relation": "r001", "k": 0}, "k: 0 is no number of answers"),
        ({"head": "e003", "relation": "r001", "k": "ten"}, "ten"),
        ({"relation": "r001"}, "two of head, relation and tail"),
        ({"head": "e003"}, "relation"),
        ({"head": "e003", "realtion": "r001"}, "no 'realtion'; did you mean 'relation'? Allowed: head, relation, tail"),
        ({"head": "e003", "relation": "r001", "exclude_known": True}, "distkgd register MODEL --known"),
    ],
)
def test_what_cannot_be_answered_is_status_400_and_says_why(question: dict[str, Any], said: str, port: int) -> None:
    for way in ("inputs", "dataframe_records"):
        status, found = posted(port, {way: [question]})
        assert status == 400 and said in found["message"], found
        assert "Traceback" not in found["message"]


def test_a_question_that_cannot_be_answered_leaves_the_others_theirs(port: int, model: distkgd.TrainedModel) -> None:
    questions: list[dict[str, Any]] = [
        {"head": "e001", "relation": "r001", "k": 3},
        {"head": "nobody", "relation": "r001"},
        {"tail": 2, "relation": "r001"},
        {"tail": 2, "relation": "r001", "ids": True},
    ]
    for way in ("inputs", "dataframe_records"):
        status, found = posted(port, {way: questions})
        assert status == 200, found
        named, unknown, number, row = found["predictions"]
        assert named["names"] == model.predict(head="e001", relation="r001", k=3).names[0]
        assert "called 'nobody'" in unknown["error"] and "names" not in unknown and '"ids": true' in number["error"]
        assert row["tail"] == "e002" and row["names"] == model.predict(tail="e002", relation="r001").names[0]


def test_relations_are_asked_for_beside_other_questions(port: int, model: distkgd.TrainedModel) -> None:
    pair, other = {"head": "e001", "tail": "e002"}, {"head": "e001", "relation": "r001"}
    for body in (
        {"inputs": [pair, other]},
        {"dataframe_records": [pair, other]},
        {
            "dataframe_split": {
                "columns": ["head", "relation", "tail"],
                "data": [["e001", None, "e002"], ["e001", "r001", None]],
            }
        },
    ):
        status, found = posted(port, body)
        assert status == 200, found
        relations, tails = found["predictions"]
        assert relations["names"] == model.predict_relation(**pair).names[0] and relations["asked"] == "relation"
        assert tails["names"] == model.predict(head="e001", relation="r001").names[0]
    for way in ("inputs", "instances"):  # columns, and rows that have all of them
        body = {way: {"head": ["e001"], "tail": ["e002"]} if way == "inputs" else [pair]}
        assert posted(port, body)[1]["predictions"] == [relations]


def test_mlflows_own_paths_say_that_it_is_there(port: int) -> None:
    for path, wanted in (("/ping", "\n"), ("/health", "\n"), ("/version", mlflow.__version__)):
        connection = patient(port)
        connection.request("GET", path)
        response = connection.getresponse()
        assert (response.status, response.read().decode()) == (200, wanted)
        connection.close()
        assert path in openapi()["paths"]


def test_it_listens_on_this_machine_alone(port: int) -> None:
    listening = [one for one in psutil.net_connections("tcp") if one.status == "LISTEN" and one.laddr.port == port]
    assert [one.laddr.ip for one in listening] == [HOST]


def test_what_is_measured_of_the_endpoints_is_in_the_report(
    place: Path, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, asked = place / "run", []
    student = [entry for entry in read_run(run).entries() if entry.role == "student"]
    monkeypatch.setattr(speed, "serving", lambda uri, store: asked.append((uri, store)) or nullcontext(port))
    measured = measure(student, ["models:/toy@student-6"], "the store", seconds=1.0)
    assert asked == [("models:/toy@student-6", "the store")]
    (row,) = measured["rows"]
    assert row["stage"] == "student" and row["dim"] == 6 and row["bytes"] == student[0].num_bytes
    assert 0 < row["p50_ms"] <= row["p99_ms"] < 5000 and row["per_second"] > 1 and row["requests"] > 5
    assert measured["machine"]["cores"] >= 1
    shutil.copytree(run, place / "copy")
    keep_measured(place / "copy", measured)
    for name in ("report.md", "report.html"):
        assert f"student p50 {row['p50_ms']:.1f} ms" in (place / "copy" / name).read_text()
    assert json.loads((place / "copy/report.json").read_text())["serving"] == measured


def test_a_server_that_does_not_start_says_why(place: Path) -> None:
    with (
        pytest.raises(ServerError, match=r"nobody"),
        serving("models:/nobody@champion", f"sqlite:///{place}/mlflow.db"),
    ):
        pass
