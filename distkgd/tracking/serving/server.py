"""`mlflow models serve` as a process of its own, for tests and measurements."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

from distkgd.errors import DistkgdError

HOST = "127.0.0.1"
START_SECONDS, STOP_SECONDS, ANSWER_SECONDS = 120.0, 10.0, 60.0


class ServerError(DistkgdError):
    """An endpoint that did not start."""


@contextmanager
def serving(model_uri: str, store: str, threads: int = 0) -> Iterator[int]:
    """The port at which a registered model answers on 127.0.0.1 until the block ends.

    model_uri: such as models:/NAME@champion. store: MLflow's tracking URI. threads: of the server's torch, 0: its
    default.

    Raises ServerError, with the server's last lines, where it does not answer within two minutes.
    """
    with socket.socket() as free:
        free.bind((HOST, 0))
        port = int(free.getsockname()[1])
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", model_uri, "--env-manager", "local"]
    # The command starts `uvicorn` by its name, which lies beside this Python whether or not that is on the PATH.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    env = os.environ | {"PATH": path, "MLFLOW_TRACKING_URI": store, "MLFLOW_DISABLE_TELEMETRY": "true"}
    env |= {"OMP_NUM_THREADS": str(threads)} if threads else {}
    env.pop("DISTKGD_QUERY_BITS", None)  # speeds are of queries as they are
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        process = subprocess.Popen(
            [*command, "-p", str(port)], stdout=log, stderr=log, env=env, start_new_session=True, text=True
        )
        try:
            _wait(process, port, log, model_uri)
            yield port
        finally:
            _stop(process)


def ask(connection: http.client.HTTPConnection, questions: Sequence[Mapping[str, Any]]) -> tuple[int, Any]:
    """(HTTP status, JSON) of questions, each {"head" or "tail", "relation", "k"}, sent to an endpoint."""
    body = json.dumps({"inputs": list(questions)})
    connection.request("POST", "/invocations", body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    return response.status, json.loads(response.read())


def connect(port: int) -> http.client.HTTPConnection:
    """A connection to an endpoint, which stays open from question to question."""
    return http.client.HTTPConnection(HOST, port, timeout=ANSWER_SECONDS)


def _wait(process: "subprocess.Popen[str]", port: int, log: Any, what: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        with (
            suppress(OSError, http.client.HTTPException),
            closing(http.client.HTTPConnection(HOST, port, timeout=1.0)) as one,
        ):
            one.request("GET", "/ping")
            if one.getresponse().status == 200:
                return
        time.sleep(0.1)
    log.seek(0)
    raise ServerError(f"{what} does not answer after {START_SECONDS:.0f} s; its server said: {log.read()[-2000:]}")


def _stop(process: "subprocess.Popen[str]") -> None:
    # The whole session: the command has started another process, which may outlive it.
    for sign in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, sign)
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_SECONDS)
