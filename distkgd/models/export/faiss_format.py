"""A FAISS index of the entities: its search gives the top k of a query as the scorer makes it.

For scorers that meet candidates by an inner product or a Euclidean distance. Rows of 32 bits are a flat index, exact.
Rows of few bits are FAISS's own of few bits:

    1 to 4, one step per row    IndexRaBitQ of their bit planes, exact: a level of b bits is half the sum of b signs
                                times 2^(b-1) to 1, so that a row is b rows of signs, which b multiples of a query
                                meet, one after the other. Of a distance only 1 bit.
    16                          IndexScalarQuantizer QT_bf16, exact
    all others                  IndexScalarQuantizer QT_8bit: rounded again, by a range per column, without steps

Beside it lie the relations, from which queries are made.
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
from distkgd.kernels.quantiser import Packed, unpack_codes
from distkgd.models.export.source import PackedTable, Source, Table
from distkgd.models.model import project
from distkgd.models.model_folder import check_files, read_json
from distkgd.scorers import Scorer, from_constants

FAISS = "distkgd-faiss/1"
_NUMBERS_AT_ONCE = 1 << 20  # made from codes
WHY_NOT = {
    "coordinates": "it sums over coordinates, which no exact index of FAISS does with its relations' scales or moduli",
    "squared": "its entities have biases, which a distance leaves out",
    "hyperbolic": "it measures in hyperbolic space with a curvature per relation",
    "lorentz": "its entities have biases, and times that their rows do not hold",
}


def write_faiss(source: Source, folder: Path) -> dict[str, Any]:
    """Write entity.faiss and relation.safetensors; UnsupportedError for scorers that no index answers."""
    faiss = need("faiss", "--format faiss")
    form = source.scorer.candidate_form
    if form not in ("dot", "l2"):
        raise UnsupportedError(
            f"{source.scorer.name} cannot be searched by FAISS: {WHY_NOT[form]}. Use --format numpy."
        )
    entity, relation = source.tables
    bits, planes, widened = source.bits("entity"), 0, source.widened("relation")
    metric = faiss.METRIC_INNER_PRODUCT if form == "dot" else faiss.METRIC_L2
    if bits == 32:
        index = faiss.IndexFlatIP if form == "dot" else faiss.IndexFlatL2
        rows = (block.float().contiguous().view(torch.uint8).numpy().tobytes() for block in entity.blocks())
        write_bytes(folder / "entity.faiss", chain([_header(faiss, index, *entity.shape)], rows))
    else:
        few = bits == 1 or (bits <= 4 and form == "dot")
        packed = None
        if few and isinstance(entity, PackedTable) and source.one_step_a_row("entity"):
            packed = entity.packed(bits)
        if packed is not None and _measurable(packed, bits):
            planes, made = bits, _of_planes(faiss, packed, bits, metric)
        else:
            made = _of_ranges(faiss, entity, bits, metric)
            widened += [] if bits == 16 else [f"entity: {bits} bits rounded again to 8, with a range per column"]
        faiss.write_index(made, str(folder / "entity.faiss"))
    header = safetensors_header({"relation": (relation.tag, relation.shape, relation.size)})
    write_bytes(folder / "relation.safetensors", chain([header], relation.pieces()))
    files = {"entity": ["entity.faiss"], "relation": ["relation.safetensors"]}
    return {"format": FAISS, "files": files, "widened": widened} | ({"planes": planes} if planes else {})


def _measurable(packed: Packed, bits: int) -> bool:
    # FAISS takes rows of a squared norm below float32's epsilon for rows of norm 1.
    squares = packed.step.float().square() * (bits * packed.columns / 4)
    return not bool(((squares > 0) & (squares < 1.25e-7)).any())


def _of_planes(faiss: Any, packed: Packed, bits: int, metric: int) -> Any:
    """Of rows with one step each: rows [n, bits * columns] of plus and minus half of it, highest bits first."""
    index = faiss.IndexRaBitQ(bits * packed.columns, metric)
    index.train(torch.zeros(1, index.d).numpy())  # signs about 0
    index.qb = 0  # queries as they are
    shifts = torch.arange(bits - 1, -1, -1, dtype=torch.uint8).unsqueeze(1)
    for at in range(0, len(packed.codes), few := max(1, _NUMBERS_AT_ONCE // index.d)):
        piece = packed.select(slice(at, at + few))
        codes = unpack_codes(piece.codes, bits, packed.columns).unsqueeze(1)
        signs = ((codes >> shifts) & 1).float().sub_(0.5).flatten(1)
        index.add((signs * piece.step.float()).numpy())
    return index


def _of_ranges(faiss: Any, entity: Table, bits: int, metric: int) -> Any:
    kind = faiss.ScalarQuantizer.QT_bf16 if bits == 16 else faiss.ScalarQuantizer.QT_8bit
    index = faiss.IndexScalarQuantizer(entity.shape[1], kind, metric)
    if bits != 16:
        ends = [torch.stack(torch.aminmax(block.float(), dim=0)) for block in entity.blocks()]
        index.train(torch.cat(ends).numpy())  # only the columns' ranges are learned
    for block in entity.blocks():
        index.add(block.float().contiguous().numpy())
    return index


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
    """An index and what queries are made of. index: a FAISS index of the entities. relation: [rows, relation_size].

    planes: bits of each number, where the index is of bit planes; else 0.
    """

    index: Any
    scorer: Scorer
    relation: Tensor
    num_relations: int
    reciprocal: bool
    planes: int = 0

    def rows(self, ids: Tensor) -> Tensor:
        """[n, dim] float32: entities as the index holds them."""
        rows = torch.from_numpy(self.index.reconstruct_batch(ids.numpy()))
        return (rows.unflatten(1, (self.planes, -1)) * self._weights).sum(1) if self.planes else rows

    @property
    def _weights(self) -> Tensor:
        # [planes, 1] of the signs in a level.
        return 2.0 ** (self.planes - 1 - torch.arange(self.planes).unsqueeze(1))

    def search(self, anchor: Tensor, relation: Tensor, k: int, *, ask: str = "tail") -> tuple[Tensor, Tensor]:
        """([Q, k] scores, [Q, k] ids): the best tails of heads [Q] and relations [Q]; ask "head": heads of tails."""
        side = torch.full_like(relation, int(ask == "head"))
        row = relation + self.num_relations * side if self.reciprocal else relation
        queries = Queries(anchor, relation, side, anchor)
        made = project(self.scorer, self.reciprocal, queries, self.rows(anchor), self.relation[row].float())
        if self.planes:
            made = (made.unsqueeze(1) * self._weights).flatten(1)
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
    index, number = faiss.read_index(str(folder / "entity.faiss")), int(config["num_relations"])
    return Searcher(index, scorer, relation, number, reciprocal, int(config.get("planes", 0)))
