"""Checkpoints that are written while training goes on: what they hold, who hears of errors, what is left behind."""

import hashlib
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from threading import Event, get_ident
from typing import Any
from unittest import mock

import pytest
import torch

from distkgd.distributed.checkpoint import writer as checkpoint_writer
from distkgd.distributed.checkpoint.reader import latest, list_steps, load_rows, load_tensors, read_meta, verify
from distkgd.distributed.checkpoint.tables import Rows, seal
from distkgd.distributed.checkpoint.writer import State, Writer
from distkgd.distributed.ranks import Ranks
from distkgd.errors import CheckpointError
from distkgd.tracking.tracker import NO_METRICS, Metrics, StageTracking, Status
from distkgd.training import loop
from distkgd.training.job import Job, Progress, load_group, step_name, write
from distkgd.training.loop import train_stage
from tests.distributed.checkpoint.checkpoints import (
    Alone,
    flip_last_bit,
    no_damage,
    on_ranks,
    save,
    small,
    truncate,
    value_of,
)
from tests.ranks import run_on_ranks
from tests.toys import toy_job

STUDENT = {"dim": 8, "batch_size": 100, "epochs": 6, "validate_every": 1, "checkpoint_every": 1}


def held_up(patch: pytest.MonkeyPatch, name: str = "") -> Event:
    """Sealing a file whose path contains `name` waits until the event is set."""
    go_on = Event()

    def waits(path: Path, size: int) -> dict[str, Any]:
        if name in str(path):
            assert go_on.wait(20)
        return seal(path, size)

    patch.setattr(checkpoint_writer, "seal", waits)
    return go_on


def slowly(path: Path, size: int) -> dict[str, Any]:
    time.sleep(0.1)
    return seal(path, size)


def fails(path: Path, size: int) -> dict[str, Any]:
    raise OSError(28, "No space left on device", str(path))


def part(rank: int, value: float) -> State:
    """Rank's two of the six rows that three ranks save."""
    return State({"entity": Rows(torch.full((2, 2), value), 2 * rank, 6)}, {"w": torch.tensor(value)}, {"value": value})


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- Beside training


def test_what_changes_after_save_has_returned_is_not_in_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = held_up(monkeypatch)
    state = small(1.0)
    writer = Writer(tmp_path, Alone())
    writer.save(1, state)
    assert list_steps(tmp_path) == [], "save waited for the disk"
    state.rows["entity"].tensor.fill_(2.0)
    state.tensors["w"].fill_(2.0)
    state.meta["value"] = 2.0
    go_on.set()
    path = writer.wait()
    assert path is not None
    assert value_of(path) == 1.0


def test_wait_tells_each_checkpoint_once(tmp_path: Path) -> None:
    writer = Writer(tmp_path, Alone(), keep=3)
    assert writer.wait() is None
    writer.save(1, small(1.0))
    assert writer.wait() == tmp_path / "step_0000000001"
    assert writer.wait() is None
    writer.save(2, small(2.0))
    writer.save(3, small(3.0))
    assert list_steps(tmp_path)[:2] == [1, 2], "the previous one was not finished first"
    assert writer.wait() == tmp_path / "step_0000000003"


def save_and_go_on(ranks: Ranks, folder: str, total: int) -> str:
    """Save two checkpoints whose rows change as soon as they may; the path of the last one."""
    lo, hi = ranks.share(total)
    table = torch.arange(3.0 * total).reshape(total, 3)[lo:hi].clone()
    writer = Writer(Path(folder), ranks)
    for step in (1, 2):
        writer.save(step, State({"entity": Rows(table, lo, total)}, {"w": torch.tensor(step)}, {"step": step}))
        table += 1000.0
    return str(writer.wait())


def rows_read(ranks: Ranks, path: str, total: int) -> torch.Tensor:
    found = latest(Path(path).parent, ranks, no_damage)
    assert str(found) == path
    return load_rows(Path(path), "entity", *ranks.share(total))


