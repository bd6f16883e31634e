"""Files of questions answered into files of answers: Parquet, CSV and TSV in and out.

A question gives two of the columns head, relation and tail; the third one is what is asked. Answers stand a row each,
under the same columns, with the row of their question beside them.
"""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl

from distkgd.common.files import write_atomic
from distkgd.common.paths import AnyPath
from distkgd.data.triples import COLUMNS
from distkgd.errors import DataError, shorten
from distkgd.evaluation.answers import Answers
from distkgd.evaluation.trained_model import TrainedModel

SEPARATORS = {".csv": ",", ".tsv": "\t"}
KINDS = (".parquet", *SEPARATORS)
NO_QUESTION = "a question gives two of head, relation and tail, and asks for the third"


class Answered(NamedTuple):
    """How many questions a file had, and how many of them have an error in place of answers."""

    questions: int
    errors: int


def answer_file(
    model: TrainedModel,
    questions: AnyPath,
    out: AnyPath,
    *,
    k: int = 10,
    exclude_known: bool = False,
    ids: bool = False,
) -> Answered:
    """Answer the questions of a file into a file; what they are called says whether it is Parquet, CSV or TSV.

    questions: the columns head, relation and tail, or two of them; in each row one of the three is empty, and asked.
    out: a row per answer: question (its row, from 0), head, relation, tail, label, rank, id, score, error; a question
        with an unknown word has one row with an error, as in `Answers.table`.
    k, exclude_known, ids: as for `TrainedModel.predict`.

    Raises DataError where the file cannot be read as questions, StorageError where answers cannot be written.
    """
    kind_of(out)
    found = answered_table(model, read_questions(questions), k=k, exclude_known=exclude_known, ids=ids)
    _write(found, Path(out))
    return Answered(found["question"].n_unique(), int(found["error"].is_not_null().sum()))


def answered_table(
    model: TrainedModel, asked: pl.DataFrame, *, k: int = 10, exclude_known: bool = False, ids: bool = False
) -> pl.DataFrame:
    """The table that `answer_file` writes of the questions in a frame."""
    asked = asked.select(*COLUMNS).with_row_index("question")
    given = {column: pl.col(column).is_not_null() for column in COLUMNS}
    how: dict[str, Any] = {"k": k, "exclude_known": exclude_known, "ids": ids}
    parts = []
    for wanted in COLUMNS:
        words = [column for column in COLUMNS if column != wanted]
        rows = asked.filter(*(given[column] for column in words), ~given[wanted])
        if len(rows):
            columns: dict[str, Any] = {column: _words(rows[column], ids) for column in words}
            answers = (
                model.predict_relation(**columns, **how) if wanted == "relation" else model.predict(**columns, **how)
            )
            parts.append(_placed(answers, rows["question"]))
    wrong = asked.filter(pl.sum_horizontal(*given.values()) != 2)
    parts.append(
        wrong.select("question", *(pl.col(column).cast(pl.String) for column in COLUMNS), error=pl.lit(NO_QUESTION))
    )
    every = pl.concat(parts, how="diagonal").sort("question", maintain_order=True)
    order = ["question", *COLUMNS, "label", "rank", "id", "score", "error"]
    return every.select(column if column in every.columns else pl.lit(None).alias(column) for column in order)


def read_questions(path: AnyPath) -> pl.DataFrame:
    """Columns head, relation and tail of a file, null where a question asks for one."""
    path, kind = Path(path), kind_of(path)
    try:
        whole = path.read_bytes()
        if kind == ".parquet":
            frame = pl.read_parquet(whole)
        else:
            frame = pl.read_csv(whole, separator=SEPARATORS[kind], infer_schema=False)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise DataError(f"{path} cannot be read: {str(error).partition(chr(10))[0]}.") from None
    present = [column for column in COLUMNS if column in frame.columns]
    if len(present) < 2:
        columns = ", ".join(map(repr, frame.columns[:10]))
        raise DataError(f"{path} has the columns {shorten(columns)}; questions have two of head, relation and tail.")
    return frame.with_columns(pl.lit(None).alias(column) for column in COLUMNS if column not in present).select(
        *COLUMNS
    )


def kind_of(path: AnyPath) -> str:
    """The ending of a file of questions or answers; DataError where there is no such kind."""
    kind = Path(path).suffix.lower()
    if kind not in KINDS:
        raise DataError(f"{path}: files of questions and answers end in {', '.join(KINDS)}.")
    return kind


def _words(column: pl.Series, ids: bool) -> Sequence[Any]:
    """Words as `predict` takes them; row numbers that a text file holds are texts there."""
    if ids and column.dtype == pl.String:
        numbers = column.cast(pl.Int64, strict=False)
        return [text if number is None else number for text, number in zip(column, numbers, strict=True)]
    return column.to_list()


def _placed(answers: Answers, questions: pl.Series) -> pl.DataFrame:
    # The table of some of the file's questions, with the rows that they have there.
    table = answers.table()
    return table.with_columns(question=questions.gather(table["question"]))


def _write(table: pl.DataFrame, path: Path) -> None:
    kind, file = kind_of(path), io.BytesIO()
    if kind == ".parquet":
        table.write_parquet(file)
    else:
        table.write_csv(file, separator=SEPARATORS[kind])
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, file.getvalue())
