"""A plan on nodes that share no disk: stages travel through `storage`. Slow."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from distkgd.common.console import Display
from distkgd.config.tree import merge
from distkgd.data import load_graph
from distkgd.distributed.ranks import Ranks
from distkgd.pipeline.config import parse_config
from distkgd.pipeline.plan import run_plan
from distkgd.pipeline.ray.session import need_token
from tests.launches import SMALL, small_data
from tests.pipeline.ray.clusters import Background, attempts, kill

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

STAGE = {"batch_size": 60, "epochs": 3, "validate_every": 1}
TREE: dict[str, Any] = merge(
    SMALL,
    {
        "teachers": {"one": STAGE | {"dim": 12}, "two": STAGE | {"dim": 10, "scorer": "distmult"}},
        "student": {"method": "mulde", "epochs": 1000, "validate_every": 50, "checkpoint_every": 10},
    },
)


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[list[Any]]:
    """Two nodes with a slot and a disk each, below a head with neither; this process is connected to them."""
    need_token()
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    found = [cluster.add_node(num_cpus=1, env_vars={"DISTKGD_SCRATCH": str(tmp_path / name)}) for name in "ab"]
    try:
        ray.init(cluster.address)
        yield found
    finally:
        ray.shutdown()
        cluster.shutdown()


def raylet(node: Any) -> int:
    return int(node.all_processes["raylet"][0].process.pid)


def test_a_student_fetches_its_teachers_and_goes_on_on_another_node_when_its_own_is_gone(
    nodes: list[Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tree = TREE | {"data": str(small_data(tmp_path / "data"))}
    place = tmp_path / "place"
    chain = Background(tree | {"storage": f"file://{place}"}, tmp_path / "run", wait=20.0)
    chain.until(lambda: list(place.glob("stages/student/checkpoint/step_*/manifest.json")))
    (event,) = (event for event in chain.events() if event["stage"] == "student")
    killed = next(node for node in nodes if raylet(node) == psutil.Process(event["pids"][0]).ppid())
    assert {path.name for path in tmp_path.glob("?/*/stages/*/result.json")} == {"result.json"}
    scratch = tmp_path / "ab"[nodes.index(killed)]
    assert sorted(path.parent.name for path in scratch.glob("*/stages/*/result.json")) == ["one", "two"]
    assert not (tmp_path / "run/stages/student").exists()
    kill(raylet(killed))
    report = chain.report()
    assert attempts(report) == {"one": ["done"], "two": ["done"], "student": ["died", "done"]}

    said, deadline = "", time.monotonic() + 20.0  # Ray passes on what workers print when it gets to it
    while "student: resumed at step" not in said and time.monotonic() < deadline:
        said += "".join(capfd.readouterr())
        time.sleep(0.2)
    assert "student: resumed at step" in said, said
    config = parse_config(tree, "test")
    whole = run_plan(config, load_graph(config.data), Ranks(), tmp_path / "whole", resume=False, display=Display(False))
    for mine, theirs in zip(report["stages"], whole.stages, strict=True):
        assert mine["test"] == pytest.approx(theirs.test, abs=1e-6), mine["name"]
    assert len(list((tmp_path / "run/stages").glob("*/model/config.json"))) == 3
