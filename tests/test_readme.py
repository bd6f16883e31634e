"""The README is held to the code: commands, flags, configs, file tree and equation index."""

import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
import yaml

from distkgd.config import parse_config

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z-]+")
LAUNCHERS = sorted(path.stem for path in (ROOT / "launch").glob("*.py") if path.stem != "__init__")


def section(title: str) -> str:
    """The text under a `## title`."""
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", README, re.MULTILINE | re.DOTALL)
    assert found, f"the README has no section {title!r}"
    return found[1]


# -- commands -------------------------------------------------------------------------------------------------------


def flags_of(launcher: str) -> set[str]:
    """What `python launch/NAME.py --help` lists."""
    app = typer.Typer()
    app.command()(importlib.import_module(f"launch.{launcher}").main)
    options = {flag for option in typer.main.get_command(app).params for flag in option.opts}
    return {flag for flag in options if flag.startswith("--")} | {"--help"}


def test_every_launcher_named_in_the_readme_exists_and_every_launcher_is_named() -> None:
    assert set(re.findall(r"launch/(\w+)\.py", README)) == set(LAUNCHERS)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_every_flag_behind_a_launcher_is_one_of_its_options(launcher: str) -> None:
    lines = re.findall(rf"launch/{launcher}\.py([^`\n]*)", README)
    used = {flag for line in lines for flag in FLAG.findall(line)}
    assert used <= flags_of(launcher)
    assert used


def test_every_other_flag_belongs_to_some_launcher_or_to_a_named_program() -> None:
    foreign = {
        "torchrun": {"--standalone", "--nproc-per-node", "--max-restarts", "--nnodes", "--rdzv-backend", "--rdzv-conf"},
        "mlflow ui": {"--backend-store-uri"},
        "mlflow models serve": {"--env-manager"},
        "ray job submit": {"--address", "--working-dir", "--runtime-env"},
        "ray get-auth-token": {"--generate"},
    }
    for program, flags in foreign.items():
        assert all(re.search(rf"{program}[^\n]*{flag}", README) for flag in flags)
    known = set().union(*map(flags_of, LAUNCHERS), *foreign.values())
    assert set(FLAG.findall(README)) <= known


def test_every_make_target_named_in_the_readme_exists() -> None:
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = set(re.findall(r"(?:^|`|cpu )make (?:[A-Z]+=\S+ )?([a-z-]+)", README, re.MULTILINE))
    assert {"demo", "test", "test-all", "check"} <= named <= targets


def test_every_config_in_the_readme_is_valid() -> None:
    # The example of a method has a test of its own: tests/methods/test_own_method.py.
    # Sweeps are no plans: tests/cluster/test_sweep_config.py.
    elsewhere = README.replace(section("A method of your own"), "").replace(section("Sweeps"), "")
    blocks = re.findall(r"```yaml\n(.*?)```", elsewhere, re.DOTALL)
    assert blocks
    for block in blocks:
        parse_config(yaml.safe_load(block), "README")
    for path in re.findall(r"configs/[\w/-]+\.yaml", README):
        assert (ROOT / path).is_file(), path


# -- file tree ------------------------------------------------------------------------------------------------------


def tree() -> Iterator[str]:
    """Paths of the file tree, folders with a slash at the end."""
    block = re.search(r"```\n(.*?)```", section("File tree"), re.DOTALL)
    assert block
    folders: list[str] = []
    for line in block[1].splitlines():
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2
        folders = [*folders[:depth], name]
        assert line.removeprefix(" " * 2 * depth + name).strip(), f"{name} has no description"
        yield "".join(folders)


def test_every_path_of_the_file_tree_exists() -> None:
    for path in tree():
        assert (ROOT / path).is_dir() if path.endswith("/") else (ROOT / path).is_file(), path


def test_every_module_is_in_the_file_tree() -> None:
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "distkgd").rglob("*.py") if path.stem != "__init__"}
    assert modules - set(tree()) == set()


# -- equations ------------------------------------------------------------------------------------------------------

