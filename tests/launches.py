"""Launches as users make them: a data set in a folder, a config file, and launch/distill.py in processes of its own."""

import contextlib
import importlib
import io
import os
import signal
import stat
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml

from distkgd.commands.cli import run_main
from distkgd.config.tree import merge
from tests.programs import Program, started

ROOT = Path(__file__).resolve().parent.parent
LAUNCH_SECONDS = 200

SMALL: dict[str, Any] = {
    "device": "cpu",
    "threads": 1,
    "mlflow": {"enabled": False},
    "student": {
        "dim": 8,
        "batch_size": 60,
        "epochs": 3,
        "validate_every": 1,
        "checkpoint_every": 1,
        "dropout": 0.1,
        "regulariser": {"name": "n3", "weight": 0.01},
    },
}


def small_data(folder: Path, entities: int = 50, relations: int = 4, triples: int = 560, seed: int = 0) -> Path:
    """A data set of three TSV files in `folder`: two thirds of its triples follow a rule, the others are noise."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.tensor([entities, relations, entities])
    rows = (torch.rand(triples, 3, generator=generator) * sizes).long()
    ruled = torch.rand(triples, generator=generator) < 2 / 3
    rows[ruled, 2] = (rows[ruled, 0] + 3 * rows[ruled, 1] + 1) % entities
    rows = torch.unique(rows, dim=0)
    rows = rows[torch.randperm(len(rows), generator=generator)]
    cut = len(rows) // 8
    folder.mkdir(parents=True)
    for split, part in (("valid", rows[:cut]), ("test", rows[cut : 2 * cut]), ("train", rows[2 * cut :])):
        lines = [f"e{h:02d}\tr{r}\te{t:02d}\n" for h, r, t in part.tolist()]
        (folder / f"{split}.tsv").write_text("".join(lines), encoding="utf-8")
    return folder


def small_config(path: Path, data: Path, **changes: Any) -> Path:
    """A config file that trains a small student on `data`; `changes` go over it, key by key."""
    tree = merge(SMALL | {"data": str(data)}, changes)
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


def program(launcher: str) -> Callable[..., None]:
    """`main` of launch/`launcher`.py, or of the side-by-side measurements ("bench")."""
    module = "benchmarks.side_by_side.__main__" if launcher == "bench" else f"launch.{launcher}"
    main: Callable[..., None] = importlib.import_module(module).main
    return main


def call(launcher: str, arguments: Sequence[str | Path]) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a launcher's function in this process.

    An exception that would be a traceback at the terminal is the caller's.
    """
    main = program(launcher)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run_main(main, [str(argument) for argument in arguments])
    return code, out.getvalue(), err.getvalue()


def held(path: Path) -> dict[str, object]:
    """Everything below a folder: files with their bytes, links, folders and pipes by their kind."""
    found: dict[str, object] = {}
    for entry in path.rglob("*"):
        mode = stat.S_IFMT(entry.lstat().st_mode)
        found[str(entry.relative_to(path))] = entry.read_bytes() if mode == stat.S_IFREG else mode
    return found


def refusal(launcher: str, arguments: Sequence[str], words: Sequence[str] = ()) -> str | None:
    """What is wrong with how a launcher refuses, None if nothing is."""
    try:
        code, out, err = call(launcher, arguments)
    except Exception as error:
        return f"traceback: {type(error).__name__}: {str(error)[:300]}"
    lines = [line for line in err.strip().splitlines() if not line.startswith("warning: ")]
    if code != 2 or "Traceback" in err:
        return f"exit code {code}: {(err or out)[-300:]!r}"
    if out:
        return f"results where nothing came of it: {out[:300]!r}"
    told = " ".join(line.strip("│ ") for line in lines)
    if not (lines and lines[0].startswith(("error: ", "Usage: ", "╭─ Error"))):
        return f"no error: {err[:300]!r}"
    missing = [word for word in words if word not in told and word.replace("\n", " ") not in told]
    return f"does not say {missing}: {told[:400]!r}" if missing else None


def start(arguments: Sequence[str | Path], cwd: Path, world: int = 1, torchrun: Sequence[str] = ()) -> Program:
    """launch/distill.py with `arguments`, running; its output is one text.

    world: > 1 goes through torchrun; processes of this agent.
    torchrun: further arguments of it; with any, world 1 goes through it, too.
    """
    command = []
    if world > 1 or torchrun:
        alone = [] if "--rdzv-backend" in torchrun else ["--standalone"]
        command = ["-m", "torch.distributed.run", *alone, "--nproc-per-node", str(world), *torchrun]
    command += [str(ROOT / "launch" / "distill.py"), *map(str, arguments)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "NO_COLOR": "1", "COLUMNS": "110"}
    return started(command, cwd, env, cwd / "output.txt")


def finish(process: Program, cwd: Path, seconds: float = LAUNCH_SECONDS) -> tuple[int, str]:
    """Exit code and output so far of a started launch, once it has ended."""
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        kill_all(process)
        raise AssertionError(f"still running after {seconds} s:\n{output_of(cwd)}") from None
    return code, output_of(cwd)


def distil(arguments: Sequence[str | Path], cwd: Path, world: int = 1) -> tuple[int, str]:
    """Exit code and output of a whole launch."""
    return finish(start(arguments, cwd, world), cwd)


def output_of(cwd: Path) -> str:
    """What the launches in `cwd` have printed."""
    return (cwd / "output.txt").read_text(encoding="utf-8", errors="replace")


def family(process: Program) -> list[psutil.Process]:
    """The process and all its descendants."""
    try:
        parent = psutil.Process(process.pid)
        return [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def rank_process(process: Program, rank: int) -> psutil.Process:
    """The process of one rank of a torchrun launch."""
    for child in family(process)[1:]:
        if child.name() == f"rank {rank}":
            return child
    raise AssertionError(f"no process of rank {rank}")


def kill_all(process: Program) -> None:
    """SIGKILL to the whole family at once, as when a machine dies."""
    members = family(process)
    for member in members:
        member.suspend()  # so that nobody sees another one die first
    for member in members:
        member.send_signal(signal.SIGKILL)
    process.wait()
    psutil.wait_procs(members, timeout=10)


def wait_for(process: Program, cwd: Path, happened: Callable[[], Any]) -> None:
    """Wait until something is true while the launch runs; AssertionError with its output if it ends before."""
    deadline = time.monotonic() + LAUNCH_SECONDS
    while not happened():
        if process.poll() is not None or time.monotonic() > deadline:
            kill_all(process)
            raise AssertionError(f"it never happened; the launch said:\n{output_of(cwd)}")
        time.sleep(0.002)


def steps_saved(stage: Path) -> list[int]:
    """Steps of the checkpoints of a stage folder, ascending."""
    return sorted(int(path.name.removeprefix("step_")) for path in (stage / "checkpoint").glob("step_*"))


def model_bytes(stage: Path) -> dict[str, bytes]:
    """The table files of a stage's finished model, by name."""
    return {path.name: path.read_bytes() for path in sorted((stage / "model").glob("*.safetensors"))}
