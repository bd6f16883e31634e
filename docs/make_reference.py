"""What says what the code says: docs/config.md, differences in docs/papers.md, files in docs/architecture.md, and
docs/openapi.json.

    python docs/make_reference.py            # writes them; a test fails while they differ from the code

A key's type, default and allowed values are its annotation's; what it means is said in its class's docstring, after
`key:` or `key, other key:` at the beginning of a sentence.
"""

import ast
import inspect
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from distkgd.config.fields import LARGEST, meanings
from distkgd.methods import METHODS
from distkgd.pipeline.config import RunConfig, StageConfig
from distkgd.pipeline.sweep.config import Domain, SweepConfig
from distkgd.scorers import SCORERS
from distkgd.tracking.serving.openapi import openapi_text

DOCS = Path(__file__).resolve().parent.parent / "docs"
CONFIG, PAPERS, ARCHITECTURE, OPENAPI = "config.md", "papers.md", "architecture.md", "openapi.json"
STAGE = "STAGE"  # stands for teacher, teachers.NAME, student and baseline
TITLES: Mapping[type[BaseModel], str] = {
    RunConfig: "The run",
    StageConfig: f"{STAGE}: teacher, teachers.NAME, student, baseline",
    SweepConfig: "The sweep",
    Domain: "space.KEY",
}
SPECIAL: Mapping[tuple[type[BaseModel], str], str] = {
    (StageConfig, "method"): ", ".join(f"`{name}`" for name in METHODS),
    (StageConfig, "scorer"): ", ".join(f"`{name}`" for name in SCORERS),
    (StageConfig, "distill"): "mapping: [its method's](#options-of-the-methods)",
}
WORDS: Mapping[Any, str] = {
    bool: "`true` or `false`",
    int: "whole number",
    float: "number",
    str: "text",
    NoneType: "`null`",
    Any: "anything",
    ...: "…",
}
LONG = 100  # characters
HEAD = """# Every config key

Made of the types in the code by `python docs/make_reference.py`; a test fails when the two differ. A config is YAML,
`a.b=c` at the command line goes over it, unknown keys are refused. A key that is left out has its default; `plan.yaml`
in the run folder holds all of them, resolved. How they work together: [Plans](plans.md), [Models](models.md).
"""
OPTIONS = "Options of the methods\n\nA stage's `distill` holds the options of its `method`; `scratch` has none.\n"
SWEEP = "A sweep's file\n\nFor `distkgd ablate`: [Sweeps](cluster.md#sweeps). Its trials are plans with these keys.\n"


def write(folder: Path = DOCS) -> list[Path]:
    """Make the pages anew."""
    (folder / CONFIG).write_text(config_page(), encoding="utf-8")
    (folder / OPENAPI).write_text(openapi_text(), encoding="utf-8")
    for name, made in ((PAPERS, with_differences), (ARCHITECTURE, with_files)):
        page = folder / name
        page.write_text(made(page.read_text(encoding="utf-8")), encoding="utf-8")
    return [folder / name for name in (CONFIG, PAPERS, ARCHITECTURE, OPENAPI)]


# -- config ---------------------------------------------------------------------------------------------------------


def config_page() -> str:
    """docs/config.md."""
    parts = [HEAD, *_sections(RunConfig, "", "##"), f"## {OPTIONS}"]
    for name, method in METHODS.items():
        parts += _sections(method.Settings, "distill", "###", f" of {name}") if method.Settings.model_fields else ()
    parts += [f"## {SWEEP}", *_sections(SweepConfig, "", "###")]
    return "\n".join(parts)


def nodes(kind: type[BaseModel], path: str) -> Iterator[tuple[str, type[BaseModel]]]:
    """(path, class) of a node and of all nodes below it; a stage's once."""
    yield path, kind
    seen = set()
    for key, field in kind.model_fields.items():
        for below in _classes(field.annotation):
            place = STAGE if below is StageConfig else f"{path}.{key}".lstrip(".")
            place += ".KEY" if place == "space" else ""
            if place not in seen:
                seen.add(place)
                yield from nodes(below, place)


def _sections(root: type[BaseModel], path: str, sign: str, owner: str = "") -> Iterator[str]:
    """One for each node; `owner` goes behind the title."""
    for place, kind in nodes(root, path):
        said = meanings(kind)
        lines = [f"{sign} {TITLES.get(kind, place + owner)}\n", f"{said[''].strip()}\n"]
        lines += ["| key | is | default | means |", "|---|---|---|---|"]
        told: dict[str, str] = {}
        for key, field in kind.model_fields.items():
            below = f"{place}.{key}".lstrip(".") + owner
            means = said.get(key) or next((meanings(one)[""] for one in _classes(field.annotation)), "").strip()
            first = told.setdefault(means, key)  # keys that share a long text have it once
            means = f"see `{first}`" if first != key and len(means) > LONG else means
            is_ = SPECIAL.get((kind, key)) or _allowed(field.annotation, field.metadata, below)
            cells = [f"`{key}`", is_, _default(field.get_default(call_default_factory=True)), means]
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        yield "\n".join(lines) + "\n"


