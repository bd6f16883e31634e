"""A graph that grows: an old model updated on a newer state of its data, and one newcomer asked about at once.

python examples/growth.py        # writes into a temporary folder, and says where
"""

import tempfile
from pathlib import Path

import family

import distkgd

if __name__ == "__main__":
    place = Path(tempfile.mkdtemp(prefix="distkgd_"))
    before = family.folder(place / "before", family.triples(63))
    after = family.folder(place / "after", family.triples(75))  # twelve people more
    old = distkgd.train({**family.SMALL, "data": str(before)}, out=place / "old")

    # Rows are matched by name, newcomers placed by their neighbours, then trained for a sixth of the epochs.
    new = distkgd.update(old.folder / "stages/student", after, out=place / "new")
    print(f"{len(old.student.entities)} entities before, {len(new.student.entities)} after")
    print("\n".join(new.remarks))
    print(new.student.predict(tail="person70", relation="parent_of", k=3).names)

    # One entity more, from its triples alone, without training.
    grown = old.student.with_entity("person99", [("person30", "sibling_of", "person99")])
    print(grown.predict(tail="person99", relation="parent_of", k=3).names)
    print(f"The runs are in {place}")
