"""What a step and a ranking ask of a GPU is within budgets.json, which `python -m tests.gpu.steps --write` makes."""

import json
import warnings
from typing import Any

import pytest

from tests.gpu.cases import CASES, Counted
from tests.gpu.steps import BUDGETS, budget, counted_case

KEPT: dict[str, dict[str, Any]] = json.loads(BUDGETS.read_text(encoding="utf-8"))


def news(found: Counted, kept: dict[str, Any]) -> list[str]:
    """The lines of functions that ask for more than they did, where all together do; first how much more it is."""
    out = []
    for what, parts in (("launches", "launched at"), ("syncs", "synced at"), ("collectives", "sent at")):
        now, then = budget(found), kept
        if now[what] > then[what]:
            out.append(f"{now[what]} {what}, and no more than {then[what]} are allowed; new:")
            for function in now[parts]:
                before = then[parts].get(function, 0)
                if now[parts][function] > before:
                    out.append(f"  {function}: {now[parts][function]} in place of {before}")
                    out += [f"    {line}" for line in found.lines[function]]
    return out


@pytest.mark.parametrize("name", CASES)
def test_a_step_asks_a_gpu_for_no_more_than_its_budget(name: str) -> None:
    found, kept = counted_case(name), KEPT[name]
    told = news(found, kept)
    assert not told, "\n".join([name, *told])
    for what in ("launches", "syncs", "collectives"):
        if (now := budget(found)[what]) < kept[what]:
            part = f"python -m tests.gpu.steps --write {name!r}"
            warnings.warn(f"{name}: {now} {what} in place of {kept[what]}; lower its budget: {part}", stacklevel=1)


def test_every_budget_is_of_a_case() -> None:
    assert list(KEPT) == list(CASES)


def test_what_is_new_is_named_with_its_line() -> None:
    lines = {"a.py f": ["3 x a.py:7 f: add"], "b.py g": ["1 x b.py:9 g: item"]}
    found = Counted(3, 1, 0, 0, 0, {"a.py f": 3}, {"b.py g": 1}, {}, lines)
    kept = budget(found) | {"launched at": {"a.py f": 2, "c.py h": 1}}
    assert news(found, kept) == []
    assert any("a.py:7" in line for line in news(found, kept | {"launches": 2}))
    told = news(found, kept | {"syncs": 0, "synced at": {}})
    assert any("b.py:9" in line for line in told) and not any("a.py:7" in line for line in told)
