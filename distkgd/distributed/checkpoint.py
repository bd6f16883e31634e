"""A checkpoint is rows, not ranks: global row ranges in safetensors files, found again at any world size.

    folder/step_0000000123/
      rows-{lo}-{hi}.safetensors   all slices of one rank with that row range (no gather, never a pickle)
      replicated.safetensors       what every rank holds alike, written by rank 0
      manifest.json                written last: tables, files with sizes and sha256, meta, its own checksum

The folder is filled as `.step_….tmp` and renamed when complete, so a writer may be killed at any instant.
"""

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from distkgd.distributed.model_files import (
    DTYPES,
    Peers,
    Rows,
    Span,
    abandon,
    begin,
    check_cover,
    check_spans,
    copy_rows,
    discard,
    publish,
    restore,
    span_of,
    temporary_of,
    together,
    write_bytes,
    write_tensors,
)
from distkgd.errors import CheckpointError

__all__ = [
    "Peers",
    "Rows",
    "State",
    "latest",
    "list_steps",
    "load_rows",
    "load_tensors",
    "read_meta",
    "save",
    "verify",
]

VERSION = 1
MANIFEST = "manifest.json"
REPLICATED = "replicated.safetensors"
HASHING_THREADS = 8  # sha256 is what verifying waits for, and it runs outside the interpreter lock


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


# --- Writing


def save(folder: Path, step: int, state: State, peers: Peers, *, keep: int = 2, protect: Collection[int] = ()) -> Path:
    """Write the checkpoint of `step`, then prune to the newest `keep` and the `protect`ed steps.

    A checkpoint of the same step is replaced. Later steps (of a run that was resumed further back) neither
    count towards `keep` nor are removed. An error on any rank raises CheckpointError on all.
    """
    final = folder / f"step_{step:010d}"
    try:
        spans = together(peers, lambda: _prepare(final, step, state, keep, peers.rank), CheckpointError)
        written = together(peers, lambda: _write(temporary_of(final), state, spans, peers), CheckpointError)

        def finish() -> None:
            if peers.rank == 0:
                files = {name: record for records in written for name, record in records.items()}
                _write_manifest(temporary_of(final), _manifest_of(step, state.meta, spans, files))
                publish(final)
                _prune(folder, step, keep, protect)

        together(peers, finish, CheckpointError)
    except CheckpointError as e:
        if peers.rank == 0:
            abandon(final)
        raise CheckpointError(f"checkpoint {final} could not be written: {e}") from e.__cause__
    return final


def _prepare(final: Path, step: int, state: State, keep: int, rank: int) -> dict[str, Span]:
    """Rank 0 makes the temporary folder; every rank describes its rows."""
    if step < 0 or keep < 1:
        raise ValueError(f"step must be >= 0 and keep >= 1, got step={step}, keep={keep}")
    if rank == 0:
        for old in final.parent.glob(".old-step_*"):
            restore(old.with_name(old.name.removeprefix(".old-")))
        for stale in final.parent.glob(".step_*.tmp"):
            discard(stale)
        begin(final)
    return {name: span_of(name, rows) for name, rows in state.rows.items()}


def _file_names(spans: list[dict[str, Span]]) -> list[dict[tuple[int, int], str]]:
    """For each rank, the file of each of its row ranges.

    Ranges differ between ranks as a rule; where tables are split differently two ranks may hold equal
    ranges of different tables, and the later one gets a suffix.
    """
    seen: Counter[tuple[int, int]] = Counter()
    names = []
    for of_rank in spans:
        ranges = dict.fromkeys((span.lo, span.hi) for span in of_rank.values() if span.lo < span.hi)
        suffix = {r: f"-{seen[r]}" if seen[r] else "" for r in ranges}
        names.append({(lo, hi): f"rows-{lo:012d}-{hi:012d}{suffix[lo, hi]}.safetensors" for lo, hi in ranges})
        seen.update(ranges.keys())
    return names


