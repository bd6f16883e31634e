"""A graph that grows: what of it was there before some of its entities came."""

from pathlib import Path

import torch
from torch import Tensor

from distkgd.common import random
from distkgd.common.random import Stream
from distkgd.data.triples import SPLITS, Graph, words_of
from distkgd.errors import DataError


def drawn_newcomers(graph: Graph, share: float, seed: int = 0) -> Tensor:
    """[m] ids of entities that are taken for new ones, ascending: a share of those that train has, drawn by seed."""
    seen = graph.train[:, [0, 2]].unique()
    number = round(share * len(seen))
    if not 0 < number < len(seen):
        raise DataError(f"{share:g} of {len(seen):,} entities are {number}; give a share that leaves some of both.")
    order = torch.sort(random.bits(seed, Stream.SPLIT, 1, seen)).indices
    drawn: Tensor = seen[order[:number]].sort().values
    return drawn


def holding(triples: Tensor, entities: Tensor) -> Tensor:
    """[n] bool: which of [n, 3] triples hold one of some entities."""
    return torch.isin(triples[:, [0, 2]], entities).any(1)


def write_before(graph: Graph, newcomers: Tensor, folder: Path) -> None:
    """Write the data set that a graph was without its newcomers: all triples that hold none of them.

    Held-out triples whose relation train lacks by then are left out too. `folder` must not exist.
    """
    before = {split: rows[~holding(rows, newcomers)] for split in SPLITS if len(rows := getattr(graph, split))}
    known = before["train"][:, 1].unique()
    folder.mkdir(parents=True)
    for split, rows in before.items():
        write_triples(graph, rows[torch.isin(rows[:, 1], known)], folder / f"{split}.tsv")


def write_triples(graph: Graph, triples: Tensor, path: Path) -> None:
    """Write [n, 3] triples of a graph by name, a line each."""
    frame = words_of(triples, graph.entities.names, graph.relations.names)
    path.write_bytes(frame.write_csv(include_header=False, separator="\t", quote_style="never").encode())
