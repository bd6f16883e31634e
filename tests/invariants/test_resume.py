"""Invariant 3: stop at any step and resume = uninterrupted, bit for bit on CPU at equal world size."""

import json
import os
import random
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from distkgd.common.console import Display
from distkgd.common.stop_signal import StopRequest
from distkgd.config.stage import OptimizerConfig
from distkgd.distributed.checkpoint.reader import list_steps, read_meta
from distkgd.distributed.ranks import Ranks
from distkgd.errors import Stopped
from distkgd.evaluation.ranking import metrics
from distkgd.methods import METHODS
from distkgd.pipeline.config import parse_config
from distkgd.pipeline.plan import run_plan
from distkgd.training import loop
from distkgd.training.job import Job
from distkgd.training.loop import train_stage
from tests.covering import all_pairs
from tests.launches import (
    call,
    distil,
    finish,
    kill_all,
    model_bytes,
    small_config,
    small_data,
    start,
    steps_saved,
    wait_for,
)
from tests.ranks import run_on_ranks, run_on_threads
from tests.toys import toy_graph, toy_job

ALL = {"kind": "all"}
TRIPLE = {"kind": "triple", "num": 7, "sides": "bernoulli", "filtered": True}
REGIMES = {"triple": TRIPLE, "all": ALL}
STUDENTS: dict[str, dict[str, Any]] = {
    "scratch": {},
    "bkd": {"method": "bkd", "distill": {"temperature": 2.0}},
    "med": {"method": "med", "distill": {"evaluator_lr": 0.5}},
    "metasd": {"method": "metasd", "distill": {"prune": {"rate": 0.5, "every": 7, "ramp": 3}, "meta_lr": 0.05}},
    "dualde": {"method": "dualde", "patience": 2, "distill": {"stage_two": {"start": "plateau", "epochs": 2}}},
    "mulde": {"method": "mulde"},
    "dml": {"method": "dml", "distill": {"peer_dim": 12}},
    "rkd": {"method": "rkd", "distill": {"group": 4}},
    "iterde": {"method": "iterde", "distill": {"schedule": "two_phase", "k": 0.5}},
}
TIMES = {"triples_per_second", "sent_bytes_per_step", "peak_memory_bytes"}


def student(method: str, regime: str, **more: Any) -> dict[str, Any]:
    # 11 steps in an epoch, and a line of the log for every two.
    base = {"dim": 8, "batch_size": 28, "epochs": 3, "validate_every": 1, "dropout": 0.1, "negatives": REGIMES[regime]}
    base |= {"loss": {"name": "softmax" if regime == "all" else "self_adversarial"}}
    base |= {"optimizer": {"name": "adagrad", "lr": 0.3}, "schedule": {"name": "linear", "final": 0.1}}
    return {"student": base | STUDENTS[method] | more}


@contextmanager
def signal_in(steps: dict[int, int], rank: int = 0) -> Iterator[None]:
    """One rank gets a signal in the middle of each of some steps ({step: signal}).

    Ranks that are threads, which no signal reaches, get what the handler would leave behind.
    """
    real_step, real_listen, mine = loop.train_step, loop.listen_for_stop, threading.local()

    def step(job: Job, progress: loop.Progress, signal_number: int) -> tuple[dict[str, float], bool]:
        if progress.step in steps and job.ranks.rank == rank:
            if threading.current_thread() is threading.main_thread():
                os.kill(os.getpid(), steps[progress.step])
            else:
                mine.request.signal_number = steps[progress.step]
        return real_step(job, progress, signal_number)

    @contextmanager
    def listen() -> Iterator[StopRequest]:
        with real_listen() as mine.request:
            yield mine.request

    with mock.patch.object(loop, "train_step", step), mock.patch.object(loop, "listen_for_stop", listen):
        yield


