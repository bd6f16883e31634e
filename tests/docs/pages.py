"""README.md and docs/*.md as data: sections, fenced blocks, commands."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
# In the order in which their commands are run.
READING = ["tutorial", "use", "your_own_graph", "plans", "models", "cluster"]
READING += ["engine", "speed", "results", "compare", "papers", "config", "architecture", "index", "api"]
PAGES = ["README.md", *(f"docs/{name}.md" for name in READING)]
PROGRAMS = r"(?:[A-Z_]+=\S+ )*(?:distkgd|python|torchrun|make|mlflow|ray|pip|curl)"
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Command:
    """One command line. page: where it stands, such as docs/use.md. text: without its comment."""

    page: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}: {self.text}"


def text_of(page: str) -> str:
    """The page as it stands."""
    return (ROOT / page).read_text(encoding="utf-8")


EVERYTHING = "\n".join(text_of(page) for page in PAGES)


def section(page: str, title: str) -> str:
    """The text under a `## title`."""
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", text_of(page), re.MULTILINE | re.DOTALL)
    assert found, f"{page} has no section {title!r}"
    return found[1]


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of a language; "" are those that name none: output, trees, files."""
    return [body for named, body in FENCED.findall(text) if named == language]


def fenced_commands(page: str) -> Iterator[Command]:
    """The lines of the page's shell blocks."""
    for block in blocks(text_of(page), "sh"):
        for line in block.splitlines():
            if line := re.sub(r"(?:^|\s+)#(?: .*)?$", "", line).rstrip():
                yield Command(page, line)


def inline_commands(page: str) -> Iterator[Command]:
    """Whole commands between backticks in the page's sentences.

    Not those with …, which show a part of one, nor those of `distkgd`, which name a subcommand or an option of it.
    """
    for found in re.findall(rf"`({PROGRAMS} [^`…]*)`", FENCED.sub("", text_of(page))):
        if not re.match(r"(python -m )?distkgd", found):
            yield Command(page, found)


def commands() -> list[Command]:
    """Every distinct command line of all pages, where it stands first."""
    first: dict[str, Command] = {}
    for page in PAGES:
        for command in [*fenced_commands(page), *inline_commands(page)]:
            first.setdefault(command.text, command)
    return list(first.values())
