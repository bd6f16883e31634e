"""The servers of the documentation: MLflow's pages, and a registered model that answers the page's question. Slow."""

import http.client
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.docs.pages import commands
from tests.docs.sites import Site, run, surroundings

pytest.importorskip("mlflow")

SECONDS = 120.0
TEXTS = [one.text for one in commands()]
PAGES_OF_MLFLOW = [text for text in TEXTS if text.startswith("mlflow ui ")]
ENDPOINTS = [text for text in TEXTS if text.startswith("mlflow models serve ")]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@contextmanager
def standing(command: str, folder: Path, path: str) -> Iterator[int]:
    """The port at which a server answers, started by a command of the pages with `--port` behind it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    with (folder / "server.txt").open("w", encoding="utf-8") as said:
        words = [*shlex.split(command), "--port", str(port)]
        server = subprocess.Popen(
            words, cwd=folder, env=surroundings(), stdout=said, stderr=said, start_new_session=True
        )
        try:
            deadline = time.monotonic() + SECONDS
            while not answers(port, path):
                assert server.poll() is None and time.monotonic() < deadline, (folder / "server.txt").read_text()
                time.sleep(0.2)
            yield port
        finally:
            stop(server)


def stop(server: "subprocess.Popen[bytes]") -> None:
    """End a server and what it has started: its session is its own."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(server.pid, sign)
        with suppress(subprocess.TimeoutExpired):
            server.wait(20)


def answers(port: int, path: str) -> bool:
    """Whether GET is answered with 200."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    with suppress(OSError, http.client.HTTPException):
        connection.request("GET", path)
        return connection.getresponse().status == 200
    return False


@pytest.mark.parametrize("command", PAGES_OF_MLFLOW)
def test_the_pages_of_mlflow_are_served(command: str, site: Site) -> None:
    with standing(command, site.folder, "/") as port:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        body = json.dumps({"max_results": 10})
        connection.request("POST", "/api/2.0/mlflow/experiments/search", body, {"Content-Type": "application/json"})
        found = json.loads(connection.getresponse().read())
    assert "distkgd" in [one["name"] for one in found["experiments"]]


@pytest.mark.parametrize("command", ENDPOINTS)
def test_a_registered_model_is_served_and_answers(command: str, site: Site) -> None:
    questions = [text for text in TEXTS if text.startswith("curl ")]
    assert questions and shutil.which("curl")
    with standing(command, site.folder, "/ping") as port:
        for question in questions if "stdlib" in command else ():
            found = run(question.replace(":5000/", f":{port}/"), site.folder)
            assert found.code == 0, found.said
            # curl's progress stands before or after it.
            said, _ = json.JSONDecoder().raw_decode(found.said[found.said.index('{"pred') :])
            (answer,) = said["predictions"]
            assert answer["head"] == "module:json" and len(answer["names"]) == 3
