"""The nodes of a run's config that say how large the models between teacher and student are."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from distkgd.config.fields import Frozen, Positive, Share, describe
from distkgd.config.stage import Bits

PerDim = dict[Positive, dict[str, Any]]


def _also_by_ratio(schema: dict[str, Any], kind: type[BaseModel]) -> None:
    describe(schema, kind)
    schema["properties"] |= {key: {"type": "integer", "minimum": 1} for key in ("from", "to", "ratio")}


class ChainConfig(Frozen):
    """Teachers and students in a row (IterDE): each model, once trained, teaches the next smaller one.

    dims: real numbers per entity, falling: the first is the teacher's, the last the student's. In their place may
        stand `from`, `to` and `ratio` (2): {from: 512, to: 32} is 512, 256, 128, 64, 32.
    bits: of each number of the students, falling where dims do not: {bits: [8, 4, 2, 1]} are four students of
        student.dim, each the next one's teacher. Beside dims, one for each of them but the first.
    per_dim: dim -> keys put over the config of the model of that dim, {64: {epochs: 3, optimizer: {lr: 0.2}}}.
    per_bits: likewise of the students of so many bits.
    overlap: where stages run side by side (distkgd chain), a student may spend this share of its epochs on its
        teacher's best rows so far, while the teacher is still in training; 0: it begins when the teacher is finished.
    """

    model_config = ConfigDict(json_schema_extra=_also_by_ratio)

    dims: list[Positive] = Field(default=[])
    bits: list[Bits] = Field(default=[])
    per_dim: PerDim = Field(default_factory=dict)
    per_bits: PerDim = Field(default_factory=dict)
    overlap: Share = 0.0

    @model_validator(mode="before")
    @classmethod
    def _spelled_out(cls, value: Any) -> Any:
        if not isinstance(value, Mapping) or not {"from", "to", "ratio"} & value.keys():
            return value
        if "dims" in value:
            raise ValueError("dims are given beside from, to or ratio; use one or the other")
        numbers = {"ratio": 2, **value}
        for key, least in (("from", 1), ("to", 1), ("ratio", 2)):
            number = numbers.get(key)
            if type(number) is not int or number < least:
                raise ValueError(f"{key} must be a whole number of at least {least} (given: {number!r})")
        start, end, ratio = numbers["from"], numbers["to"], numbers["ratio"]
        dims = [start]
        while dims[-1] > end and not dims[-1] % ratio:
            dims.append(dims[-1] // ratio)
        if dims[-1] != end:
            reached = _listed(dims)
            raise ValueError(f"from {start} by ratio {ratio} reaches {reached}, not {end}; change one, or list dims")
        return {"dims": dims} | {k: v for k, v in value.items() if k not in ("from", "to", "ratio")}

    @model_validator(mode="after")
    def _falls(self) -> "ChainConfig":
        if len(self.dims) < 2 and not self.bits:
            raise ValueError(
                f"dims: at least two are needed (given: {_listed(self.dims) or 'none'}), or bits of a student"
            )
        if self.dims and self.bits and len(self.bits) != len(self.dims) - 1:
            raise ValueError(
                f"{len(self.bits)} bits for {len(self.dims) - 1} students; give one for each dim but the first"
            )
        sizes = list(
            zip(self.dims or [0] * (1 + len(self.bits)), [32, *(self.bits or [32] * len(self.dims))], strict=False)
        )
        if any(dim > before[0] or bits > before[1] or (dim, bits) == before for before, (dim, bits) in pairwise(sizes)):
            what = " and ".join(
                f"{name} {_listed(given)}" for name, given in (("dims", self.dims), ("bits", self.bits)) if given
            )
            raise ValueError(f"dims must fall from teacher to student, or bits where dims stay (given: {what})")
        fixed = ("dim", "bits") if self.bits else ("dim",)
        _check_keys("per_dim", self.per_dim, "dims", self.dims, fixed)
        _check_keys("per_bits", self.per_bits, "bits", self.bits, fixed)
        return self

    def students(self, dim: int) -> dict[str, dict[str, int]]:
        """Name -> "dim", and "bits" where the chain has them, of each student; dim: where the chain has none."""
        dims = self.dims[1:] or [dim] * len(self.bits)
        found = {}
        for i, one in enumerate(dims):
            name = [str(one)] if self.dims else []
            name += [f"{self.bits[i]}bit"] if self.bits else []
            found["_".join(name)] = {"dim": one} | ({"bits": self.bits[i]} if self.bits else {})
        return found


class AssistantConfig(Frozen):
    """A model between teacher and student (TA; Mirzadeh et al. 2020): the teacher's student and the student's teacher.

    dims: of the candidates. One alone is taken; of several, all are trained without a teacher, and the one whose
        valid MRR is nearest to the mean of the teacher's and the direct student's is taken (DualDE sec. 4.1.3); of
        equally near ones the first. The assistant itself is then taught by the student's method.
        `assistant: 128` is short for {dims: [128]}.
    per_dim: as in a chain.
    """

    dims: list[Positive] = Field(min_length=1)
    per_dim: PerDim = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _a_dim_alone(cls, value: Any) -> Any:
        return {"dims": [value]} if type(value) is int else value

    @model_validator(mode="after")
    def _fits(self) -> "AssistantConfig":
        if len(set(self.dims)) != len(self.dims):
            raise ValueError(f"dims must differ (given: {_listed(self.dims)})")
        _check_keys("per_dim", self.per_dim, "dims", self.dims, ("dim",))
        return self


def _check_keys(key: str, per: PerDim, what: str, sizes: Sequence[int], fixed: Sequence[str]) -> None:
    # fixed: what the chain says of each of its models, so that keys of one of them may not.
    if others := [size for size in per if size not in sizes]:
        raise ValueError(f"{key} has {_listed(others)}, which is none of the {what} {_listed(sizes) or '(none)'}")
    for name in fixed:
        if twice := [size for size, over in per.items() if name in over]:
            raise ValueError(f"{key} of {_listed(twice)} sets {name} again; leave it out")


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))
