"""The command `distkgd`: its help, its completion, its doors, and what it does not import."""

import importlib
import inspect
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import typer
import yaml

from distkgd.commands import evaluate, export
from distkgd.commands.app import COMMANDS, build_app
from distkgd.commands.cli import run_app
from distkgd.common.version import __version__
from distkgd.config.fields import LARGEST
from distkgd.evaluation.breakdowns import RARE_BELOW
from distkgd.evaluation.ranking import Filter, Ties
from distkgd.kernels.quantiser import BITS
from distkgd.models.export import FORMATS
from distkgd.models.importers import IMPORTERS
from tests.launches import ROOT, call, held, small_data

HEAVY = {"torch", "numpy", "polars", "pydantic", "mlflow", "ray", "deepspeed", "safetensors", "fsspec", "jinja2"}
GROUP: Any = typer.main.get_command(build_app())


def imported_by(code: str, **env: str) -> tuple[set[str], str]:
    """What of HEAVY a program has imported by its end, and its output."""
    last = f"print(json.dumps([name for name in {sorted(HEAVY)} if name in sys.modules]))"
    whole = f"import json, sys\n{code}\n{last}"
    told: dict[str, Any] = {
        "env": os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"} | env,
        "text": True,
        "timeout": 60,
    }
    done = subprocess.run([sys.executable, "-c", whole], capture_output=True, check=True, **told)
    *said, last = done.stdout.splitlines()
    return set(json.loads(last)), "\n".join(said)


# -- imports ----------------------------------------------------------------------------------------------------------


def test_importing_the_package_imports_nothing_heavy() -> None:
    assert imported_by("import distkgd; distkgd.__version__; dir(distkgd)") == (set(), "")
    assert imported_by("import torch")[0] >= {"torch"}


HELP = """
from distkgd.__main__ import main
for arguments in LINES:
    sys.argv[1:] = arguments
    try:
        main()
    except SystemExit as end:
        assert not end.code, (arguments, end.code)
"""


def test_no_help_waits_for_torch() -> None:
    lines = [["--help"], ["--version"], *([name, "--help"] for name in COMMANDS)]
    heavy, said = imported_by(HELP.replace("LINES", str(lines)))
    assert heavy <= {"pydantic"}  # typer's own, for arguments
    assert said.count("Usage: distkgd") == len(COMMANDS) + 1 and __version__ in said


def test_completion_names_commands_and_options_without_waiting_for_torch() -> None:
    for words, wanted in (("distkgd ex", "export"), ("distkgd distill --dry", "--dry-run")):
        code = "from distkgd.__main__ import main\ntry: main()\nexcept SystemExit: pass"
        asked = {"_DISTKGD_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
        heavy, said = imported_by(code, **asked)
        assert wanted in said.split() and heavy <= {"pydantic"}


# -- help -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMMANDS)
def test_every_argument_has_a_text_and_every_command_examples_that_can_be_typed(name: str) -> None:
    command = GROUP.commands[name]
    for parameter in command.params:
        assert parameter.help, f"{name}: {parameter.name}"
    _, _, examples = (command.help or "").partition("Example")
    lines = [line.strip() for line in examples.splitlines() if line.strip() and not line.strip().endswith(":")]
    assert any(f"distkgd {name}" in line for line in lines)
    for line in lines:
        text = re.sub(r"\s+(#|>) .*", "", line)
        if (found := re.search(rf"(?:^|-m )distkgd {name} ?(.*)", text)) is not None:
            GROUP.commands[name].make_context(name, shlex.split(found[1]))


def test_texts_and_limits_that_stand_twice_are_those_of_the_code() -> None:
    assert set(re.findall(r"\w+", export.FORMATS)) == {*FORMATS, "default", "or"}
    texts = {name: " ".join(one.help for one in GROUP.commands[name].params) for name in ("import", "export")}
    assert f"libraries: {', '.join(IMPORTERS)}." in texts["import"] and str(BITS) in texts["export"]
    given = inspect.signature(evaluate.main).parameters
    for name, kind in (("ties", Ties), ("filter_", Filter)):
        assert get_args(given[name].annotation)[0] == kind
    assert given["rare"].default == RARE_BELOW and given["rare"].annotation.__metadata__[0].max == LARGEST


# -- doors ------------------------------------------------------------------------------------------------------------


def test_a_launcher_is_the_subcommand_of_its_name() -> None:
    doors = {path.stem for path in (ROOT / "launch").glob("*.py")} - {"__init__"}
    assert doors == set(COMMANDS) - {"configs"}
    for name in doors:
        assert importlib.import_module(f"launch.{name}").main is COMMANDS[name]


def test_the_command_ends_as_its_launchers_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_app(build_app(), ["report", "nowhere"], "distkgd") == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert run_app(build_app(), ["reprot"], "distkgd") == 2
    assert "reprot" in capsys.readouterr().err
    assert run_app(build_app(), ["--version"], "distkgd") == 0
    assert capsys.readouterr().out == f"distkgd {__version__}\n"


# -- dry runs ---------------------------------------------------------------------------------------------------------

FEW = ["mlflow.enabled=false", "device=cpu", "report.html=false"]


def test_a_dry_run_says_plan_memory_time_and_bytes_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = small_data(tmp_path / "data", entities=12, relations=3, triples=80)
    stage = {"dim": 4, "batch_size": 20, "epochs": 1, "validate_every": 1}
    plan = {"teacher": stage | {"dim": 8}, "student": stage | {"method": "bkd"}, "threads": 1}
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))
    (tmp_path / "own.tsv").write_text("".join(f"a{i % 7}\tr{i % 2}\tb{i % 9}\n" for i in range(63)))
    before = held(tmp_path)
    asked = ["plan.yaml", "--data", str(data), *FEW]
    for arguments in (asked, ["--data", "own.tsv", "--to", "4", *FEW], ["--data", "own.tsv", "--max-mb", "9", *FEW]):
        code, out, told = call("distill", [*arguments, "--dry-run"])
        assert code == 0 and not out, told
        for words in (
            "taught by teacher" if "--max-mb" not in arguments else "med",
            "tables ",
            "memory ",
            "time about",
        ):
            assert words in told
        assert "nothing was trained or written" in told and held(tmp_path) == before
    assert call("distill", [*asked, "--out", "run"])[0] == 0
    size = json.loads((tmp_path / "run/report.json").read_text())["stages"][1]["row_bytes"]
    trained = held(tmp_path)
    code, _, told = call("distill", [*asked, "--out", "run", "--resume", "--dry-run"])
    assert code == 0 and "every stage is finished" in told and held(tmp_path) == trained
    code, _, told = call("distill", [*asked, "--out", "run", "--dry-run"])
    assert code == 2 and "--resume" in told
    _, _, told = call("distill", [*asked, "--dry-run"])
    entities = int(re.search(r"(\d+) entities", told)[1])  # type: ignore[index]
    assert size == 16 and f"tables {(entities + 2 * 3) * size} B" in told
