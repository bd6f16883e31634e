"""The equation index of docs/papers.md is held to the code and to the tests."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docs.pages import ROOT, section

METHODS = {"dualde": "DualDE", "iterde": "IterDE", "med": "MED", "metasd": "MetaSD"}
METHODS |= {"rkd": "RKD", "dml": "DML", "mulde": "MulDE"}
NUMBERS = r"\d+(?:(?:\s*[-–,]\s*|\s+and\s+|\s*\(and\s+)\d+)*"
EQUATION = re.compile(rf"Eq\.\s+({NUMBERS})")
CITATION = re.compile(r"(\w+)(?: et al\.| & \w+)[^\d]*?(\d{4})")


def numbers(text: str) -> Iterator[int]:
    """The equation numbers of "2, 11 and 15" or "9–11"."""
    for first, last in re.findall(r"(\d+)(?:\s*[-–]\s*(\d+))?", text):
        yield from range(int(first), int(last or first) + 1)


def tags(source: str, stem: str) -> Iterator[tuple[str, int]]:
    """Equation tags of a source, e.g. "DualDE Eq. 8" or "Sun 2019 Eq. 3", and the line of each.

    A bare "Eq." belongs to the method or the paper that stands right before it, else to the method of the file or of
    the config class around it, else to the paper cited last.
    """
    for found in EQUATION.finditer(source):
        before = source[: found.start()]
        word = re.search(r"(\w+)\s+\(?$", before)
        around = re.findall(r"^class (\w+?)(?:Config)?\b", before, re.MULTILINE)
        cited = CITATION.findall(before[-250:])
        if word and word[1] in METHODS.values():
            owner = word[1]
        elif cited and before.endswith(f"{cited[-1][1]}, "):
            owner = " ".join(cited[-1])
        elif stem in METHODS:
            owner = METHODS[stem]
        elif around and around[-1].lower() in METHODS:
            owner = METHODS[around[-1].lower()]
        else:
            assert cited, f"{stem}: Eq. {found[1]} of which paper?"
            owner = " ".join(cited[-1])
        yield from ((f"{owner} Eq. {number}", before.count("\n") + 1) for number in numbers(found[1]))
    for found in re.finditer(rf"\b(?:{'|'.join(METHODS.values())})\[\w+\]", source):
        yield found[0], source.count("\n", 0, found.start()) + 1


def index() -> list[list[str]]:
    """Rows of the equation index: tag, where, what, test."""
    lines = [line for line in section("docs/papers.md", "Equations").splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def single(tag: str) -> set[str]:
    """The single tags of a row's."""
    owner, sign, listed = tag.partition(" Eq. ")
    return {f"{owner} Eq. {n}" for n in numbers(listed)} if sign else {tag}


def indexed() -> set[str]:
    """Single tags of the index."""
    return set().union(*(single(tag) for tag, *_ in index()))


def tags_within(path: Path, name: str) -> set[str]:
    """Those that stand in the functions and classes of that name."""
    source = path.read_text(encoding="utf-8")
    kinds = ast.FunctionDef, ast.ClassDef
    named = [node for node in ast.walk(ast.parse(source)) if isinstance(node, kinds) and node.name == name]
    assert named, f"{path} has no {name}"
    return {
        tag
        for tag, line in tags(source, path.stem)
        if any(node.lineno <= line <= (node.end_lineno or 0) for node in named)
    }


def names(source: str, stem: str) -> list[str]:
    """Equation tags without their lines."""
    return [tag for tag, _ in tags(source, stem)]


def test_tags_are_read_from_code_in_all_ways_they_are_written() -> None:
    assert names("# Eq. 10-11 (and 14-15) say", "dualde") == [f"DualDE Eq. {n}" for n in (10, 11, 14, 15)]
    assert names("Eq. 2, 11 and 15 lack. Eq. 4.", "dualde") == [f"DualDE Eq. {n}" for n in (2, 11, 15, 4)]
    assert names("(Sun et al., ICLR 2019, Eq. 5-6; there", "losses") == ["Sun 2019 Eq. 5", "Sun 2019 Eq. 6"]
    assert names("class DualdeConfig(Frozen):\n    (Eq. 7)", "config") == ["DualDE Eq. 7"]
    assert names("Eq. 4 (Zhu & Gupta 2017, Eq. 1)", "metasd") == ["MetaSD Eq. 4", "Zhu 2017 Eq. 1"]
    assert names("(DualDE Eq. 6) of MED[EI]", "losses") == ["DualDE Eq. 6", "MED[EI]"]
    with pytest.raises(AssertionError, match="of which paper"):
        names("see Eq. 3", "losses")


@pytest.mark.parametrize(
    "path", sorted((ROOT / "distkgd").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT / "distkgd"))
)
def test_every_equation_tag_in_the_code_is_in_the_index(path: Path) -> None:
    assert set(names(path.read_text(encoding="utf-8"), path.stem)) - indexed() == set()


def test_the_index_holds_all_equations_of_dualde() -> None:
    assert {f"DualDE Eq. {n}" for n in range(1, 16)} <= indexed()


@pytest.mark.parametrize("row", index(), ids=lambda row: row[0])
def test_a_row_of_the_index_names_code_and_a_test_that_exist(row: list[str]) -> None:
    path, name = re.findall(r"`([^`]+)`", row[1])
    found = tags_within(ROOT / path, name)
    if " Eq. " in row[0] or "[" in row[0]:
        assert single(row[0]) <= found, f"{path} does not say at {name} what it is"
    test, _, function = row[3].strip("`").partition("::")
    assert (ROOT / test).is_file()
    assert not function or f"def {function}(" in (ROOT / test).read_text(encoding="utf-8")
