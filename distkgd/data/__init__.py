"""Graphs: triples, vocabularies, readers and public data sets."""

from __future__ import annotations

import os
from pathlib import Path

from distkgd.common.paths import AnyPath
from distkgd.data.datasets.powerlaw import EXAMPLE, power_law_graph, read_power_law
from distkgd.data.datasets.public import PUBLIC, load_public
from distkgd.data.datasets.pystdlib import build as build_pystdlib
from distkgd.data.reading.folders import read_folder
from distkgd.data.reading.formats import AS_THEY_ARE, How
from distkgd.data.triples import Graph, Vocabulary
from distkgd.errors import DataError

__all__ = ["Graph", "How", "Vocabulary", "anchored", "load_graph", "power_law_graph"]


def load_graph(source: AnyPath, how: How = AS_THEY_ARE) -> Graph:
    """The graph of a folder, of a public data set (downloaded once, checked), of Python's own library, or a made one.

    source: "pystdlib" is the embedded data set, "powerlaw:…" a made graph and a name in `PUBLIC` that set, whatever
        folders lie here; a `Path`, text with a path separator, or the name of a folder that exists is a folder.
    how: of a folder, what its files do not say themselves.
    """
    source = source if isinstance(source, str) else Path(source)
    if source == "pystdlib":
        return build_pystdlib()
    if isinstance(source, str) and source.partition(":")[0] == "powerlaw":
        return read_power_law(source)
    if isinstance(source, str) and source in PUBLIC:
        return load_public(source)
    if isinstance(source, Path) or os.sep in source or (source and Path(source).exists()):
        return read_folder(source, how=how)
    raise DataError(
        f"no data set is called {source!r} and no folder of that name is here; known are: pystdlib, "
        f"{', '.join(PUBLIC)}, {EXAMPLE}; for a folder of your own give its path"
    )


def anchored(source: str) -> str:
    """What finds the data set that `load_graph` finds here from any other working directory, too."""
    if source == "pystdlib" or source.partition(":")[0] == "powerlaw":
        return source
    if source not in PUBLIC:
        return str(Path(source).resolve()) if Path(source).exists() else source
    data = os.environ.get("DISTKGD_DATA", "")
    here = Path(data, source)
    return str(here.resolve()) if data and not here.is_absolute() and here.is_dir() else source
