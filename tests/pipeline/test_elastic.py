"""Ranks started anew: by torchrun after a death or a change of members, and by hand in another number."""

import json
import multiprocessing as mp
import os
import shutil
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from distkgd.commands import cli
from distkgd.distributed.ownership import OWNER
from distkgd.distributed.ranks import Ranks
from distkgd.distributed.rendezvous import launch_agent, meet, same_launch
from distkgd.errors import RendezvousError
from distkgd.models.model_folder import load_model
from tests.launches import (
    distil,
    finish,
    kill_all,
    model_bytes,
    output_of,
    rank_process,
    small_config,
    small_data,
    start,
    steps_saved,
    wait_for,
)

SECONDS = timedelta(seconds=10)
SHORT = timedelta(seconds=0.3)
# By default torchrun waits half a minute for further members, and 15 seconds for a sign of life of the present ones.
QUICK = "last_call_timeout=1,keep_alive_interval=1,keep_alive_max_attempt=5"


# -- the ranks of one generation find each other ------------------------------------------------------------------


def generation(store: dist.Store, world: int, late: int = 0) -> list[dist.Store]:
    """The stores on which the ranks of a generation agree, each rank in a thread of its own, one after the others."""

    def rank_meets(rank: int) -> dist.Store:
        time.sleep(0.1 if rank == late else 0)
        return meet(store, rank, world, SECONDS)

    with ThreadPoolExecutor(world) as threads:
        return list(threads.map(rank_meets, range(world)))


@pytest.mark.parametrize("world", [1, 2, 5])
def test_the_ranks_of_a_generation_share_a_store_that_no_other_generation_sees(world: int) -> None:
    store = dist.HashStore()
    for number in range(3):
        stores = generation(store, world, late=(world - 1) * (number % 2))
        assert not any(mine.check(["address"]) for mine in stores)
        stores[0].set("address", f"of generation {number}")
        assert {mine.get("address") for mine in stores} == {f"of generation {number}".encode()}


def test_a_generation_does_not_meet_one_that_died_on_the_way() -> None:
    store = dist.HashStore()
    with pytest.raises(RendezvousError):
        meet(store, 1, 3, SHORT)  # said hello; nobody answered
    with pytest.raises(RendezvousError):
        meet(store, 0, 3, SHORT)  # answered the dead; nobody confirmed
    stores = generation(store, 3)
    stores[2].set("address", "here")
    assert stores[0].get("address") == b"here"


@pytest.mark.parametrize(("here", "missing"), [([0], "1, 2, 3"), ([0, 2], "1, 3")])
def test_rank_0_names_the_ranks_that_did_not_come(here: list[int], missing: str) -> None:
    store = dist.HashStore()
    with ThreadPoolExecutor(4) as threads:
        futures = [threads.submit(meet, store, rank, 4, timedelta(seconds=1)) for rank in here]
        with pytest.raises(RendezvousError, match=f"of 4 ranks these did not come: {missing};"):
            futures[0].result()


def test_a_rank_says_that_it_heard_nothing_from_rank_0() -> None:
    with pytest.raises(RendezvousError, match="rank 1 heard nothing from rank 0"):
        meet(dist.HashStore(), 1, 2, SHORT)


