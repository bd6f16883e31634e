"""Small finished runs, and their pages as a reader of HTML sees them."""

import json
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import polars as pl

from distkgd.common.console import Display
from distkgd.config.tree import merge
from distkgd.data import Graph, Vocabulary
from distkgd.distributed.ranks import Ranks
from distkgd.pipeline.config import parse_config
from distkgd.pipeline.plan import run_plan
from tests.toys import toy_graph

STAGE: dict[str, Any] = {"batch_size": 100, "epochs": 3, "validate_every": 1, "optimizer": {"lr": 0.3}}
TAUGHT: dict[str, Any] = {
    "name": "a <run> & more",
    "teacher": {**STAGE, "dim": 12, "epochs": 12},
    "student": {**STAGE, "dim": 6, "method": "dualde", "distill": {"stage_two": {"start": 3, "epochs": 2}}},
    "baseline": True,
}
VOID = {"meta", "path", "br"}


def nasty_graph() -> Graph:
    """A toy graph whose names would be markup if they were not escaped."""
    graph = toy_graph()
    entities = pl.Series([f"<script>alert({i})</script>" for i in range(graph.num_entities)])
    relations = pl.Series([f'r{i} "&amp;" <b>' for i in range(graph.num_relations)])
    return Graph(
        "toy", graph.train, graph.valid, graph.test, Vocabulary(entities), Vocabulary(relations), graph.sha256, ()
    )


def ran(folder: Path, tree: dict[str, Any], graph: Graph | None = None, resume: bool = False) -> dict[str, Any]:
    """Run a plan on one rank; returns report.json as it is on disk."""
    config = parse_config(merge({"mlflow": {"enabled": False}}, tree), "test")
    run_plan(config, graph or nasty_graph(), Ranks(), folder, resume=resume, display=Display(False))
    report: dict[str, Any] = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    return report


@dataclass
class Node:
    """An element: its tag, attributes and children, which are elements or texts."""

    tag: str
    attributes: dict[str, str]
    children: list["Node | str"] = field(default_factory=list)

    @property
    def text(self) -> str:
        """All words in it, spaces made one."""
        parts = [child if isinstance(child, str) else child.text for child in self.children]
        return " ".join(" ".join(parts).split())

    def find(self, tag: str, **attributes: str) -> list["Node"]:
        """All elements of a tag within, whose attributes are as given (class_: one of its classes)."""
        wanted = {key.rstrip("_"): value for key, value in attributes.items()}
        found = []
        for child in self.children:
            if isinstance(child, str):
                continue
            if child.tag == tag and all(
                value in child.attributes.get(key, "").split() if key == "class" else child.attributes.get(key) == value
                for key, value in wanted.items()
            ):
                found.append(child)
            found += child.find(tag, **attributes)
        return found


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open = [Node("", {})]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        node = Node(tag, {key: value or "" for key, value in attrs})
        self.open[-1].children.append(node)
        if tag not in VOID:
            self.open.append(node)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open[-1].children.append(Node(tag, {key: value or "" for key, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        if tag in VOID and self.open[-1].tag != tag:
            return
        assert self.open[-1].tag == tag, f"</{tag}> closes <{self.open[-1].tag}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.open[-1].children.append(data)


def read(page: str) -> Node:
    """The page; AssertionError where an element is not closed as it was opened."""
    reader = _Reader()
    reader.feed(page)
    reader.close()
    assert len(reader.open) == 1, f"<{reader.open[-1].tag}> is not closed"
    return reader.open[0]


def cells(table: Node) -> list[list[str]]:
    """The words of a table's body."""
    (body,) = table.find("tbody")
    rows = body.find("tr")
    return [[c.text for c in row.children if isinstance(c, Node)] for row in rows]
