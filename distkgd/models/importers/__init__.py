"""Models of other libraries as model folders of this one: `import_model` and the table IMPORTERS.

An importer is a function (path, what the user says) -> `Foreign`. A source is written LIBRARY:PATH.
"""

import os
from collections.abc import Callable
from pathlib import Path

from distkgd.common.paths import AnyPath, check_folder
from distkgd.data import Graph
from distkgd.distributed.node_sharing import on_first
from distkgd.distributed.ranks import Ranks
from distkgd.errors import ConfigError
from distkgd.models.importers.dglke import open_dglke
from distkgd.models.importers.foreign import Foreign, Given
from distkgd.models.importers.libkge import open_libkge
from distkgd.models.importers.plain import open_plain
from distkgd.models.importers.pykeen import open_pykeen
from distkgd.models.importers.rotate import open_rotate
from distkgd.models.importers.writing import write_model
from distkgd.models.model_folder import check_files, read_json

IMPORTERS: dict[str, Callable[[Path, Given], Foreign]] = {
    "pykeen": open_pykeen,
    "libkge": open_libkge,
    "rotate": open_rotate,
    "dglke": open_dglke,
    "plain": open_plain,
}

# What the user may have to say of a library's models, because its files do not.
SAID = {"plain": ("scorer", "margin", "norm", "layout"), "pykeen": ("scorer", "norm")}

__all__ = ["IMPORTERS", "Foreign", "Given", "import_model", "is_foreign", "open_foreign"]


def is_foreign(source: str) -> bool:
    """Whether `source` names a model of another library, LIBRARY:PATH."""
    return source.partition(":")[0] in IMPORTERS and ":" in source


def check_own_export(path: Path) -> None:
    """ModelError where `path`, or the folder of that file, is an export of this library whose files have changed."""
    folder = path if path.is_dir() else path.parent
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    if str(config.get("format", "")).startswith("distkgd-"):
        check_files(folder)


def open_foreign(source: str, given: Given) -> Foreign:
    """The model that LIBRARY:PATH names, nothing written yet; a DistkgdError says what is wrong with it."""
    library, _, path = source.partition(":")
    if not is_foreign(source) or not path:
        raise ConfigError(f"{source!r} names no model; write LIBRARY:PATH with a library of {', '.join(IMPORTERS)}.")
    for flag in ("scorer", "margin", "norm", "layout"):
        if getattr(given, flag) is not None and flag not in SAID.get(library, ()):
            raise ConfigError(
                f"--{flag} says nothing of a {library} model, whose files say it themselves; leave it out."
            )
    return IMPORTERS[library](Path(path), given)


def import_model(
    source: str, out: AnyPath, given: Given, ranks: Ranks, graph: Graph | None = None, data: str = ""
) -> tuple[Foreign, list[str]]:
    """Write the model that LIBRARY:PATH names as the model folder `out`; returns it and what the user should know.

    graph: whose entities and relations the rows become, in its order; None: the model's own. data: what the graph was
        loaded by.

    The first rank alone reads and writes; all call it. Raises ModelError where scores differ from the library's own.
    """
    out = Path(out)
    notes: list[str] = []

    def ready() -> None:
        if os.path.lexists(out):
            raise ConfigError(f"{out} exists; name a folder that does not exist yet, or remove this one.")
        check_folder(out, "the folder")

    def sound() -> None:
        check_own_export(Path(source.partition(":")[2]))
        notes.append(model.check())

    on_first(ranks, ready)
    model = open_foreign(source, given)
    on_first(ranks, sound)
    return model, [*notes, *write_model(model, out, ranks, graph, data)]