def train_with_stops(ranks: Ranks, config: dict[str, Any], folder: str, stops: int = 0) -> dict[str, Any]:
    """Train a toy stage to its end, through so many signals (`signal_in`): each ends the job, and a fresh one goes on.

    "steps" are those after which the job stopped; "rows" is this rank's part of the student; "state" the files of the
    last checkpoint by checksum, and its numbers.
    """
    stopped = []
    for _ in range(stops):
        with pytest.raises(Stopped) as info:
            train_stage(toy_job(config, ranks, Path(folder)))
        assert info.value.signal_number == signal.SIGTERM
        ranks.barrier()
        stopped.append(list_steps(Path(folder) / "stages/student/checkpoint")[-1])
        ranks.barrier()
    job = toy_job(config, ranks, Path(folder))
    progress = train_stage(job)
    ranks.barrier()
    manifest = read_meta(job.checkpoints / loop.step_name(progress.step))
    numbers = {k: v for k, v in manifest["meta"]["progress"].items() if "seconds" not in k and k != "joules"}
    found = job.validate() if job.validate is not None else {}
    return {
        "steps": stopped,
        "rows": job.method.student.entity.weight.clone(),
        "relation": job.method.student.relation.detach().clone(),
        "state": ({k: v["sha256"] for k, v in manifest["files"].items()}, numbers, manifest["meta"]["method"]),
        "per_epoch": job.input_builder.sampler.steps_per_epoch,
        "valid": found,
    }


def train_stopped(ranks: Ranks, config: dict[str, Any], folder: str, stops: tuple[int, ...], rank: int) -> Any:
    """`train_with_stops` of ranks that are processes."""
    with signal_in(dict.fromkeys(stops, signal.SIGTERM), rank):
        return train_with_stops(ranks, config, folder, len(stops))


def log_of(folder: Path) -> list[dict[str, Any]]:
    """metrics.jsonl of the student without what depends on the clock."""
    lines = (folder / "stages/student/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines]


def assert_each_step_once(log: list[dict[str, Any]]) -> None:
    for kind in ("loss", "valid/mrr"):
        steps = [row["step"] for row in log if kind in row]
        assert steps == sorted(set(steps)), f"{kind} is logged twice or out of order"


def assert_bit_identical(many: list[dict[str, Any]], whole: list[dict[str, Any]]) -> None:
    for mine, theirs in zip(many, whole, strict=True):
        assert torch.equal(mine["rows"], theirs["rows"])
        assert torch.equal(mine["relation"], theirs["relation"])
        assert mine["state"] == theirs["state"]


@pytest.mark.parametrize(("method", "regime", "world"), all_pairs(STUDENTS, REGIMES, [1, 2]))
def test_a_stage_stopped_three_times_ends_with_the_rows_and_the_log_of_one_that_was_not(
    method: str, regime: str, world: int, tmp_path: Path
) -> None:
    config = student(method, regime)
    whole = run_on_threads(world, train_with_stops, config=config, folder=str(tmp_path / "whole"))
    per_epoch, last = whole[0]["per_epoch"], whole[0]["state"][1]["step"]
    # In the middle of an epoch and of a line of the log, at the very end of an epoch, and anywhere.
    drawn = random.Random(f"{method} {regime} {world}").randrange(2 * per_epoch + 3, last - 3)
    stops = (per_epoch // 2, 2 * per_epoch - 2, drawn)
    folder = tmp_path / "stopped"
    with signal_in(dict.fromkeys(stops, signal.SIGTERM), rank=world - 1):
        many = run_on_threads(world, train_with_stops, config=config, folder=str(folder), stops=3)
    # A rank hears of the signal in its next step at the latest; then the step is finished.
    assert [after - stop for after, stop in zip(many[0]["steps"], stops, strict=True)] == [2, 2, 2]
    assert_bit_identical(many, whole)
    logs = [log_of(run) for run in (folder, tmp_path / "whole")]
    assert [sorted(row) for row in logs[0]] == [sorted(row) for row in logs[1]]
    assert logs[0] == logs[1]
    if method == "dualde":
        assert whole[0]["state"][2]["stage"] == 2


@pytest.mark.parametrize(("method", "regime"), [("dualde", "triple"), ("metasd", "all")])
def test_ranks_that_are_processes_end_with_the_same_rows_after_a_signal_to_one_of_them(
    method: str, regime: str, tmp_path: Path
) -> None:
    config = student(method, regime)
    whole, many = (
        run_on_ranks(2, train_stopped, config=config, folder=str(tmp_path / str(stops)), stops=stops, rank=1)
        for stops in ((), (5, 26))
    )
    assert_bit_identical(many, whole)
    assert_each_step_once(log_of(tmp_path / "(5, 26)"))


def assert_same_when_stopped(config: dict[str, Any], stops: tuple[int, ...], folder: Path) -> dict[str, Any]:
    """One rank, stopped or not, ends with the same rows and state; what it ends with."""
    whole = train_with_stops(Ranks(), config, str(folder / "whole"))
    assert_bit_identical([train_stopped(Ranks(), config, str(folder / "stopped"), stops, 0)], [whole])
    return whole


@pytest.mark.parametrize("name", OptimizerConfig.model_fields["name"].annotation.__args__)
def test_every_optimiser_goes_on_with_its_state(name: str, tmp_path: Path) -> None:
    more = {"optimizer": {"name": name, "lr": 0.05, "relation_lr": 0.02, "clip": 3.0}, "epochs": 2}
    assert_same_when_stopped(student("scratch", "triple", **more), (3, 15), tmp_path)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "plateau"])
