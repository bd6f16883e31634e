"""Text into numbered triples: names.cpp beside plain Python."""

import random

import pytest
import torch

from distkgd.kernels.build import library
from distkgd.kernels.names import NameTables

pytestmark = pytest.mark.skipif(library("names") is None, reason="no C++ compiler")


def numbered(*texts: bytes, separator: str = "\t") -> tuple[list[list[list[int]]], list[str], list[str]] | None:
    """Triples of each text, entities, relations; None where a text was refused."""
    with NameTables.open() as tables:
        assert tables is not None
        rows = [tables.read(text, 0, separator) for text in texts]
        found = [part for part in rows if part is not None]
        if len(found) < len(rows):
            return None
        entities, relations = tables.sort(found)
        assert all(part.dtype == torch.int64 for part in found)
        return [part.tolist() for part in found], *(lines.decode().split("\n")[:-1] for lines in (entities, relations))


def test_thousands_of_names_that_begin_alike_are_sorted_as_python_sorts_their_code_points() -> None:
    generator = random.Random(0)
    shared = "http://example.org/entité/"
    names = [
        shared + "".join(generator.choices("aé\U0001f600𐀀\ufffd0", k=generator.randint(1, 12))) for _ in range(4000)
    ]
    names += [name + "0" * k for name in names[:500] for k in range(1, 12)]  # one the beginning of the next
    relations = [f"r{i}" for i in range(300)]
    triples = [
        [(generator.choice(names), generator.choice(relations), generator.choice(names)) for _ in range(n)]
        for n in (20_000, 1, 65)
    ]
    texts = ["\n".join(map("\t".join, part)).encode() for part in triples]
    found = numbered(*texts)
    assert found is not None
    rows, entities, found_relations = found
    assert entities == sorted({name for part in triples for triple in part for name in (triple[0], triple[2])})
    assert found_relations == sorted({triple[1] for part in triples for triple in part})
    assert [[(entities[h], found_relations[r], entities[t]) for h, r, t in part] for part in rows] == triples


@pytest.mark.parametrize("lead", range(0x80, 0x100, 8))
def test_names_are_as_strictly_utf8_as_python_demands(lead: int) -> None:
    others = [0x41, 0x7F, 0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF, 0xC0]
    tails = [bytes([a]) for a in others] + [bytes([a, b]) for a in others for b in others]
    tails += [bytes([a, 0x80, b]) for a in others for b in others] + [b""]
    for name in (bytes([first]) + tail for first in range(lead, lead + 8) for tail in tails):
        try:
            name.decode()
            valid = True
        except UnicodeDecodeError:
            valid = False
        assert (numbered(b"a\t" + name + b"\tb") is not None) == valid, name


@pytest.mark.parametrize(
    "text",
    [
        b"", b"\n", b"a", b"a\tr", b"a\tr\t", b"a\t\tb", b"\tr\tb", b"a\tr\tb\tc", b"a\tr\tb\n\na\tr\tb", b"a\tr\nb\tc",
        b"a\tr\tb\r", b"a\rb\tr\tb", b"a\0\tr\tb", b"a\tr\tb\0", b"a\tr\t\nb", b"a,r,b",
    ],
)  # fmt: skip
def test_what_is_not_three_fields_of_text_is_refused(text: bytes) -> None:
    assert numbered(b"a\tr\tb", text) is None


def test_line_ends_at_the_end_do_not_count_and_the_separator_is_the_callers() -> None:
    assert numbered(b"b,r\t,a\n\n\n", separator=",") == ([[[1, 0, 0]]], ["a", "b"], ["r\t"])
