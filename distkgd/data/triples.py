"""A graph: three splits of triples as integers, and the vocabularies that turn integers back into words."""

from __future__ import annotations

import difflib
import hashlib
import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import polars as pl
import torch

from distkgd.data.leaks import find_leaks
from distkgd.errors import DataError, shorten

COLUMNS = ("head", "relation", "tail")
SPLITS = ("train", "valid", "test")

# Spelling help must stay quick with millions of names: each step below looks at fewer of them, harder.
_SPELLING_LENGTH = 120
_SPELLING_SCANNED = 200_000
_SPELLING_COMPARED = 300
_MOST_KEYS = 2**63 - 1  # possible triples that are told apart by one number


class Vocabulary:
    """Names by row number, with optional human labels beside them.

    Names live in one polars column, not in Python strings: 40 M of them cost their bytes, not 40 M objects.

    names: unique, one line of text each; row order is the id.
    labels: a column beside `names` (null = none).
    """

    _packed: torch.Tensor

    def __init__(self, names: pl.Series, labels: pl.Series | None = None) -> None:
        names = names.cast(pl.String).rename("name")
        if labels is not None:
            if len(labels) != len(names):
                raise DataError(
                    f"{len(labels)} labels for {len(names)} names; give one per name, null where there is none"
                )
            labels = None if labels.null_count() == len(labels) else labels.cast(pl.String).rename("label")
        self._size, self._columns = len(names), (names, labels)
        doubled = (names == names.shift(1)).any() if self._is_sorted else names.n_unique() < len(names)
        if names.null_count() or doubled:
            twice = names.filter(names.is_duplicated() | names.is_null())[0]
            raise DataError(f"a vocabulary needs names, each of them once; {twice!r} is doubled or empty")
        broken = names.filter(names.str.contains(r"[\t\n\r]"))
        if len(broken):
            raise DataError(f"the name {broken[0]!r} holds a tab or a line break; names are stored one per line")

    @cached_property
    def _columns(self) -> tuple[pl.Series, pl.Series | None]:
        # Of an unpacked vocabulary. polars 2.1 copies even out of a mapped file: who reads names has them for itself.
        frame = pl.read_ipc(self._packed.numpy().tobytes()).rechunk()
        return frame["name"], frame.get_column("label", default=None)

    @cached_property
    def _is_sorted(self) -> bool:
        # Readers sort their names, so the usual look-up is a binary search; any other order works too.
        return bool(self.names.is_sorted())

    def pack(self) -> torch.Tensor:
        """[bytes] uint8: names and labels, for `unpack`."""
        file = io.BytesIO()
        pl.DataFrame(self._texts).write_ipc(file)
        return torch.frombuffer(file.getbuffer(), dtype=torch.uint8)

    @classmethod
    def unpack(cls, packed: torch.Tensor, size: int) -> Self:
        """The `size` names that were packed; not checked again, and not read before one of them is asked for."""
        made = cls.__new__(cls)
        made._packed, made._size = packed, size
        return made

    def __len__(self) -> int:
        return self._size

    def __repr__(self) -> str:
        return f"Vocabulary({len(self):,} names, {'with' if self.labels is not None else 'no'} labels)"

    @property
    def names(self) -> pl.Series:
        """[n] names in row order."""
        return self._columns[0]

    @property
    def labels(self) -> pl.Series | None:
        """[n] labels in row order, null where a name has none; None when no name has one."""
        return self._columns[1]

    @property
    def _texts(self) -> list[pl.Series]:
        return [column for column in self._columns if column is not None]

    def name(self, id: int) -> str:
        """The name of a row. Raises DataError outside 0 … n-1."""
        if not 0 <= int(id) < len(self):
            raise DataError(f"id {int(id)} is outside the vocabulary; it has the ids 0 … {len(self) - 1}")
        return str(self.names[int(id)])

    def label(self, id: int) -> str:
        """The human label of a row, or its name when it has none."""
        name = self.name(id)
        label = None if self.labels is None else self.labels[int(id)]
        return name if label is None else str(label)

    def id(self, text: str) -> int:
        """The row of a name, else of a label that only one row has.

        Raises DataError for a label shared by several names (lists them), and for unknown text (its nearest).
        """
        row = self.row_of_name(text)
        if row is not None:
            return row
        if self.labels is not None:
            rows = (self.labels == text).arg_true()
            if len(rows) == 1:
                return int(rows[0])
            if len(rows) > 1:
                sharing = ", ".join(repr(str(self.names[row])) for row in rows.head(5).to_list())
                more = f" and {len(rows) - 5} more" if len(rows) > 5 else ""
                raise DataError(f"{len(rows)} names share the label {text!r}: {sharing}{more}; use a name")
        nearest = self.nearest(text)
        hint = f"; nearest: {', '.join(map(repr, nearest))}" if nearest else "; nothing is spelt like it"
        raise DataError(f"{shorten(text)!r} is neither a name nor a label among {len(self):,}{hint}")

    def row_of_name(self, text: str) -> int | None:
        """The row that has `text` as its name, None where there is none."""
        if self._is_sorted:
            row = int(self.names.search_sorted(text)) if len(self) else 0
            return row if row < len(self) and self.names[row] == text else None
        rows = (self.names == text).arg_true()
        return int(rows[0]) if len(rows) else None

    def rows_of(self, other: Vocabulary) -> torch.Tensor:
        """[len(other)] int64: the row here of each name of another vocabulary, -1 where there is none."""
        found = rows_of(other.names, self.names).cast(pl.Int64).fill_null(-1)
        return torch.from_numpy(found.to_numpy().copy())

    @cached_property
    def loose(self) -> list[pl.Series]:
        """Names and, where there are any, labels as they are compared with what is written loosely."""
        return [loose(column) for column in self._texts]

    @cached_property
    def has_numbers(self) -> bool:
        """Whether any name or label is a whole number."""
        return any(bool(column.str.contains(r"^-?\d+$").any()) for column in self._texts)

    def nearest(self, text: str) -> list[str]:
        """The names and labels that are spelt most like `text`."""
        return nearest_spellings(text, pl.concat([column.drop_nulls().rename("") for column in reversed(self._texts)]))

    def write_tsv(self, path: str | Path) -> None:
        """Write `id<TAB>name` in row order, without a header."""
        rows = pl.DataFrame({"name": self.names}).with_row_index("id")
        with Path(path).open("wb") as file:  # polars would take some paths for patterns or addresses
            rows.write_csv(file, include_header=False, separator="\t", quote_style="never")

    @classmethod
    def read_tsv(cls, path: str | Path) -> Vocabulary:
        """Read what `write_tsv` wrote. Raises DataError when a row is missing, doubled or out of order."""
        path = Path(path)
        if path.is_file() and path.stat().st_size == 0:
            return cls(pl.Series("name", [], dtype=pl.String))
        rows = read_numbered(path)
        wrong = (rows["id"] != pl.int_range(len(rows), dtype=pl.Int64, eager=True)).fill_null(True).arg_true()
        if len(wrong):
            row = int(wrong[0])
            raise DataError(f"{path}, line {row + 1}: the id is {rows['id'][row]}, expected {row}; ids count up from 0")
        if rows["name"].null_count():
            raise DataError(f"{path}, line {int(rows['name'].is_null().arg_true()[0]) + 1}: the name is empty")
        try:
            return cls(rows["name"])
        except DataError as error:
            raise DataError(f"{path}: {error}") from None