def _allowed(kind: Any, limits: Sequence[Any], below: str) -> str:
    """What an annotation with its limits lets through, in words; `below`: the title of a node's own section."""
    if get_origin(kind) is Annotated:
        return _allowed(get_args(kind)[0], get_args(kind)[1:], below)
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        below = TITLES.get(kind, below)
        anchor = re.sub(r"[^\w\- ]", "", below.lower()).replace(" ", "-")  # as GitHub makes it
        return f"[{below.partition(':')[0]}](#{anchor})"
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    inner = [_allowed(one, (), below) for one in arguments]
    if origin in (Union, UnionType):
        return " or ".join(inner)
    words = f"mapping: {' → '.join(inner)}" if origin is dict else f"list: {', '.join(inner)}"
    return (WORDS[kind] if origin is None else words) + _limits(limits)


def _limits(metadata: Sequence[Any]) -> str:
    """Of annotations such as Ge(1), also within a Field."""
    flat = [limit for one in metadata for limit in getattr(one, "metadata", [one])]
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    told = [f"{sign} {getattr(one, key):g}" for key, sign in signs.items() for one in flat if hasattr(one, key)]
    told = [limit for limit in told if limit != f"≤ {LARGEST:g}"]
    least = [f", {one.min_length} or more" for one in flat if hasattr(one, "min_length")]
    return (f" {' and '.join(told)}" if told else "") + "".join(least)


def _default(value: Any) -> str:
    if value is PydanticUndefined:
        return "must be given"
    if isinstance(value, BaseModel):
        return "its keys' defaults"
    if value is None or isinstance(value, bool):
        return f"`{json.dumps(value)}`"
    return "none" if value in ("", {}, []) else f"`{list(value) if isinstance(value, tuple) else value}`"


def _classes(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _classes(inner)


# -- differences ----------------------------------------------------------------------------------------------------


def with_differences(page: str) -> str:
    """docs/papers.md with what the methods and scorers say of the papers and the authors' code now."""
    made = "What each file says of itself at its top, by `python docs/make_reference.py`.\n"
    return _filled(page, PAPERS, "differences", f"{made}\n{differences()}")


def _filled(page: str, name: str, what: str, made: str) -> str:
    """`page` with `made` between the lines that say where it belongs; ValueError where they are missing."""
    first, last = f"<!-- {what}:begin -->", f"<!-- {what}:end -->"
    before, begin, rest = page.partition(first)
    _, end, after = rest.partition(last)
    if not (begin and end):
        raise ValueError(f"{name} needs the lines {first} and {last}; the {what} go between them")
    return f"{before}{begin}\n{made}{end}{after}"


def differences() -> str:
    """A paragraph for each method, and for each scorer that differs from what was published."""
    told = [(f"distkgd/methods/{name}.py", inspect.getmodule(method)) for name, method in METHODS.items()]
    kinds = dict.fromkeys(kind for scorer in SCORERS.values() for kind in scorer.__mro__)
    text = [f"### `{path}`\n\n{inspect.getdoc(module)}\n" for path, module in told]
    for kind in kinds:
        doc = inspect.cleandoc(kind.__doc__ or "")
        if "Differs from" in doc:
            text.append(f"### `{kind.__module__.replace('.', '/')}.py`, {kind.__name__}\n\n{doc}\n")
    return "\n".join(text)


# -- files ----------------------------------------------------------------------------------------------------------


def with_files(page: str) -> str:
    """docs/architecture.md with the package's files and what each says of itself."""
    return _filled(page, ARCHITECTURE, "files", f"\n```\n{files()}```\n\n")


def files() -> str:
    """A line for each module, with the first sentence of its docstring; those of a folder below that of its package."""
    package = DOCS.parent / "distkgd"
    lines = []
    for path in sorted(package.rglob("*.py"), key=lambda path: (path.parent, path.name)):
        said = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("\n\n")[0]
        told = re.split(r"[.;](?:\s|$)", " ".join(said.split()))[0]
        place = path.relative_to(package.parent)
        is_folder = path.name == "__init__.py"
        name = f"{place.parent}/" if is_folder else f"  {place.name}"
        lines.append(f"{name:<32} {told}".rstrip() + "\n")
    return "".join(lines)


if __name__ == "__main__":
    sys.stdout.writelines(f"written: {path}\n" for path in write())