def test_every_schedule_goes_on_where_it_was(schedule: str, tmp_path: Path) -> None:
    more = {"schedule": {"name": schedule, "final": 0.2, "factor": 0.3, "patience": 1}, "accumulate": 2, "epochs": 6}
    config = student("scratch", "all", batch_size=60, **more)
    whole = assert_same_when_stopped(config, (8, 23), tmp_path)
    if schedule == "plateau":
        assert whole["state"][1]["plateau_scale"] < 1.0


def dualde_with_curve(curve: list[float], folder: Path) -> Job:
    """A DualDE job whose validations give the MRRs of `curve`, by epoch."""
    config = student("dualde", "all", optimizer={"name": "adam", "lr": 0.05}, epochs=8, batch_size=50)
    job = toy_job(config, Ranks(), folder)
    epochs = iter(range(len(curve)))
    done = list_steps(job.checkpoints)
    for _ in range(done[-1] // job.input_builder.sampler.steps_per_epoch if done else 0):
        next(epochs)
    job.validate = lambda: {"mrr": curve[next(epochs)]}
    return job


# Best after epoch 2, not after 3 and 4: stage two starts there, from the rows of epoch 2.
CURVE = [0.2, 0.3, 0.1, 0.2, 0.25, 0.1]


@pytest.fixture(scope="module")
def unstopped(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """DualDE's job of `CURVE`, trained to its end."""
    job = dualde_with_curve(CURVE, tmp_path_factory.mktemp("unstopped"))
    loads: list[tuple[str, str]] = []
    real = loop.load_group
    with mock.patch.object(loop, "load_group", lambda j, g, p: (loads.append((g, p.name)), real(j, g, p))):
        progress = train_stage(job)
    per_epoch = job.input_builder.sampler.steps_per_epoch
    best = loop.step_name(2 * per_epoch)
    assert loads == [("student", best), ("student", best)], "once for stage two, once for the model"
    assert job.method.state().values == {"stage": 2, "stage_two_since": 4}
    assert progress.step == 6 * per_epoch
    return job


@pytest.mark.parametrize("offset", [-3, -2, -1, 0, 1, 4])
def test_dualde_stopped_around_its_change_of_stage_restores_the_best_rows_all_the_same(
    offset: int, unstopped: Job, tmp_path: Path
) -> None:
    per_epoch = unstopped.input_builder.sampler.steps_per_epoch
    stop = 4 * per_epoch + offset
    with signal_in({stop: signal.SIGINT}), pytest.raises(Stopped):
        train_stage(dualde_with_curve(CURVE, tmp_path))
    again = dualde_with_curve(CURVE, tmp_path)
    assert train_stage(again).step == 6 * per_epoch
    for group, dense in unstopped.dense.items():
        other = again.dense[group]
        assert dense.steps == other.steps
        for name, tensor in dense.tensors.items():
            assert torch.equal(tensor, other.tensors[name]), (group, name)
            assert all(torch.equal(v, other.state()[name][k]) for k, v in dense.state()[name].items()), (group, name)
    for group, rows in unstopped.rows.items():
        assert rows.steps == again.rows[group].steps
        assert torch.equal(rows.table.weight, again.rows[group].table.weight), group
        assert all(torch.equal(v, again.rows[group].state[k]) for k, v in rows.state.items()), group


@pytest.mark.parametrize(("first", "then"), [(1, 2), (2, 1), (2, 3)])
def test_a_resume_on_another_number_of_ranks_trains_the_same_model_to_rounding(
    first: int, then: int, tmp_path: Path
) -> None:
    config = student("bkd", "all")
    whole = train_with_stops(Ranks(), config, str(tmp_path / "whole"))
    folder = str(tmp_path / "changed")
    with signal_in({14: signal.SIGTERM}):
        run_on_threads(first, train_until_stopped, config=config, folder=folder)
    many = run_on_threads(then, train_with_stops, config=config, folder=folder)
    rows = torch.cat([rank["rows"] for rank in many])
    torch.testing.assert_close(rows, whole["rows"], rtol=0, atol=1e-3)
    assert many[0]["valid"] == pytest.approx(whole["valid"], abs=2e-3, rel=2e-3)
    assert_each_step_once(log_of(tmp_path / "changed"))


def train_until_stopped(ranks: Ranks, config: dict[str, Any], folder: str) -> None:
    """Train a toy stage until a signal (`signal_in`)."""
    with pytest.raises(Stopped):
        train_stage(toy_job(config, ranks, Path(folder)))


def stop_in(ranks: Ranks, config: dict[str, Any], folder: str, step: int) -> None:
    """`train_until_stopped` of ranks that are processes."""
    with signal_in({step: signal.SIGTERM}):
        train_until_stopped(ranks, config, folder)


def stop_plan(config: dict[str, Any], folder: Path, steps: dict[int, int]) -> None:
    parsed = parse_config({"mlflow": {"enabled": False}} | config, "test")
    with signal_in(steps):
        run_plan(parsed, toy_graph(), Ranks(), folder, resume=True, display=Display(False))


@pytest.mark.parametrize("from_the_end", [1, 2])
def test_a_signal_in_the_last_steps_of_a_stage_stops_the_plan_before_the_next_one(
    from_the_end: int, tmp_path: Path
) -> None:
    small = {"dim": 8, "batch_size": 60, "epochs": 2, "validate_every": 1}
    config = {"teacher": small, "student": {**small, "epochs": 3, "method": "bkd"}}
    per_epoch = -(-len(toy_graph().train) // 60)
    with pytest.raises(Stopped):
        stop_plan(config, tmp_path, {2 * per_epoch - from_the_end: signal.SIGTERM})
    assert not (tmp_path / "stages/student/model").exists()
    assert not list_steps(tmp_path / "stages/student/checkpoint"), "the student was trained all the same"
    stop_plan(config, tmp_path, {})
    assert (tmp_path / "report.json").is_file()


def test_the_metrics_of_a_finished_stage_are_those_of_its_rows(tmp_path: Path) -> None:
    done = train_stopped(Ranks(), student("scratch", "all"), str(tmp_path), (20,), 0)
    best = max(row["valid/mrr"] for row in log_of(tmp_path) if "valid/mrr" in row)
    assert done["valid"]["mrr"] == best
    assert metrics(torch.ones(1))["mrr"] == 1.0


def test_every_method_is_in_this_test() -> None:
    assert STUDENTS.keys() == METHODS.keys()


# -- processes that really die ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_data(tmp_path_factory.mktemp("resume") / "data")


def taught(path: Path, data: Path, epochs: int) -> Path:
    """A teacher and its DualDE student, who both write a checkpoint after every epoch."""
    teacher = {"dim": 16, "batch_size": 60, "epochs": epochs, "validate_every": 2, "checkpoint_every": 1}
    more = {"method": "dualde", "validate_every": 2, "distill": {"stage_two": {"start": epochs // 2, "epochs": 4}}}
    return small_config(path, data, teacher=teacher, student=more | {"epochs": epochs, "batch_size": 60})


def killed_and_resumed(config: Path, folder: Path, cwd: Path, world: int, seed: int) -> None:
    """A launch that dies at a moment drawn from `seed` (odd: in the teacher, even: in the student), and goes on."""
    generator = random.Random(seed)
    arguments: list[str | Path] = [config, "--out", folder, "--resume"]
    process = start(arguments, cwd, world)
    stage, step = folder / "stages" / ("teacher" if seed % 2 else "student"), generator.randrange(5, 60)
    wait_for(process, cwd, lambda: (steps_saved(stage) or [0])[-1] >= step)
    # Anywhere in a step, in a validation or in the writing of the next checkpoint.
    with suppress(subprocess.TimeoutExpired):
        process.wait(generator.random() * 0.05)
    kill_all(process)
    assert process.returncode == -signal.SIGKILL, "it was over before it could be killed"
    code, output = distil(arguments, cwd, world)
    assert code == 0, output
    assert "resumed at step" in output
    assert "Traceback" not in output


SLOW = pytest.mark.slow


# Of two ranks: tests/invariants/test_kills.py, and by torchrun tests/pipeline/test_elastic.py.
@pytest.mark.parametrize(
    ("world", "seeds"), [(1, [0]), *(pytest.param(world, [1, 2, 3, 4], marks=SLOW) for world in (1, 2))]
)
def test_a_run_killed_at_any_moment_and_resumed_writes_the_same_bytes(
    world: int, seeds: list[int], data: Path, tmp_path: Path
) -> None:
    # Long enough that neither stage ends between the step that was drawn and the kill, whatever else is at work.
    config = taught(tmp_path / "config.yaml", data, epochs=36)
    whole = tmp_path / "whole"
    code, output = distil([config, "--out", whole], tmp_path, world)
    assert code == 0, output
    for seed in seeds:
        folder = tmp_path / f"killed-{seed}"
        killed_and_resumed(config, folder, tmp_path, world, seed)
        for stage in ("teacher", "student"):
            mine, theirs = (model_bytes(run / "stages" / stage) for run in (folder, whole))
            assert len(theirs) == 2 * world
            assert mine == theirs
        reports = [json.loads((run / "report.json").read_text(encoding="utf-8"))["stages"] for run in (folder, whole)]
        assert [s["test"] for s in reports[0]] == [s["test"] for s in reports[1]]
        assert_each_step_once(log_of(folder))


def test_ctrl_c_saves_a_checkpoint_and_says_how_to_go_on(data: Path, tmp_path: Path) -> None:
    config, folder = small_config(tmp_path / "config.yaml", data), tmp_path / "run"
    with signal_in({9: signal.SIGINT}):
        code, _, said = call("distill", [config, "--out", folder])
    assert code == 128 + signal.SIGINT
    assert steps_saved(folder / "stages" / "student")[-1] == 11
    assert "after step 11" in said and "--resume" in said
    assert not (folder / "report.json").exists()


@pytest.mark.parametrize("world", [1, pytest.param(2, marks=SLOW)])
def test_a_signal_to_a_launch_saves_a_checkpoint_and_says_how_to_go_on(world: int, data: Path, tmp_path: Path) -> None:
    config = small_config(tmp_path / "config.yaml", data, student={"epochs": 5000, "checkpoint_every": 1000})
    folder = tmp_path / "run"
    process = start([config, "--out", folder], tmp_path, world)
    stage = folder / "stages" / "student"
    wait_for(process, tmp_path, lambda: (stage / "metrics.jsonl").is_file() and len(log_of(folder)) > 20)
    process.send_signal(signal.SIGTERM)
    code, output = finish(process, tmp_path, seconds=60)
    saved = steps_saved(stage)
    assert saved
    assert f"after step {saved[-1]}" in output
    assert "--resume" in output
    assert not (folder / "report.json").exists()
    if world == 1:
        assert code == 128 + signal.SIGTERM
        assert "Traceback" not in output
    else:
        # What torchrun itself prints and returns after a signal is its own affair.
        assert code != 0
        assert "distkgd/" not in output
