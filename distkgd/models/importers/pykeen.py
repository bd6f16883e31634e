"""Models of PyKEEN.

A result directory (trained_model.pkl and training_triples/): the pickle runs what it says, so it needs `trust_pickle`,
and PyKEEN. Its scores are compared with ours.

A state dict, `torch.save(model.state_dict(), "state_dict.pt")`, as such a file or in a directory: tensors alone, which
say neither the scorer nor a norm; the user does, or the config.json of an export of ours.

PyKEEN interleaves complex numbers as we do; it has relation r and its inverse in rows 2r and 2r + 1, its RotatE takes
the root of all squares (norm 2), and none of its models has a margin, but for the bias of an affine transformation.
Its SimplE (1.11.1) lets first vectors meet first ones and second ones second ones, both as head and as tail, so that it
is a DistMult, and is imported as one; a SimplE of ours, exported, says that tails take theirs in the other order.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import polars as pl
import torch
from torch import Tensor

from distkgd.common.optional_imports import need
from distkgd.errors import ConfigError, ModelError, UnsupportedError
from distkgd.models.importers.foreign import Foreign, Given, names_of_table, read_names
from distkgd.models.importers.torch_files import load_tensors
from distkgd.models.model_folder import read_json
from distkgd.scorers import Scorer, build_scorer
from distkgd.scorers.interleaved import join_pairs

PICKLE, STATE, TRIPLES = "trained_model.pkl", "state_dict.pt", "training_triples"
SCORER_OF = {
    "TransEInteraction": "transe",
    "DistMultInteraction": "distmult",
    "ComplExInteraction": "complex",
    "CPInteraction": "cp",
    "RESCALInteraction": "rescal",
    "SimplEInteraction": "simple",
    "RotatEInteraction": "rotate",
    "PairREInteraction": "pairre",
}
CROSSED = (1, 0)  # which of SimplE's two vectors a tail takes first
PARTS = {"cp": (2, 1), "simple": (2, 2), "pairre": (1, 2)}  # representations per entity and relation, if not one each


def open_pykeen(path: Path, given: Given) -> Foreign:
    """The model in a result directory, or in the file of a state dict."""
    state = path / STATE if path.is_dir() else path
    pickled = path / PICKLE
    if path.is_dir() and not state.is_file() and not pickled.is_file():
        raise ModelError(f"{path} holds neither {PICKLE} nor {STATE}; give a result directory of PyKEEN.")
    if pickled.is_file() and given.trust_pickle:
        return _of_model(pickled, given)
    if not state.is_file():
        raise ModelError(
            f"{pickled} is a pickle, which can run anything when it is read. If you trust it: launch/import.py "
            f"--trust-pickle, in a plan trust_pickle: true. Else import the numbers alone: "
            f"torch.save(model.state_dict(), '{STATE}')."
        )
    return _of_state(state, given)


def _of_state(path: Path, given: Given) -> Foreign:
    state = load_tensors(path)
    if not isinstance(state, dict):
        raise ModelError(f"{path} holds a {type(state).__name__}, not a state dict.")
    config = read_json(path.parent / "config.json") if (path.parent / "config.json").is_file() else {}
    ours: dict[str, Any] = config.get("scorer", {})
    name = str(given.scorer or ours.get("name", ""))
    if name not in SCORER_OF.values():
        known = ", ".join(SCORER_OF.values())
        raise ConfigError(f"{path} does not say its scorer; say which of {known} it is (launch/import.py --scorer).")
    norm = given.norm or ours.get("norm")
    if name == "transe" and norm is None:
        raise ConfigError(
            f"{path} does not say the norm of its TransE (PyKEEN's scoring_fct_norm); say it (launch/import.py --norm)."
        )
    entity, relation = (_weights(state, kind, name, path) for kind in ("entity", "relation"))
    scale = float(state.get("interaction.log_scale", torch.zeros(())))
    margin = _margin(float(state.get("interaction.bias", torch.zeros(()))), scale, str(path))
    crossed = bool(ours)
    scorer, convert = _convert(name, entity, relation, margin, 2 if name == "rotate" else norm, path, crossed)
    return _foreign(path.parent, given, scorer, *convert)


def _weights(state: dict[str, Tensor], kind: str, scorer: str, path: Path) -> list[Tensor]:
    num = PARTS.get(scorer, (1, 1))[kind == "relation"]
    names = [f"{kind}_representations.{i}._embeddings.weight" for i in range(num)]
    if missing := [name for name in names if name not in state]:
        raise ModelError(f"{path} has no {missing[0]}, which {scorer} needs. It has: {', '.join(state)}.")
    return [state[name].detach() for name in names]


def _of_model(path: Path, given: Given) -> Foreign:
    need("pykeen.models", "reading a pickle of PyKEEN", "bench")
    try:
        model = torch.load(path, map_location="cpu", weights_only=False)
    except Exception as error:  # a pickle can raise anything
        raise ModelError(f"{path}: truncated, or not PyKEEN's: {type(error).__name__}: {error}.") from error
    interaction: Any = getattr(model, "interaction", None)
    scale = bias = 0.0
    crossed = getattr(interaction, "_tail_indices", None) == CROSSED
    if type(interaction).__name__ == "MonotonicAffineTransformationInteraction":
        scale, bias, interaction = float(interaction.log_scale), float(interaction.bias), interaction.base
    if type(interaction).__name__ == "ClampedInteraction":
        if interaction.clamp_score is not None:
            raise UnsupportedError(f"{path} clamps its scores to {interaction.clamp_score}; no scorer here does.")
        interaction = interaction.base
    name = SCORER_OF.get(type(interaction).__name__)
    if name is None:
        what = f"{type(model).__name__} with {type(interaction).__name__}"
        raise UnsupportedError(f"{path}: {what} has no counterpart here; supported are {', '.join(SCORER_OF)}.")
    if getattr(interaction, "power_norm", False) or getattr(interaction, "p", 1) not in (1, 2):
        given_norm = f"p={interaction.p}, power_norm={interaction.power_norm}"
        raise UnsupportedError(f"{path}: {given_norm}; allowed are p 1 and 2 without power_norm.")
    norm = {"transe": getattr(interaction, "p", 1), "rotate": 2}.get(name)
    if name == "pairre" and interaction.p != 1:
        raise UnsupportedError(f"{path}: PairRE with p={interaction.p}; only p=1 has a counterpart here.")
    model.eval()
    with torch.no_grad():
        entity, relation = (
            [_rows(one) for one in getattr(model, f"{k}_representations")] for k in ("entity", "relation")
        )
    scorer, convert = _convert(name, entity, relation, _margin(bias, scale, str(path)), norm, path, crossed)
    foreign = _foreign(path.parent, given, scorer, *convert)

    def original(triples: Tensor) -> Tensor:
        model.predict_with_sigmoid = False
        with torch.no_grad():
            scores: Tensor = model.predict_hrt(triples).squeeze(1)
        return scores

    return Foreign(**{**vars(foreign), "original": original})


def _rows(representation: Any) -> Tensor:
    """[n, numbers] what a representation gives, normalised and all; complex numbers interleaved."""
    found = representation(None)
    return torch.view_as_real(found.resolve_conj()).flatten(1) if found.is_complex() else found.flatten(1)


def _margin(bias: float, log_scale: float, where: str) -> float:
    if abs(log_scale) > 1e-7 or bias < 0:
        raise UnsupportedError(
            f"{where} scales its scores by exp({log_scale:.4g}) and adds {bias:.4g}; only a bias >= 0 has a "
            "counterpart here, the margin."
        )
    return bias


def _convert(
    name: str,
    entity: Sequence[Tensor],
    relation: Sequence[Tensor],
    margin: float,
    norm: int | None,
    path: Path,
    crossed: bool,
) -> tuple[Scorer, tuple[Tensor, Tensor]]:
    """The scorer and both tables in our layout, relations still in PyKEEN's order.

    crossed: whether SimplE's first vectors meet second ones.
    """
    if name == "pairre":
        entities, relations = entity[0], join_pairs(*relation)
    elif name in ("cp", "simple"):
        entities = join_pairs(*entity)
        relations = relation[0] if name == "cp" else join_pairs(*relation)
        if name == "simple" and not crossed:
            name, relations = "distmult", 0.5 * relations
    else:
        entities, relations = entity[0], relation[0]
    if name == "rotate":
        real, imaginary = relations.unflatten(1, (-1, 2)).unbind(-1)
        if float((real.square() + imaginary.square() - 1.0).abs().max().detach()) > 1e-4:
            raise UnsupportedError(
                f"{path}: relations of RotatE whose numbers do not have modulus 1 scale, not only turn."
            )
        relations = torch.atan2(imaginary, real)
    options: dict[str, Any] = {}
    if name in ("transe", "rotate", "pairre"):
        options["margin"] = margin
    elif margin:
        raise UnsupportedError(f"{path} adds {margin:.4g} to the scores of {name}, which have no margin here.")
    if name in ("transe", "rotate"):
        options["norm"] = norm
    scorer = build_scorer(name, entities.shape[1], **options)
    if relations.shape[1] != scorer.relation_size:
        raise ModelError(f"{path}: relations of {relations.shape[1]} numbers do not fit {scorer}.")
    return scorer, (entities.contiguous(), relations.contiguous())


def _foreign(folder: Path, given: Given, scorer: Scorer, entity: Tensor, relation: Tensor) -> Foreign:
    relations = _names(folder, given, "relation", len(relation))
    reciprocal = len(relations) != len(relation)
    if reciprocal:  # relation and inverse in turn, to all relations before all inverse ones
        relation = torch.cat([relation[0::2], relation[1::2]])
    entities = _names(folder, given, "entity", len(entity))
    return Foreign(
        "PyKEEN",
        scorer,
        reciprocal,
        entities,
        relations,
        lambda ids: entity[ids],
        lambda ids: relation[ids],
        entity.dtype,
        trained=_trained(folder, entities, relations) if given.names is None else None,
    )


def _names(folder: Path, given: Given, kind: str, rows: int) -> pl.Series:
    """Names of training_triples/, PyKEEN's way, else of files beside it or in the folder that the user names."""
    kinds = {"entity": "entities", "relation": "relations"}
    path = folder / TRIPLES / f"{kind}_to_id.tsv.gz"
    if given.names is None and path.is_file():
        return names_of_table(path, rows, ("id", "name"), header=True, halves=kind == "relation")
    return read_names(given.folders(folder), kinds[kind], rows, halves=kind == "relation")  # type: ignore[arg-type]


def _trained(folder: Path, entities: pl.Series, relations: pl.Series) -> Callable[[], pl.DataFrame] | None:
    """Reads the training triples that PyKEEN keeps beside the names of its rows."""
    path = folder / TRIPLES / "numeric_triples.tsv.gz"

    def read() -> pl.DataFrame:
        try:
            schema = dict.fromkeys(("head", "relation", "tail"), pl.Int64)
            rows = pl.read_csv(path.read_bytes(), separator="\t", schema=schema)
            return rows.select(
                head=entities.gather(rows["head"]),
                relation=relations.gather(rows["relation"]),
                tail=entities.gather(rows["tail"]),
            )
        except (OSError, EOFError, pl.exceptions.PolarsError) as error:
            raise ModelError(f"{path} is no table of PyKEEN's triples: {str(error).splitlines()[0]}") from None

    return read if path.is_file() else None