def read_numbered(path: Path, header: bool = False) -> pl.DataFrame:
    """Columns id and name of a file of lines `id<TAB>name`. Raises DataError when it is none.

    header: there is a first line that names them, as PyKEEN's tables have it, and names may be in quotes.
    """
    try:
        return pl.read_csv(
            path.read_bytes(),
            separator="\t",
            has_header=False,
            skip_rows=int(header),
            quote_char='"' if header else None,
            schema={"id": pl.Int64, "name": pl.String},
        )
    except (OSError, EOFError, pl.exceptions.PolarsError) as error:
        reason = str(error).splitlines()[0] if str(error) else repr(error)
        raise DataError(f"{path}: not a vocabulary of `id<TAB>name` lines: {reason}") from error


@dataclass(frozen=True, eq=False)
class Graph:
    """Triples in three splits, as rows (head, relation, tail) of ids.

    train, valid, test: int64 [n, 3], contiguous.
    sha256: of the decompressed bytes of train, valid and test in that order, CRLF read as LF.
    warnings: what a user should know about the data and may leave as it is.
    """

    name: str
    train: torch.Tensor
    valid: torch.Tensor
    test: torch.Tensor
    entities: Vocabulary
    relations: Vocabulary
    sha256: str
    warnings: tuple[str, ...]

    @property
    def num_entities(self) -> int:
        return len(self.entities)

    @property
    def num_relations(self) -> int:
        return len(self.relations)

    @property
    def identity(self) -> str:
        """sha256 of the data and of where its splits end, which `sha256`, that of all their bytes, does not say."""
        sizes = [len(split) for split in (self.train, self.valid, self.test)]
        return hashlib.sha256(f"{self.sha256} {sizes}".encode()).hexdigest()

    def is_of(self, about: Mapping[str, Any]) -> bool:
        """Whether `about`, the `summary` of a graph, is of the same triples in the same splits."""
        mine = self.summary()
        return all(about.get(key) == mine[key] for key in ("sha256", "num_train", "num_valid", "num_test"))

    def summary(self) -> dict[str, str | int]:
        """The sizes, for a log line or a run's parameters."""
        return {
            "name": self.name,
            "sha256": self.sha256,
            "num_entities": self.num_entities,
            "num_relations": self.num_relations,
            "num_train": len(self.train),
            "num_valid": len(self.valid),
            "num_test": len(self.test),
        }


