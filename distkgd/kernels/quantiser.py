"""Rows of few bits: how they are rounded, how gradients pass the rounding, and what they are packed into.

A number of b bits is one of 2^b levels that lie symmetrically about 0, half a step from it: its code less the middle of
all codes, times the step. Each group of columns of a row has a step of its own, in bfloat16. It follows from the
numbers: that of the least squared error, found by turns of rounding and fitting from the step that suits a normal
distribution; from 8 bits on, the one that reaches the largest magnitude. So the master rows are all that is trained,
and whoever holds a row can round it.

Widths can be nested: the code of b bits is the top b bits of the widest code, and each width has a step of its own,
that of the least squared error given its codes. There 8 bits divide the cells of 4, so that the narrow widths have good
thresholds.

In training the gradient passes straight through to the numbers that lie no more than half a step beyond the outermost
levels, and stops at the others (Bengio et al. 2013; Esser et al. 2020 without a step to be learned). 16 bits are
bfloat16, which needs no step. Biases stand before the coordinates and are always bfloat16.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from distkgd.errors import ConfigError

BITS = (1, 2, 3, 4, 8, 16, 32)
# Of a normal distribution, the steps of the least squared error as multiples of the mean magnitude.
_NORMAL_STEP = {1: 2.0, 2: 1.2479, 3: 0.7344, 4: 0.4199}
_FITS = 2  # turns of rounding and fitting
PARTS = ("codes", "step", "bias", "coarser")  # of `Packed`
_NUMBERS_AT_ONCE = 1 << 18  # rounded: what is made on the way is several times as large


@dataclass(frozen=True)
class Packed:
    """Rows of few bits. codes: [n, bytes] uint8, number i of a row in its bits i * b … (i + 1) * b - 1, lowest first.

    step: [n, groups] bfloat16. bias: [n, biases] bfloat16. coarser: [n, narrower widths * groups] bfloat16, the steps
    of the codes' top bits, width by width. columns: numbers of a row beside its biases.
    """

    codes: Tensor
    step: Tensor
    bias: Tensor
    coarser: Tensor

    columns: int

    @property
    def nbytes(self) -> int:
        """Of all rows."""
        return self.codes.nbytes + self.step.nbytes + self.bias.nbytes + self.coarser.nbytes

    def select(self, rows: Tensor | slice) -> "Packed":
        """Some of the rows."""
        return Packed(self.codes[rows], self.step[rows], self.bias[rows], self.coarser[rows], self.columns)


@dataclass(frozen=True)
class Quantiser:
    """How rows [n, biases + columns] are rounded to `bits` (1, 2, 3, 4, 8) per number, or to bfloat16 (16).

    group: columns that share a step, a divisor of their number; None: all of a row.
    of: the codes are the top `bits` of codes of so many; None: widths are not nested.
    coarser: ascending narrower widths whose steps are kept with the rows, where `bits` is the widest.
    zeros: what is 0 stays 0 and does not count in the step, for rows that are pruned; 8 bits or fewer.
    """

    bits: int
    group: int | None = None
    biases: int = 0
    of: int | None = None
    coarser: tuple[int, ...] = ()
    zeros: bool = False

    def __call__(self, rows: Tensor) -> Tensor:
        """[n, biases + columns] what the rows are rounded to; gradients pass through to the rows."""
        rounded: Tensor = _StraightThrough.apply(rows, self)  # type: ignore[no-untyped-call]
        return rounded

    def row_bytes(self, width: int) -> int:
        """Of a packed row of so many numbers, biases among them."""
        if self.bits == 16:
            return 2 * width
        return self.code_bytes(width) + 2 * self.groups(width) * (1 + len(self.coarser)) + 2 * self.biases

    def code_bytes(self, width: int) -> int:
        """Of the codes of a row of so many numbers, biases among them."""
        return -(-(width - self.biases) * self.bits // 8)

    def groups(self, width: int) -> int:
        """How many steps a row of so many numbers has."""
        return 1 if self.group is None else (width - self.biases) // self.group

    @property
    def widths(self) -> tuple[int, ...]:
        """All that rows which are packed by this can be seen in, ascending."""
        return *self.coarser, self.bits

    def narrowed(self, bits: int) -> "Quantiser":
        """The one of a nested width, which knows no other; ConfigError where there is no such width."""
        if bits not in self.widths:
            raise ConfigError(f"{bits} bits: the model has {', '.join(map(str, self.widths))}; take one of these.")
        return replace(self, bits=bits, coarser=())

    def to_json(self) -> dict[str, Any]:
        """What `quantiser_of` makes it of again."""
        return {key: value for key, value in asdict(self).items() if key not in ("of", "coarser", "zeros") or value}

    def round(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """(rounded [n, biases + columns], bool [n, columns] which numbers lie inside of the levels' range)."""
        if self.bits == 16:
            return rows.bfloat16().to(rows.dtype), torch.ones_like(rows[:, self.biases :], dtype=torch.bool)
        if len(rows) > (few := max(1, _NUMBERS_AT_ONCE // rows.shape[1])):
            rounded, inside = torch.empty_like(rows), torch.empty_like(rows[:, self.biases :], dtype=torch.bool)
            for piece, *into in zip(rows.split(few), rounded.split(few), inside.split(few), strict=True):
                for out, found in zip(into, self.round(piece), strict=True):
                    out.copy_(found)
            return rounded, inside
        numbers = self._grouped(rows)
        levels, step = self._coded(numbers)
        inside = numbers.abs() <= step * 2.0 ** (self.bits - 1)
        rounded = (levels * step).flatten(1)
        if self.biases:
            rounded = torch.cat([rows[:, : self.biases].bfloat16().to(rows.dtype), rounded], 1)
        return rounded, inside.flatten(1)

    def levels(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """([n, columns] levels of rows [n, biases + columns], half-integers or 0; [n, groups] steps)."""
        few = max(1, _NUMBERS_AT_ONCE // rows.shape[1])
        pieces = [self._coded(self._grouped(piece)) for piece in rows.detach().split(few)]
        return torch.cat([x.flatten(1) for x, _ in pieces]), torch.cat([x.squeeze(-1) for _, x in pieces])

    def pack(self, rows: Tensor) -> Packed:
        """`round`ed rows [n, biases + columns] in as few bytes as they need; fewer than 16 bits, without `zeros`."""
        if len(rows) > (few := max(1, _NUMBERS_AT_ONCE // rows.shape[1])):
            pieces = [self.pack(piece) for piece in rows.split(few)]
            parts = {part: torch.cat([getattr(piece, part) for piece in pieces]) for part in PARTS}
            return Packed(**parts, columns=pieces[0].columns)
        numbers = self._grouped(rows.detach())
        levels, step = self._coded(numbers)
        codes = (levels + (2 ** (self.bits - 1) - 0.5)).to(torch.uint8)
        coarser = [self.narrowed(bits)._coded(numbers)[1].squeeze(-1).bfloat16() for bits in self.coarser]
        return Packed(
            pack_codes(codes.flatten(1), self.bits),
            step.squeeze(-1).bfloat16(),
            rows[:, : self.biases].detach().bfloat16(),
            torch.cat([step.new_empty(len(rows), 0, dtype=torch.bfloat16), *coarser], 1),
            rows.shape[1] - self.biases,
        )

    def unpack(self, packed: Packed) -> Tensor:
        """[n, biases + columns] float32."""
        codes = unpack_codes(packed.codes, self.bits, packed.columns).float() - (2 ** (self.bits - 1) - 0.5)
        groups = packed.step.shape[1]
        numbers = codes.reshape(len(codes), groups, packed.columns // groups) * packed.step.float().unsqueeze(-1)
        return torch.cat([packed.bias.float(), numbers.flatten(1)], 1)

    def _grouped(self, rows: Tensor) -> Tensor:
        # [n, groups, columns of a group]
        columns = rows.shape[1] - self.biases
        groups = self.groups(rows.shape[1])
        return rows[:, self.biases :].reshape(len(rows), groups, columns // groups)

    def _coded(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        # (levels [n, groups, columns of a group], step [n, groups, 1] exact in bfloat16; 0 of a group of zeros).
        if self.of is not None:
            few = min(self.of, 4)
            finest = _levels(numbers, _fitting_step(numbers, few) * 2.0 ** (few - self.of), self.of)
            levels = (finest * 2.0 ** (self.bits - self.of)).floor_().add_(0.5)
            return levels, _to_bfloat16(_least_squares(numbers, levels))
        if self.bits >= 8:
            step = numbers.abs().amax(-1, keepdim=True) / (2 ** (self.bits - 1) - 0.5)
        else:
            step = _fitting_step(numbers, self.bits, self.zeros)
        step = _to_bfloat16(step)
        return _levels(numbers, step, self.bits, self.zeros), step


def quantiser_of(about: Mapping[str, Any]) -> Quantiser:
    """What `Quantiser.to_json` told of."""
    return Quantiser(**{**about, "coarser": tuple(about.get("coarser", ()))})


@dataclass(frozen=True)
class Rounding:
    """Bits of the entities' and of the relations' numbers; columns of an entity's row that share a step (None: all).

    coarser: ascending narrower widths of the entities' numbers that are nested in `bits`.
    """

    bits: int = 8
    relation_bits: int = 32
    group: int | None = None
    coarser: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """ConfigError unless there are such rows."""
        for bits in (self.bits, self.relation_bits):
            if bits not in BITS:
                raise ConfigError(f"{bits} bits per number; allowed: {', '.join(map(str, BITS))}.")
        if self.group is not None and self.bits > 8:
            raise ConfigError(f"group: {self.group} columns share a step, and {self.bits} bits have none; give bits.")

    def quantisers(self, scorer: "Widths") -> "dict[str, Quantiser]":
        """{"entity" or "relation": its quantiser}, of those below 32 bits; ConfigError where the group does not fit."""
        found = {}
        if self.bits < 32:
            of = self.bits if self.coarser else None
            found["entity"] = Quantiser(self.bits, self.group, scorer.biases, of, self.coarser)
            if self.group is not None and scorer.dim % self.group:
                raise ConfigError(
                    f"group: {self.group} columns that share a step do not divide {scorer.dim}; use a divisor, or none."
                )
        if self.relation_bits < 32:
            found["relation"] = Quantiser(self.relation_bits)
        return found


class Widths(Protocol):
    """What of a scorer a rounding depends on."""

    @property
    def dim(self) -> int: ...
    @property
    def biases(self) -> int: ...


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, quantiser: Quantiser) -> Tensor:
        rounded, inside = quantiser.round(rows)
        ctx.save_for_backward(inside)
        ctx.biases = quantiser.biases
        return rounded

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,), (inside,) = grads, ctx.saved_tensors
        passed = grad.clone()
        passed[:, ctx.biases :] *= inside
        return passed, None


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """[n, ceil(columns * bits / 8)] uint8 of codes [n, columns] below 2^bits, lowest bits first."""
    if bits == 8:
        return codes
    place = torch.arange(8, dtype=torch.uint8, device=codes.device)
    ticks = (codes.unsqueeze(-1) >> place[:bits]) & 1
    ticks = torch.nn.functional.pad(ticks.flatten(1), (0, -codes.shape[1] * bits % 8))
    return (ticks.reshape(len(codes), ticks.shape[1] // 8, 8) << place).sum(-1, dtype=torch.uint8)


def unpack_codes(packed: Tensor, bits: int, columns: int) -> Tensor:
    """[n, columns] uint8: what `pack_codes` packed."""
    if bits == 8:
        return packed
    place = torch.arange(8, dtype=torch.uint8, device=packed.device)
    ticks = (packed.unsqueeze(-1) >> place) & 1
    ticks = ticks.flatten(1)[:, : columns * bits].reshape(len(packed), columns, bits)
    return (ticks << place[:bits]).sum(-1, dtype=torch.uint8)


def _fitting_step(numbers: Tensor, bits: int, zeros: bool = False) -> Tensor:
    # [..., 1] of the least squared error, of at most 4 bits. zeros: these do not count.
    magnitude = numbers.abs()
    if zeros:
        mean = magnitude.sum(-1, keepdim=True) / (magnitude > 0).sum(-1, keepdim=True).clamp_min(1)
    else:
        mean = magnitude.mean(-1, keepdim=True)
    step = mean * _NORMAL_STEP[bits]
    for _ in range(_FITS if bits > 1 else 0):  # of one bit the first is exact
        step = _least_squares(magnitude, _levels(magnitude, step, bits, zeros))
    return step.masked_fill(mean == 0, 0.0) if zeros else step  # a group of zeros


def _least_squares(numbers: Tensor, levels: Tensor) -> Tensor:
    # [..., 1] the step by which the levels are nearest to the numbers.
    return (numbers * levels).sum(-1, keepdim=True) / levels.square().sum(-1, keepdim=True)


def _levels(numbers: Tensor, step: Tensor, bits: int, zeros: bool = False) -> Tensor:
    # Half-integers; 0.5 of what has no step. zeros: 0 of 0.
    largest = 2 ** (bits - 1) - 0.5
    levels = torch.where(step > 0, numbers / step, 0.0).floor_().add_(0.5)
    levels = levels.clamp_(-largest, largest)
    return levels.mul_(numbers != 0) if zeros else levels


def _to_bfloat16(step: Tensor) -> Tensor:
    return step.bfloat16().to(step.dtype)
