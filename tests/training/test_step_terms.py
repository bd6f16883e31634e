import math
from collections.abc import Mapping

import pytest
import torch

from distkgd.training.step_terms import UNSEEN, Number, StepTerms


def on_device(**terms: float) -> dict[str, Number]:
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in terms.items()}


def check(step: int, terms: Mapping[str, float]) -> None:
    if not all(map(math.isfinite, terms.values())):
        raise ValueError(f"step {step}: {terms}")


def test_terms_are_told_once_they_are_looked_at_step_by_step() -> None:
    told: list[list[dict[str, float]]] = []
    steps = StepTerms(check, told.append)
    assert not steps.add(7, on_device(hard=0.5), False, look=False)
    assert not steps.add(8, on_device(hard=0.25, soft=1.0), False, look=False) and told == []
    assert not steps.add(9, {"hard": 2.0}, False, look=True)
    assert told == [[{"hard": 0.5}, {"hard": 0.25, "soft": 1.0}, {"hard": 2.0}]]
    assert not steps.look() and len(told) == 1


def test_a_term_that_is_no_number_names_its_step_however_late_it_is_seen() -> None:
    steps = StepTerms(check, lambda _: None)
    for step in range(5):
        steps.add(step, on_device(hard=math.nan if step == 3 else 1.0), False, look=False)
    with pytest.raises(ValueError, match=r"step 3: \{'hard': nan\}"):
        steps.look()


def test_a_signal_that_only_the_device_knows_of_is_seen_with_the_terms() -> None:
    steps = StepTerms(check, lambda _: None)
    assert not steps.add(0, on_device(hard=1.0), torch.tensor(15.0), look=False)
    assert not steps.add(1, on_device(hard=1.0), torch.tensor(0.0), look=False)
    assert steps.look() and not steps.look()
    assert steps.add(2, on_device(hard=1.0), True, look=False)  # what the host knows needs no look


def test_a_look_is_never_further_away_than_a_fixed_number_of_steps() -> None:
    told: list[list[dict[str, float]]] = []
    steps = StepTerms(check, told.append)
    for step in range(2 * UNSEEN + 1):
        steps.add(step, on_device(hard=1.0), torch.tensor(0.0), look=False)
    assert [len(found) for found in told] == [UNSEEN, UNSEEN]