def words_of(triples: torch.Tensor, entities: pl.Series, relations: pl.Series) -> pl.DataFrame:
    """Columns head, relation, tail: the names in triples [n, 3]."""
    columns = zip(COLUMNS, (entities, relations, entities), triples.unbind(1), strict=True)
    return pl.DataFrame({column: names.gather(ids.numpy()) for column, names, ids in columns})


def sorted_unique(columns: list[pl.Series]) -> pl.Series:
    """The distinct strings of columns in code-point order: the same ids everywhere, for any line order."""
    return pl.concat([column.rename("name").unique() for column in columns]).unique().sort()


def assemble(
    name: str,
    splits: Mapping[str, torch.Tensor],
    entities: Vocabulary,
    relations: Vocabulary,
    sha256: str,
    warnings: Iterable[str] = (),
    *,
    leaks: bool = True,
) -> Graph:
    """Drop doubled triples, and count what is odd. splits: int64 [n, 3] each; what is missing is empty.

    leaks: whether held-out triples that train says in other words are looked for.
    """
    rows = {split: splits.get(split, torch.empty(0, 3, dtype=torch.int64)) for split in SPLITS}
    keys, notes = {}, list(warnings)
    for split in SPLITS:
        before, keys[split] = len(rows[split]), _keys(rows[split], len(entities), len(relations))
        if dropped := before - keys[split].n_unique():
            first = keys[split].is_first_distinct()
            rows[split], keys[split] = rows[split][torch.from_numpy(first.to_numpy())], keys[split].filter(first)
            notes.append(f"{split}: {dropped:,} of {before:,} triples were there twice; the repeats were dropped")
    unseen = told_unseen(rows, len(entities))
    for split in SPLITS[1:]:
        notes += [unseen[split]] if split in unseen else []
        # A set of the held-out triples is small; one of the training triples would take as long as reading them.
        if known := int(keys["train"].is_in(keys[split].implode()).sum()):
            notes.append(f"{split}: {known:,} of {len(rows[split]):,} triples are in train too; they are kept")
    if common := int(keys["valid"].is_in(keys["test"].implode()).sum()):
        notes.append(_told_common(common, len(keys["valid"]), len(keys["test"])))
    if leaks and (told := str(find_leaks(rows, relations.names))):
        notes.append(told)
    return Graph(name, rows["train"], rows["valid"], rows["test"], entities, relations, sha256, tuple(notes))


