"""Ray, started on this machine or joined, with settings that are safe on a shared one: no telemetry, a dashboard on
127.0.0.1 or none, and a token that clients must know, for Ray's other processes listen on the node's address."""

import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from distkgd.errors import ConfigError

LOCAL = "127.0.0.1"
CONNECT_SECONDS = 10.0  # for a connection to the address
JOIN_SECONDS = 60.0  # for the cluster's answer
START_SECONDS = 180.0  # for Ray on this machine: seconds, but on a busy one
# Each one waits 40 s for an answer, deaf to signals, and Ray swallows what a handler raises between two of them.
TRIES, TRIES_TO_JOIN = "RAY_gcs_server_port_wait_time_s", "1"
STORE_BYTES = 256 << 20  # of a local session's object store: tables travel as files, not as objects


@dataclass(frozen=True)
class Session:
    """A connection to Ray. ray: the module. local: whether this process has started it and will end it."""

    ray: Any
    local: bool


def import_ray() -> Any:
    """The module, without telemetry; ConfigError where it is not installed."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # the coming behaviour, and no warning about it
    try:
        return import_module("ray")
    except ImportError as error:
        raise ConfigError(f"Ray cannot be imported ({error}); pip install 'distkgd[ray]'") from None


@contextmanager
def ray_session(
    address: str | None = None,
    *,
    num_cpus: int | None = None,
    num_gpus: int | None = None,
    dashboard: bool = False,
    quiet: bool = False,
) -> Iterator[Session]:
    """Join the cluster at `address`, or at RAY_ADDRESS (a Ray job has it), or else start Ray on this machine.

    Where this process is connected already, that connection is used and left open. `address` "auto" is the cluster
    that runs on this machine, "local" never joins one. num_cpus, num_gpus (default: what the machine has) and
    dashboard are of a local session. quiet: nothing of what workers print comes here. Raises ConfigError when the
    cluster cannot be joined.
    """
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    if address == "local":
        need_token()  # before Ray is imported, which reads it then
    ray = import_ray()
    if ray.is_initialized():
        yield Session(ray, local=False)
        return
    told: dict[str, Any] = {"log_to_driver": False, "logging_level": "warning"} if quiet else {}
    if address == "local":
        told |= {"num_cpus": num_cpus or len(os.sched_getaffinity(0)), "num_gpus": num_gpus}
        told |= {"include_dashboard": dashboard, "dashboard_host": LOCAL, "object_store_memory": STORE_BYTES}
        _start(ray, told)
    else:
        _join(ray, address, told)
    try:
        yield Session(ray, local=address == "local")
    finally:
        ray.shutdown()


def need_token() -> None:
    """Token authentication for a session of this process and its children, unless RAY_AUTH_MODE says otherwise.

    The token is in their environment; without it Ray leaves one in ~/.ray. Raises ConfigError when Ray was imported
    before the mode was set: it reads that then, and would not be let in by the processes it starts.
    """
    if "ray" in sys.modules and "RAY_AUTH_MODE" not in os.environ:
        raise ConfigError(
            "Ray was imported before distkgd could ask for its token; set RAY_AUTH_MODE=token (or =disabled, to go "
            "without) in the environment before anything imports ray."
        )
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    given = any(os.environ.get(name) for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"))
    if not given and not (Path.home() / ".ray" / "auth_token").exists():
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def _start(ray: Any, options: dict[str, Any]) -> None:
    """Ray on this machine; ConfigError where it does not come up."""
    try:
        with at_most(START_SECONDS):
            ray.init("local", **options)
    except Exception as error:  # whatever it is, Ray is not there
        raise ConfigError(
            f"Ray could not be started on this machine ({_first_line(error)}); look at its logs below /tmp/ray, at the "
            "room in /tmp and /dev/shm, and at processes of an earlier session, or join a cluster with --address"
        ) from error


def _join(ray: Any, address: str, options: dict[str, Any]) -> None:
    """The cluster at an address; ConfigError where there is none, or one that does not answer in time."""
    given = os.environ.get(TRIES)
    os.environ[TRIES] = given or TRIES_TO_JOIN
    try:
        reach(address)
        with at_most(JOIN_SECONDS):
            ray.init(address, **options)
    except Exception as error:  # whatever it is, there is no cluster to work on
        raise ConfigError(
            f"no Ray cluster can be joined at {address!r} ({_first_line(error)}); look at the address, at "
            "RAY_AUTH_MODE (token on both sides, or on neither) and the token, or leave the address out to start "
            "Ray on this machine"
        ) from error
    finally:
        if given is None:  # it also says how long a session of our own may take to start
            del os.environ[TRIES]


def reach(address: str) -> None:
    """OSError unless somebody listens at HOST:PORT within seconds; Ray itself would try for minutes, in silence."""
    host, _, port = address.rpartition("://")[2].partition("/")[0].rpartition(":")
    if host and port.isdigit():  # else it is "auto", or something that Ray will refuse
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """TimeoutError in a block that takes longer; only the main thread can be interrupted so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def late(_number: int, _frame: object) -> None:
        raise TimeoutError(f"no answer within {seconds:g} s")

    began, handler = time.monotonic(), signal.signal(signal.SIGALRM, late)
    left, every = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - began), 0.001) if left else 0.0, every)
        signal.signal(signal.SIGALRM, handler)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