@pytest.mark.parametrize(("written", "read"), [(1, 3), (2, 1), (3, 2)])
def test_what_ranks_write_while_going_on_is_read_by_another_number_of_ranks(
    written: int, read: int, tmp_path: Path
) -> None:
    (path, *others) = run_on_ranks(written, save_and_go_on, folder=str(tmp_path), total=11)
    assert others == [path] * (written - 1)
    assert path.endswith("step_0000000002")
    rows = torch.cat(run_on_ranks(read, rows_read, path=path, total=11))
    assert torch.equal(rows, torch.arange(33.0).reshape(11, 3) + 1000.0)
    assert int(load_tensors(Path(path))["w"]) == read_meta(Path(path))["meta"]["step"] == 2


MEMORY = """
import sys, torch
from pathlib import Path
from distkgd.distributed.checkpoint.writer import State, Writer
from distkgd.distributed.checkpoint.tables import Rows
from distkgd.distributed.ranks import Ranks

def peak():
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) / 1024

def save(table):
    writer = Writer(Path(sys.argv[1]), Ranks(), keep=1)
    writer.save(1, State({"entity": Rows(table, 0, len(table))}))
    writer.wait()

table = torch.ones(500_000, 100)
save(table[:10])
Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again at what is held now
before = peak()
save(table)
print(peak() - before)
"""


