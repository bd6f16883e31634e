"""Ray with safe settings, and the files that describe a cluster."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from distkgd.errors import ConfigError
from distkgd.pipeline.ray import session as session_module
from distkgd.pipeline.ray.session import import_ray, need_token, ray_session

ROOT = Path(__file__).resolve().parent.parent.parent.parent


def test_a_local_session_has_a_token_and_no_telemetry(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE", "RAY_USAGE_STATS_ENABLED"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    with monkeypatch.context() as afresh:
        afresh.delitem(sys.modules, "ray", raising=False)
        need_token()
    import_ray()
    assert os.environ["RAY_AUTH_MODE"] == "token" and len(os.environ["RAY_AUTH_TOKEN"]) == 64
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
    assert not (tmp_path / ".ray").exists()
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_MODE", "RAY_USAGE_STATS_ENABLED"):
        os.environ.pop(name)


def test_a_ray_that_was_imported_without_the_mode_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import_ray()
    monkeypatch.delenv("RAY_AUTH_MODE")
    with pytest.raises(ConfigError, match="before anything imports ray"), ray_session("local"):
        pass
    assert "RAY_AUTH_MODE" not in os.environ


def test_a_token_that_is_there_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray/auth_token").write_text("known", encoding="utf-8")
    need_token()
    assert "RAY_AUTH_TOKEN" not in os.environ


def test_a_missing_ray_is_named_with_the_extra_that_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_name: str) -> None:
        raise ModuleNotFoundError("No module named 'ray'")

    monkeypatch.setattr(session_module, "import_module", missing)
    with pytest.raises(ConfigError, match=r"No module named 'ray'.*pip install 'distkgd\[ray\]'"), ray_session():
        pass


@contextmanager
def listening() -> Iterator[str]:
    """The address of somebody who takes connections and says nothing."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield f"127.0.0.1:{server.getsockname()[1]}"


def no_ray(monkeypatch: pytest.MonkeyPatch, init: Callable[..., None]) -> None:
    module = SimpleNamespace(is_initialized=lambda: False, init=init)
    monkeypatch.setattr(session_module, "import_module", lambda _name: module)


def test_an_address_where_nobody_listens_is_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with listening() as closed:
        pass
    monkeypatch.setenv("RAY_ADDRESS", closed)
    no_ray(monkeypatch, lambda *_: pytest.fail("Ray would have tried for minutes"))
    with pytest.raises(ConfigError, match=rf"at '{closed}' \(ConnectionRefusedError: .*\); look at"), ray_session():
        pass


def test_what_ray_says_of_a_cluster_is_told_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(address: str) -> None:
        raise RuntimeError(f"no token for {address}\nand much more")

    no_ray(monkeypatch, refuse)
    with listening() as address:
        said = rf"at '{address}' \(RuntimeError: no token for {address}\); look at .*RAY_AUTH_MODE"
        with pytest.raises(ConfigError, match=said), ray_session(address):
            pass


def test_a_cluster_that_does_not_answer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    no_ray(monkeypatch, lambda *_: time.sleep(30))
    monkeypatch.setattr(session_module, "JOIN_SECONDS", 0.2)
    said = r"\(TimeoutError: no answer within 0.2 s\)"
    with listening() as address, pytest.raises(ConfigError, match=said), ray_session(address):
        pass
    timer = signal.getitimer(signal.ITIMER_REAL)[0]
    assert timer == 0.0 or timer > 1.0  # that of whoever runs the tests goes on


def test_ray_that_does_not_start_is_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_address: str, **_options: Any) -> None:
        raise OSError("No space left on device: /dev/shm")

    no_ray(monkeypatch, full)
    with (
        pytest.raises(ConfigError, match=r"could not be started on this machine \(OSError: No space"),
        ray_session("local"),
    ):
        pass


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_a_launcher_leaves_an_address_that_says_nothing_with_one_line_and_code_2(tmp_path: Path) -> None:
    with listening() as address:
        command = [sys.executable, str(ROOT / "launch/chain.py"), str(ROOT / "configs/umls/ta_complex.yaml")]
        env = os.environ | {"PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "disabled", "COLUMNS": "400"}
        command += ["--address", address, "mlflow.enabled=false"]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 2, done.stderr
    assert f"error: no Ray cluster can be joined at '{address}'" in done.stderr and "Traceback" not in done.stderr


def test_the_example_of_a_cluster_is_one_that_ray_takes() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load((ROOT / "configs/ray/cluster.yaml").read_text(encoding="utf-8"))
    validate_config(prepare_config(config))
    types = config["available_node_types"]
    assert types["head"]["resources"] == {"CPU": 0} and types["gpu"]["resources"]["GPU"] > 0
    commands = config["head_start_ray_commands"] + config["worker_start_ray_commands"]
    assert all("RAY_AUTH_MODE=token" in command for command in commands if "ray start" in command)


def test_the_example_of_a_job_is_a_runtime_environment() -> None:
    from ray.runtime_env import RuntimeEnv

    RuntimeEnv(**yaml.safe_load((ROOT / "configs/ray/job.yaml").read_text(encoding="utf-8")))
