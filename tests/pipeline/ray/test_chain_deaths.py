"""Chains whose coordinator, node or launcher is killed, and chains of real graphs beside torchrun. Slow."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import pytest

from distkgd.config.tree import merge
from distkgd.pipeline.ray.session import need_token, ray_session
from tests.launches import ROOT, finish, kill_all, small_data, wait_for
from tests.pipeline.ray.clusters import CHAIN, Background, actor_process, attempts, chained, kill, shipped
from tests.programs import Program, started

LONG = {"epochs": 200, "validate_every": 10, "checkpoint_every": 5}
SECONDS = 300.0

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # a minute each, on two idle cores


@pytest.fixture
def tree(tmp_path: Path) -> dict[str, Any]:
    stages = {"teacher": LONG, "student": LONG, "chain": {"dims": [16, 8]}, "baseline": False}
    return merge(CHAIN | {"data": str(small_data(tmp_path / "data"))}, stages)


@pytest.fixture
def two_slots() -> Iterator[None]:
    with ray_session("local", num_cpus=2):
        yield


def same_figures(one: dict[str, Any], other: dict[str, Any], tolerance: float) -> None:
    for mine, theirs in zip(one["stages"], other["stages"], strict=True):
        assert mine["name"] == theirs["name"]
        for split in ("valid", "test"):
            assert mine[split] == pytest.approx(theirs[split], abs=tolerance), (mine["name"], split)


def script(name: str, arguments: list[str | Path], cwd: Path, **variables: str) -> Program:
    """A launcher, running; its output is in output.txt."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "NO_COLOR": "1", "COLUMNS": "110"} | variables
    command = [str(ROOT / "launch" / name), *map(str, arguments)]
    return started(command, cwd, env, cwd / "output.txt")


# -- deaths -------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("two_slots")
def test_a_worker_killed_in_every_stage_changes_no_figure_and_repeats_nothing_finished(
    tree: dict[str, Any], tmp_path: Path
) -> None:
    tree = merge(tree, {"baseline": LONG})
    chain = Background(tree, tmp_path / "run", workers=2)
    for number, stage in enumerate(("teacher", "student", "direct")):
        kill(chain.at_work(stage)["pids"][number % 2])
    report = chain.report()
    assert attempts(report) == {name: ["died", "done"] for name in ("teacher", "student", "direct")}
    same_figures(report, chained(tree, tmp_path / "whole", workers=2), 1e-6)


@pytest.mark.usefixtures("two_slots")
@pytest.mark.parametrize("stage", ["teacher", "student"])
def test_a_coordinator_that_is_killed_is_started_again_and_repeats_nothing_finished(
    stage: str, tree: dict[str, Any], tmp_path: Path
) -> None:
    chain = Background(tree, tmp_path / "run", workers=2)
    pids = chain.at_work(stage)["pids"]
    kill(actor_process("coordinator").pid)
    report = chain.report()
    found = attempts(report)
    assert found == {name: ["lost with its coordinator", "done"] if name == stage else ["done"] for name in found}
    assert not any(psutil.pid_exists(pid) for pid in pids)
    same_figures(report, chained(tree, tmp_path / "whole", workers=2), 1e-6)


def test_a_node_that_is_killed_leaves_a_smaller_gang(tree: dict[str, Any], tmp_path: Path) -> None:
    need_token()
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    node = cluster.add_node(num_cpus=1)
    try:
        ray.init(cluster.address)
        tree = merge(tree, {"teacher": {"epochs": 5 * LONG["epochs"]}})  # workers may outlive their raylet for seconds
        chain = Background(tree, tmp_path / "run", workers=2, wait=5.0)
        assert chain.at_work("teacher")["world"] == 2
        kill(node.all_processes["raylet"][0].process.pid)
        report = chain.report()
        whole = chained(tree, tmp_path / "whole", workers=1)
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert attempts(report) == {"teacher": ["died", "done"], "student": ["done"]}
    assert [event["world"] for event in report["timeline"]] == [2, 1, 1]
    assert report["world"] == 1
    for mine, theirs in zip(report["stages"], whole["stages"], strict=True):
        assert mine["valid"]["mrr"] == pytest.approx(theirs["valid"]["mrr"], abs=0.005)