def test_a_rank_that_found_no_others_says_so_itself(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Other errors are the same on all ranks, and rank 0 speaks for them."""

    def alone(device: str) -> Ranks:
        raise RendezvousError("rank 1 heard nothing")

    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr("distkgd.distributed.ranks.join_ranks", alone)
    with pytest.raises(SystemExit) as info:
        cli.launch(lambda ranks, display: None)
    assert info.value.code == 2 and capsys.readouterr().err == "error: rank 1 heard nothing\n"


# -- whose a run folder is ----------------------------------------------------------------------------------------


def agent_seen_by_a_child() -> str:
    with mp.get_context("fork").Pool(1) as child:
        return str(child.apply(launch_agent))


def test_children_of_one_process_have_one_agent_and_without_torchrun_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert launch_agent() is None
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    child = agent_seen_by_a_child()
    assert child == agent_seen_by_a_child() and f"/{os.getpid()}/" in child
    assert launch_agent() not in (None, child)


@pytest.mark.parametrize("content", [None, "", "[]", "{}", '{"agents": []}', '{"agents": ["c"]}', '{"agents": 3}'])
def test_a_folder_of_another_launch_is_not_taken_for_ones_own(content: str | None, tmp_path: Path) -> None:
    path = tmp_path / "launch.json"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    assert not same_launch(path, ["a", "b"])
    assert not same_launch(path, [])
    path.write_text('{"agents": ["b", "c"]}', encoding="utf-8")
    assert same_launch(path, ["a", "b"])


# -- launches -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a data set, a config in double precision, and an uninterrupted run of it on two ranks."""
    cwd = tmp_path_factory.mktemp("elastic")
    small_config(cwd / "small.yaml", small_data(cwd / "data"), dtype="float64", baseline=False, student={"epochs": 12})
    code, output = distil(["small.yaml", "--out", "whole"], cwd, world=2)
    assert code == 0, output
    return cwd


def stage_of(run: Path) -> Path:
    return run / "stages" / "student"


def latest(run: Path) -> int:
    """Step of the last checkpoint."""
    return max(steps_saved(stage_of(run)), default=0)


def assert_same_tables(run: Path, whole: Path) -> None:
    """Equal but for the order of sums, which another number of ranks changes."""
    mine, theirs = (load_model(stage_of(folder), Ranks()).model for folder in (run, whole))
    torch.testing.assert_close(mine.entity.weight, theirs.entity.weight, rtol=0, atol=1e-9)
    torch.testing.assert_close(mine.relation, theirs.relation, rtol=0, atol=1e-9)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_run_goes_on_by_itself_after_a_rank_was_killed(place: Path, tmp_path: Path, victim: int) -> None:
    run = tmp_path / "run"
    process = start([place / "small.yaml", "--out", run], tmp_path, 2, ["--max-restarts", "2"])
    wait_for(process, tmp_path, lambda: latest(run))
    rank_process(process, victim).kill()
    code, output = finish(process, tmp_path)
    assert code == 0, output
    assert output.count("student: resumed at step") == 1
    assert model_bytes(stage_of(run)) == model_bytes(stage_of(place / "whole"))


def test_a_restart_does_not_get_round_the_question_for_resume(place: Path, tmp_path: Path) -> None:
    """The first attempt is refused; the second is the same launch, but the folder is not of its making."""
    run = shutil.copytree(place / "whole", tmp_path / "run")
    process = start([place / "small.yaml", "--out", run], tmp_path, 1, ["--max-restarts", "1"])
    code, output = finish(process, tmp_path)
    said = [line for line in output.splitlines() if line.startswith("error: ")]  # torchrun's summary repeats the last
    assert code != 0 and len(said) == 2 and all("already holds a run; add --resume" in line for line in said), output
    assert not (run / OWNER).exists()
    assert (run / "launch.json").read_bytes() == (place / "whole" / "launch.json").read_bytes()


def test_a_run_goes_on_with_fewer_and_with_more_processes(place: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = [place / "small.yaml", "--out", run, "--resume"]
    for world in (2, 1):
        reached = latest(run)
        process = start(arguments, tmp_path, world)
        wait_for(process, tmp_path, partial(lambda before: latest(run) > before, reached))
        kill_all(process)
    code, output = distil(arguments, tmp_path, world=3)
    assert code == 0, output
    assert output.count("student: resumed at step") == 2 and "world: 3" in output
    assert_same_tables(run, place / "whole")


# -- members that come and go -------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def members(run: Path) -> int:
    """How many agents have the run's present generation of ranks."""
    path = run / "launch.json"
    return len(json.loads(path.read_text(encoding="utf-8"))["agents"]) if path.exists() else 0


@pytest.mark.slow
@pytest.mark.parametrize("parting", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_goes_on_when_a_second_agent_comes_and_when_it_goes(
    parting: signal.Signals, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # With a shared store torchrun 2.13 never tells an agent that comes later where it is, and both give up.
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    (tmp_path / "other").mkdir()
    agent = ["--nnodes", "1:2", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{free_port()}"]
    agent += ["--rdzv-conf", QUICK, "--max-restarts", "1", "--monitor-interval", "0.1", "--local-addr", "127.0.0.1"]
    run = tmp_path / "run"
    arguments = [place / "small.yaml", "--out", run]
    first = start(arguments, tmp_path, 1, agent)
    wait_for(first, tmp_path, lambda: latest(run))
    alone = rank_process(first, 0)
    alone.suspend()  # or it would be done before the other agent has got up
    other = start(arguments, tmp_path / "other", 1, agent)
    wait_for(first, tmp_path, lambda: f"Sending process {alone.pid} closing signal SIGTERM" in output_of(tmp_path))
    alone.resume()
    wait_for(first, tmp_path, lambda: members(run) == 2)
    joined = latest(run)
    wait_for(first, tmp_path, lambda: latest(run) > joined)
    if parting == signal.SIGKILL:
        kill_all(other)
    else:
        other.send_signal(parting)
    wait_for(first, tmp_path, lambda: members(run) == 1)
    code, output = finish(first, tmp_path)
    other.wait(30)
    assert code == 0, output
    # The change of members is no restart that counts: the one there was is left for the parting.
    assert output.count("student: resumed at step") == 2, output
    assert_same_tables(run, place / "whole")
