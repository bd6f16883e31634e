"""Every command of README.md and docs/ is run in one folder, in the order of the pages, or has a test of its own."""

import importlib
import json
import re
import shlex
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import typer

from distkgd.commands.app import COMMANDS as COMMANDS_OF_DISTKGD
from distkgd.commands.cli import split_arguments
from distkgd.pipeline.config import load_config
from tests.docs.commands import TABLE, Elsewhere, Parsed, Run, Slow, how, keys_of
from tests.docs.pages import EVERYTHING, PAGES, PROGRAMS, ROOT, Command, blocks, commands, fenced_commands, text_of
from tests.docs.sites import Site, build, of_kind, run, small_rules

COMMANDS = commands()
NAMED = [one for one in TABLE.values() if isinstance(one, Elsewhere | Parsed)]
# A launcher, or the measurements side by side, which are a package that runs.
LAUNCHER = re.compile(r"(?:launch/(?=\w+\.py)|^distkgd |-m benchmarks\.(?=side_by_side))(\w+)(?:\.py)? ?(.*)")
LAUNCHED = [one for one in COMMANDS if LAUNCHER.search(one.text)]


# -- the table ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_every_command_has_one_entry(command: Command) -> None:
    found = keys_of(command.text)
    assert len(found) == 1, f"{command}: tests/docs/commands.py says {found or 'nothing'} about it; it needs one entry"


@pytest.mark.parametrize("key", TABLE)
def test_every_entry_is_about_a_command(key: str) -> None:
    assert any(keys_of(one.text) == [key] for one in COMMANDS), f"no page has {key!r} any more; drop the entry"


def test_every_line_of_a_block_that_is_a_command_is_in_a_shell_block() -> None:
    for page in PAGES:
        for block in blocks(text_of(page), ""):
            assert not re.search(rf"^{PROGRAMS} ", block, re.MULTILINE), f"{page}: begin this block with ```sh\n{block}"