def chain_file(tree: dict[str, Any], tmp_path: Path) -> Path:
    import yaml

    path = tmp_path / "chain.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


def in_student(run: Path) -> bool:
    return bool(list((run / "stages/student/checkpoint").glob("step_*")))


def test_a_launcher_that_is_killed_leaves_a_run_that_resume_goes_on_with(tree: dict[str, Any], tmp_path: Path) -> None:
    arguments: list[str | Path] = [chain_file(tree, tmp_path), "--out", tmp_path / "run", "--workers", "2"]
    launcher = script("chain.py", arguments, tmp_path)
    wait_for(launcher, tmp_path, lambda: in_student(tmp_path / "run"))
    kill_all(launcher)
    code, said = finish(script("chain.py", [*arguments, "--resume"], tmp_path), tmp_path, SECONDS)
    assert code == 0, said
    report = json.loads((tmp_path / "run/report.json").read_text(encoding="utf-8"))
    assert attempts(report) == {"teacher": ["done"], "student": ["lost with its coordinator", "done"]}
    assert "teacher: finished before" in said and "student: resumed at step" in said


def test_ctrl_c_saves_every_stage_and_ends_with_its_number(tree: dict[str, Any], tmp_path: Path) -> None:
    arguments: list[str | Path] = [chain_file(tree, tmp_path), "--out", tmp_path / "run", "--workers", "2"]
    launcher = script("chain.py", arguments, tmp_path)
    wait_for(launcher, tmp_path, lambda: in_student(tmp_path / "run"))
    launcher.send_signal(signal.SIGINT)
    code, said = finish(launcher, tmp_path, SECONDS)
    assert code == 128 + signal.SIGINT, said
    assert "add --resume to the same command" in said
    code, said = finish(script("chain.py", [*arguments, "--resume"], tmp_path), tmp_path, SECONDS)
    assert code == 0, said
    report = json.loads((tmp_path / "run/report.json").read_text(encoding="utf-8"))
    assert attempts(report) == {"teacher": ["done"], "student": ["stopped", "done"]}


# -- MLflow -------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("two_slots")
def test_runs_keep_their_ids_through_a_death_and_stages_at_once_share_a_file(
    tree: dict[str, Any], tmp_path: Path
) -> None:
    import mlflow

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    tree = merge(tree, {"mlflow": {"enabled": True, "uri": uri}, "baseline": True})
    chain = Background(tree, tmp_path / "run")
    event = chain.at_work("teacher")
    stages = "stages", "teacher", "run_id"

    def kept(*keys: str) -> Any:
        found = json.loads((tmp_path / "run/mlflow.json").read_text(encoding="utf-8"))
        for key in keys:
            found = found[key]
        return found

    before = kept("run_id"), kept(*stages)
    kill(event["pids"][0])
    report = chain.report()
    assert attempts(report)["teacher"] == ["died", "done"]
    assert (kept("run_id"), kept(*stages)) == before
    client = mlflow.MlflowClient(uri)
    parent = client.get_run(before[0])
    assert parent.info.status == "FINISHED" and parent.data.tags["launcher"] == "ray"
    for stage in ("teacher", "student", "direct"):
        run = client.get_run(kept("stages", stage, "run_id"))
        assert run.info.status == "FINISHED" and run.data.tags["mlflow.parentRunId"] == before[0]
        points = client.get_metric_history(run.info.run_id, "valid/mrr")
        steps = [point.step for point in points]
        assert len(steps) == len(set(steps)) == LONG["epochs"] // LONG["validate_every"]


# -- the same plan through torchrun -------------------------------------------------------------------------------


