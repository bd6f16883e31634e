"""One launch at a time works in a run folder."""

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from distkgd.commands.cli import run_main
from distkgd.common.console import Display
from distkgd.distributed import ownership
from distkgd.distributed.ownership import OWNER, Owner, owned, read_owner
from distkgd.distributed.ranks import Ranks
from distkgd.distributed.rendezvous import is_alive, process_id
from distkgd.errors import ConfigError, Stopped
from distkgd.pipeline.config import parse_config
from distkgd.pipeline.plan import run_plan
from launch import ablate, chain, distill
from tests.toys import toy_graph

ME = process_id() or ""
MACHINE = ME.split("/")[0]
OTHER = Owner("elsewhere", 4711, "2026-01-02 03:04:05+00:00", process_id(os.getppid()), [])  # alive, not this process
GONE = replace(OTHER, process=f"{MACHINE}/{2**22 + 1}/5")
REUSED = replace(OTHER, process=f"{MACHINE}/{os.getppid()}/5")  # its number is another process's now
FAR = replace(OTHER, process="another machine/4711/5")


def silent(_line: str) -> None:
    raise AssertionError(f"there was nothing to say, and yet: {_line}")


def left(folder: Path, owner: Owner) -> Path:
    """A folder with an owner.json that nobody has locked."""
    folder.mkdir(exist_ok=True)
    (folder / OWNER).write_text(json.dumps(asdict(owner)), encoding="utf-8")
    return folder


def plan_in(folder: Path, resume: bool) -> None:
    tree = {"mlflow": {"enabled": False}, "student": {"dim": 4, "epochs": 1, "batch_size": 100}}
    run_plan(parse_config(tree, "test"), toy_graph(), Ranks(), folder, resume=resume, display=Display(False))


