"""What the pages point to is there, and what two of them say is the same."""

import re

import pytest

from tests.docs.pages import PAGES, ROOT, text_of

LINKED = [*PAGES, "CONTRIBUTING.md", "CHANGELOG.md"]
NOT_YET = {"benchmarks/results/gpu.json"}  # what benchmarks/gpu.sh writes; no GPU has
RESULTS = re.compile(r"<!-- results:begin -->\n(.*?\n\n(?:\|[^\n]*\n)+)", re.DOTALL)


def anchors(page: str) -> set[str]:
    """What a link may name after `#`: titles in lower case, without punctuation, spaces as hyphens."""
    titles = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text_of(page), flags=re.M | re.S), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", LINKED)
def test_every_link_leads_somewhere(page: str) -> None:
    folder = (ROOT / page).parent
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        if not target.startswith("http"):
            path, _, anchor = target.partition("#")
            file = (folder / path).resolve() if path else ROOT / page
            assert file.exists(), f"{page} links to {target}"
            assert not anchor or anchor in anchors(str(file.relative_to(ROOT))), f"{page} links to {target}"


@pytest.mark.parametrize("page", LINKED[:-1])  # a change log names what is gone
def test_every_file_that_is_named_is_there(page: str) -> None:
    named = re.findall(r"`((?:distkgd|tests|benchmarks|configs|launch|docs)/[\w./-]+)`", text_of(page))
    assert {name for name in named if "NAME" not in name and not (ROOT / name).exists()} <= NOT_YET


def test_the_first_table_is_the_same_on_both_pages() -> None:
    first, second = (RESULTS.search(text_of(page)) for page in ("README.md", "docs/results.md"))
    assert first and second and first[1] == second[1]