@pytest.mark.parametrize("entry", sorted({one.test for one in NAMED if one.test is not None}))
def test_a_test_named_in_its_place_exists(entry: str) -> None:
    path, _, name = entry.partition("::")
    assert re.search(rf"^def {name}\(", (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE), entry


# -- what every command is held to ----------------------------------------------------------------------------------


@pytest.mark.parametrize("command", LAUNCHED, ids=str)
def test_the_arguments_of_a_launcher_are_read_and_its_config_is_valid(command: Command) -> None:
    name, rest = LAUNCHER.search(command.text).groups()  # type: ignore[union-attr]
    arguments = shlex.split(rest)
    app = typer.Typer()
    app.command()(COMMANDS_OF_DISTKGD.get(name) or importlib.import_module(f"benchmarks.{name}.__main__").main)
    if "--help" in arguments:
        return
    parsed = typer.main.get_command(app).make_context(name, arguments).params
    if name in ("distill", "chain"):
        path, overrides = split_arguments(parsed["arguments"] or [])
        if path is None:
            path = Path("configs/default.yaml")
        if path.parts[0] != "runs":  # else an earlier command makes it
            load_config(path, overrides if path.parent.name != "configs" else [], parsed["data"])


def test_every_extra_that_is_to_be_installed_is_one() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = set(re.findall(r"distkgd\[(\w+)\]", EVERYTHING))
    assert extras <= set(project["optional-dependencies"]) and {"mlflow", "ray", "bench"} <= extras


def test_make_and_benchmarks_that_are_not_run_are_there() -> None:
    targets = re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for command in COMMANDS:
        if isinstance(how(command.text), Parsed):
            words = command.text.split()
            if "make" in words:
                assert words[-1] in targets
            elif words[:2] == ["python", "-m"]:
                place = ROOT / words[2].replace(".", "/")
                assert (place / "__main__.py").is_file() or place.with_suffix(".py").is_file()
            elif words[0] == "python":
                assert (ROOT / words[1]).is_file()
    ci = (ROOT / ".ci/run").read_text(encoding="utf-8")
    assert {"make check", "make test"} <= set(ci.splitlines())


# -- running --------------------------------------------------------------------------------------------------------


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("command", of_kind(Run), ids=str)
def test_a_command_of_the_pages_does_what_it_says(
    command: Command, site: Site, record_property: Callable[[str, object], None]
) -> None:
    entry, outcome = how(command.text), site.outcomes.get(command.text)
    assert isinstance(entry, Run)
    if outcome is None:
        pytest.skip(f"{entry.needs} is not installed")
    record_property("seconds", round(outcome.seconds, 1))  # of --junitxml
    assert outcome.code in entry.codes, f"{command}\n{outcome.said[-3000:]}"
    assert "Traceback" not in outcome.said


@pytest.mark.timeout(1800)
def test_the_projection_of_the_page_is_what_the_model_says(site: Site) -> None:
    said = site.outcomes["python benchmarks/engine.py project"].said
    rows = [line for line in said.splitlines() if line.startswith("| 1")]
    assert len(rows) == 8 and set(rows) <= set(text_of("docs/engine.md").splitlines())


@pytest.mark.timeout(1800)
def test_two_ranks_report_the_same_figures_as_one(site: Site) -> None:
    (command,) = (one.text for one in of_kind(Run) if re.match(r"torchrun .* launch/distill\.py", one.text))
    alone = re.sub(r"^torchrun .* launch/distill\.py", "distkgd distill", command).replace(
        "runs/two_ranks", "runs/one_rank"
    )
    assert run(alone, site.folder).code == 0
    one, two = (
        json.loads((site.folder / f"runs/{name}/report.json").read_text()) for name in ("one_rank", "two_ranks")
    )
    assert (one["world"], two["world"]) == (1, 2)
    for mine, theirs in zip(one["stages"], two["stages"], strict=True):
        for split in ("valid", "test"):
            for name in ("mrr", "hits_at_1", "hits_at_3", "hits_at_10"):
                assert theirs[split][name] == pytest.approx(mine[split][name], abs=2e-3)


SHOWN = [(page, code) for page in PAGES for code in blocks(text_of(page), "python") if "class Match" not in code]


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("page", "code"), SHOWN, ids=[page for page, _ in SHOWN])
def test_a_program_of_the_pages_runs(page: str, code: str, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    # The method in docs/models.md is run by tests/methods/test_own_method.py.
    if ".frame()" in code:
        pytest.importorskip("pandas")
    monkeypatch.chdir(site.folder)
    with small_rules():
        exec(compile(code, page, "exec"), {"__name__": "example"})


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("command", of_kind(Slow), ids=str)
def test_a_long_command_of_the_pages_does_what_it_says(command: Command, site: Site) -> None:
    entry = how(command.text)
    assert isinstance(entry, Slow)
    if entry.needs is not None:
        pytest.importorskip(entry.needs)
    outcome = run(command.text, site.folder)
    assert outcome.code in entry.codes, f"{command}\n{outcome.said[-3000:]}"
    assert (site.folder / entry.leaves).exists()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_demo_at_full_size_and_what_the_tutorial_does_with_it(tmp_path: Path) -> None:
    folder = build(tmp_path, small=False)
    page = "docs/tutorial.md"
    asked = [
        one.text for one in fenced_commands(page) if re.search(r"^distkgd (evaluate|predict|report|export)", one.text)
    ]
    for command in ["make demo", *asked]:
        ended = run(command, folder, seconds=600)
        assert ended.code == 0, f"{command}\n{ended.said[-3000:]}"
    stages = json.loads((folder / "runs/demo/report.json").read_text(encoding="utf-8"))["stages"]
    mrr = {stage["name"]: stage["test"]["mrr"] for stage in stages}
    assert mrr["teacher"] > mrr["student"] > mrr["direct"] + 0.01
    (code,) = blocks(text_of(page), "python")
    (folder / "program.py").write_text(code, encoding="utf-8")
    assert run(f"{sys.executable} program.py", folder).code == 0


def test_most_commands_are_run_as_they_stand() -> None:
    kinds = [type(how(one.text)) for one in COMMANDS]
    assert kinds.count(Run) > kinds.count(Slow) + kinds.count(Elsewhere) + kinds.count(Parsed)
