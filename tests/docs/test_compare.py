"""docs/compare.md: each yes of ours names a test that there is."""

import re

from tests.docs.pages import ROOT, blocks, section

PAGE, TITLE = "docs/compare.md", "What distkgd has"


def rows(title: str) -> list[list[str]]:
    """The cells of a section's table, without its two lines of head."""
    lines = [line for line in section(PAGE, title).splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_every_yes_names_a_test_function_that_exists() -> None:
    assert len(rows(TITLE)) > 20 and not blocks(section(PAGE, TITLE), "sh")
    for feature, ours, *_ in rows(TITLE):
        (named,) = re.findall(r"`(tests/[\w/]+\.py::test_\w+)`", ours)
        path, _, name = named.partition("::")
        assert re.search(rf"^def {name}\(", (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE), (feature, named)


def test_what_we_lack_is_no_yes() -> None:
    assert len(rows("What others have")) > 10
    assert not [row for row in rows("What others have") if row[1].startswith("yes")]


def test_counts_of_ours_are_those_of_the_code() -> None:
    from distkgd.data.datasets.public import PUBLIC
    from distkgd.methods import METHODS
    from distkgd.models.export import FORMATS
    from distkgd.scorers import SCORERS

    text = (ROOT / PAGE).read_text(encoding="utf-8")
    assert f"| scoring functions | {len(SCORERS)}, " in text and f"| built-in data sets | {len(PUBLIC)} |" in text
    named = re.search(r"\| distillation \| yes, `([a-z ]+)`", text)
    assert named and set(named[1].split()) == {name for name, kind in METHODS.items() if name != "scratch"}
    (export,) = [row[1] for row in rows(TITLE) if row[0] == "export"]
    assert len(export.split(":")[0].split(",")) == len(FORMATS)
