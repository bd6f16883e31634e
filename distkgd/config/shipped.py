"""The configs that come with the package: found from any folder by their names."""

import os
from pathlib import Path

from distkgd.common.paths import AnyPath

PACKAGE = Path(__file__).resolve().parent.parent
DEFAULT = "default"  # the demo


def folder() -> Path:
    """Where they lie: DISTKGD_CONFIGS; inside of an installed package; beside it in a checkout."""
    places = [Path(os.environ["DISTKGD_CONFIGS"])] if os.environ.get("DISTKGD_CONFIGS") else []
    places += [PACKAGE / "configs", PACKAGE.parent / "configs"]
    return next((place for place in places if place.is_dir()), places[0])


def shipped() -> dict[str, Path]:
    """Name, such as wn18rr/dualde_complex -> file; in the order of their names."""
    base = folder()
    return {path.relative_to(base).with_suffix("").as_posix(): path for path in sorted(base.rglob("*.yaml"))}


def find_config(path: AnyPath) -> Path:
    """`path` if it is there, else the shipped config that it names; configs/ before and .yaml behind may be left out.

    `path` itself where there is neither.
    """
    path = Path(path)
    if os.path.lexists(path) or path.is_absolute():
        return path
    name = path.as_posix().removeprefix("configs/").removesuffix(".yaml")
    return shipped().get(name, path)


def about(path: Path) -> str:
    """The first sentence of the comment at the top of a config, "" where there is none."""
    lines = path.read_text(encoding="utf-8").splitlines()
    end = next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))
    text = " ".join(line.lstrip("# ") for line in lines[:end])
    return text.partition(". ")[0].rstrip(".")