def told_unseen(rows: Mapping[str, torch.Tensor], num_entities: int) -> dict[str, str]:
    """Of valid and test ([n, 3] each) how many triples hold an entity that train lacks, where there are any."""
    seen = torch.zeros(num_entities, dtype=torch.bool)
    for place in (0, 2):
        seen[rows["train"][:, place]] = True
    unseen = {split: int((~seen[rows[split][:, [0, 2]]]).any(1).sum()) for split in SPLITS[1:]}
    return {
        split: f"{split}: {num:,} of {len(rows[split]):,} triples hold an entity that train lacks; they are kept"
        for split, num in unseen.items()
        if num
    }


def _told_common(common: int, valid: int, test: int) -> str:
    if common == valid == test:
        return f"test: its {test:,} triples are those of valid; figures of test are of what the models were chosen by"
    return f"test: {common:,} of {test:,} triples are in valid too; they are kept"


def _keys(rows: torch.Tensor, num_entities: int, num_relations: int) -> pl.Series:
    """[n] one value per triple [n, 3], the same for the same triple: a number where they are few enough."""
    if num_entities**2 * num_relations > _MOST_KEYS:
        return pl.DataFrame(rows.numpy(), schema=COLUMNS).to_struct()
    head, relation, tail = rows.unbind(1)
    return pl.Series(head.mul(num_relations).add_(relation).mul_(num_entities).add_(tail).numpy())


def encode(frame: pl.DataFrame, entities: pl.Series, relations: pl.Series) -> torch.Tensor:
    """int64 [n, 3]: where the words of the columns head, relation, tail stand among the names."""
    triples = np.empty((len(frame), 3), dtype=np.int64)  # filled by column: a frame of all three would be copied twice
    for place, (column, names) in enumerate(zip(COLUMNS, (entities, relations, entities), strict=True)):
        found = rows_of(frame[column], names)
        assert not found.null_count(), "the vocabularies were built from these very frames"
        triples[:, place] = found.to_numpy()
    return torch.from_numpy(triples)


def rows_of(wanted: pl.Series, names: pl.Series) -> pl.Series:
    """[n] UInt32: where each text stands among names, null where it does not.

    A join beats a cast to Enum by a third at 2 M names, and needs no global table of strings.
    """
    table = pl.DataFrame({"name": names, "row": pl.int_range(len(names), dtype=pl.UInt32, eager=True)})
    return pl.DataFrame({"name": wanted}).join(table, on="name", how="left", maintain_order="left")["row"]


def loose(words: pl.Series) -> pl.Series:
    """Texts as they are compared when they may be written loosely: in lower case, blanks for _, none at the ends."""
    return words.str.to_lowercase().str.replace_all("_", " ", literal=True).str.strip_chars(" ")


def nearest_spellings(text: str, known: pl.Series, count: int = 3) -> list[str]:
    """Up to `count` known strings spelt like `text`: by length, by shared letter pairs, then by difflib."""
    wanted = text[:_SPELLING_LENGTH].lower()
    pairs = sorted({wanted[i : i + 2] for i in range(len(wanted) - 1)}) or [wanted]
    slack = 2 + len(wanted) // 8
    word = pl.col("word")
    frame = pl.DataFrame({"known": known, "word": known}).filter(
        word.str.len_bytes().is_between(len(wanted.encode()) - 2 * slack, len(wanted.encode()) + 2 * slack)
    )
    intact = 3
    while len(frame) > _SPELLING_SCANNED and intact < len(text):
        # Most slips keep one end of the word, so of too many words those that share a longer end are nearer.
        ends = frame.filter(word.str.starts_with(text[:intact]) | word.str.ends_with(text[-intact:]))
        frame = ends if len(ends) else frame.head(_SPELLING_SCANNED)
        intact *= 2
    frame = frame.head(_SPELLING_SCANNED)
    shared = pl.sum_horizontal([word.str.contains(pair, literal=True).cast(pl.UInt32) for pair in pairs])
    frame = frame.with_columns(word.str.to_lowercase()).with_columns(shared.alias("shared"))
    frame = frame.sort("shared", descending=True, maintain_order=True).head(_SPELLING_COMPARED)
    spelt = dict(zip(frame["word"].to_list(), frame["known"].to_list(), strict=True))
    return [spelt[word] for word in difflib.get_close_matches(wanted, spelt, n=count)]
