"""Pages as a person sees them: headless Chromium, told what to do through its DevTools protocol."""

import asyncio
import base64
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SECONDS = 90.0
TEXT = "document.body ? document.body.innerText : ''"


class Browser:
    """A browser with one page."""

    def __init__(self, port: int, runner: asyncio.Runner) -> None:
        self._port = port
        self._runner = runner
        self._number = 0

    def show(self, url: str, words: list[str], picture: Path, *, ready: str = "true", first: str = "") -> str:
        """The text of a page once it has all `words` and the script `ready` is true; and a picture of it then.

        first: a script that is run again and again until then, such as a click. Raises AssertionError after SECONDS.
        """
        return self._runner.run(self._show(url, words, picture, ready, first))

    async def _show(self, url: str, words: list[str], picture: Path, ready: str, first: str) -> str:
        async with aiohttp.ClientSession() as session:
            async with session.put(f"http://127.0.0.1:{self._port}/json/new?about:blank") as answer:
                page = await answer.json(content_type=None)
            async with session.ws_connect(page["webSocketDebuggerUrl"], max_msg_size=1 << 26) as socket:
                await self._call(socket, "Page.enable")
                await self._call(socket, "Page.navigate", url=url)
                text, deadline = "", time.monotonic() + SECONDS
                while True:
                    if first:
                        await self._evaluate(socket, first)
                    text = str(await self._evaluate(socket, TEXT))
                    there = all(word in text for word in words)
                    if there and await self._evaluate(socket, ready):
                        break
                    if time.monotonic() > deadline:
                        await self._picture(socket, picture)
                        missing = [word for word in words if word not in text]
                        raise AssertionError(f"{url}, see {picture}: no {missing or ready} in:\n{text}")
                    await asyncio.sleep(0.5)
                await asyncio.sleep(1.0)  # for what fades in
                await self._picture(socket, picture)
            await (await session.get(f"http://127.0.0.1:{self._port}/json/close/{page['id']}")).read()
        return text

    async def _picture(self, socket: Any, path: Path) -> None:
        found = await self._call(socket, "Page.captureScreenshot", format="png")
        path.write_bytes(base64.b64decode(found["data"]))

    async def _evaluate(self, socket: Any, script: str) -> Any:
        found = await self._call(socket, "Runtime.evaluate", expression=script, returnByValue=True)
        return found["result"].get("value")

    async def _call(self, socket: Any, method: str, **params: Any) -> Any:
        self._number += 1
        await socket.send_json({"id": self._number, "method": method, "params": params})
        while True:
            message = json.loads((await socket.receive(SECONDS)).data)
            if message.get("id") == self._number:
                assert "error" not in message, message
                return message["result"]


@contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    """A running browser whose profile is in `folder`."""
    assert CHROMIUM is not None
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run"]
    options += [f"--user-data-dir={folder}", "--remote-debugging-port=0"]
    options += ["--window-size=1600,3200"]  # charts are drawn when they are in sight
    process = subprocess.Popen([CHROMIUM, *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline, told = time.monotonic() + SECONDS, folder / "DevToolsActivePort"
        while not (told.exists() and told.read_text(encoding="utf-8").count(os.linesep)):
            assert process.poll() is None and time.monotonic() < deadline, "Chromium did not start"
            time.sleep(0.1)
        with asyncio.Runner() as runner:
            yield Browser(int(told.read_text(encoding="utf-8").splitlines()[0]), runner)
    finally:
        process.terminate()
        process.wait(30)
