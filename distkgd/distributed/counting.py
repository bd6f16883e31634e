"""Ranks that are not there: what a step would send, counted without sending it."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from distkgd.distributed.ranks import Ranks


class CountingRanks(Ranks):
    """Rank 0 of `world`, alone: nothing arrives from the other ranks but zeros, and `traffic` counts as ever.

    The others ask for nothing: of an exchange counts whichever is more, what goes out or what comes in.
    """

    def __init__(self, world: int, device: torch.device) -> None:
        super().__init__(0, world, device)
        self.in_order = True  # by exchanges, which count the same bytes

    def barrier(self) -> None:
        """Nobody is waited for."""

    def gather_objects(self, value: Any) -> list[Any]:
        """`value` for each rank."""
        return [value] * self.world

    def begin_all_reduce(self, tensor: Tensor, kind: str = "control") -> Callable[[], Tensor]:
        """The sum with zeros."""
        self.sent(kind, 2 * tensor.numel() * tensor.element_size() * (self.world - 1) / self.world)
        return lambda: tensor

    def all_to_all_async(
        self, rows: Tensor, send: Sequence[int], receive: Sequence[int], kind: str
    ) -> Callable[[], Tensor]:
        """The own rows where they belong, zeros for those of others."""
        width = math.prod(rows.shape[1:]) * rows.element_size()
        self.sent(kind, max(sum(send[1:]), sum(receive[1:])) * width)
        out = rows.new_zeros((sum(receive), *rows.shape[1:]))
        out[: send[0]] = rows[: send[0]]
        return lambda: out
