"""Writes checkpoints while training goes on.

1. `Writer.save`, on all ranks: the rows go to files of a temporary folder by plain writes. The page cache is the
   snapshot: no second copy of a shard is made, and the tensors may change again.
2. A thread of each rank, without any collective, makes that rank's files durable, takes their checksums, and leaves
   them in a record beside the files.
3. A second thread of rank 0 waits for all records, writes the manifest, renames the folder and prunes.

Every attempt fills a folder of its own, `.step_…-{token}.tmp`. So a writer may be killed at any instant, and one that
is not quite dead yet cannot reach into the next attempt at the same step.
"""

import json
import secrets
import time
from collections.abc import Callable, Collection
from concurrent import futures
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Thread
from typing import Any, NoReturn

from torch import Tensor

from distkgd.common.files import discard, empty_trash, publish, restore, sync
from distkgd.distributed.checkpoint.reader import MANIFEST, REPLICATED, VERSION, checksum_of, found_in, is_whole
from distkgd.distributed.checkpoint.tables import (
    Rows,
    Span,
    check_spans,
    on_every_rank,
    seal,
    span_of,
    write_bytes,
    write_tensors,
)
from distkgd.distributed.ranks import Ranks
from distkgd.errors import CheckpointError

PATIENCE_SECONDS = 1.0  # between two words to the other ranks: far below the time after which they give a peer up
RECORD_SECONDS = 600.0  # how much longer than rank 0 another rank may take
LEAVING_SECONDS = 5.0  # what an error in the training loop waits for a checkpoint that is nearly there


@dataclass
class State:
    """What a checkpoint holds.

    rows: this rank's slices of the row tables; every rank names the same tables
    tensors: equal on all ranks; rank 0 writes them
    meta: JSON-able; rank 0's is written
    """

    rows: dict[str, Rows] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)


class Writer:
    """Writes a stage's checkpoints, each one while training goes on.

    As a context manager it gives a checkpoint that is being written a few seconds when an error ends the loop.
    """

    def __init__(self, folder: Path, peers: Ranks, *, keep: int = 2) -> None:
        if keep < 1:
            raise ValueError(f"keep must be >= 1, got keep={keep}")
        self._folder = folder
        self._peers = peers
        self._keep = keep
        self._flight: _Flight | None = None
        self._published: Path | None = None

    def save(self, step: int, state: State, *, protect: Collection[int] = ()) -> None:
        """Start the checkpoint of `step`; all ranks call it. On return everything in `state` may be changed.

        The previous one is finished first. A checkpoint of the same step is replaced. Once published, the newest `keep`
        and the `protect`ed steps stay; later steps (of a run that was resumed further back) neither count towards
        `keep` nor are removed. An error on any rank raises CheckpointError on all.
        """
        self._land()
        peers, final = self._peers, self._folder / f"step_{step:010d}"
        drawn = self._folder / f".{final.name}-{secrets.token_hex(4)}.tmp"  # rank 0's is taken
        try:
            plans = on_every_rank(peers, lambda: self._plan(drawn, step, state), CheckpointError)
            temporary, spans = plans[0][0], [spans for _, spans in plans]
            sizes = on_every_rank(peers, lambda: _fill(temporary, state, spans, peers.rank), CheckpointError)
            meta = json.loads(json.dumps(state.meta)) if peers.rank == 0 else {}
        except CheckpointError as e:
            self._give_up(final, drawn, e)
        sealed = _background(lambda: _seal_files(temporary, peers.rank, sizes[peers.rank]))
        flight = _Flight(final, temporary, [sealed])
        if peers.rank == 0:
            manifest = _manifest_of(step, meta, spans)
            kept = frozenset(protect)
            flight.tasks.append(_background(lambda: self._publish(flight, manifest, kept)))
        self._flight = flight

    def wait(self) -> Path | None:
        """Until nothing is being written; all ranks call it. The newest checkpoint published since the last call.

        An error on any rank, also one of a thread, raises CheckpointError on all.
        """
        self._land()
        path, self._published = self._published, None
        return path

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        # Nothing collective: after an error the other ranks may be elsewhere, or gone.
        if error is not None and self._flight is not None:
            _, unfinished = futures.wait(self._flight.tasks, LEAVING_SECONDS)
            self._flight.given_up.set()
            if unfinished or any(task.exception() for task in self._flight.tasks):
                error.add_note(
                    f"The checkpoint {self._flight.final} could not be finished; the one before it is whole."
                )

    def _plan(self, temporary: Path, step: int, state: State) -> tuple[Path, dict[str, Span]]:
        """Rank 0 makes the temporary folder; every rank describes its rows."""
        if self._peers.rank == 0:
            if step < 0:
                raise ValueError(f"step must be >= 0, got step={step}")
            try:
                json.dumps(state.meta)
            except TypeError as e:
                raise ValueError(f"meta must hold only what JSON can: {e}") from e
            self._folder.mkdir(parents=True, exist_ok=True)
            _clear(self._folder)
            temporary.mkdir()
        return temporary, {name: span_of(name, rows) for name, rows in state.rows.items()}

    def _land(self) -> None:
        """Wait for the checkpoint that is being written, if any; every rank hears of an error on any."""
        flight = self._flight
        if flight is None:
            return
        try:
            while not all(on_every_rank(self._peers, flight.is_done, CheckpointError)):
                pass
        except CheckpointError as e:
            self._flight = None
            flight.given_up.set()
            if self._peers.rank == 0:
                futures.wait(flight.tasks)
            self._give_up(flight.final, flight.temporary, e)
        self._flight, self._published = None, flight.final

    def _give_up(self, final: Path, temporary: Path, error: CheckpointError) -> NoReturn:
        if self._peers.rank == 0:
            with suppress(OSError):  # it is not there any more, or the next `save` will clear it
                discard(temporary)
        raise CheckpointError(f"checkpoint {final} could not be written: {error}") from error.__cause__

    def _publish(self, flight: "_Flight", manifest: dict[str, Any], protect: Collection[int]) -> None:
        """On rank 0: all that happens once every rank's files are durable."""
        flight.tasks[0].result()
        manifest["files"] = _collect(flight, manifest["world"])
        path = flight.temporary / MANIFEST
        write_bytes(path, [json.dumps({**manifest, "checksum": checksum_of(manifest)}, indent=1).encode()])
        sync(path)
        publish(flight.temporary, flight.final)
        _prune(self._folder, manifest["step"], self._keep, protect)


