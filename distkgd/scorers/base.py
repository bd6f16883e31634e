"""What every scorer says about itself: sizes, starting values, formula, and how a query meets candidates."""

import math
from abc import ABC, abstractmethod
from copy import copy
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from distkgd.config.plugins import spec_of
from distkgd.errors import ConfigError, UnsupportedError
from distkgd.kernels.candidates import Candidates, GatheredRows, plain
from distkgd.kernels.pairs import Kind

CandidateForm = Literal["dot", "l2", "coordinates", "squared", "hyperbolic", "lorentz"]


@dataclass(frozen=True)
class Init:
    """How a table starts: `scale` is the standard deviation (normal) or the half-width (uniform).

    columns: a factor on the scale of each column; none: 1 for all.
    """

    kind: Literal["normal", "uniform"]
    scale: float
    columns: tuple[float, ...] = ()


class Scorer(ABC):
    """One scoring function f(h, r, t). Higher is better; distance scorers score margin − distance.

    `dim` is the number of coordinates stored per entity, always. Scorers hold no tensors: they are plain,
    immutable descriptions of a formula, the same on every rank and every device.

    Shapes: an entity is `[..., entity_size]`, its biases before its dim coordinates; a relation
    `[..., relation_size]`, a query `[..., query_size]`; leading dimensions broadcast.
    """

    name: ClassVar[str]
    options: ClassVar[frozenset[str]] = frozenset()
    default_margin: ClassVar[float] = 0.0
    dim_multiple: ClassVar[int] = 1
    complex_pairs: ClassVar[bool] = False  # coordinates 2k, 2k+1 of an entity are one complex number
    biases: ClassVar[int] = 0  # numbers of an entity row before its coordinates; every crop keeps them
    tails_only: ClassVar[bool] = False  # there is no `head_query`: models need reciprocal relations
    lists_relations: ClassVar[bool] = False  # `listed_query` is better than a copy of the relation's row per query

    def __init__(self, dim: int, *, margin: float | None = None, norm: int | None = None) -> None:
        self._check_dim(dim, "dim")
        for option, value in (("margin", margin), ("norm", norm)):
            # Even a value that changes nothing is refused: an option that is accepted and ignored misleads.
            if value is not None and option not in self.options:
                raise ConfigError(
                    f"{self.name}: {option}={value} was given, but its formula has no {option} "
                    f"(its options: {', '.join(sorted(self.options)) or 'none'}). "
                    f"Remove {option}, or choose a scorer that has it."
                )
        self.dim = dim
        self.margin = self.default_margin if margin is None else float(margin)
        self.norm = 1 if norm is None else norm
        if not (math.isfinite(self.margin) and self.margin >= 0):
            raise ConfigError(f"{self.name}: margin={margin}; allowed is any finite number >= 0.")
        if self.norm not in (1, 2):
            raise ConfigError(f"{self.name}: norm={norm}; allowed are 1 and 2.")

    @property
    def entity_size(self) -> int:
        """Real numbers per entity: biases and coordinates."""
        return self.biases + self.dim

    def coordinates(self, rows: Tensor) -> Tensor:
        """`[..., dim]` of entity rows `[..., entity_size]`."""
        return rows[..., self.biases :] if self.biases else rows

    @property
    def relation_size(self) -> int:
        """Real numbers per relation: one per coordinate, unless the scorer says otherwise."""
        return self.dim

    @property
    def query_size(self) -> int:
        """Real numbers per query, as `tail_query` and `head_query` make it."""
        return self.dim

    @property
    @abstractmethod
    def candidate_form(self) -> CandidateForm:
        """How a query meets a candidate: inner product, Euclidean distance, a sum over coordinates, or biases less a
        squared distance, Euclidean or hyperbolic, or a Lorentz inner product."""

    @property
    def prefix_form(self) -> Literal["sum", "squares"] | None:
        """How the scores of all crops follow from blocks of consecutive columns of query and candidate.

        sum: a crop's score is the margin plus what each block up to its border scores by itself, with margin 0.
        squares: it is the margin minus the root of the sum of the blocks' squared distances.
        None: the crop's query is no crop of the query, or its score no such sum; each crop is scored by itself.
        """
        return None if self.biases else "sum"

    @property
    def term(self) -> Kind | None:
        """φ of which Σ_k φ(q_k, c_k) over the coordinates is the distance, or the square of an l2 one, if any."""
        return None

    @abstractmethod
    def score(self, h: Tensor, r: Tensor, t: Tensor) -> Tensor:
        """`[...]` scores of heads and tails `[..., entity_size]` and relations `[..., relation_size]`."""

    @abstractmethod
    def tail_query(self, h: Tensor, r: Tensor) -> Tensor:
        """`[..., query_size]` what of (h, r) meets tail candidates."""

    @abstractmethod
    def head_query(self, t: Tensor, r: Tensor) -> Tensor:
        """`[..., query_size]` what of (r, t) meets head candidates."""

    def listed_query(self, rows: Tensor, relation: GatheredRows, *, of_heads: bool = False) -> Tensor:
        """`[n, query_size]`: `tail_query` of heads [n, entity_size] and relations that are rows of a table, without
        copies of these; of_heads: `head_query` of tails."""
        return (self.head_query if of_heads else self.tail_query)(rows, plain(relation))

    def turned(self, r: Tensor, side: Tensor) -> Tensor | None:
        """`[n, relation_size]` relations whose tail queries are head queries of r where side [n] is 1, and tail queries
        of it where that is 0; None where none are."""
        return None

    @abstractmethod
    def score_candidates(self, q: Tensor, c: Candidates) -> Tensor:
        """`[..., Q, N]` scores of queries `[..., Q, query_size]` against candidates `[..., N, entity_size]`.

        One operation for both directions, so head and tail queries can be concatenated. Neither needs a
        `[..., Q, N, dim]` tensor. Candidates are copied or listed.
        """

    @abstractmethod
    def entity_init(self) -> Init:
        """Where entity rows start."""

    @abstractmethod
    def relation_init(self) -> Init:
        """Where relation rows start."""

    def crop(self, dim: int) -> "Scorer":
        """The scorer of the model made of the biases and the first `dim` coordinates; margin and norm stay."""
        self._check_dim(dim, "crop to dim")
        if dim > self.dim:
            raise ConfigError(
                f"{self.name}: crop to dim={dim}; allowed is at most {self.dim}, the dim of the model. "
                "Choose a smaller crop, or train a larger model."
            )
        small = copy(self)
        small.dim = dim
        return small

    def crop_columns(self, dim: int) -> Tensor:
        """`[k]` int64: columns of a relation row that belong to the crop to the first `dim` coordinates.

        The entity columns of that crop are always `[:crop(dim).entity_size]`. Relations are stored coordinate by
        coordinate, with all numbers of one coordinate side by side, so here too the crop is a prefix; a scorer
        whose relation is not stored like this says so by overriding.
        """
        return torch.arange(self.crop(dim).relation_size)

    def relation_columns(self, kept: Tensor) -> Tensor:
        """`[relation_size]` bool: columns of a relation row that belong to the entity columns `kept`, `[dim]` bool.

        Entity columns stay or go `dim_multiple` at a time. Where those that go are 0, in relations too, the scores are
        those of the model made of the rest. UnsupportedError for scorers with biases.
        """
        if self.biases:
            raise UnsupportedError(f"{self.name}: whole columns of a model with biases cannot go; prune numbers.")
        coordinates = kept[:: self.dim_multiple]
        return coordinates.repeat_interleave(self.relation_size // len(coordinates))

    def relation_query(self, h: Tensor, t: Tensor) -> Tensor:
        """`[..., relation_size]` what of (h, t) meets relations by inner product, where the formula is linear in r."""
        raise UnsupportedError(
            f"{self.name}: its score is not an inner product with the relation, so relations cannot be predicted by "
            "one; use distmult, complex, simple, cp or rescal."
        )

    def constants(self) -> dict[str, str | int | float]:
        """Everything the formula needs besides the tables, ready for JSON; `from_constants` reads it back."""
        constants: dict[str, str | int | float] = {"name": spec_of(type(self)), "dim": self.dim}
        return constants | {option: getattr(self, option) for option in sorted(self.options)}

    def __repr__(self) -> str:
        arguments = ", ".join(f"{key}={value}" for key, value in self.constants().items() if key != "name")
        return f"{type(self).__name__}({arguments})"

    def _check_dim(self, dim: int, what: str) -> None:
        if not isinstance(dim, int) or isinstance(dim, bool) or dim < 1:
            raise ConfigError(f"{self.name}: {what}={dim!r}; allowed is a whole number >= 1.")
        if dim % self.dim_multiple:
            raise UnsupportedError(
                f"{self.name}: {what}={dim}; allowed are multiples of {self.dim_multiple}, "
                f"because coordinates are stored in groups of {self.dim_multiple} real numbers. "
                f"Use {dim + self.dim_multiple - dim % self.dim_multiple} instead."
            )


def sign_of(side: Tensor) -> Tensor:
    """`[n]` 1 where side is 0, -1 where it is 1."""
    return torch.rsub(side, 1, alpha=2)


def check_reciprocal(scorer: Scorer, reciprocal: bool) -> None:
    """UnsupportedError for a model whose head queries have no formula."""
    if scorer.tails_only and not reciprocal:
        raise UnsupportedError(
            f"{scorer.name} with reciprocal: false: no single query meets all heads of (r, t), because a relation maps "
            "the head and not the tail. Set reciprocal: true, which asks for heads by inverse relations."
        )
