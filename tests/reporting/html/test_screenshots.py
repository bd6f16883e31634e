"""The page in a real browser, at the width of a desk and of a telephone: it shows something, and nothing sticks out."""

import html
import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next((path for name in BROWSERS if (path := shutil.which(name))), None)
SECONDS = 240
WIDTHS = (1280, 800, 400)
HEIGHT = 3000  # px of a frame
# The page in frames beside each other: a browser's own window cannot be made as narrow as a telephone everywhere.
FRAMES = """<!doctype html><meta charset="utf-8">
<style>body { margin: 0; display: flex } iframe { border: 0; flex: none }</style>
FRAMES<pre id="said"></pre><script>
function look(frame, width) {
  for (const one of frame.querySelectorAll("details")) one.open = width === 400;
  const scrolls = (one) => {
    for (let up = one; up && up !== frame.body; up = up.parentElement)
      if (["auto", "scroll"].includes(frame.defaultView.getComputedStyle(up).overflowX)) return true;
    return false;
  };
  const out = [...frame.body.querySelectorAll("*")]
    .filter((one) => one.getBoundingClientRect().right > width + 0.5 && !scrolls(one.parentElement))
    .map((one) => one.tagName + " " + one.textContent.slice(0, 40));
  const shown = [...frame.querySelectorAll(".chart")].filter((one) => one.getBoundingClientRect().height > 100);
  const texts = shown.flatMap((one) => [...one.querySelectorAll("span, .name, th")]).filter((one) => one.textContent);
  const boxes = texts.map((one) => one.getBoundingClientRect());
  const covered = texts.filter((one, i) => boxes.some((b, k) => k > i && !one.contains(texts[k])
    && texts[k].closest(".chart") === one.closest(".chart")
    && Math.min(b.right, boxes[i].right) - Math.max(b.left, boxes[i].left) > 4
    && Math.min(b.bottom, boxes[i].bottom) - Math.max(b.top, boxes[i].top) > 5)).map((one) => one.textContent);
  return {
    width: frame.documentElement.scrollWidth, out, covered, charts: shown.length,
    figures: frame.querySelectorAll("figure").length,
    smallest: Math.min(...boxes.map((box) => box.height)),
  };
}
addEventListener("load", () => {
  const frames = [...document.querySelectorAll("iframe")];
  document.getElementById("said").textContent =
    JSON.stringify(frames.map((one) => look(one.contentDocument, one.clientWidth)));
});
</script>
"""

pytestmark = pytest.mark.skipif(BROWSER is None, reason=f"no browser is installed: {', '.join(BROWSERS)}")


@dataclass(frozen=True)
class Seen:
    """A page as a browser without a window shows it. found: width -> what reaches how far, sticks out or is covered.

    picture: the page at those widths, beside each other.
    """

    found: dict[int, dict[str, Any]]
    picture: Path


@pytest.fixture(scope="module")
def seen(taught: Path, tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """The page of a run that has a figure of most kinds, and names that are long and without a space."""
    assert BROWSER is not None
    made = tmp_path_factory.mktemp("shots")
    shutil.copy(taught / "report.html", made)
    frames = "".join(f'<iframe width="{width}" height="{HEIGHT}" src="report.html"></iframe>' for width in WIDTHS)
    (made / "frames.html").write_text(FRAMES.replace("FRAMES", frames), encoding="utf-8")
    flags = ["--headless=new", "--disable-gpu", "--hide-scrollbars", "--force-device-scale-factor=1", "--no-first-run"]
    flags += ["--allow-file-access-from-files", "--disable-background-networking", f"--user-data-dir={made / 'home'}"]
    flags += ["--no-sandbox"] if os.geteuid() == 0 else []  # which Chromium demands of root; the page is our own
    flags += [f"--window-size={sum(WIDTHS)},{HEIGHT}", "--virtual-time-budget=2000"]
    flags += ["--dump-dom", f"--screenshot={made / 'page.png'}"]
    command = [BROWSER, *flags, (made / "frames.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=True)
    said = html.unescape(done.stdout.partition('<pre id="said">')[2].partition("</pre>")[0])
    return Seen(dict(zip(WIDTHS, json.loads(said), strict=True)), made / "page.png")


@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_sticks_out_of_the_page_and_every_figure_shows_one_chart(seen: Seen, width: int) -> None:
    found = seen.found[width]
    assert found["width"] == width and found["out"] == []
    assert found["charts"] == found["figures"] >= 8
    assert found["covered"] == []
    assert found["smallest"] >= 10  # px, the height of words in charts


@pytest.mark.parametrize("width", WIDTHS)
def test_its_picture_is_not_blank(seen: Seen, width: int) -> None:
    image = pytest.importorskip("PIL.Image", reason="Pillow, which matplotlib brings, is not installed")
    left = sum(WIDTHS[: WIDTHS.index(width)])
    with image.open(seen.picture) as picture:
        page = picture.convert("RGB").crop((left, 0, left + width, HEIGHT))
    colours = page.getcolors(1 << 20)
    paper = max(colours)[1]
    assert paper == (255, 255, 255) and len(colours) > 50
    for top in range(0, HEIGHT, 1000):  # words or charts all the way down
        assert page.convert("L").crop((0, top, width, top + 1000)).getextrema()[0] < 120
