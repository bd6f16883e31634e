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

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import polars as pl
import torch
from torch import Tensor

from distkgd.common.optional_imports import need
from distkgd.errors import ConfigError, ModelError, UnsupportedError
from distkgd.models.importers.foreign import KEPT, Foreign, Given, counterpart, read_names
from distkgd.models.importers.torch_files import load_tensors
from distkgd.models.model_folder import read_json
from distkgd.scorers import build_scorer
from distkgd.scorers.interleaved import join_pairs

PICKLE, STATE = "trained_model.pkl", "state_dict.pt"
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
            f"{pickled} is a pickle, which can run anything when it is read. If you trust it: distkgd import "
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
        raise ConfigError(f"{path} does not say its scorer; say which of {known} it is (distkgd import --scorer).")
    norm = given.norm or ours.get("norm")
    if name == "transe" and norm is None:
        raise ConfigError(
            f"{path} does not say the norm of its TransE (PyKEEN's scoring_fct_norm); say it (distkgd import --norm)."
        )
    kinds = zip(("entity", "relation"), PARTS.get(name, (1, 1)), strict=True)
    weights = [[f"{kind}_representations.{i}._embeddings.weight" for i in range(num)] for kind, num in kinds]
    if missing := [weight for listed in weights for weight in listed if weight not in state]:
        raise ModelError(f"{path} has no {missing[0]}, which {name} needs. It has: {', '.join(state)}.")
    tables = [_joined([state[weight].detach() for weight in listed]) for listed in weights]
    scale, bias = (float(state.get(f"interaction.{key}", torch.zeros(()))) for key in ("log_scale", "bias"))
    return _foreign(path, given, name, tables, scale, bias, norm, crossed=bool(ours))


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
    what = type(interaction).__name__
    if what not in SCORER_OF:
        what = f"{type(model).__name__} with {what}"
    name = counterpart(what, SCORER_OF, path)
    norm = getattr(interaction, "p", 1)
    if getattr(interaction, "power_norm", False) or norm not in (1, 2):
        given_norm = f"p={norm}, power_norm={interaction.power_norm}"
        raise UnsupportedError(f"{path}: {given_norm}; allowed are p 1 and 2 without power_norm.")
    if name == "pairre" and norm != 1:
        raise UnsupportedError(f"{path}: PairRE with p={norm}; only p=1 has a counterpart here.")

    def original(triples: Tensor) -> Tensor:
        model.predict_with_sigmoid = False
        with torch.no_grad():
            scores: Tensor = model.predict_hrt(triples).squeeze(1)
        return scores

    model.eval()
    with torch.no_grad():
        tables = [
            _joined([_rows(one) for one in getattr(model, f"{k}_representations")]) for k in ("entity", "relation")
        ]
    return _foreign(path, given, name, tables, scale, bias, norm, crossed, original)


def _rows(representation: Any) -> Tensor:
    """[n, numbers] what a representation gives, normalised and all; complex numbers interleaved."""
    found = representation(None).detach()
    return torch.view_as_real(found.resolve_conj()).flatten(1) if found.is_complex() else found.flatten(1)


def _joined(parts: list[Tensor]) -> Tensor:
    return join_pairs(*parts) if len(parts) == 2 else parts[0]


def _foreign(
    path: Path,
    given: Given,
    name: str,
    tables: list[Tensor],
    scale: float,
    bias: float,
    norm: int | None,
    crossed: bool,
    original: Callable[[Tensor], Tensor] | None = None,
) -> Foreign:
    """What the numbers mean. tables: of entities and relations, these in PyKEEN's order.

    scale, bias: of an affine transformation of scores. crossed: whether SimplE's first vectors meet second ones.
    """
    entity, relation = tables
    if abs(scale) > 1e-7 or bias < 0:
        raise UnsupportedError(
            f"{path} scales its scores by exp({scale:.4g}) and adds {bias:.4g}; only a bias >= 0 has a counterpart "
            "here, the margin."
        )
    if name == "simple" and not crossed:
        name, relation = "distmult", 0.5 * relation
    if name == "rotate":
        norm = 2
        real, imaginary = relation.unflatten(1, (-1, 2)).unbind(-1)
        if float((real.square() + imaginary.square() - 1.0).abs().max()) > 1e-4:
            raise UnsupportedError(
                f"{path}: relations of RotatE whose numbers do not have modulus 1 scale, not only turn."
            )
        relation = torch.atan2(imaginary, real)
    has_margin = name in ("transe", "rotate", "pairre")
    if bias and not has_margin:
        raise UnsupportedError(f"{path} adds {bias:.4g} to the scores of {name}, which have no margin here.")
    folder = path.parent
    names = read_names(given.folders(folder), len(entity), len(relation), halves=True)
    reciprocal = len(names[1]) != len(relation)
    if reciprocal:  # relation and inverse in turn, to all relations before all inverse ones
        relation = torch.cat([relation[0::2], relation[1::2]])
    triples = folder / KEPT / "numeric_triples.tsv.gz"
    return Foreign(
        "PyKEEN",
        build_scorer(
            name,
            entity.shape[1],
            bias if has_margin else None,
            norm if name in ("transe", "rotate") else None,
        ),
        (path, path),
        names,
        entity,
        relation,
        reciprocal,
        original=original,
        trained=partial(_trained, triples, *names) if given.names is None and triples.is_file() else None,
    )


def _trained(path: Path, entities: pl.Series, relations: pl.Series) -> pl.DataFrame:
    """Names of the training triples that PyKEEN keeps beside the names of its rows."""
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
