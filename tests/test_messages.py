"""Flags that messages advise: each is an option of the command that prints the message."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import typer

from distkgd.commands.app import COMMANDS

ROOT = Path(__file__).resolve().parent.parent
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "distkgd").rglob("*.py"))
}
TRAINING = ("ablate", "chain", "distill")
# Who prints a module's messages, where others import it for something else.
PRINTED_BY = {
    "distkgd.commands.cli": TRAINING,
    "distkgd.errors": TRAINING,
    "distkgd.data.reading.formats": ("distill",),
    "distkgd.training.job": TRAINING,
    "distkgd.pipeline.autoconfig.rules": ("distill",),
    "distkgd.pipeline.plan": TRAINING,
    "distkgd.pipeline.run_folder": TRAINING,
    "distkgd.pipeline.storage": TRAINING,
    "distkgd.evaluation.prediction": ("predict",),
    "distkgd.evaluation.entity_lookup": ("predict",),
    "distkgd.evaluation.model_metrics": ("evaluate",),
    "distkgd.pipeline.ray.worker_group": ("chain",),
    "distkgd.pipeline.sweep.config": ("ablate",),
    **{f"distkgd.models.export.{name}_format": ("export",) for name in ("faiss", "numpy", "onnx", "parquet", "pykeen")},
}
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z-]+")
OF_OTHERS = ("--env-manager", "--experiment-id")  # mlflow's


def texts(path: Path) -> Iterator[str]:
    """All texts of a module but docstrings; of f-strings what does not depend on values."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = list(ast.walk(tree))
    inside = {id(part) for node in nodes if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in nodes:
        match node:
            case ast.Module() | ast.FunctionDef() | ast.ClassDef():
                if ast.get_docstring(node) is not None:
                    inside.add(id(node.body[0].value))  # type: ignore[attr-defined]
            case ast.JoinedStr(values=parts):
                yield "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in parts)
            case ast.Constant(value=str(text)) if id(node) not in inside:
                yield text


def options(launcher: str) -> set[str]:
    """All long options of `distkgd LAUNCHER`."""
    app = typer.Typer()
    app.command()(COMMANDS[launcher])
    command = typer.main.get_command(app)
    return {"--help", *(text for one in command.params for text in (*one.opts, *one.secondary_opts))}


@cache
def imported(name: str) -> set[str]:
    """The modules of the package that a module of it imports."""
    nodes = ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8")))
    of = [(node.module, node.names) for node in nodes if isinstance(node, ast.ImportFrom) and node.module]
    return MODULES.keys() & {one for module, names in of for one in (module, *(f"{module}.{a.name}" for a in names))}


def reached(launcher: str) -> set[str]:
    """The modules that a command imports, and those that they import."""
    seen, ahead = set(), {COMMANDS[launcher].__module__}
    while ahead:
        name = ahead.pop()
        seen.add(name)
        ahead |= imported(name) - seen
    return seen


def wrong_flags(text: str, printers: list[str], known: dict[str, set[str]]) -> list[str]:
    """Flags in a message that a command lacks: the launcher it names before the flag, else any that prints it."""
    wrong = []
    if FLAG.fullmatch(text):
        return []  # an argument of a program, or the name of an option
    for flag in FLAG.finditer(text):
        named = re.findall(rf"distkgd ({'|'.join(COMMANDS)})\b", text[: flag.start()])
        commands = named[-1:] or printers
        if flag[0] not in OF_OTHERS and (not commands or any(flag[0] not in known[one] for one in commands)):
            wrong.append(f"{flag[0]} ({', '.join(commands)})")
    return wrong


@pytest.fixture(scope="module")
def known() -> dict[str, set[str]]:
    return {launcher: options(launcher) for launcher in COMMANDS}


def test_every_flag_that_a_message_advises_exists_in_the_command_that_prints_it(known: dict[str, set[str]]) -> None:
    users = {launcher: reached(launcher) for launcher in COMMANDS}
    users["configs"] = {COMMANDS["configs"].__module__}  # it imports all of them for their options alone
    # It imports all that chooses plans for `distkgd distill`, and asks for none of it.
    users["update"] = {COMMANDS["update"].__module__, "distkgd.pipeline.autoconfig.update"}
    # They measure steps of plans that are there, and choose none.
    users["ablate"] = users["reproduce"] = users["ablate"] - {"distkgd.pipeline.autoconfig.forecast"}
    found, number = {}, 0
    for name, path in MODULES.items():
        printers = [launcher for launcher in COMMANDS if name in users[launcher]]
        for text in texts(path):
            number += len(FLAG.findall(text))
            if wrong := wrong_flags(text, list(PRINTED_BY.get(name, printers)), known):
                found[f"{name}: {text[:60]}"] = wrong
    assert found == {} and number > 50


def test_the_check_notices_a_flag_of_another_command(known: dict[str, set[str]]) -> None:
    assert wrong_flags("say it (--scorer)", ["import", "distill"], known) == ["--scorer (import, distill)"]
    assert wrong_flags("say it with distkgd import --scorer S", ["distill"], known) == []
    assert wrong_flags("distkgd import x, distkgd export --scorer S", ["import"], known) == ["--scorer (export)"]
    assert wrong_flags("use --resume", [], known) == ["--resume ()"]
