"""`python -m tests.gpu.steps [PART OF A NAME] [--where] [--write]`: what training steps and rankings ask of a GPU.

Prints launches, synchronisations, collectives, bytes and FLOPs of each case of `cases.py` whose name holds the part.
--where: also the lines that asked for them, most first. --write: makes them the budgets that tests hold.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from tests.gpu.cases import CASES, ON_TWO, Counted, count
from tests.ranks import close_pools, run_on_ranks

BUDGETS = Path(__file__).parent / "budgets.json"


def counted_case(name: str) -> Counted:
    """What a case asks of the GPU of the first rank."""
    world = 2 if name.startswith(ON_TWO) else 1
    found: Counted = run_on_ranks(world, count, pretend=True, name=name)[0]
    return found


def budget(found: Counted) -> dict[str, Any]:
    """What is kept of a case: totals, and the part of each function."""
    kept = {"launches": found.launches, "syncs": found.syncs, "collectives": found.collectives}
    return kept | {"synced at": found.synced_at, "sent at": found.sent_at, "launched at": found.launched_at}


def write(found: dict[str, Counted]) -> None:
    """Put these cases' budgets into the file, one case and one function a line."""
    budgets = json.loads(BUDGETS.read_text(encoding="utf-8")) if BUDGETS.exists() else {}
    budgets |= {name: budget(counted) for name, counted in found.items()}
    budgets = {name: budgets[name] for name in CASES if name in budgets}
    BUDGETS.write_text(json.dumps(budgets, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", default="")
    parser.add_argument("--where", action="store_true")
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    found = {}
    for name in CASES:
        if given.part in name:
            found[name] = counted_case(name)
            print(f"{name}: {found[name].told}", flush=True)
            if given.where:
                show(found[name])
    close_pools()
    if given.write:
        write(found)


def show(found: Counted) -> None:
    """Every line with its part of the synchronisations and launches."""
    parts_of = {"syncs": found.synced_at, "collectives": found.sent_at, "launches": found.launched_at}
    for title, parts in parts_of.items():
        print(f"  {title}")
        for function in sorted(parts, key=lambda name: -parts[name]):
            print(f"    {parts[function]:4d} {function}")
            print(*(f"           {line}" for line in found.lines[function]), sep="\n")


if __name__ == "__main__":
    main()
