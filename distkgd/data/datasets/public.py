"""Public data sets by name: found on this machine, or downloaded once and checked before they are kept.

Looked for in `$DISTKGD_DATA/<name>/`, then in the user's cache, `$XDG_CACHE_HOME/distkgd/<name>/` (by default
`~/.cache/distkgd/<name>/`), then at the public address. A download is unpacked beside its place in the cache
and moved there in one step, so no reader ever sees half of it.
"""

from __future__ import annotations

import gzip
import hashlib
import http.client
import io
import os
import tarfile
import tempfile
import urllib.request
import zlib
from dataclasses import replace
from pathlib import Path, PurePosixPath

from distkgd.common.version import __version__
from distkgd.data.reading.folders import read_folder
from distkgd.data.triples import SPLITS, Graph
from distkgd.errors import DataError

TIMEOUT = 60.0  # seconds without a byte


# Of the decompressed files, CRLF read as LF (FB15k-237 is published with CRLF).
SHA256: dict[str, dict[str, str]] = {
    "wn18rr": {
        "train": "038612e783c215ee5f3ca9fbfca27b8d0739be1028fe4ee7c174aecf0b83d5df",
        "valid": "453ce7202afa58094a04d2b1560ee2b02660f1c260b32ce6651c8ccedd1028ab",
        "test": "0383bceaaa1096cf3c03ec021ed0048068e2355dbfc0239b292cefdac821cec5",
    },
    "fb15k-237": {
        "train": "61099230e4439f90885ca9767739e31e8e32f54736fa1c35952b27997bc7c08a",
        "valid": "749cbe9d923bac7b9354da5614ecfed2e0220256d442c3e04a6b303db1f273d9",
        "test": "e2e35e8e6113de220140b6f44dc71a5207b0fc6872d575e874aefe13259b655b",
    },
    "codex-s": {
        "train": "64f93b7f314f3936a6f65739721429db3f6a7c8f5a1e1104ec3bb544f7434f59",
        "valid": "3831c0e57daef03c3a18cdd1a72e370b496f696c5218883d35c7d2ab8a6a772c",
        "test": "27127fcb34688c4778e88a39ef3c9b540807da846021e9d9685660ac1838aca1",
    },
    "umls": {
        "train": "873ef4925516b83e7f6f8cc02b4be51d848828710a7f65a956f0ac4a9e452f35",
        "valid": "025c98f8a4891e2a6582ec5b40ee0d904031edad9c52554522f4b7904820c98e",
        "test": "a7eb529a3d2810fcc96341ccc97c625a5e202f8389673aa6bd317eeebbb79014",
    },
    "kinship": {
        "train": "738612111a6acf0e39662bde24c7e72a4d1edf20931beea077da367dda689731",
        "valid": "c56f8630a583178b1e569f11a64aa535ae1ce0b0912d8b1e24716be2b37f04da",
        "test": "05e5733265761d55be9c05bfaff5a8d0808df46f9c1e9d66cc3f2fe114e43d88",
    },
    "nations": {
        "train": "0830fa9da8e5bba2ccdaa45b7bdc9130451ba66b09ff2708f35fccaf82473e57",
        "valid": "2b337a62e51a2f45c283eac98a70d21b7e0e102136be1539b2a52c652a7b0530",
        "test": "3971085165b47b6aeaec68058c6d8d98b3005e929db81268410b95ae4db770ab",
    },
}
_CONVE = "https://github.com/TimDettmers/ConvE/raw/master/"
_CODEX = "https://raw.githubusercontent.com/tsafavi/codex/master/data/triples/"
# Of a tar archive with the three files; or, with {split} in it, of each file.
PUBLIC: dict[str, str] = {
    "wn18rr": _CONVE + "WN18RR.tar.gz",
    "fb15k-237": _CONVE + "FB15k-237.tar.gz",
    "yago3-10": _CONVE + "YAGO3-10.tar.gz",
    "codex-s": _CODEX + "codex-s/{split}.txt",
    "codex-m": _CODEX + "codex-m/{split}.txt",
    "codex-l": _CODEX + "codex-l/{split}.txt",
    "umls": _CONVE + "umls.tar.gz",
    "kinship": _CONVE + "kinship.tar.gz",
    "nations": _CONVE + "nations.tar.gz",
}
TRAIN_MD5 = {"yago3-10": "a9da8f583ec3920570eeccf07199229a"}  # of the train file, where no more is published


