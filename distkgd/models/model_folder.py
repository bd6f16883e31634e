"""A finished model on disk: safetensors shards, names in row order, and every constant of the formula.

model/
  config.json         scorer and its constants, sizes, reciprocal, the table files in order, where it came from
  entities.tsv        id, name in row order; entity_labels.tsv where the graph has human names
  relations.tsv       id, name; relation_labels.tsv likewise
  entity-*.safetensors    concatenate to `entity` [num_entities, biases + dim]; most scorers have no biases
  relation-*.safetensors  concatenate to `relation` [num_relations or twice that, relation_size]
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import polars as pl
import torch

from distkgd.common.paths import AnyPath
from distkgd.data import Graph, Vocabulary
from distkgd.distributed.checkpoint.tables import TAGS, Rows, atomic_folder, read_table, rows_in, write_table
from distkgd.distributed.finite import Broken, broken_in_file
from distkgd.distributed.ranks import Ranks
from distkgd.distributed.tables import ShardedTable
from distkgd.errors import DataError, ModelError
from distkgd.kernels.candidates import plain
from distkgd.kernels.packed import PackedRows, chosen
from distkgd.kernels.quantiser import Quantiser, quantiser_of
from distkgd.models.formats.int8 import read_int8
from distkgd.models.formats.packed import read_packed, write_packed
from distkgd.models.formats.sparse import read_sparse, smallest
from distkgd.models.formats.zeros import read_zeros
from distkgd.models.model import Model, broken_row_of
from distkgd.scorers import Scorer, from_constants

FORMAT = "distkgd-model/1"
PACKED = "distkgd-packed/1"  # the same with one or both tables as `formats.packed` writes them
SPARSE = "distkgd-sparse/1"  # the same with tables as `sparse_files` writes them
INT8 = "distkgd-int8/1"  # the same with entities as `formats.int8` reads them


@dataclass(frozen=True)
class LoadedModel:
    """A model, its vocabularies, and its config.json."""

    model: Model
    entities: Vocabulary
    relations: Vocabulary
    config: dict[str, Any]


def save_model(folder: AnyPath, model: Model, graph: Graph | LoadedModel, about: Mapping[str, Any]) -> None:
    """Write `model` of the entities of `graph`, or of the model it was made of; `about` goes into config.json.

    All ranks call it. ModelError, and nothing is written, where its tables hold NaN or an infinity.
    """
    folder = Path(folder)
    ranks = model.entity.ranks
    if (broken := broken_row_of(model)) is not None:
        raise ModelError(f"{folder} is not written: the model's {told(broken, graph.entities, graph.relations)}.")
    table = model.entity
    lo, hi = ranks.share(len(model.relation))
    tables = {
        "entity": Rows(table.weight, table.lo, table.total),
        "relation": Rows(model.relation.detach()[lo:hi], lo, len(model.relation)),
    }
    quantisers = model.quantisers
    with atomic_folder(folder, ranks) as part:
        of_tables: dict[str, list[str]] = {}
        for name, rows in tables.items():
            if name in quantisers:
                of_tables |= write_packed(part, name, rows, quantisers[name], ranks)
            else:
                of_tables[name] = write_table(part, name, rows, ranks)
        files = [file for of_table in of_tables.values() for file in of_table]
        # Each rank reads back its share; who holds the digests knows the model, rows and all.
        mine = {name: sha256_of(part / name) for name in files[ranks.rank :: ranks.world]}
        digests = {name: digest for found in ranks.gather_objects(mine) for name, digest in found.items()}
        if ranks.first:
            config = {
                "format": PACKED if quantisers else FORMAT,
                "scorer": model.scorer.constants(),
                "num_entities": table.total,
                "num_relations": model.num_relations,
                "reciprocal": model.reciprocal,
                "dtype": str(table.shard.dtype).removeprefix("torch."),
                **({"packed": {name: one.to_json() for name, one in quantisers.items()}} if quantisers else {}),
                "files": of_tables,
                "sha256": {name: digests[name] for name in files},
                **about,
            }
            (part / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            write_names(part, "entities", "entity_labels", graph.entities)
            write_names(part, "relations", "relation_labels", graph.relations)


def load_model(folder: AnyPath, ranks: Ranks, dtype: torch.dtype | None = None) -> LoadedModel:
    """The model in `folder` (or in its `model/` subfolder), this rank's rows only.

    Raises ModelError, on all ranks, when the folder is not a model, a file of it is missing or damaged, or a number of
    its tables is NaN or infinite. Packed entities stay packed on a CPU.
    """
    folder = Path(folder)
    folder = find_model(folder)
    config = read_config(folder)
    if config["format"] == PACKED:
        chosen()  # refuses here what scoring would refuse later
    try:
        scorer = from_constants(config["scorer"])
        num_entities, num_relations = int(config["num_entities"]), int(config["num_relations"])
        reciprocal, files = bool(config["reciprocal"]), config["files"]
        lo, hi = ranks.share(num_entities)
        rows = num_relations * (2 if reciprocal else 1)
        entity: torch.Tensor | PackedRows
        if config["format"] == SPARSE:
            entity = read_sparse(folder / files["entity"][0], (num_entities, scorer.entity_size), lo, hi)
            relation = read_sparse(folder / files["relation"][0], (rows, scorer.relation_size), 0, rows)
        elif config["format"] == PACKED:
            entity = _read_rows(folder, config, "entity", scorer.entity_size, lo, hi)
            relation = plain(_read_rows(folder, config, "relation", scorer.relation_size, 0, rows))
        elif config["format"] == INT8:
            path = folder / files["entity"][0]
            entity = read_int8(path, num_entities, scorer.biases, scorer.dim, lo, hi)
            relation = read_table(folder, files["relation"], "relation", 0, rows).float()
        else:
            entity = read_table(folder, files["entity"], "entity", lo, hi)
            relation = read_table(folder, files["relation"], "relation", 0, rows)
        entities = read_names(folder, "entities", "entity_labels", num_entities)
        relations = read_names(folder, "relations", "relation_labels", num_relations)
    except (ModelError, DataError):
        raise
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ModelError(f"{folder}/config.json lacks or garbles {error}; write the model again.") from None
    if entity.shape[1] != scorer.entity_size or relation.shape[1] != scorer.relation_size:
        raise ModelError(
            f"{folder}: the tables have {entity.shape[1]} and {relation.shape[1]} columns, "
            f"the scorer in config.json ({scorer}) needs {scorer.entity_size} and {scorer.relation_size}."
        )
    wanted = dtype or (torch.float32 if config["format"] == PACKED else relation.dtype)
    # Rows in bfloat16 stay as they are and are widened where they are used; packed ones on a CPU too.
    if isinstance(entity, torch.Tensor) or ranks.device.type != "cpu":
        stored = entity.dtype if entity.dtype == torch.bfloat16 else wanted
        entity = plain(entity).to(ranks.device, stored)
    table = ShardedTable(entity, num_entities, ranks, wanted)
    model = Model(scorer, table, relation.to(ranks.device, wanted), num_relations, reciprocal)
    if (broken := broken_row_of(model)) is not None:
        held = files.get(broken.tensor) or files[f"{broken.tensor}.step"]
        ends = accumulate(rows_in(folder / file) for file in held)
        path = folder / next(file for file, end in zip(held, ends, strict=True) if broken.row < end or file == held[-1])
        raise ModelError(_refusal(path, broken, entities, relations))
    return LoadedModel(model, entities, relations, config)


def _read_rows(
    folder: Path, config: Mapping[str, Any], name: str, width: int, lo: int, hi: int
) -> torch.Tensor | PackedRows:
    # [hi - lo, width] of a folder of format PACKED.
    about = config["packed"].get(name)
    if about is None or about["bits"] == 16:
        return read_table(folder, config["files"][name], name, lo, hi)
    quantiser = quantiser_of(about)
    if quantiser.zeros:
        return read_zeros(folder, config["files"], name, quantiser, width, lo, hi)
    return PackedRows(read_packed(folder, config["files"], name, quantiser, width, lo, hi), quantiser)


def read_shape(folder: AnyPath) -> tuple[Scorer, bool]:
    """(scorer, reciprocal) of the model in `folder`, from its config.json alone; ModelError when there is none."""
    folder = Path(folder)
    folder = find_model(folder)
    config = read_config(folder)
    try:
        return from_constants(config["scorer"]), bool(config["reciprocal"])
    except ModelError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ModelError(f"{folder}/config.json lacks or garbles {error}; write the model again.") from None


def find_model(folder: AnyPath) -> Path:
    """`folder` itself or its `model/` subfolder, whichever holds a config.json."""
    folder = Path(folder)
    for candidate in (folder, folder / "model"):
        if (candidate / "config.json").is_file():
            return candidate
    seen = ", ".join(sorted(p.name for p in folder.iterdir())[:10]) if folder.is_dir() else "no such folder"
    raise ModelError(
        f"{folder} holds no model (looked for config.json and model/config.json; found: {seen}). "
        "Give the folder of a finished stage, e.g. runs/NAME/stages/student."
    )


def read_config(folder: AnyPath) -> dict[str, Any]:
    """config.json of a model folder."""
    folder = Path(folder)
    config = read_json(folder / "config.json")
    known = (FORMAT, PACKED, SPARSE, INT8)
    if config.get("format") not in known:
        given = config.get("format")
        raise ModelError(
            f"{folder}/config.json has format {given!r}; this version reads {', '.join(map(repr, known))}."
        )
    if not isinstance(config.get("reciprocal"), bool):
        raise ModelError(f"{folder}/config.json: reciprocal is {config.get('reciprocal')!r}, not true or false.")
    return config


def read_json(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file; ModelError when there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read: {error}.") from None
    if not isinstance(found, dict):
        raise ModelError(f"{path} holds {found!r:.80}, not a mapping of names to values.")
    return found


def bytes_on_disk(folder: AnyPath) -> int:
    """Bytes of the table files of a model folder: what a student costs."""
    folder = Path(folder)
    return sum(path.stat().st_size for path in find_model(folder).glob("*.safetensors"))


def table_bytes(model: Model, dim: int | None = None, how: Mapping[str, Quantiser] | None = None) -> int:
    """Of a model's tables, or those of its crop to `dim`, as they are saved; headers of files not counted.

    how: quantisers of "entity" and "relation" in place of the model's own.
    """
    scorer, table, relation = model.scorer, model.entity, model.relation
    scorer = scorer if dim is None else scorer.crop(dim)
    shapes = {
        "entity": (table.total, scorer.entity_size, table.shard.dtype.itemsize),
        "relation": (len(relation), scorer.relation_size, relation.element_size()),
    }
    how, size = model.quantisers if how is None else how, 0
    for name, (rows, width, item) in shapes.items():
        size += rows * (how[name].row_bytes(width) if name in how else width * item)
    return size


def sizes_on_disk(folder: AnyPath) -> dict[str, int]:
    """What a model folder takes: bytes of its table files, bits of both tables' numbers, row_bytes, num_entities.

    row_bytes: of an entity's row (codes, steps, biases); left out of exports that have no rows of one size.
    """
    config = read_config(find_model(folder))
    how = {name: quantiser_of(about) for name, about in config.get("packed", {}).items()}
    names = {"entity": "bits", "relation": "relation_bits"}
    found = {key: how[name].bits if name in how else 32 for name, key in names.items()}
    found |= {"bytes": bytes_on_disk(folder), "num_entities": int(config["num_entities"])}
    width, entity = from_constants(config["scorer"]).entity_size, how.get("entity")
    if entity is not None:
        return found if entity.zeros else found | {"row_bytes": entity.row_bytes(width)}
    whole = config["format"] in (FORMAT, PACKED)
    return found | ({"row_bytes": width * getattr(torch, config["dtype"]).itemsize} if whole else {})


def distinct_rows(model: Model) -> int:
    """How many entities' rows differ as the model is saved: of few bits, some may be equal. All ranks call it."""
    table = model.entity
    # A row is told by 64 bits, the sum of its numbers' bits, mixed, times odd whole numbers; 0.0 makes minus zero zero.
    factors = 1 + 2 * torch.randint(1 << 62, (table.dim,), generator=torch.Generator().manual_seed(0))
    factors, few = factors.to(table.ranks.device), max(1, (1 << 20) // table.dim)
    pieces = (table.rows(slice(at, at + few)) for at in range(0, max(1, len(table.shard)), few))
    seen = (piece if table.quantiser is None else table.quantiser(piece) for piece in pieces)
    mine = torch.cat([(_mixed((rows.float() + 0.0).view(torch.int32)) * factors).sum(1) for rows in seen]).unique()
    return len(torch.cat(table.ranks.gather_objects(mine.cpu())).unique())


def _mixed(bits: torch.Tensor) -> torch.Tensor:
    # Numbers that differ in their sign alone differ in the lower half too.
    spread = bits * 0x1E3779B97F4A7C15
    return spread ^ (spread >> 32)


def sparse_bytes(model: Model) -> int:
    """Bytes of the table files that `export --format sparse` would write of a model; all ranks call it."""
    table = model.entity
    nonzeros = torch.count_nonzero(table.weight).reshape(1)
    table.ranks.all_reduce(nonzeros)
    sizes = [smallest(TAGS[table.weight.dtype], (table.total, table.dim), int(nonzeros))]
    relation = model.relation.detach()
    shape = len(relation), relation.shape[1]
    return sum(size for _, size in [*sizes, smallest(TAGS[relation.dtype], shape, int(torch.count_nonzero(relation)))])


def sha256_of(path: Path) -> str:
    """Of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_files(folder: AnyPath) -> None:
    """ModelError names the first file of a model folder or of an export, in whatever format, that is not as written.

    `load_model` does not do this: it would read everything once more.
    """
    folder = Path(folder)
    digests = read_json(folder / "config.json").get("sha256")
    if not isinstance(digests, dict) or not digests:
        raise ModelError(f"{folder}/config.json holds no sha256 of files; export the model again.")
    for file, digest in digests.items():
        if not (folder / file).is_file() or sha256_of(folder / file) != digest:
            raise ModelError(
                f"{folder / file}: missing, or its sha256 differs from config.json's; export the model again."
            )


def check_numbers(folder: Path) -> None:
    """ModelError names the first row of a model folder's tables that holds NaN or an infinity.

    For who does not load the model: its files are read in pieces (but those of many zeros).
    """
    config = read_config(folder)
    if config["format"] == SPARSE:
        load_model(folder, Ranks())
        return
    for name, files in config["files"].items():
        start = 0
        for file in files:
            if (found := broken_in_file(folder / file)) is not None:
                entities = read_names(folder, "entities", "entity_labels", int(config["num_entities"]))
                relations = read_names(folder, "relations", "relation_labels", int(config["num_relations"]))
                broken = Broken(name, start + found.row, found.value)
                raise ModelError(_refusal(folder / file, broken, entities, relations))
            start += rows_in(folder / file)


def told(broken: Broken, entities: Vocabulary, relations: Vocabulary) -> str:
    """A broken row in words: its tensor, number, name and value."""
    if broken.tensor.startswith("entity"):
        name = f"entity {entities.name(broken.row)!r}"
    else:
        inverse, row = divmod(broken.row, len(relations))
        name = f"{'inverse of ' if inverse else ''}relation {relations.name(row)!r}"
    return f"tensor {broken.tensor!r}, row {broken.row} ({name}), holds {broken.value}"


def _refusal(path: Path, broken: Broken, entities: Vocabulary, relations: Vocabulary) -> str:
    return (
        f"{path}: {told(broken, entities, relations)}; such a model has no scores. Take one whose training has not "
        "diverged."
    )


def same_vocabulary(loaded: LoadedModel, graph: Graph, folder: str) -> None:
    """Refuse a model whose rows mean other entities or relations than the graph's."""
    for kind, mine, theirs in (
        ("entities", loaded.entities, graph.entities),
        ("relations", loaded.relations, graph.relations),
    ):
        if len(mine) != len(theirs) or not mine.names.equals(theirs.names):
            since = data_since(loaded, graph)
            raise ModelError(
                f"{folder} was trained on other {kind} ({len(mine)}) than {graph.name} ({len(theirs)}); "
                f"name the data set that the model was trained on{since and f' ({since})'}."
            )


def data_since(loaded: LoadedModel, graph: Graph) -> str:
    """That `graph` is not what the model was trained on, "" when it is or the model does not say."""
    then = loaded.config.get("data")
    if not isinstance(then, Mapping) or not then.get("sha256") or graph.is_of(then):
        return ""
    sha256 = str(then["sha256"])
    if sha256 == graph.sha256:
        return f"{graph.name} has changed since training: its splits end elsewhere"
    return f"{graph.name} has changed since training or is another one: sha256 {graph.sha256[:12]}, then {sha256[:12]}"


def write_names(folder: Path, names: str, labels: str, vocabulary: Vocabulary) -> None:
    """Write names, and labels where there are any: "entities", "entity_labels", or of relations."""
    vocabulary.write_tsv(folder / f"{names}.tsv")
    if vocabulary.labels is not None:
        texts = vocabulary.labels
        frame = pl.DataFrame({"id": pl.arange(0, len(texts), eager=True), "label": texts})
        with (folder / f"{labels}.tsv").open("wb") as file:  # polars would take some paths for patterns or addresses
            frame.write_csv(file, separator="\t", include_header=False)


def read_names(folder: Path, names: str, labels: str, number: int) -> Vocabulary:
    """`number` names of a model folder, and labels if there are any: "entities", "entity_labels", or of relations."""
    vocabulary = Vocabulary.read_tsv(folder / f"{names}.tsv")
    if len(vocabulary) != number:
        raise ModelError(f"{folder / names}.tsv has {len(vocabulary)} rows; config.json says {number}.")
    path = folder / f"{labels}.tsv"
    if not path.is_file():
        return vocabulary
    try:
        with path.open("rb") as file:
            frame = pl.read_csv(file, separator="\t", has_header=False, schema={"id": pl.Int64, "label": pl.String})
    except (pl.exceptions.PolarsError, OSError) as error:
        raise ModelError(f"{path} is no table of ids and labels ({error}); write the model again.") from None
    if frame["id"].to_list() != list(range(number)):
        raise ModelError(f"{path} has {len(frame)} rows or other ids than 0 … {number - 1}; write the model again.")
    return Vocabulary(vocabulary.names, frame["label"])