def test_a_save_needs_little_memory_beside_the_table(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", MEMORY, tmp_path], capture_output=True, text=True, check=True)
    assert sum(path.stat().st_size for path in tmp_path.rglob("*")) > 200e6
    shutil.rmtree(tmp_path)  # pytest would keep it for a while
    assert float(done.stdout) < 64, "MB more than before"


# --- Errors


@pytest.mark.parametrize("victim", [0, 1, 2])
@pytest.mark.parametrize("then", ["wait", "save"])
def test_an_error_in_one_ranks_thread_is_raised_on_all_ranks(
    then: str, victim: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_ranks(3, lambda peers: save(tmp_path, 1, part(peers.rank, 1.0), peers))
    monkeypatch.setattr(
        checkpoint_writer,
        "seal",
        lambda path, size: (fails if f"rows-{victim:05d}" in path.name else seal)(path, size),
    )

    def run(peers: Any) -> None:
        writer = Writer(tmp_path, peers)
        writer.save(2, part(peers.rank, 2.0))
        if then == "wait":
            writer.wait()
        else:
            writer.save(3, part(peers.rank, 3.0))

    results = on_ranks(3, run)
    assert [type(result) for result in results] == [CheckpointError] * 3
    assert len({str(result) for result in results}) == 1
    for word in ("step_0000000002", f"rank {victim}: OSError", "No space left"):
        assert word in str(results[0])
    assert names(tmp_path) == ["step_0000000001"]


def test_after_an_error_the_next_checkpoint_is_written(tmp_path: Path) -> None:
    writer = Writer(tmp_path, Alone())
    with mock.patch.object(checkpoint_writer, "seal", fails):
        writer.save(1, small(1.0))
        with pytest.raises(CheckpointError, match="No space left"):
            writer.wait()
    writer.save(2, small(2.0))
    assert writer.wait() == tmp_path / "step_0000000002"


def test_a_file_that_lost_bytes_before_it_was_durable_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = held_up(monkeypatch)
    writer = Writer(tmp_path, Alone())
    writer.save(1, small(1.0))
    (file,) = tmp_path.glob(".step*/rows*")
    truncate(file)
    go_on.set()
    with pytest.raises(CheckpointError, match=rf"{file.name}: \d+ bytes were written"):
        writer.wait()
    assert names(tmp_path) == []


def test_ranks_that_leave_no_record_are_named_after_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = checkpoint_writer._seal_files
    monkeypatch.setattr(checkpoint_writer, "RECORD_SECONDS", 0.2)
    monkeypatch.setattr(checkpoint_writer, "_seal_files", lambda f, rank, sizes: None if rank else real(f, rank, sizes))
    began = time.monotonic()
    results = on_ranks(3, lambda peers: save(tmp_path, 1, part(peers.rank, 1.0), peers))
    assert time.monotonic() - began < 15
    assert [type(result) for result in results] == [CheckpointError] * 3
    assert "ranks [1, 2] have left no record" in str(results[0])
    assert "share" in str(results[0])
    assert names(tmp_path) == []


def test_no_rank_sits_in_a_collective_while_another_one_is_slow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = held_up(monkeypatch, "rows-00001")
    monkeypatch.setattr(checkpoint_writer, "PATIENCE_SECONDS", 0.05)
    monkeypatch.setattr(checkpoint_writer, "RECORD_SECONDS", 30.0)
    asked: list[int] = []

    def run(peers: Any) -> Path | None:
        writer = Writer(tmp_path, peers)
        writer.save(1, part(peers.rank, 1.0))
        real = peers.gather_objects

        def gather(value: Any) -> list[Any]:
            asked.append(peers.rank)
            if len(asked) == 30:
                go_on.set()
            return real(value)

        peers.gather_objects = gather
        return writer.wait()

    assert on_ranks(3, run) == [tmp_path / "step_0000000001"] * 3
    assert len(asked) >= 30


# --- Writers that die, and those that are not quite dead


def test_records_of_an_earlier_attempt_are_not_taken_for_this_ones(tmp_path: Path) -> None:
    save(tmp_path, 7, small(1.0), Alone())
    (tmp_path / "step_0000000007").rename(tmp_path / ".step_0000000007-0badf00d.tmp")
    (tmp_path / ".step_0000000007-0badf00d.tmp" / "record-00000.json").write_text('{"evil.safetensors": {"size": 1}}')
    path = save(tmp_path, 7, small(2.0), Alone())
    assert value_of(path) == 2.0
    assert names(path) == ["manifest.json", "replicated.safetensors", "rows-00000.safetensors"]
    assert names(tmp_path) == [path.name]


def test_an_earlier_writer_that_wakes_up_late_does_no_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = save(tmp_path, 1, small(1.0), Alone())
    events = [Event(), Event()]
    threads: list[int] = []

    def waits(path: Path, size: int) -> dict[str, Any]:
        if get_ident() not in threads:
            threads.append(get_ident())
        assert events[threads.index(get_ident())].wait(20)
        return seal(path, size)

    monkeypatch.setattr(checkpoint_writer, "seal", waits)
    undead, writer = Writer(tmp_path, Alone()), Writer(tmp_path, Alone())
    undead.save(2, small(2.0))
    while not threads:
        time.sleep(0.001)
    writer.save(2, small(3.0))
    events[0].set()
    with pytest.raises(CheckpointError, match=r"step_0000000002.*No such file"):
        undead.wait()
    events[1].set()
    again = writer.wait()
    assert again is not None
    assert (value_of(before), value_of(again)) == (1.0, 3.0)
    assert names(tmp_path) == [before.name, again.name]


def test_an_error_in_the_loop_leaves_the_checkpoint_that_was_being_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_writer, "seal", slowly)
    with pytest.raises(RuntimeError, match="elsewhere") as caught, Writer(tmp_path, Alone()) as writer:
        writer.save(1, small(1.0))
        raise RuntimeError("elsewhere")
    assert value_of(tmp_path / "step_0000000001") == 1.0
    assert not hasattr(caught.value, "__notes__")


def test_an_error_in_the_loop_does_not_wait_long_for_a_rank_that_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = held_up(monkeypatch, "rows-00001")
    monkeypatch.setattr(checkpoint_writer, "LEAVING_SECONDS", 0.2)
    monkeypatch.setattr(checkpoint_writer, "RECORD_SECONDS", 30.0)

    def run(peers: Any) -> None:
        with Writer(tmp_path, peers) as writer:
            writer.save(1, part(peers.rank, 1.0))
            raise RuntimeError("elsewhere")

    began = time.monotonic()
    results = on_ranks(3, run)
    assert time.monotonic() - began < 5
    assert "could not be finished" in results[0].__notes__[0]
    assert not hasattr(results[2], "__notes__")
    go_on.set()
    time.sleep(0.3)  # the thread of rank 0 would publish now
    assert list_steps(tmp_path) == []


# --- In the training loop


def stage(folder: Path, curve: list[float] | None = None, ranks: Ranks | None = None, **config: Any) -> Job:
    """A toy job; `curve`: the MRR after each epoch."""
    job = toy_job({"student": STUDENT} | config, ranks or Ranks(), folder)
    if curve is not None:
        left = iter(curve)
        job.validate = lambda: {"mrr": next(left)}
    return job


class Registered(StageTracking):
    """Reads every checkpoint it is told about."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def checkpoint(self, path: Path, step: int, sha256: str) -> None:
        time.sleep(0.02)  # a store far away
        verify(path)
        assert read_meta(path)["step"] == step
        assert hashlib.sha256((path / "manifest.json").read_bytes()).hexdigest() == sha256
        self.steps.append(step)

    def log(self, metrics: Metrics, step: int) -> None:
        assert metrics

    def finish(self, status: Status, model_folder: Path | None, metrics: Metrics = NO_METRICS) -> None:
        raise AssertionError("a loop ends no run")


def test_every_checkpoint_is_registered_while_it_is_still_there(tmp_path: Path) -> None:
    job = stage(tmp_path, [0.5, 0.1, 0.1, 0.1, 0.1, 0.1], keep=1)
    job.tracking = Registered()
    train_stage(job)
    per_epoch = job.input_builder.sampler.steps_per_epoch
    assert job.tracking.steps == [per_epoch * epoch for epoch in range(1, 7)]
    assert list_steps(job.checkpoints) == [per_epoch, 6 * per_epoch]


def test_rows_are_loaded_from_a_checkpoint_that_is_still_being_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_writer, "seal", slowly)
    job = stage(tmp_path)
    weight = job.method.student.entity.weight
    before = weight.clone()
    write(job, Progress(step=3))
    weight.zero_()
    load_group(job, "student", job.checkpoints / step_name(3))
    assert torch.equal(weight, before)


@pytest.mark.parametrize("validate_every", [0, 2])
def test_a_stage_has_published_its_last_checkpoint_when_it_returns(
    validate_every: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_writer, "seal", slowly)
    job = stage(tmp_path, student=STUDENT | {"validate_every": validate_every, "epochs": 2})
    progress = train_stage(job)
    assert list_steps(job.checkpoints)[-1] == progress.step
    assert list(job.checkpoints.glob(".*")) == []


def train_with_a_full_disk(ranks: Ranks, folder: str) -> tuple[str, list[int]]:
    """The error of a stage whose second checkpoint one rank cannot write, and the checkpoints there are."""
    job = stage(Path(folder), ranks=ranks)
    second = step_name(2 * job.input_builder.sampler.steps_per_epoch)
    broken = ranks.rank == ranks.world - 1

    def full(path: Path, size: int) -> dict[str, Any]:
        return (fails if broken and second in str(path) else seal)(path, size)

    with mock.patch.object(checkpoint_writer, "seal", full), pytest.raises(CheckpointError) as caught:
        train_stage(job)
    ranks.barrier()
    return str(caught.value), [
        step // job.input_builder.sampler.steps_per_epoch for step in list_steps(job.checkpoints)
    ]


@pytest.mark.parametrize("world", [1, 2])
def test_a_disk_that_fills_up_stops_the_stage_on_every_rank(world: int, tmp_path: Path) -> None:
    for message, epochs in run_on_ranks(world, train_with_a_full_disk, folder=str(tmp_path)):
        assert "could not be written" in message
        assert "No space left" in message
        assert epochs == [1]


@pytest.mark.parametrize("damage", [flip_last_bit, truncate])
def test_with_the_default_config_a_damaged_checkpoint_has_a_previous_one(
    damage: Callable[[Path], None], tmp_path: Path
) -> None:
    rising = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]  # the newest is the best one, too
    whole = stage(tmp_path / "whole", rising)
    train_stage(whole)
    job = stage(tmp_path / "run", rising)
    per_epoch = job.input_builder.sampler.steps_per_epoch
    real = loop.train_step

    def dies(job: Job, progress: Progress, signal_number: int) -> tuple[dict[str, float], bool]:
        if progress.step == 4 * per_epoch + 1:
            raise RuntimeError("elsewhere")
        return real(job, progress, signal_number)

    with mock.patch.object(loop, "train_step", dies), pytest.raises(RuntimeError, match="elsewhere"):
        train_stage(job)
    (rows,) = (job.checkpoints / step_name(4 * per_epoch)).glob("rows*")
    damage(rows)
    again = stage(tmp_path / "run", rising[3:])
    said: list[str] = []
    again.display.warn = said.append  # type: ignore[method-assign]
    train_stage(again)
    assert len(said) == 1
    assert str(rows) in said[0]
    assert f"the previous one, {step_name(3 * per_epoch)}, is used" in said[0]
    assert torch.equal(again.method.student.entity.weight, whole.method.student.entity.weight)