METHODS = {"dualde": "DualDE", "iterde": "IterDE", "med": "MED", "metasd": "MetaSD"}
METHODS |= {"rkd": "RKD", "dml": "DML", "mulde": "MulDE"}
NUMBERS = r"\d+(?:(?:\s*[-–,]\s*|\s+and\s+|\s*\(and\s+)\d+)*"
EQUATION = re.compile(rf"Eq\.\s+({NUMBERS})")
CITATION = re.compile(r"(\w+)(?: et al\.| & \w+)[^\d]*?(\d{4})")


def numbers(text: str) -> Iterator[int]:
    """The equation numbers of "2, 11 and 15" or "9–11"."""
    for first, last in re.findall(r"(\d+)(?:\s*[-–]\s*(\d+))?", text):
        yield from range(int(first), int(last or first) + 1)


def tags(source: str, stem: str) -> Iterator[str]:
    """Equation tags of a source, e.g. "DualDE Eq. 8" or "Sun 2019 Eq. 3".

    A bare "Eq." belongs to the method whose name stands before it, else to the method of the file or of the config
    class around it, else to the paper cited before it.
    """
    for found in EQUATION.finditer(source):
        before = source[: found.start()]
        word = re.search(r"(\w+)\s+\(?$", before)
        around = re.findall(r"^class (\w+?)(?:Config)?\b", before, re.MULTILINE)
        cited = CITATION.findall(before[-250:])
        if word and word[1] in METHODS.values():
            owner = word[1]
        elif stem in METHODS:
            owner = METHODS[stem]
        elif around and around[-1].lower() in METHODS:
            owner = METHODS[around[-1].lower()]
        else:
            assert cited, f"{stem}: Eq. {found[1]} of which paper?"
            owner = " ".join(cited[-1])
        yield from (f"{owner} Eq. {number}" for number in numbers(found[1]))
    yield from re.findall(rf"\b(?:{'|'.join(METHODS.values())})\[\w+\]", source)


def index() -> list[list[str]]:
    """Rows of the equation index: tag, where, what, test."""
    lines = [line for line in section("Equations").splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def indexed() -> set[str]:
    """Single tags of the index."""
    found = set()
    for tag, *_ in index():
        owner, sign, listed = tag.partition(" Eq. ")
        found |= {f"{owner} Eq. {n}" for n in numbers(listed)} if sign else {tag}
    return found


def test_tags_are_read_from_code_in_all_ways_they_are_written() -> None:
    assert list(tags("# Eq. 10-11 (and 14-15) say", "dualde")) == [f"DualDE Eq. {n}" for n in (10, 11, 14, 15)]
    assert list(tags("Eq. 2, 11 and 15 lack. Eq. 4.", "dualde")) == [f"DualDE Eq. {n}" for n in (2, 11, 15, 4)]
    assert list(tags("(Sun et al., ICLR 2019, Eq. 5-6; there", "losses")) == ["Sun 2019 Eq. 5", "Sun 2019 Eq. 6"]
    assert list(tags("class DualdeConfig(Frozen):\n    (Eq. 7)", "config")) == ["DualDE Eq. 7"]
    assert list(tags("(DualDE Eq. 6) of MED[EI]", "losses")) == ["DualDE Eq. 6", "MED[EI]"]
    with pytest.raises(AssertionError, match="of which paper"):
        list(tags("see Eq. 3", "losses"))


@pytest.mark.parametrize(
    "path", sorted((ROOT / "distkgd").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT / "distkgd"))
)
def test_every_equation_tag_in_the_code_is_in_the_index(path: Path) -> None:
    assert set(tags(path.read_text(encoding="utf-8"), path.stem)) - indexed() == set()


def test_the_index_holds_all_equations_of_dualde() -> None:
    assert {f"DualDE Eq. {n}" for n in range(1, 16)} <= indexed()


@pytest.mark.parametrize("row", index(), ids=lambda row: row[0])
def test_a_row_of_the_index_names_code_and_a_test_that_exist(row: list[str]) -> None:
    path, name = re.findall(r"`([^`]+)`", row[1])
    assert name in (ROOT / path).read_text(encoding="utf-8")
    test, _, function = row[3].strip("`").partition("::")
    assert (ROOT / test).is_file()
    assert not function or f"def {function}(" in (ROOT / test).read_text(encoding="utf-8")