@pytest.mark.parametrize("resume", [False, True])
def test_a_second_launch_is_refused_with_the_first_ones_machine_process_and_start(resume: bool, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    plan_in(folder, False)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with owned(folder, Ranks(), silent):
        started = json.loads((folder / OWNER).read_text(encoding="utf-8"))["started"]
        with pytest.raises(ConfigError) as info:
            plan_in(folder, resume)
        assert (folder / OWNER).is_file()
    for word in (str(folder), socket.gethostname(), f"process {os.getpid()} ", started, str(folder / OWNER)):
        assert word in str(info.value)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    plan_in(folder, True)


def test_a_killed_owner_is_followed_and_that_is_said(tmp_path: Path) -> None:
    first = os.fork()
    if not first:
        with owned(tmp_path, Ranks(), silent):
            time.sleep(60)
        os._exit(0)
    while (owner := read_owner(tmp_path / OWNER)) is None:
        time.sleep(0.01)
    with pytest.raises(ConfigError, match=f"process {first} on"), owned(tmp_path, Ranks(), silent):
        pass
    os.kill(first, signal.SIGKILL)
    os.waitpid(first, 0)
    assert owner.pid == first
    said: list[str] = []
    with owned(tmp_path, Ranks(), said.append):
        assert read_owner(tmp_path / OWNER) is not None
    (line,) = said
    assert f"process {first} on" in line and "takes it over" in line
    with owned(tmp_path, Ranks(), silent):
        pass
    assert not (tmp_path / OWNER).exists()


def refuse_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(_file: Any, _how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)


@pytest.mark.parametrize("locks", [True, False], ids=["locks", "a disk without locks"])
@pytest.mark.parametrize("owner", [GONE, REUSED], ids=["gone", "its number reused"])
def test_a_stale_owner_is_recognised(
    owner: Owner, locks: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not locks:
        refuse_locks(monkeypatch)
    said: list[str] = []
    with owned(left(tmp_path, owner), Ranks(), said.append):
        found = read_owner(tmp_path / OWNER)
        assert found is not None and (found.process, found.pid) == (ME, os.getpid())
    (line,) = said
    assert "process 4711 on elsewhere, started 2026-01-02 03:04:05+00:00, which is gone" in line
    assert not (tmp_path / OWNER).exists()


def test_on_a_disk_without_locks_a_living_process_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_locks(monkeypatch)
    with pytest.raises(ConfigError, match="process 4711 on elsewhere"), owned(left(tmp_path, OTHER), Ranks(), silent):
        pass
    assert read_owner(tmp_path / OWNER) == OTHER


@contextmanager
def beating(path: Path) -> Iterator[None]:
    """The signs of life of an owner elsewhere."""
    over = threading.Event()

    def beat() -> None:
        while not over.wait(0.05):
            os.utime(path)

    thread = threading.Thread(target=beat)
    thread.start()
    yield
    over.set()
    thread.join()


def test_an_owner_on_another_machine_lives_as_long_as_it_gives_signs_of_life(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ownership, "SILENCE", 0.6)
    monkeypatch.setattr(ownership, "BEAT", 0.05)
    said: list[str] = []
    refused = pytest.raises(ConfigError, match=r"elsewhere.*if it is dead, delete")
    with beating(left(tmp_path, FAR) / OWNER), refused, owned(tmp_path, Ranks(), said.append):
        pass
    assert read_owner(tmp_path / OWNER) == FAR
    with owned(tmp_path, Ranks(), said.append):
        seen = (tmp_path / OWNER).stat().st_mtime
        time.sleep(0.2)
        assert (tmp_path / OWNER).stat().st_mtime > seen, "this process gives none itself"
    left(tmp_path, FAR)
    os.utime(tmp_path / OWNER, (0, 0))  # nobody waits for the signs of years ago
    monkeypatch.setattr(ownership, "SILENCE", 1e6)
    with owned(tmp_path, Ranks(), said.append):
        pass
    assert [line.partition("; ")[2][:11] for line in said] == [
        "looking for",
        "looking for",
        "this launch",
        "this launch",
    ]


def test_the_ranks_of_one_launch_follow_each_other_and_nobody_comes_in_between(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")  # the parent process is torchrun, and alive
    with pytest.raises(RuntimeError), owned(tmp_path, Ranks(), silent):
        raise RuntimeError("a rank dies")
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    with pytest.raises(ConfigError, match="is in use"), owned(tmp_path, Ranks(), silent):
        pass
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with owned(tmp_path, Ranks(), silent) as agents:
        assert agents == [process_id(os.getppid())]
    assert not (tmp_path / OWNER).exists()
    with pytest.raises(Stopped), owned(tmp_path, Ranks(), silent):
        raise Stopped(15, "here")
    assert not (tmp_path / OWNER).exists()


@pytest.mark.parametrize("launcher", [f"{ME}/launch", f"{GONE.process}/launch"], ids=["the same", "a dead one's"])
def test_a_dying_process_of_the_same_or_a_dead_launch_is_waited_for(launcher: str, tmp_path: Path) -> None:
    inside, end = threading.Event(), threading.Event()

    def first() -> None:
        with owned(tmp_path, Ranks(), silent, launcher):
            inside.set()
            end.wait(10)

    thread = threading.Thread(target=first)
    thread.start()
    inside.wait(10)
    timer = threading.Timer(0.3, end.set)
    timer.start()
    with owned(tmp_path, Ranks(), silent, f"{ME}/launch"):
        assert end.is_set()
    thread.join()


def test_a_folder_that_was_made_for_nothing_goes_again(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), owned(tmp_path / "runs" / "one", Ranks(), silent):
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_a_process_is_known_by_its_machine_number_and_start() -> None:
    assert is_alive(ME) is True and is_alive(f"{ME}/anything") is True
    child = subprocess.Popen(["sleep", "60"])
    name = process_id(child.pid) or ""
    assert is_alive(name) is True
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert is_alive(name) is False  # a zombie yet
    child.wait()
    assert is_alive(name) is False and process_id(child.pid) is None
    assert is_alive(FAR.process or "") is None


LAUNCHERS: dict[str, tuple[Callable[..., None], list[str]]] = {
    "distill": (distill.main, []),
    "distill --to": (distill.main, ["--data", "pystdlib", "--to", "8"]),
    "chain": (chain.main, []),
    "ablate": (ablate.main, ["configs/tables/iterde-ablation.yaml"]),
}


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("name", LAUNCHERS)
def test_every_launcher_is_refused_before_it_reads_anything(
    name: str, resume: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = left(tmp_path / "run", OTHER)
    begun = time.monotonic()
    main, arguments = LAUNCHERS[name]
    code = run_main(main, [*arguments, "--out", str(folder), *(["--resume"] if resume else [])])
    error = capsys.readouterr().err
    assert code == 2 and "process 4711 on elsewhere, started 2026-01-02" in error and "Traceback" not in error
    assert time.monotonic() < begun + 5
    assert [path.name for path in folder.iterdir()] == [OWNER]