# --- A checkpoint on its way


@dataclass
class _Flight:
    """tasks: this rank's threads, rank 0's publishing one last. given_up: nobody waits for them any more."""

    final: Path
    temporary: Path
    tasks: list["Future[None]"]
    given_up: Event = field(default_factory=Event)

    def is_done(self) -> bool:
        """Whether this rank's part is done, waited for a few seconds; raises what a thread has raised."""
        ended, running = futures.wait(self.tasks, PATIENCE_SECONDS, futures.FIRST_EXCEPTION)
        for task in ended:
            task.result()
        return not running


def _background(action: Callable[[], None]) -> "Future[None]":
    """`action` in a thread that does not hold up the end of the process (an executor's would)."""
    future: Future[None] = Future()

    def run() -> None:
        try:
            action()
        except BaseException as e:  # whoever waits for the future gets it
            future.set_exception(e)
        else:
            future.set_result(None)

    Thread(target=run, name="checkpoint", daemon=True).start()
    return future


def _fill(folder: Path, state: State, spans: list[dict[str, Span]], rank: int) -> dict[str, int]:
    """Write this rank's files; returns their sizes."""
    for name in dict.fromkeys(name for of_rank in spans for name in of_rank):
        without = [rank for rank, of_rank in enumerate(spans) if name not in of_rank]
        if without:
            raise ValueError(f"table {name!r}: ranks {without} do not name it; give zero rows instead")
        check_spans(name, [of_rank[name] for of_rank in spans])
    sizes = {}
    if tables := {name: rows.tensor for name, rows in state.rows.items() if len(rows.tensor)}:
        sizes[_rows_of(rank)] = write_tensors(folder / _rows_of(rank), tables)
    if rank == 0:
        sizes[REPLICATED] = write_tensors(folder / REPLICATED, state.tensors)
    return sizes


def _record_of(folder: Path, rank: int) -> Path:
    return folder / f"record-{rank:05d}.json"


def _seal_files(folder: Path, rank: int, sizes: dict[str, int]) -> None:
    """Make this rank's files durable and leave their sizes and checksums in its record."""
    records = {name: seal(folder / name, size) for name, size in sizes.items()}
    part = folder / f"record-{rank:05d}.part"
    write_bytes(part, [json.dumps(records).encode()])
    part.replace(_record_of(folder, rank))


def _collect(flight: _Flight, world: int) -> dict[str, Any]:
    """Sizes and checksums of all files; takes the ranks' records away as they come."""
    files: dict[str, Any] = {}
    missing, pause, deadline = [*range(world)], 0.001, time.monotonic() + RECORD_SECONDS
    while True:
        for rank in [*missing]:
            record = _record_of(flight.temporary, rank)
            if record.exists():
                files |= json.loads(record.read_bytes())
                record.unlink()
                missing.remove(rank)
        if not missing:
            return files
        if flight.given_up.wait(pause):
            raise CheckpointError(f"given up before ranks {missing} had written their part")
        if time.monotonic() > deadline:
            raise CheckpointError(
                f"ranks {missing} have left no record in {flight.temporary} within {RECORD_SECONDS:g} s; "
                "is the folder on a file system that all ranks share?"
            )
        pause = min(2 * pause, 0.1)


def _rows_of(rank: int) -> str:
    return f"rows-{rank:05d}.safetensors"


def _manifest_of(step: int, meta: dict[str, Any], spans: list[dict[str, Span]]) -> dict[str, Any]:
    """The manifest without "files" and "checksum"."""
    tables = {}
    for name, any_span in spans[0].items():
        held = [(rank, of_rank[name].lo, of_rank[name].hi) for rank, of_rank in enumerate(spans)]
        tables[name] = {
            "total": any_span.total,
            "row_shape": list(any_span.row_shape),
            "dtype": any_span.dtype,
            "files": [{"file": _rows_of(rank), "lo": lo, "hi": hi} for rank, lo, hi in held if lo < hi],
        }
    return {"version": VERSION, "step": step, "world": len(spans), "tables": tables, "meta": meta}


def _clear(folder: Path) -> None:
    """Finish or remove what earlier attempts left."""
    empty_trash(folder)
    for old in folder.glob(".old-step_*"):
        restore(old.with_name(old.name.removeprefix(".old-")))
    for stale in folder.glob(".step_*.tmp"):
        discard(stale)


def _prune(folder: Path, step: int, keep: int, protect: Collection[int]) -> None:
    """Remove older checkpoints; one that is visibly damaged never takes the place of a good one."""
    older = {at: path for at, path in found_in(folder).items() if at <= step}
    whole = [at for at, path in sorted(older.items()) if is_whole(path)]
    for at, path in older.items():
        if at not in {step, *whole[-keep:], *protect}:
            discard(path)
