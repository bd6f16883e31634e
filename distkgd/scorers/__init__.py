"""Scoring functions: one file per paper, and the table of those that exist."""

from collections.abc import Mapping
from typing import Any

from distkgd.config.plugins import class_of_folder, named_class
from distkgd.errors import ConfigError
from distkgd.scorers.base import Init, Scorer
from distkgd.scorers.complex import ComplEx
from distkgd.scorers.cp import CP
from distkgd.scorers.distmult import DistMult
from distkgd.scorers.hyperbolic.isometries import RefE, RotE
from distkgd.scorers.hyperbolic.lorentz import HyboNet
from distkgd.scorers.hyperbolic.poincare_scorers import AttH, DistH, RefH, RotH, TransH
from distkgd.scorers.pairre import PairRE
from distkgd.scorers.rescal import Rescal
from distkgd.scorers.rotate import RotatE
from distkgd.scorers.simple import SimplE
from distkgd.scorers.transe import TransE

__all__ = ["SCORERS", "Init", "Scorer", "build_scorer", "from_constants", "scorer_class"]

_ALL: tuple[type[Scorer], ...] = (
    TransE,
    DistMult,
    ComplEx,
    SimplE,
    RotatE,
    PairRE,
    CP,
    Rescal,
    RotE,
    RefE,
    TransH,
    DistH,
    RotH,
    RefH,
    AttH,
    HyboNet,
)
SCORERS: dict[str, type[Scorer]] = {scorer.name: scorer for scorer in _ALL}
GROUP = "distkgd.scorers"  # of entry points of other packages


# Constants that a scorer got later, and what models written before that mean.
_LATER: dict[str, dict[str, Any]] = {"rotate": {"norm": 1}}


def scorer_class(name: str) -> type[Scorer]:
    """The scorer that a config names: one of SCORERS, `package.module:Class`, or an entry point; else ConfigError."""
    return named_class(name, SCORERS, GROUP, Scorer)


def build_scorer(name: str, dim: int, margin: float | None = None, norm: int | None = None) -> Scorer:
    """The scorer `name`, as `scorer_class` has it; None leaves an option at the scorer's own default."""
    return scorer_class(name)(dim, margin=margin, norm=norm)


def from_constants(constants: Mapping[str, Any]) -> Scorer:
    """The scorer whose `constants()` these are; nothing may be missing and nothing may be left over."""
    name = str(constants.get("name"))
    if name not in SCORERS and ":" not in name:
        raise ConfigError(
            f"scorer constants name {name!r}; known are {', '.join(sorted(SCORERS))}. "
            "The model was written by another version, or its file is damaged."
        )
    kind = SCORERS.get(name) or class_of_folder(name, SCORERS, GROUP, Scorer)
    constants = {**_LATER.get(name, {}), **constants}
    wanted = {"name", "dim"} | kind.options
    if set(constants) != wanted:
        raise ConfigError(
            f"scorer constants of {name} have the keys {sorted(constants)}; "
            f"needed are exactly {sorted(wanted)}. "
            "The model was written by another version, or its file is damaged."
        )
    return kind(**{key: value for key, value in constants.items() if key != "name"})
