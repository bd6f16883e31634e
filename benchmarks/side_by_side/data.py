"""What is measured on: WN18RR where it lies at hand, else a made graph of its size; and text files of any length."""

import functools
import os
from pathlib import Path

import numpy as np
import polars as pl
import torch

from distkgd.data import Graph, load_graph

WN18RR_SIZE = "powerlaw:entities=40943,triples=86835,relations=11,skew=0.8,seed=0,valid=3034,test=3134"


def source_of_size() -> str:
    """WN18RR if $DISTKGD_DATA has it (nothing is downloaded), else a made graph of as many entities and triples."""
    root = os.environ.get("DISTKGD_DATA")
    return "wn18rr" if root and (Path(root).expanduser() / "wn18rr").is_dir() else WN18RR_SIZE


@functools.lru_cache(maxsize=2)
def graph_of(source: str) -> Graph:
    """The graph of a source, its training triples in a fixed random order."""
    graph = load_graph(source)
    order = torch.randperm(len(graph.train), generator=torch.Generator().manual_seed(0))
    graph.train.copy_(graph.train[order])
    return graph


def write_triples(folder: Path, triples: int, entities: int, held_out: int = 1000) -> Path:
    """A folder with a train file of random triples and small valid and test files; returns the train file."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    relations = min(500, max(1, triples // 200))  # few enough that the held-out triples bring no new one
    for split, number in (("train", triples), ("valid", held_out), ("test", held_out)):
        columns = {
            "h": pl.Series(generator.integers(0, entities, number)),
            "r": pl.Series(generator.integers(0, relations, number)),
            "t": pl.Series(generator.integers(0, entities, number)),
        }
        frame = pl.DataFrame(
            {key: pl.select(pl.format(key + "{}", column)).to_series() for key, column in columns.items()}
        )
        with (folder / f"{split}.tsv").open("wb") as file:
            frame.write_csv(file, separator="\t", include_header=False)
    return folder / "train.tsv"
