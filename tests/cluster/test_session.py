"""Ray with safe settings, and the files that describe a cluster."""

import os
from pathlib import Path

import pytest
import yaml

from distkgd.cluster import session as session_module
from distkgd.cluster.session import import_ray, need_token, ray_session
from distkgd.errors import ConfigError

ROOT = Path(__file__).resolve().parent.parent.parent


def test_a_local_session_has_a_token_and_no_telemetry(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE", "RAY_USAGE_STATS_ENABLED"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    need_token()
    import_ray()
    assert os.environ["RAY_AUTH_MODE"] == "token" and len(os.environ["RAY_AUTH_TOKEN"]) == 64
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
    assert not (tmp_path / ".ray").exists()
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_MODE", "RAY_USAGE_STATS_ENABLED"):
        os.environ.pop(name)


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


def test_a_cluster_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")

    class NoRay:
        @staticmethod
        def is_initialized() -> bool:
            return False

        @staticmethod
        def init(address: str) -> None:
            raise ConnectionError(f"nobody at {address}\nand much more")

    monkeypatch.setattr(session_module, "import_module", lambda _name: NoRay)
    with (
        pytest.raises(ConfigError, match=r"at '127.0.0.1:1' \(ConnectionError: nobody at 127.0.0.1:1\)"),
        ray_session(),
    ):
        pass


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