def load_public(name: str) -> Graph:
    """The graph of a name in `PUBLIC`. Raises DataError when it cannot be had or is not the published one."""
    data = os.environ.get("DISTKGD_DATA")
    cache = cache_folder() / name
    for folder in ([Path(data) / name] if data else []) + [cache]:
        if folder.is_dir():
            return _read(folder, name)
    unpacked = ""
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=cache.parent, ignore_cleanup_errors=True) as unpacked:
            _download(PUBLIC[name], Path(unpacked))
            graph = _read(Path(unpacked), name)
            _move(Path(unpacked), cache)
            return graph
    except OSError as error:
        raise DataError(f"{cache}: no place for a download ({error}); set XDG_CACHE_HOME or DISTKGD_DATA") from error
    except DataError as error:
        reason = str(error).replace(unpacked, PUBLIC[name])
        by_hand = f"put its files into {Path(data or '$DISTKGD_DATA') / name}"
        raise DataError(f"{name} was not downloaded, nothing was kept: {reason}; try again, or {by_hand}") from error


def cache_folder() -> Path:
    """Where downloads are kept."""
    base = os.environ.get("XDG_CACHE_HOME")
    return Path(base or os.path.expanduser("~/.cache")) / "distkgd"


def _read(folder: Path, name: str) -> Graph:
    known = SHA256.get(name, {})
    graph = read_folder(folder, name, known)
    if known:
        return graph
    checked = "nothing could be checked"
    if name in TRAIN_MD5:
        _check_md5(next(folder.glob("train.*")), TRAIN_MD5[name])
        checked = "only train could be checked, by its md5"
    warning = f"no sha256 is published for {name}: {checked}; sha256 of train, valid, test as read: {graph.sha256}"
    return replace(graph, warnings=(*graph.warnings, warning))


def _check_md5(path: Path, expected: str) -> None:
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    # Whether the published sum is of LF or CRLF line ends is not said; either is the same text.
    found = {hashlib.md5(text, usedforsecurity=False).hexdigest() for text in (data, data.replace(b"\r\n", b"\n"))}
    if expected not in found:
        raise DataError(
            f"{path}: its md5 is {min(found)}, expected {expected}: it is not the published file; remove it"
        )


def _download(address: str, folder: Path) -> None:
    if "{split}" not in address:
        _unpack(_fetch(address), folder, address)
        return
    for split in SPLITS:
        (folder / f"{split}.txt").write_bytes(_fetch(address.format(split=split)))


def _fetch(address: str) -> bytes:
    # Some hosts turn away a client that does not say who it is.
    request = urllib.request.Request(address, headers={"User-Agent": f"distkgd/{__version__}"})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
            # All at once: then it is an error if fewer bytes arrive than were promised.
            data: bytes = response.read()
            return data
    except http.client.IncompleteRead as error:
        arrived = len(error.partial)
        told = f"{arrived:,} bytes arrived, {arrived + (error.expected or 0):,} were promised"
        raise DataError(f"{address}: {told}") from error
    except (OSError, http.client.HTTPException) as error:
        raise DataError(f"{address}: {error or type(error).__name__}") from error


def _unpack(archive: bytes, folder: Path, address: str) -> None:
    """Take the three files out and nothing else; where the archive would like to put them does not matter."""
    missing = {f"{split}.txt" for split in SPLITS}
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
            for member in tar:
                name = PurePosixPath(member.name).name
                content = tar.extractfile(member) if name in missing and member.isfile() else None
                if content is not None:
                    found[name] = content.read()
                    missing.remove(name)
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise DataError(f"{address}: the archive is damaged: {error}") from error
    if missing:
        raise DataError(f"{address}: the archive holds no {', '.join(sorted(missing))}")
    for name, data in found.items():
        (folder / name).write_bytes(data)


def _move(unpacked: Path, cache: Path) -> None:
    unpacked.chmod(0o755)  # mkdtemp locks others out, who may share the cache
    try:
        unpacked.rename(cache)
    except OSError as error:
        # Another process was quicker with the same, checked files: those are as good.
        if not cache.is_dir():
            raise DataError(f"{cache}: cannot be created: {error}") from error
