"""README.md and docs/ are held to the code: launchers, flags, configs, links, file tree."""

import importlib
import re

import pytest
import typer
import yaml

from distkgd.commands.app import COMMANDS
from distkgd.pipeline.config import parse_config
from tests.docs.pages import EVERYTHING, FENCED, PAGES, ROOT, blocks, section, text_of

FLAG = re.compile(r"(?<![\w-])--[a-z][a-z-]+")
PROGRAMS = {name: rf"(?:distkgd {name}|launch/{name}\.py)" for name in COMMANDS}
PROGRAMS["bench"] = r"-m benchmarks\.side_by_side"


# -- commands -------------------------------------------------------------------------------------------------------


def flags_of(program: str) -> set[str]:
    """What `distkgd NAME --help` lists."""
    app = typer.Typer()
    app.command()(COMMANDS.get(program) or importlib.import_module("benchmarks.side_by_side.__main__").main)
    options = {flag for option in typer.main.get_command(app).params for flag in option.opts}
    return {flag for flag in options if flag.startswith("--")} | {"--help"}


@pytest.mark.parametrize("pages", [["README.md"], PAGES], ids=["README.md", "all pages"])
def test_every_command_that_is_named_exists_and_every_command_is_named(pages: list[str]) -> None:
    text = "\n".join(map(text_of, pages))
    lines = "\n".join([*blocks(text, "sh"), *re.findall(r"`(distkgd [^`]*)`", text)])
    assert set(re.findall(r"^distkgd (\w+)", lines, re.MULTILINE)) == set(COMMANDS)
    assert set(re.findall(r"launch/(\w+)\.py", text)) <= set(COMMANDS)


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_flag_behind_a_launcher_is_one_of_its_options(program: str) -> None:
    lines = re.findall(rf"{PROGRAMS[program]}([^`\n]*)", EVERYTHING)
    used = {flag for line in lines for flag in FLAG.findall(line)}
    assert used <= flags_of(program)
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
        assert all(re.search(rf"{program}[^\n]*{flag}", EVERYTHING) for flag in flags)
    known = {"--version", "--install-completion"}.union(*map(flags_of, PROGRAMS), *foreign.values())
    assert set(FLAG.findall(EVERYTHING)) <= known


def test_every_folder_of_the_package_is_in_the_map_of_the_readme() -> None:
    folders = {f"distkgd/{path.name}/" for path in (ROOT / "distkgd").iterdir() if any(path.glob("*.py"))}
    assert folders - set(re.findall(r"`(distkgd/\w+/)`", section("README.md", "Where things are"))) == set()


def test_every_make_target_that_is_named_exists() -> None:
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = set(re.findall(r"(?:^|`|cpu )make (?:[A-Z]+=\S+ )?([a-z-]+)", EVERYTHING, re.MULTILINE))
    assert {"demo", "test", "test-all", "check"} <= named <= targets


@pytest.mark.parametrize("page", PAGES)
def test_every_config_is_valid(page: str) -> None:
    # The example of a method has a test of its own: tests/methods/test_own_method.py.
    # Sweeps are no plans: tests/pipeline/sweep/test_sweep_config.py.
    text = text_of(page)
    for elsewhere in re.findall(r"^## (A method of your own|Sweeps)$", text, re.MULTILINE):
        text = text.replace(section(page, elsewhere), "")
    for block in blocks(text, "yaml"):
        parse_config(yaml.safe_load(block), page)
    for path in re.findall(r"(?<![\w/-])configs/[\w/-]+\.yaml", text_of(page)):
        assert (ROOT / path).is_file(), path


def test_the_pages_show_configs() -> None:
    assert len(blocks(EVERYTHING, "yaml")) >= 6


# -- links ----------------------------------------------------------------------------------------------------------


def anchors(page: str) -> set[str]:
    """Those that GitHub gives the page's headings."""
    heads = re.findall(r"^#+ (.+)$", FENCED.sub("", text_of(page)), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES)
def test_every_link_between_pages_is_relative_and_leads_somewhere(page: str) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`]*`", "", FENCED.sub("", text_of(page))))
    for link in links:
        path, _, anchor = link.partition("#")
        if re.match(r"https?:", link):
            assert page != "README.md", f"{link}: the README's links are relative"
            continue
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.is_file(), f"{page}: {link} leads nowhere"
        there = anchors(str(target.resolve().relative_to(ROOT)))
        assert not anchor or anchor in there, f"{page}: {link}: no such section"


def test_every_page_is_read_by_the_tests_and_linked_from_the_readme() -> None:
    assert {str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md")} == set(PAGES) - {"README.md"}
    for page in set(PAGES) - {"README.md"}:
        assert f"]({page}" in text_of("README.md"), page


def test_the_readme_is_short() -> None:
    assert len(text_of("README.md").splitlines()) <= 150, "what is not for everybody goes to docs/"
