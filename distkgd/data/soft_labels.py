"""Soft labels in files: of each training query the best k answers of a teacher, and what all others weigh together.

Any program can write such a folder; all arrays are NumPy's, read through a memory map:

- `queries.npy` [Q, 3] int64: relation, side, anchor, each row once and in ascending order. Side 0 asks
  (anchor, relation, ?), side 1 asks (?, relation, anchor). There is one for both ends of every training triple.
- `entities.npy` [Q, k] int32 or int64: ids of answers, of a query each once, in any order; -1 where there are fewer.
- `logits.npy` [Q, k] float32 or float64: their scores over the temperature, or the logarithms of their probabilities.
- `rest.npy` [Q] float32 or float64: the log-sum-exp of the logits of all other entities; -inf where they have no mass.
- `labels.json`: `version` 1; `temperature`; `entities` and `relations`, the SHA-256 (hexadecimal) of their names in the
  order of their ids, each followed by a newline, in UTF-8; `sha256` {file name: that of its bytes}.

Ids are those of the graph as distkgd reads it (`entities.tsv` of a model of it).
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from distkgd.data.filters import Queries, both_sides
from distkgd.data.triples import Graph, Vocabulary
from distkgd.errors import DataError

FILES = ("queries", "entities", "logits", "rest")
VERSION = 1


class Labels(NamedTuple):
    """Of some queries: [Q, k] int64 entities, -1: none, their logits and [Q] that of all others together, float64."""

    entities: Tensor
    logits: Tensor
    rest: Tensor


class SoftLabels:
    """A folder of soft labels; DataError where it is none."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        try:
            self.about: dict[str, Any] = json.loads((self.folder / "labels.json").read_text(encoding="utf-8"))
            arrays = {name: np.load(self.folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in FILES}
        except (OSError, ValueError) as error:
            raise DataError(f"{self.folder} holds no soft labels that can be read: {error}") from None
        self._queries, self._entities, self._logits, self._rest = (arrays[name] for name in FILES)
        if not isinstance(self.about, dict) or self.about.get("version") != VERSION:
            raise DataError(f"{self.folder}/labels.json is not of version {VERSION}.")
        number, shape = len(self._queries), self._logits.shape
        wanted = {"queries": (number, 3), "entities": (number, shape[-1]), "logits": (number, shape[-1])}
        for name, expected in {**wanted, "rest": (number,)}.items():
            kinds = "i" if name in ("queries", "entities") else "f"
            if arrays[name].shape != expected or arrays[name].dtype.kind != kinds:
                raise DataError(
                    f"{self.folder}/{name}.npy is {arrays[name].dtype} {list(arrays[name].shape)}, and must be "
                    f"{'int' if kinds == 'i' else 'float'} {list(expected)}."
                )

    @property
    def k(self) -> int:
        """How many answers a query has at most."""
        return int(self._entities.shape[1])

    def check(self, graph: Graph, temperature: float) -> None:
        """DataError unless these files are whole, of this graph and temperature, and have every training query."""
        for name in FILES:
            path = self.folder / f"{name}.npy"
            with path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != self.about.get("sha256", {}).get(path.name):
                    raise DataError(f"{path}: its sha256 differs from that in labels.json; write the labels again.")
        for kind, names in (("entities", graph.entities), ("relations", graph.relations)):
            if self.about.get(kind) != digest_of(names):
                raise DataError(
                    f"{self.folder} has labels of other {kind} than {graph.name}; write them for this graph."
                )
        if self.about.get("temperature") != temperature:
            made = self.about.get("temperature")
            raise DataError(f"{self.folder} has labels of temperature {made}, and the stage's is {temperature}.")
        keys, wanted = self._keys(graph.num_entities), training_queries(graph)
        if len(keys) and not bool((keys[1:] > keys[:-1]).all()):
            raise DataError(f"{self.folder}/queries.npy: rows must ascend, each once.")
        lacking = ~torch.isin(_keys_of(wanted, graph.num_entities), keys)
        if lacking.any():
            relation, side, anchor = wanted[lacking][0].tolist()
            ends = ["?", graph.entities.names[anchor]] if side else [graph.entities.names[anchor], "?"]
            raise DataError(
                f"{self.folder} lacks {int(lacking.sum())} of {len(wanted)} training queries, the first is "
                f"({ends[0]}, {graph.relations.names[relation]}, {ends[1]})."
            )
        if len(self._entities) and not -1 <= int(self._entities.min()) <= int(self._entities.max()) < len(
            graph.entities
        ):
            raise DataError(f"{self.folder}/entities.npy: ids must be -1 to {len(graph.entities) - 1}.")
        counts = self._entities >= 0
        if not np.isfinite(self._logits, where=counts, out=np.ones(counts.shape, bool)).all():
            raise DataError(f"{self.folder}/logits.npy holds NaN or an infinity.")
        if not (self._rest < np.inf).all():
            raise DataError(f"{self.folder}/rest.npy holds NaN or +inf.")

    def of(self, queries: Queries, num_entities: int) -> Labels:
        """The labels of queries, on their device; of what is no training query, those of another."""
        device = queries.anchor.device
        if not hasattr(self, "_sorted"):
            self._sorted = self._keys(num_entities)
        asked = torch.stack([queries.relation, queries.side, queries.anchor], 1).cpu()
        rows = torch.searchsorted(self._sorted, _keys_of(asked, num_entities)).clamp(max=len(self._sorted) - 1).numpy()
        entities = torch.from_numpy(self._entities[rows].astype(np.int64))
        logits, rest = (torch.from_numpy(x[rows].astype(np.float64)) for x in (self._logits, self._rest))
        return Labels(entities.to(device), logits.to(device), rest.to(device))

    def _keys(self, num_entities: int) -> Tensor:
        return _keys_of(torch.from_numpy(self._queries.astype(np.int64)), num_entities)


def _keys_of(queries: Tensor, num_entities: int) -> Tensor:
    # [Q] int64 of [Q, 3] relation, side, anchor: in their order.
    return (queries[:, 0] * 2 + queries[:, 1]) * num_entities + queries[:, 2]


def training_queries(graph: Graph) -> Tensor:
    """[Q, 3] int64: relation, side and anchor of every question that a training triple answers, ascending."""
    asked = both_sides(graph.train)
    keys = _keys_of(torch.stack([asked.relation, asked.side, asked.anchor], 1), graph.num_entities).unique()
    which = keys // graph.num_entities
    return torch.stack([which // 2, which % 2, keys % graph.num_entities], 1)


def digest_of(names: Vocabulary) -> str:
    """SHA-256 of names by id, each followed by a newline."""
    return hashlib.sha256("".join(f"{name}\n" for name in names.names).encode()).hexdigest()


def write_about(folder: Path, graph: Graph, temperature: float, more: Mapping[str, Any]) -> None:
    """Write labels.json beside the arrays in `folder`; `more` goes into it."""
    digests = {f"{n}.npy": hashlib.sha256((folder / f"{n}.npy").read_bytes()).hexdigest() for n in FILES}
    about = {"version": VERSION, "temperature": temperature, "entities": digest_of(graph.entities)}
    about |= {"relations": digest_of(graph.relations), **more, "sha256": digests}
    (folder / "labels.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
