"""A checkpoint is rows, not ranks: global row ranges in safetensors files, found again at any world size.

    folder/step_0000000123/
      rows-{rank}.safetensors   the slices of one rank (no gather, never a pickle); the manifest says of which rows
      replicated.safetensors    what every rank holds alike, written by rank 0
      manifest.json             written last: tables, files with sizes and sha256, meta, its own checksum

`writer.py` fills a hidden folder and renames it when complete: what has this name was whole once.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from distkgd.distributed.checkpoint.tables import DTYPES, check_cover, fill_rows, on_every_rank
from distkgd.distributed.ranks import Ranks
from distkgd.errors import CheckpointError

VERSION = 1
MANIFEST = "manifest.json"
REPLICATED = "replicated.safetensors"
HASHING_THREADS = 8  # sha256 is what verifying waits for, and it runs outside the interpreter lock


# --- Finding


def found_in(folder: Path) -> dict[int, Path]:
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
    return sorted(step for step, path in found_in(folder).items() if (path / MANIFEST).is_file())


def latest(folder: Path, peers: Ranks, on_damage: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that verifies, the same on every rank; None when there is none.

    Rank 0 decides which folders there are; the ranks share the hashing.
    on_damage: called on rank 0 for each damaged one that is passed over, with a message naming the bad file
    """

    def candidates() -> list[str]:
        return [path.name for _, path in sorted(found_in(folder).items(), reverse=True)]

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

    names: list[str | None] = [*on_every_rank(peers, candidates, CheckpointError)[0], None]
    for name, previous in pairwise(names):
        assert name is not None
        problem = next(filter(None, on_every_rank(peers, partial(damage, name), CheckpointError)), None)
        if problem is None:
            return folder / name
        on_every_rank(peers, partial(report, problem, previous), CheckpointError)
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


def is_whole(path: Path) -> bool:
    """Whether all files are there with their sizes; their contents are not checked."""
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


def checksum_of(manifest: dict[str, Any]) -> str:
    """sha256 of a manifest without its checksum."""
    body = {key: value for key, value in manifest.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


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
    if manifest.get("checksum") != checksum_of(manifest):
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
    parts = [(path / part["file"], part["lo"], part["hi"]) for part in table["files"]]
    return fill_rows(out, lo, name, parts, CheckpointError)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The replicated tensors."""
    read_meta(path)
    try:
        with safe_open(path / REPLICATED, "pt") as f:
            # a clone, because a tensor may be a map of the file, which pruning will remove
            return {name: f.get_tensor(name).clone() for name in f.keys()}  # noqa: SIM118 - not a dict
    except (OSError, SafetensorError) as e:
        raise CheckpointError(f"{path / REPLICATED}: missing or damaged: {e}") from e