def _write(folder: Path, state: State, spans: list[dict[str, Span]], peers: Peers) -> dict[str, Any]:
    """Write this rank's files; returns their sizes and checksums."""
    for name in dict.fromkeys(name for of_rank in spans for name in of_rank):
        without = [rank for rank, of_rank in enumerate(spans) if name not in of_rank]
        if without:
            raise ValueError(f"table {name!r}: ranks {without} do not name it; give zero rows instead")
        check_spans(name, [of_rank[name] for of_rank in spans])
    records = {}
    mine = spans[peers.rank]
    for (lo, hi), file in _file_names(spans)[peers.rank].items():
        tables = {name: state.rows[name].tensor for name, span in mine.items() if span[:2] == (lo, hi)}
        records[file] = write_tensors(folder / file, tables)
    if peers.rank == 0:
        records[REPLICATED] = write_tensors(folder / REPLICATED, state.tensors)
    return records


def _manifest_of(
    step: int, meta: dict[str, Any], spans: list[dict[str, Span]], files: dict[str, Any]
) -> dict[str, Any]:
    tables, names = {}, _file_names(spans)
    for name, any_span in spans[0].items():
        held = [(of_rank[name].lo, of_rank[name].hi) for of_rank in spans]
        parts = zip(held, names, strict=True)
        tables[name] = {
            "total": any_span.total,
            "row_shape": list(any_span.row_shape),
            "dtype": any_span.dtype,
            "files": [{"file": f[lo, hi], "lo": lo, "hi": hi} for (lo, hi), f in parts if lo < hi],
        }
    return {
        "version": VERSION,
        "step": step,
        "world": len(spans),
        "tables": tables,
        "files": files,
        "meta": meta,
    }


