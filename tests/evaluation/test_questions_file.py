"""Files of questions become files of answers, which are those of the model asked in a program."""

from pathlib import Path

import polars as pl
import pytest

import distkgd
from distkgd.data import Graph
from distkgd.errors import DataError
from distkgd.evaluation.questions_file import KINDS, NO_QUESTION, answer_file
from distkgd.models.model_folder import save_model
from tests.jobs import toy_model
from tests.launches import call, refusal
from tests.toys import toy_graph

ASKED = [
    ("e001", "r000", None),
    (None, "r001", "e002"),
    ("e003", None, "e004"),
    ("nobody", "r000", None),
    ("e001", "r002", "e002"),
    ("e005", "r000", None),
]


@pytest.fixture(scope="module")
def m(tmp_path_factory: pytest.TempPathFactory) -> distkgd.TrainedModel:
    graph: Graph = toy_graph(21, 3)
    folder = tmp_path_factory.mktemp("questions") / "model"
    save_model(folder, toy_model(graph, "complex", 8), graph, {})
    return distkgd.load(folder)


def write(frame: pl.DataFrame, path: Path) -> Path:
    if path.suffix == ".parquet":
        frame.write_parquet(path)
    else:
        frame.write_csv(path, separator="\t" if path.suffix == ".tsv" else ",")
    return path


def read(path: Path) -> pl.DataFrame:
    if path.suffix == ".parquet":
        return pl.read_parquet(path)
    return pl.read_csv(path, separator="\t" if path.suffix == ".tsv" else ",")


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_of_questions_is_answered_row_by_row(kind: str, m: distkgd.TrainedModel, tmp_path: Path) -> None:
    frame = pl.DataFrame(ASKED, schema=["head", "relation", "tail"], orient="row")
    asked = write(frame.with_columns(note=pl.lit("x")), tmp_path / f"asked{kind}")
    assert answer_file(m, asked, tmp_path / f"new/answers{kind}", k=2) == (6, 2)
    found = read(tmp_path / f"new/answers{kind}")
    assert found.columns == ["question", "head", "relation", "tail", "label", "rank", "id", "score", "error"]
    assert found["question"].to_list() == [0, 0, 1, 1, 2, 2, 3, 4, 5, 5]
    assert found["rank"].to_list() == [1, 2, 1, 2, 1, 2, None, None, 1, 2]
    tails = m.predict(head=["e001", "e005"], relation="r000", k=2)
    heads, relations = (
        m.predict(tail="e002", relation="r001", k=2),
        m.predict_relation(head="e003", tail="e004", k=2),
    )
    assert found["tail"].to_list()[:2] == tails.names[0] and found["tail"].to_list()[-2:] == tails.names[1]
    assert found["head"].to_list()[2:4] == heads.names[0] and found["relation"].to_list()[4:6] == relations.names[0]
    wanted = [*tails.scores[0], *heads.scores[0], *relations.scores[0], *tails.scores[1]]
    assert found["score"].drop_nulls().to_list() == pytest.approx([float(score) for score in wanted], rel=1e-6)
    errors = dict(zip(found["question"], found["error"], strict=True))
    assert "nobody" in errors[3] and errors[4] == NO_QUESTION and errors[0] is None


def test_one_kind_of_question_needs_two_columns_and_row_numbers_may_be_numbers_or_texts(
    m: distkgd.TrainedModel, tmp_path: Path
) -> None:
    asked = write(pl.DataFrame({"relation": [0, 1], "head": [3, 4]}), tmp_path / "asked.parquet")
    assert answer_file(m, asked, tmp_path / "answers.parquet", ids=True, k=1) == (2, 0)
    text = write(pl.read_parquet(asked), tmp_path / "asked.tsv")
    assert answer_file(m, text, tmp_path / "answers.tsv", ids=True, k=1) == (2, 0)
    wanted = m.predict(head=[3, 4], relation=[0, 1], ids=True, k=1).names
    for path in (tmp_path / "answers.parquet", tmp_path / "answers.tsv"):
        assert [[name] for name in read(path)["tail"]] == wanted


def test_files_that_hold_no_questions_are_refused(m: distkgd.TrainedModel, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="two of head, relation and tail"):
        answer_file(m, write(pl.DataFrame({"head": ["e001"]}), tmp_path / "one.csv"), tmp_path / "out.csv")
    with pytest.raises(DataError, match=r"end in \.parquet, \.csv, \.tsv"):
        answer_file(m, tmp_path / "one.csv", tmp_path / "out.xlsx")
    with pytest.raises(DataError, match="cannot be read"):
        answer_file(m, tmp_path / "gone.parquet", tmp_path / "out.csv")
    (tmp_path / "broken.parquet").write_text("no")
    with pytest.raises(DataError, match="cannot be read"):
        answer_file(m, tmp_path / "broken.parquet", tmp_path / "out.csv")
    assert not (tmp_path / "out.csv").exists()
    empty = write(pl.DataFrame(schema={"head": pl.String, "relation": pl.String}), tmp_path / "empty.parquet")
    assert answer_file(m, empty, tmp_path / "answers.parquet") == (0, 0)
    assert read(tmp_path / "answers.parquet").height == 0


def test_the_launcher_answers_a_file_and_says_how_many_it_could_not(m: distkgd.TrainedModel, tmp_path: Path) -> None:
    model = m._folder
    asked = write(pl.DataFrame(ASKED, schema=["head", "relation", "tail"], orient="row"), tmp_path / "asked.csv")
    told = ["--questions", asked, "--out", tmp_path / "answers.parquet", "--top", "2"]
    code, out, err = call("predict", [model, *told])
    assert (code, out) == (1, "") and "6 questions, 2 of them with an error" in err
    assert read(tmp_path / "answers.parquet").height == 10
    for wrong in (told[:2], [*told, "--relation", "r000"], [*told, "--head", "e001"], []):
        assert refusal("predict", [str(one) for one in (model, *wrong)], ["--questions"]) is None
