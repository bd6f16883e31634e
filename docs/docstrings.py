"""Docstrings as pages of the site: doctests as code, lines `name: what it is` as a list (a griffe extension)."""

import re
from typing import Any

import griffe

ARGUMENT = re.compile(r"^(\*{0,2}\w+(?:, \*{0,2}\w+)*): ")
SENTENCE = re.compile(r"(?<=\.) (?=(?:\w+, )*\w+: )")  # several of them on one line


def page(text: str) -> str:
    """The Markdown of a docstring."""
    blocks = []
    for block in text.split("\n\n"):
        if block.startswith(">>>"):
            blocks.append(f"```pycon\n{block}\n```")
        elif ARGUMENT.match(block):
            lines = "\n".join(
                SENTENCE.sub("\n", line.strip() if ARGUMENT.match(line) else line) for line in block.split("\n")
            )
            blocks.append(
                "\n".join(
                    ARGUMENT.sub(r"- `\1`: ", line.lstrip()) if ARGUMENT.match(line.lstrip()) else line
                    for line in lines.split("\n")
                )
            )
        else:
            blocks.append(block)
    return "\n\n".join(blocks)


class Docstrings(griffe.Extension):
    """Rewrites every docstring that is read."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = page(obj.docstring.value)