def through_torchrun(config: str, overrides: list[str], tmp_path: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(ROOT / "launch/distill.py"), config, *overrides, "--out", str(tmp_path / "torchrun")]
    overrides = ["mlflow.enabled=false", "device=cpu", "threads=1"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run([*command, *overrides], cwd=tmp_path, env=env, check=True, timeout=500, capture_output=True)
    found: dict[str, Any] = json.loads((tmp_path / "torchrun/report.json").read_text(encoding="utf-8"))
    return found


ITERDE = ["chain.dims=[64, 32, 16, 8]", "teacher.dim=64", "student.dim=8", "teacher.epochs=10", "student.epochs=8"]


@pytest.mark.usefixtures("two_slots")
@pytest.mark.parametrize(
    ("config", "overrides", "num_stages"),
    [
        ("configs/umls/iterde_complex.yaml", ITERDE, 5),
        ("configs/umls/med_complex.yaml", ["student.epochs=8"], 2),
    ],
    ids=["iterde", "med"],
)
def test_a_plan_on_umls_has_the_figures_of_torchrun(
    config: str, overrides: list[str], num_stages: int, tmp_path: Path
) -> None:
    path = str(ROOT / config)
    theirs = through_torchrun(path, overrides, tmp_path)
    report = chained(shipped(path, *overrides), tmp_path / "ray", workers=2)
    assert len(report["stages"]) == num_stages and report["world"] == theirs["world"] == 2
    same_figures(report, theirs, 1e-3)


@pytest.mark.usefixtures("two_slots")
def test_four_teachers_on_two_slots_take_less_time_than_one_after_the_other(tmp_path: Path) -> None:
    tree = shipped(
        str(ROOT / "configs/umls/dualde_complex.yaml"), "teacher.epochs=10", "student.epochs=2", "baseline=false"
    )
    teacher = tree.pop("teacher")
    tree |= {"teachers": {f"teacher_{dim}": teacher | {"dim": dim} for dim in (48, 40, 32, 24)}}
    began = time.monotonic()
    report = chained(tree, tmp_path / "run")
    wall = time.monotonic() - began
    events = report["timeline"]
    assert report["stages"][-1]["teachers"] == list(tree["teachers"])
    at_once = max(sum(e["started"] <= one["started"] < e["ended"] for e in events) for one in events)
    assert at_once == 2
    serial = sum(event["ended"] - event["started"] for event in events)
    assert wall < serial, (wall, serial)


# -- jobs ---------------------------------------------------------------------------------------------------------


def open_port(port: int) -> bool:
    with socket.socket() as s:
        return s.connect_ex(("127.0.0.1", port)) == 0


def free_ports(number: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]


def test_a_job_submitted_to_a_head_node_runs_a_chain(tmp_path: Path) -> None:
    dashboard, port = free_ports(2)
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0123456789abcdef" * 4, "RAY_USAGE_STATS_ENABLED": "0"}
    env = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"} | token
    ray = str(Path(sys.executable).with_name("ray"))
    start = f"{ray} start --head --block --node-ip-address=127.0.0.1 --num-cpus=2 --dashboard-host=127.0.0.1"
    submit = [ray, "job", "submit", "--address", f"http://127.0.0.1:{dashboard}", "--working-dir", str(ROOT)]
    variables = {"DISTKGD_DATA": os.environ.get("DISTKGD_DATA", ""), "OMP_NUM_THREADS": "1"}
    environment = {"env_vars": variables, "excludes": ["runs/", ".git/", ".venv/", "*.db", "tests/"]}
    submit += ["--runtime-env-json", json.dumps(environment), "--", sys.executable, "launch/chain.py"]
    submit += ["configs/umls/chain_bkd_complex.yaml", "teacher.epochs=2", "student.epochs=2", "chain.per_dim={}"]
    submit += ["mlflow.enabled=false", "threads=1", "--workers", "1", "--out", str(tmp_path / "run")]
    # Sockets' paths may have 107 letters, so not below tmp_path.
    with (
        TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as short,
        (tmp_path / "head.txt").open("w") as said,
    ):
        ports = [f"--port={port}", f"--dashboard-port={dashboard}", f"--temp-dir={short}"]
        head = subprocess.Popen([*start.split(), *ports], env=env, stdout=said, stderr=said)
        try:
            deadline = time.monotonic() + 60
            while not open_port(dashboard):
                assert head.poll() is None and time.monotonic() < deadline, (tmp_path / "head.txt").read_text()
                time.sleep(0.2)
            done = subprocess.run(submit, env=env, capture_output=True, text=True, timeout=500, check=False)
        finally:
            head.terminate()
            head.wait(30)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "run/report.json").read_text(encoding="utf-8"))
    assert list(attempts(report).values()) == [["done"]] * 5
    assert "report:" in done.stdout + done.stderr
