"""A FAISS index of the entities, exact: its search gives the top k of a query as the scorer makes it.

For scorers that meet candidates by an inner product (IndexFlatIP) or a Euclidean distance (IndexFlatL2). Beside it lie
the relations, from which queries are made.
"""

from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distkgd.common.optional_imports import need
from distkgd.common.paths import AnyPath
from distkgd.data.filters import Queries
from distkgd.distributed.checkpoint.tables import read_table, safetensors_header, write_bytes
from distkgd.errors import ModelError, UnsupportedError
from distkgd.models.export.source import Source
from distkgd.models.model import project
from distkgd.models.model_folder import check_files, read_json
from distkgd.scorers import Scorer, from_constants

FAISS = "distkgd-faiss/1"
WHY_NOT = {
    "coordinates": "it sums over coordinates, which no exact index of FAISS does with its relations' scales or moduli",
    "squared": "its entities have biases, which a distance leaves out",
    "hyperbolic": "it measures in hyperbolic space with a curvature per relation",
}


def write_faiss(source: Source, folder: Path) -> dict[str, Any]:
    """Write entity.faiss, float32, and relation.safetensors; UnsupportedError for scorers that no index answers."""
    faiss = need("faiss", "--format faiss")
    form = source.scorer.candidate_form
    if form not in ("dot", "l2"):
        raise UnsupportedError(
            f"{source.scorer.name} cannot be searched by FAISS: {WHY_NOT[form]}. Use --format numpy."
        )
    index = faiss.IndexFlatIP if form == "dot" else faiss.IndexFlatL2
    entity, relation = source.tables
    rows = (block.float().contiguous().view(torch.uint8).numpy().tobytes() for block in entity.blocks())
    write_bytes(folder / "entity.faiss", chain([_header(faiss, index, *entity.shape)], rows))
    header = safetensors_header({"relation": (relation.tag, relation.shape, relation.size)})
    write_bytes(folder / "relation.safetensors", chain([header], relation.pieces()))
    return {"format": FAISS, "files": {"entity": ["entity.faiss"], "relation": ["relation.safetensors"]}}


def _header(faiss: Any, index: Any, num: int, dim: int) -> bytes:
    """What stands before the rows in the file of a flat index, so that it is written without one in memory."""

    def patched(rows: int) -> bytes:
        # Two fields of 8 bytes depend on the number of rows: it stands in the third of 4 bytes, the numbers' last.
        example = made[1][:]
        example[8:16], example[-8:] = rows.to_bytes(8, "little"), (rows * dim).to_bytes(8, "little")
        return bytes(example)

    made = []
    for rows in (1, 2):
        small = index(dim)
        small.add(torch.ones(rows, dim).numpy())
        made.append(bytearray(faiss.serialize_index(small).tobytes()[: -4 * rows * dim]))
    if patched(1) != made[0]:
        raise UnsupportedError(f"faiss {faiss.__version__} writes flat indices in a way that is not known here.")
    return patched(num)


@dataclass(frozen=True)
class Searcher:
    """An index and what queries are made of. index: a FAISS index of the entities. relation: [rows, relation_size]."""

    index: Any
    scorer: Scorer
    relation: Tensor
    num_relations: int
    reciprocal: bool

    def search(self, anchor: Tensor, relation: Tensor, k: int, *, ask: str = "tail") -> tuple[Tensor, Tensor]:
        """([Q, k] scores, [Q, k] ids): the best tails of heads [Q] and relations [Q]; ask "head": heads of tails."""
        side = torch.full_like(relation, int(ask == "head"))
        rows = torch.from_numpy(self.index.reconstruct_batch(anchor.numpy()))
        row = relation + self.num_relations * side if self.reciprocal else relation
        queries = Queries(anchor, relation, side, anchor)
        made = project(self.scorer, self.reciprocal, queries, rows, self.relation[row].float())
        found, ids = (torch.from_numpy(x) for x in self.index.search(made.contiguous().numpy(), k))
        if self.scorer.candidate_form == "l2":
            found = self.scorer.margin - found.clamp_min(0.0).sqrt()  # FAISS gives squared distances
        return found, ids


def open_searcher(folder: AnyPath) -> Searcher:
    """What `write_faiss` wrote; ModelError names a damaged file."""
    folder = Path(folder)
    faiss = need("faiss", "an index of FAISS")
    config = read_json(folder / "config.json")
    if config.get("format") != FAISS:
        raise ModelError(f"{folder} is no export in FAISS's format but {config.get('format')!r}.")
    check_files(folder)
    scorer, reciprocal = from_constants(config["scorer"]), bool(config["reciprocal"])
    rows = int(config["num_relations"]) * (2 if reciprocal else 1)
    relation = read_table(folder, config["files"]["relation"], "relation", 0, rows)
    return Searcher(
        faiss.read_index(str(folder / "entity.faiss")), scorer, relation, int(config["num_relations"]), reciprocal
    )
