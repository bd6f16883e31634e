"""The page in a real browser, at the width of a desk and of a telephone: it shows something, and nothing sticks out."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.reporting.html.pages import TAUGHT, ran

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next((path for name in BROWSERS if (path := shutil.which(name))), None)
SECONDS = 90
# The page in a frame as wide as a telephone: a browser's own window cannot be made so narrow everywhere.
FRAME = """<!doctype html><meta charset="utf-8">
<style>body {{ margin: 0 }} iframe {{ border: 0; display: block }}</style>
<iframe id="page" width="{width}" height="{height}" src="report.html"></iframe>
<pre id="said"></pre><script>
addEventListener("load", () => {{
  const frame = document.getElementById("page").contentDocument, root = frame.documentElement;
  for (const one of frame.querySelectorAll("details")) one.open = {opened};
  const scrolls = (one) => {{
    for (let up = one; up && up !== frame.body; up = up.parentElement)
      if (["auto", "scroll"].includes(frame.defaultView.getComputedStyle(up).overflowX)) return true;
    return false;
  }};
  const out = [...frame.body.querySelectorAll("*")]
    .filter((one) => one.getBoundingClientRect().right > {width} + 0.5 && !scrolls(one.parentElement))
    .map((one) => one.tagName + " " + one.textContent.slice(0, 40));
  const shown = [...frame.querySelectorAll("svg")].filter((one) => one.getBoundingClientRect().width > 0);
  const texts = shown.flatMap((one) => [...one.querySelectorAll("text")]);
  const boxes = texts.map((one) => one.getBoundingClientRect());
  const covered = texts.filter((one, i) => boxes.some((b, k) => k > i && texts[k].closest("svg") === one.closest("svg")
    && Math.min(b.right, boxes[i].right) - Math.max(b.left, boxes[i].left) > 4
    && Math.min(b.bottom, boxes[i].bottom) - Math.max(b.top, boxes[i].top) > 5)).map((one) => one.textContent);
  document.getElementById("said").textContent = JSON.stringify({{
    width: root.scrollWidth, height: root.scrollHeight, out, covered, charts: shown.length,
    figures: frame.querySelectorAll("figure").length,
    smallest: Math.min(...boxes.map((box) => box.height)),
  }});
}});
</script>
"""

pytestmark = pytest.mark.skipif(BROWSER is None, reason=f"no browser is installed: {', '.join(BROWSERS)}")


def browse(page: Path, home: Path, *arguments: str) -> str:
    """What a browser without a window writes to its standard output."""
    assert BROWSER is not None
    flags = ["--headless=new", "--disable-gpu", "--hide-scrollbars", "--force-device-scale-factor=1", "--no-first-run"]
    flags += ["--allow-file-access-from-files", "--disable-background-networking", f"--user-data-dir={home}"]
    flags += ["--no-sandbox"] if os.geteuid() == 0 else []  # which Chromium demands of root; the page is our own
    command = [BROWSER, *flags, "--virtual-time-budget=2000", *arguments, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=True)
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose page has a figure of most kinds, and names that are long and without a space."""
    made = tmp_path_factory.mktemp("shots") / "run"
    ran(made, TAUGHT)
    return made


def seen(folder: Path, home: Path, width: int, opened: bool = False) -> dict[str, object]:
    """What a browser finds in the page at some width: how far it reaches, and what sticks out or is covered."""
    frame = folder / f"frame-{width}-{opened}.html"
    frame.write_text(FRAME.format(width=width, height=900, opened=str(opened).lower()), encoding="utf-8")
    dom = browse(frame, home, "--dump-dom", f"--window-size={max(width, 600)},900")
    said = dom.partition('<pre id="said">')[2].partition("</pre>")[0]
    found: dict[str, object] = json.loads(said.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    return found


@pytest.mark.parametrize("width", [1280, 800, 400])
def test_nothing_sticks_out_of_the_page_and_every_figure_shows_one_chart(
    folder: Path, tmp_path: Path, width: int
) -> None:
    found = seen(folder, tmp_path, width, opened=width == 400)
    assert found["width"] == width and found["out"] == []
    assert found["charts"] == found["figures"] and int(str(found["figures"])) >= 8
    assert found["covered"] == []
    assert float(str(found["smallest"])) >= 10  # px, the height of words in charts


@pytest.mark.parametrize("width", [1280, 400])
def test_its_picture_is_not_blank(folder: Path, tmp_path: Path, width: int) -> None:
    image = pytest.importorskip("PIL.Image", reason="Pillow, which matplotlib brings, is not installed")
    frame = folder / f"picture-{width}.html"
    frame.write_text(FRAME.format(width=width, height=3000, opened="false"), encoding="utf-8")
    browse(frame, tmp_path, f"--screenshot={tmp_path / 'page.png'}", f"--window-size={max(width, 600)},3000")
    with image.open(tmp_path / "page.png") as picture:
        grey = picture.convert("L").crop((0, 0, width, 3000))
        colours = picture.convert("RGB").crop((0, 0, width, 3000)).getcolors(1 << 20)
    paper = max(colours)[1]
    assert paper == (255, 255, 255) and len(colours) > 50
    for top in range(0, 3000, 1000):  # words or charts all the way down
        assert grey.crop((0, top, width, top + 1000)).getextrema()[0] < 120