def _checksum(manifest: dict[str, Any]) -> str:
    body = {key: value for key, value in manifest.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    try:
        manifest = json.loads(json.dumps(manifest))  # as a reader will see it: string keys, lists
    except TypeError as e:
        raise ValueError(f"meta must hold only what JSON can: {e}") from e
    sealed = {**manifest, "checksum": _checksum(manifest)}
    write_bytes(folder / MANIFEST, [json.dumps(sealed, indent=1).encode()])


def _prune(folder: Path, step: int, keep: int, protect: Collection[int]) -> None:
    """Remove older checkpoints; one that is visibly damaged never takes the place of a good one."""
    older = {at: path for at, path in _found(folder).items() if at <= step}
    whole = [at for at, path in sorted(older.items()) if _is_whole(path)]
    for at, path in older.items():
        if at not in {step, *whole[-keep:], *protect}:
            discard(path)


# --- Finding


def _found(folder: Path) -> dict[int, Path]:
    """Checkpoint folders by step, whole or damaged; one caught in the middle of a replacement counts."""
    found: dict[int, Path] = {}
    for pattern in (r"\.old-step_(\d{10,})", r"step_(\d{10,})"):  # the later one wins
        for path in folder.iterdir() if folder.is_dir() else ():
            match = re.fullmatch(pattern, path.name)
            if match and path.is_dir():
                found[int(match[1])] = path
    return found


def list_steps(folder: Path) -> list[int]:
    """Steps of the complete checkpoints, ascending; their contents are not checked."""
    return sorted(step for step, path in _found(folder).items() if (path / MANIFEST).is_file())


def latest(folder: Path, peers: Peers, on_damage: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that verifies, the same on every rank; None when there is none.

    Rank 0 decides which folders there are; the ranks share the hashing.
    on_damage: called on rank 0 for each damaged one that is passed over, with a message naming the bad file
    """

    def candidates() -> list[str]:
        return [path.name for _, path in sorted(_found(folder).items(), reverse=True)]

    def damage(name: str) -> str | None:
        try:
            verify(folder / name, part=peers.rank, parts=peers.world)
        except CheckpointError as e:
            return str(e)
        return None

    def report(problem: str, previous: str | None) -> None:
        if peers.rank == 0:
            then = f"the previous one, {previous}, is used" if previous else "there is no previous one"
            on_damage(f"checkpoint is damaged: {problem}; {then}")

    names: list[str | None] = [*together(peers, candidates, CheckpointError)[0], None]
    for name, previous in pairwise(names):
        assert name is not None
        problem = next(filter(None, together(peers, partial(damage, name), CheckpointError)), None)
        if problem is None:
            return folder / name
        together(peers, partial(report, problem, previous), CheckpointError)
    return None


def _check_sizes(path: Path) -> dict[str, Any]:
    """The manifest, after everything but the files' contents has been checked."""
    manifest = read_meta(path)
    try:
        for name, table in manifest["tables"].items():
            check_cover(name, [(part["lo"], part["hi"]) for part in table["files"]], table["total"])
            for part in table["files"]:
                if part["file"] not in manifest["files"]:
                    raise ValueError(f"table {name!r}: no size and sha256 for {part['file']}")
        sizes = {name: record["size"] for name, record in manifest["files"].items()}
    except (KeyError, TypeError, AttributeError, ValueError) as e:
        raise CheckpointError(f"{path / MANIFEST}: {e}") from e
    for name, size in sizes.items():
        try:
            actual = os.stat(path / name).st_size
        except OSError as e:
            raise CheckpointError(f"{path / name}: missing: {e}") from e
        if actual != size:
            raise CheckpointError(f"{path / name}: {actual} bytes, expected {size}: truncated or overwritten")
    return manifest


def _is_whole(path: Path) -> bool:
    try:
        _check_sizes(path)
    except CheckpointError:
        return False
    return True


def verify(path: Path, *, part: int = 0, parts: int = 1) -> None:
    """CheckpointError, naming the file, unless every byte of the checkpoint is what was written.

    part, parts: hash only every `parts`-th file, so that ranks can share the work
    """
    records = _check_sizes(path)["files"]

    def check(name: str) -> None:
        try:
            with open(path / name, "rb") as f:
                actual = hashlib.file_digest(f, "sha256").hexdigest()
        except OSError as e:
            raise CheckpointError(f"{path / name}: cannot be read: {e}") from e
        if actual != records[name].get("sha256"):
            raise CheckpointError(f"{path / name}: sha256 differs from the manifest's: its content has changed")

    with ThreadPoolExecutor(HASHING_THREADS) as pool:
        list(pool.map(check, sorted(records)[part::parts]))


# --- Reading


def read_meta(path: Path) -> dict[str, Any]:
    """The manifest: "step", "world", "meta", "tables", "files", …; CheckpointError when it is damaged."""
    file = path / MANIFEST
    try:
        manifest = json.loads(file.read_bytes())
    except OSError as e:
        raise CheckpointError(f"{file}: missing or unreadable: {e}") from e
    except ValueError as e:
        raise CheckpointError(f"{file}: not JSON: {e}") from e
    if not isinstance(manifest, dict) or manifest.get("version") != VERSION:
        version = manifest.get("version") if isinstance(manifest, dict) else None
        raise CheckpointError(f"{file}: unknown format version {version!r}; this reader knows {VERSION}")
    if manifest.get("checksum") != _checksum(manifest):
        raise CheckpointError(f"{file}: its own checksum differs: its content has changed")
    return manifest


def load_rows(path: Path, name: str, lo: int, hi: int) -> Tensor:
    """[hi - lo, ...] the global rows [lo, hi) of a table, whichever files hold them; reads nothing else."""
    tables = read_meta(path)["tables"]
    if name not in tables:
        raise CheckpointError(f"{path}: no table {name!r}; it has {', '.join(sorted(tables)) or 'none'}")
    table = tables[name]
    if not 0 <= lo <= hi <= table["total"]:
        raise CheckpointError(f"{path}: table {name!r} has {table['total']} rows; rows [{lo}, {hi}) were asked for")
    out = torch.empty((hi - lo, *table["row_shape"]), dtype=DTYPES[table["dtype"]])
    for part in table["files"]:
        first, last = max(lo, part["lo"]), min(hi, part["hi"])
        if first < last:
            rows = out[first - lo : last - lo]
            copy_rows(path / part["file"], name, first - part["lo"], rows, CheckpointError)
    return out


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The replicated tensors."""
    read_meta(path)
    try:
        with safe_open(path / REPLICATED, "pt") as f:
            # a clone, because a tensor may be a map of the file, which pruning will remove
            return {name: f.get_tensor(name).clone() for name in f.keys()}  # noqa: SIM118 - not a dict
    except (OSError, SafetensorError) as e:
        raise CheckpointError(f"{path / REPLICATED}: missing or damaged: {e}") from e
