"""A directory as PyKEEN saves one: trained_model.pkl, its state_dict.pt, and the vocabulary as training_triples/.

    torch.load("trained_model.pkl", weights_only=False)                # the model; a pickle: load only what you wrote
    TriplesFactory.from_path_binary("training_triples")                # names and ids, no triples

Of scorers that PyKEEN computes in the same way. Relation r is row 2 r there and its inverse row 2 r + 1; pairs
of numbers are complex numbers or tables of their own, as PyKEEN has them. Scores are equal: a margin becomes the bias
of PyKEEN's MonotonicAffineTransformationInteraction.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distkgd.common.optional_imports import need
from distkgd.errors import UnsupportedError
from distkgd.models.export.source import Source
from distkgd.models.importers.pykeen import CROSSED
from distkgd.models.model_folder import read_names
from distkgd.scorers import Scorer
from distkgd.scorers.interleaved import split_pairs

WHAT = "--format pykeen"


def write_pykeen(source: Source, folder: Path) -> dict[str, Any]:
    """Write a model that PyKEEN loads. The tables are in memory meanwhile.

    Raises UnsupportedError without PyKEEN, and for a scorer that it does not have or computes otherwise.
    """
    nn, triples = need("pykeen.models", WHAT, "bench"), need("pykeen.triples", WHAT, "bench")
    config, scorer = source.config, source.scorer
    entity, relation = (torch.cat([*table.blocks()]) for table in source.tables)
    dtype = torch.float64 if entity.dtype == torch.float64 else torch.float32
    entities, relations = entity_parts(scorer, entity.to(dtype)), relation_parts(scorer, relation.to(dtype))
    if config["reciprocal"]:
        # PyKEEN has each relation beside its inverse.
        relations = [part.unflatten(0, (2, -1)).transpose(0, 1).flatten(0, 1) for part in relations]
    interaction, arguments = interaction_of(scorer)
    info = triples.KGInfo(len(entity), int(config["num_relations"]), bool(config["reciprocal"]))
    model = nn.ERModel(
        triples_factory=info,
        interaction=interaction,
        interaction_kwargs=arguments,
        entity_representations_kwargs=[_representation(part) for part in entities],
        relation_representations_kwargs=[_representation(part) for part in relations],
    )
    # As its initializers these tensors would be pickled once more.
    for part, representation in zip(
        [*entities, *relations], [*model.entity_representations, *model.relation_representations], strict=True
    ):
        weight = representation._embeddings.weight
        numbers = torch.view_as_real(part.resolve_conj()) if part.is_complex() else part
        weight.data = numbers.reshape(weight.shape).clone()
    model.eval()
    torch.save(model, folder / "trained_model.pkl")
    torch.save(model.state_dict(), folder / "state_dict.pt")
    _write_vocabulary(source, folder / "training_triples", triples)
    files = [*(f"training_triples/{path.name}" for path in (folder / "training_triples").iterdir())]
    return {
        "format": "distkgd-pykeen/1",
        "files": {"model": ["trained_model.pkl", "state_dict.pt"], "vocabulary": sorted(files)},
    }


def interaction_of(scorer: Scorer) -> tuple[Any, dict[str, Any]]:
    """PyKEEN's interaction that scores as `scorer` does: its class and arguments."""
    modules = need("pykeen.nn.modules", WHAT, "bench")
    name, arguments = "", {}
    match scorer.name, scorer.norm:
        case "transe", norm:
            name, arguments = "TransE", {"p": norm, "power_norm": False}
        case "rotate", 1:
            why = "PyKEEN takes the root of all squares, which is norm: 2, and this model adds up moduli, norm: 1"
            raise UnsupportedError(f"rotate with norm 1 cannot be exported: {why}. Use another format.")
        case ("distmult" | "complex" | "cp" | "rescal" | "simple" | "rotate" | "pairre") as found, _:
            names = {"distmult": "DistMult", "complex": "ComplEx", "cp": "CP", "rescal": "RESCAL", "simple": "SimplE"}
            name = (names | {"rotate": "RotatE", "pairre": "PairRE"})[found]
            arguments = {"p": 1, "power_norm": False} if found == "pairre" else {}
        case _:
            raise UnsupportedError(f"PyKEEN has no {scorer.name}; use another format.")
    made = getattr(modules, f"{name}Interaction")(**arguments)
    if scorer.name == "simple":  # PyKEEN's own lets first vectors meet first ones
        made._tail_indices = CROSSED
    if not scorer.margin:
        return made, {}
    bias = {"initial_bias": scorer.margin, "trainable_bias": False, "trainable_scale": False}
    return modules.MonotonicAffineTransformationInteraction, {"base": made, **bias}


def entity_parts(scorer: Scorer, rows: Tensor) -> list[Tensor]:
    """PyKEEN's entity representations [n, ...] of rows [n, dim]."""
    if scorer.complex_pairs:
        return [torch.view_as_complex(rows.unflatten(1, (-1, 2)).contiguous())]
    if scorer.name == "cp":
        return [part.unsqueeze(1) for part in split_pairs(rows)]
    if scorer.name == "simple":
        return [*split_pairs(rows)]
    if scorer.name == "pairre":  # PyKEEN's interaction leaves the length to its model, so it is taken here
        return [torch.nn.functional.normalize(rows, dim=1)]
    return [rows]


def relation_parts(scorer: Scorer, rows: Tensor) -> list[Tensor]:
    """PyKEEN's relation representations [n, ...] of rows [n, relation_size]."""
    match scorer.name:
        case "complex":
            return [torch.view_as_complex(rows.unflatten(1, (-1, 2)).contiguous())]
        case "rotate":
            return [torch.polar(torch.ones_like(rows), rows)]
        case "cp":
            return [rows.unsqueeze(1)]
        case "simple" | "pairre":
            return [*split_pairs(rows)]
        case "rescal":
            return [rows.unflatten(1, (scorer.dim, scorer.dim))]
    return [rows]


def _representation(part: Tensor) -> dict[str, Any]:
    return {"shape": tuple(part.shape[1:]), "dtype": part.dtype}


def _write_vocabulary(source: Source, folder: Path, triples: Any) -> None:
    config = source.config
    words = [
        read_names(source.folder, f"{'entities' if kind == 'entity' else 'relations'}", f"{kind}_labels", int(number))
        for kind, number in (("entity", config["num_entities"]), ("relation", config["num_relations"]))
    ]
    entity_to_id, relation_to_id = ({name: i for i, name in enumerate(one.names.to_list())} for one in words)
    triples.TriplesFactory(
        mapped_triples=torch.empty(0, 3, dtype=torch.int64),
        entity_to_id=entity_to_id,
        relation_to_id=relation_to_id,
        create_inverse_triples=bool(config["reciprocal"]),
    ).to_path_binary(folder)
