"""Loss terms of steps, which on an accelerator are not looked at step by step: for each the host would have to wait."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

# A number, or a [] tensor on an accelerator that may still have to be computed.
Number = float | Tensor

UNSEEN = 100  # steps that are not looked at, at most: so far a NaN or a signal may be behind


class StepTerms:
    """What steps found, until it is looked at.

    check: told of each step's number and its terms, which may be NaN.
    note: told of the terms of consecutive steps once they are checked.
    """

    def __init__(
        self, check: Callable[[int, Mapping[str, float]], None], note: Callable[[list[dict[str, float]]], None]
    ) -> None:
        self._check, self._note = check, note
        self._waiting: list[tuple[int, Mapping[str, Number], Number]] = []

    def add(self, step: int, terms: Mapping[str, Number], stopping: Number, *, look: bool) -> bool:
        """Take note of a step's terms and of whether a signal asked any rank to stop; look at them now, or later.

        Returns whether a signal did, as far as it is known. All ranks must look after the same steps.
        """
        self._waiting.append((step, terms, stopping))
        if look or len(self._waiting) >= UNSEEN:
            return self.look()
        return not isinstance(stopping, Tensor) and bool(stopping)

    def look(self) -> bool:
        """Look at the steps that wait; returns whether a signal asked any rank to stop in one of them."""
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return False
        numbers = [x for _, terms, stopping in waiting for x in (*terms.values(), stopping)]
        tensors = [x.double() for x in numbers if isinstance(x, Tensor)]
        fetched = iter(torch.stack(tensors).tolist() if tensors else [])
        found = iter([float(next(fetched)) if isinstance(x, Tensor) else float(x) for x in numbers])
        seen, asked = [], False
        for step, terms, _ in waiting:
            values = {name: next(found) for name in terms}
            asked = next(found) > 0 or asked
            self._check(step, values)
            seen.append(values)
        self._note(seen)
        return asked
