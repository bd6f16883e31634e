"""The command `distkgd`: its subcommands in one table."""

from collections.abc import Callable
from typing import Annotated

import typer

from distkgd.commands import (
    ablate,
    chain,
    configs,
    distill,
    evaluate,
    export,
    import_model,
    predict,
    register,
    report,
    update,
)
from distkgd.commands.cli import guarded
from distkgd.common.version import __version__

COMMANDS: dict[str, Callable[..., None]] = {
    "distill": distill.main,
    "predict": predict.main,
    "evaluate": evaluate.main,
    "export": export.main,
    "import": import_model.main,
    "chain": chain.main,
    "ablate": ablate.main,
    "reproduce": ablate.reproduce,
    "register": register.main,
    "report": report.main,
    "update": update.main,
    "configs": configs.main,
}


def about(
    version: Annotated[bool, typer.Option("--version", help="Say the version.")] = False,
) -> None:
    """Distil large knowledge-graph-embedding models into small ones, sharded over ranks."""
    if version:
        typer.echo(f"distkgd {__version__}")


def build_app() -> typer.Typer:
    """The command with all its subcommands."""
    app = typer.Typer(name="distkgd", pretty_exceptions_enable=False, no_args_is_help=True)
    app.callback(invoke_without_command=True)(about)
    for name, main in COMMANDS.items():
        app.command(name)(guarded(main))
    return app
