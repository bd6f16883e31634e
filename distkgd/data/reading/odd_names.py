"""What is odd about the names of a graph, looked for among the distinct ones: outer white space, Unicode, columns.

Names are sorted series, as readers make them; rows are ids [n, 3] (head, relation, tail) of each split.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass

import polars as pl
import torch
from torch import Tensor

from distkgd.data.triples import COLUMNS
from distkgd.errors import shorten

_FEW_ALONE = 0.05  # share of triples with words of their own, from which on a first line with such is nothing odd


@dataclass(frozen=True)
class Settled:
    """Names without outer white space. ids: [old] new row of each; dropped: [old] which had some; notes: for people."""

    names: pl.Series
    ids: Tensor
    dropped: Tensor
    notes: tuple[str, ...]


def settle(names: pl.Series, quoted: Set[str], what: str) -> Settled | None:
    """Drop outer white space, but of names in quotes that would be another name without; None: there is none."""
    bare = names.str.strip_chars()
    if not (names != bare).any():
        return None
    table, odd = pl.DataFrame({"name": names, "bare": bare}), pl.col("name") != pl.col("bare")
    shared = pl.col("bare").is_duplicated()
    table = table.with_columns(odd=odd, shared=shared, kept=odd & shared & pl.col("name").is_in(list(quoted)))
    new = pl.select(pl.when(table["kept"]).then(table["name"]).otherwise(table["bare"]).alias("name")).to_series()
    notes = []
    for kept, told in (
        (False, "are written with and without outer white space{}; they are taken as one"),
        (True, "differ from another in outer white space alone{}; quotes hold it, so they are kept apart"),
    ):
        if len(found := table.filter(pl.col("odd") & pl.col("shared") & (pl.col("kept") == kept))):
            name, bare = found.row(0)[:2]
            such = f", such as {shorten(name)!r} and {shorten(bare)!r}"
            notes.append(f"{len(found):,} names of {what} {told.format(such)}")
    distinct = new.unique().sort()
    ids = torch.from_numpy(distinct.search_sorted(new).to_numpy().astype("int64"))
    dropped = torch.from_numpy((table["odd"] & ~table["kept"]).to_numpy().copy())
    return Settled(distinct, ids, dropped, tuple(notes))


def told_names(names: pl.Series, what: str) -> Iterator[str]:
    """Names that are told apart, and look as if they should not be."""
    wide = names.filter(names.str.len_bytes() != names.str.len_chars())
    plain = wide.str.normalize("NFC")
    twins = (plain != wide) & (_among(plain, names) | plain.is_duplicated())
    if twins.any():
        row = int(twins.arg_true()[0])
        other = next(one for one in (plain[row], *wide.filter(plain == plain[row])) if one != wide[row])
        yield (
            f"{int(twins.sum()):,} names of {what} differ from another in Unicode normalisation alone, such as "
            f"{shorten(wide[row])!a} and {shorten(other)!a}; they are kept apart"
        )
    first, end = (int(names.search_sorted(text)) for text in ('"', "#"))  # the character that follows
    wrapped = names[first:end].filter(names[first:end].str.contains('^".+"$'))
    bare = wrapped.str.slice(1).str.head(-1)
    if (both := _among(bare, names)).any():
        row = int(both.arg_true()[0])
        yield (
            f"{int(both.sum()):,} names of {what} stand in quotes and without, such as {shorten(wrapped[row])!r} and "
            f"{shorten(bare[row])!r}; they are kept apart: between TABs, quotes count only where all of a first line "
            "is in quotes"
        )


def told_order(rows: Mapping[str, Tensor], entities: pl.Series, relations: pl.Series) -> Iterator[str]:
    """A doubt whether the columns are head, relation, tail, where most relation names are entities too."""
    among = _among(relations, entities)
    if len(relations) < 2 or 2 * int(among.sum()) <= len(relations):
        return
    sizes = {"relation": len(relations)}
    for place, column in ((0, "head"), (2, "tail")):
        seen = torch.zeros(len(entities), dtype=torch.bool)
        for part in rows.values():
            seen[part[:, place]] = True
        sizes[column] = int(seen.sum())
    fewest = min(sizes, key=lambda column: sizes[column])
    if fewest == "relation" and relations.str.contains(r"^\d+$").all():
        return  # ids: each kind counts from 0
    order = {"head": ("relation", "head", "tail"), "tail": ("head", "tail", "relation")}.get(fewest, COLUMNS[::-1])
    where = {"head": "first", "tail": "last"}.get(fewest)
    clue = f" The {where} one has the fewest names ({sizes[fewest]:,})." if where else ""
    yield (
        f"{int(among.sum()):,} of {len(relations):,} relation names are names of entities too: are the columns head, "
        f"relation, tail?{clue} If not, say so in a first line of each file, such as {'<TAB>'.join(order)}, or of one "
        f"file by distkgd distill --columns {','.join(order)}"
    )


def told_first_lines(
    wheres: Mapping[str, str], rows: Mapping[str, Tensor], entities: pl.Series, relations: pl.Series
) -> list[str]:
    """Doubts about first lines whose words come nowhere else: they may be headers.

    wheres: split -> file and line of its first triple, for files without a header.
    """
    firsts = {split: rows[split][0] for split in wheres}
    rest = [part[1:] if split in firsts else part for split, part in rows.items()]
    # Nearly always the relation comes again soon, and then nothing else is looked at.
    strange = {
        split: row
        for split, row in firsts.items()
        if not any((part[:1000, 1] == row[1]).any() or (part[:, 1] == row[1]).any() for part in rest)
    }
    if not strange or not sum(map(len, rest)):
        return []
    triples = torch.cat(rest)
    ends = torch.bincount(triples[:, [0, 2]].flatten(), minlength=len(entities))
    between = torch.bincount(triples[:, 1], minlength=len(relations))
    alone = (ends[triples[:, [0, 2]]] == 1).all(1) & (between[triples[:, 1]] == 1)
    if alone.float().mean() > _FEW_ALONE:
        return []
    notes = []
    for split, row in strange.items():
        head, relation, tail = row.tolist()
        if not ends[head] and not ends[tail]:
            words = ", ".join(repr(shorten(word)) for word in (entities[head], relations[relation], entities[tail]))
            notes.append(
                f"{wheres[split]} ({words}) is taken as a triple, though its words come nowhere else; if it is a "
                "header, remove it"
            )
    return notes


def _among(texts: pl.Series, names: pl.Series) -> pl.Series:
    # Which texts are among sorted names: a binary search each, for there are few of them.
    if not len(texts) or not len(names):
        return pl.Series([False] * len(texts), dtype=pl.Boolean)
    places = names.search_sorted(texts)
    return names.gather(places.clip(0, len(names) - 1)) == texts
