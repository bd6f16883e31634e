"""docs/config.md and the differences in docs/papers.md say what the code says."""

import re
import shutil
from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import BaseModel, Field

from distkgd.config.fields import Frozen, Positive, Share
from distkgd.methods import METHODS
from distkgd.pipeline.config import RunConfig, StageConfig
from distkgd.pipeline.sweep.config import SweepConfig
from distkgd.tracking.serving.openapi import openapi_text
from docs import make_reference
from docs.make_reference import (
    ARCHITECTURE,
    CONFIG,
    DOCS,
    OPENAPI,
    PAPERS,
    config_page,
    meanings,
    nodes,
    with_differences,
    with_files,
    write,
)

AGAIN = "make it again: python docs/make_reference.py"
ROOTS = [(RunConfig, ""), (SweepConfig, ""), *((method.Settings, name) for name, method in METHODS.items())]


def test_the_page_of_config_keys_is_what_the_types_say() -> None:
    assert (DOCS / CONFIG).read_text(encoding="utf-8") == config_page(), f"docs/{CONFIG} and the types differ; {AGAIN}"


def test_the_document_of_the_endpoint_is_what_the_code_says() -> None:
    assert (DOCS / OPENAPI).read_text(encoding="utf-8") == openapi_text(), (
        f"docs/{OPENAPI} and the code differ; {AGAIN}"
    )


def test_the_differences_are_what_the_methods_say() -> None:
    page = (DOCS / PAPERS).read_text(encoding="utf-8")
    assert page == with_differences(page), f"docs/{PAPERS} and the methods' docstrings differ; {AGAIN}"


def test_the_files_are_those_of_the_package_and_each_says_what_it_is() -> None:
    page = (DOCS / ARCHITECTURE).read_text(encoding="utf-8")
    assert page == with_files(page), f"docs/{ARCHITECTURE} and the modules' docstrings differ; {AGAIN}"
    assert make_reference.files().count("(") == make_reference.files().count(")"), (
        "a first sentence is cut in the middle"
    )
    assert [line for line in make_reference.files().splitlines() if len(line.split()) < 2] == []


def test_the_pages_are_written_where_they_belong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (PAPERS, ARCHITECTURE):
        shutil.copy(DOCS / name, tmp_path)
    before = (tmp_path / PAPERS).read_text(encoding="utf-8")
    assert [path.name for path in write(tmp_path)] == [CONFIG, PAPERS, ARCHITECTURE, OPENAPI]
    assert (tmp_path / CONFIG).read_text(encoding="utf-8") == config_page()
    monkeypatch.setattr(make_reference, "differences", lambda: "none\n")
    write(tmp_path)
    assert "\nnone\n" in (tmp_path / PAPERS).read_text(encoding="utf-8") and "\nnone\n" not in before
    (tmp_path / PAPERS).write_text("no place", encoding="utf-8")
    with pytest.raises(ValueError, match=r"papers.md needs the lines"):
        write(tmp_path)


@pytest.mark.parametrize(("root", "name"), ROOTS, ids=lambda one: getattr(one, "__name__", one))
def test_every_key_has_a_meaning(root: type[BaseModel], name: str) -> None:
    for path, kind in nodes(root, ""):
        said = meanings(kind)
        for key, field in kind.model_fields.items():
            inner = [one for one in nodes(kind, path) if one[0].rpartition(".")[2] == key]
            assert said.get(key) or inner or field.annotation is StageConfig, (
                f"{kind.__name__}: its docstring says nothing of {key}; begin a sentence with '{key}: '"
            )
            assert said.get(key) != "", f"{kind.__name__}.{key}"


def test_every_key_is_on_the_page_once_per_node() -> None:
    for root, path in ((RunConfig, ""), (SweepConfig, "")):
        for place, kind in nodes(root, path):
            (part,) = (
                part
                for part in re.split(r"^##+ ", config_page(), flags=re.MULTILINE)
                if re.match(rf"{re.escape(make_reference.TITLES.get(kind, place))}\n", part)
            )
            assert re.findall(r"^\| `(\w+)` \|", part, re.MULTILINE) == list(kind.model_fields)


def test_types_limits_defaults_and_meanings_are_read_from_a_class(monkeypatch: pytest.MonkeyPatch) -> None:
    class Inner(Frozen):
        """What is inside.

        on: it is.
        """

        on: bool = True

    class Outer(Frozen):
        """Two keys | more.

        many, few: how many. kind: of which kind, a or b; names: no key of this sentence.
            It goes on. part: a share.
        """

        many: Positive = 3
        few: Annotated[int, Field(ge=2, le=5)] = 2
        kind: Literal["a", "b"] | None = None
        part: Share
        inner: Inner = Inner()
        listed: list[int] = Field(default=[], min_length=2)

    monkeypatch.setattr(make_reference, "LONG", 7)
    page = "\n".join(make_reference._sections(Outer, "", "##"))
    assert [line for line in page.splitlines() if line.startswith("| `")] == [
        "| `many` | whole number ≥ 1 | `3` | how many |",
        "| `few` | whole number ≥ 2 and ≤ 5 | `2` | see `many` |",
        "| `kind` | `a`, `b` or `null` | `null` | of which kind, a or b; names: no key of this sentence. It goes on |",
        "| `part` | number ≥ 0 and < 1 | must be given | a share |",
        "| `inner` | [inner](#inner) | its keys' defaults | What is inside. |",
        "| `listed` | list: whole number, 2 or more | none |  |",
        "| `on` | `true` or `false` | `true` | it is |",
    ]
