"""Models at URIs that fsspec knows: s3://, gs://, file://, memory://, … `teacher: URI` in any plan is such a model.

What is fetched is a copy in the run's folder, checked against the sha256 that the model's own config.json has.
`huggingface_hub` pushes models to hf://OWNER/NAME and loads them from its cache.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import fsspec

from distkgd.common.files import abandon, begin, publish, sync, temporary_of
from distkgd.common.optional_imports import need
from distkgd.common.paths import AnyPath
from distkgd.errors import ConfigError, DistkgdError, ModelError, StorageError
from distkgd.models.model_folder import check_numbers, find_model, read_config, read_json, read_shape, sha256_of
from distkgd.scorers import Scorer

CONFIG = "config.json"
HUB = "hf://"
HUB_FILES = ["*.json", "*.tsv", "*.safetensors", "*.npy", "*.md"]  # nothing that is run when it is read


def is_remote(source: str) -> bool:
    """Whether `source` is a URI and not a path."""
    return "://" in source


def open_uri(uri: str) -> tuple[Any, str]:
    """(file system, path in it) of a URI; ConfigError where fsspec does not know its kind."""
    try:
        fs, root = fsspec.core.url_to_fs(uri)
    except (ValueError, ImportError) as error:
        raise ConfigError(
            f"{uri} cannot be opened ({error}); use a kind that fsspec knows, and install what it needs for it, "
            "such as `pip install s3fs` for s3://."
        ) from None
    fs.invalidate_cache()
    return fs, root.rstrip("/")


@contextmanager
def reaching(what: str) -> Iterator[None]:
    """StorageError that says what was being done, from whatever a file system raises in the block."""
    try:
        yield
    except DistkgdError:
        raise
    except Exception as error:  # every file system has errors of its own
        first = str(error).strip().partition("\n")[0]
        raise StorageError(
            f"{what} failed ({type(error).__name__}: {first}); look at the URI and the rights to it."
        ) from error


@contextmanager
def filled(folder: Path) -> Iterator[Path]:
    """A temporary folder that becomes `folder` when the block ends well; after an error nothing of it is left."""
    begin(folder)
    try:
        yield temporary_of(folder)
        for path in temporary_of(folder).iterdir():
            sync(path)
        publish(temporary_of(folder), folder)
    except BaseException:
        abandon(folder)
        raise


def download(fs: Any, there: str, folder: Path) -> None:
    """Copy the files directly in `there`."""
    for path in sorted(fs.find(there, maxdepth=1)):
        fs.get_file(path, str(folder / path.rpartition("/")[2]))


def upload(fs: Any, folder: Path, there: str, last: str) -> None:
    """Copy the files directly in `folder`, `last` after all others: who finds that one finds all."""
    fs.makedirs(there, exist_ok=True)
    for name in sorted(
        (path.name for path in folder.iterdir() if path.is_file()), key=lambda name: (name == last, name)
    ):
        fs.put_file(str(folder / name), f"{there}/{name}")


def check_files(folder: AnyPath, uri: str) -> None:
    """ModelError unless the tables of a fetched model have the sha256 that its config.json has, and finite numbers."""
    folder = Path(folder)
    config = read_config(folder)
    tables = [name for names in config.get("files", {}).values() for name in names]
    digests = config.get("sha256", {})
    for name in tables:
        if name not in digests:
            raise ModelError(f"{uri}/{CONFIG} has no sha256 of {name}; write the model again.")
        if not (folder / name).is_file() or sha256_of(folder / name) != digests[name]:
            raise ModelError(f"{uri}/{name} is missing, or not what {CONFIG} says by its sha256; copy the model again.")
    try:
        check_numbers(folder)
    except ModelError as error:
        raise ModelError(str(error).replace(str(folder), uri)) from None


def fetch_model(uri: str, out: AnyPath) -> None:
    """Copy the model at `uri` (a model folder, or one with a `model` in it) to `out`, whole or not at all.

    Raises StorageError where it cannot be read, ModelError where there is none or its files are damaged.
    """
    out = Path(out)
    with reaching(f"fetching {uri}"):
        fs, there = _find(uri)
        with filled(out) as part:
            download(fs, there, part)
            check_files(part, uri)


def read_remote_shape(uri: str) -> tuple[Scorer, bool]:
    """`read_shape` of the model at `uri`; only its config.json travels."""
    with reaching(f"reading {uri}"), TemporaryDirectory() as folder:
        fs, there = _find(uri)
        fs.get_file(f"{there}/{CONFIG}", str(Path(folder) / CONFIG))
        return read_shape(Path(folder))


def _find(uri: str) -> tuple[Any, str]:
    fs, root = open_uri(uri)
    for there in (root, f"{root}/model"):
        if fs.exists(f"{there}/{CONFIG}"):
            return fs, there
    raise ModelError(
        f"{uri} holds no model (looked for {CONFIG} and model/{CONFIG}); give the URI of a finished stage's folder, "
        "e.g. s3://BUCKET/runs/NAME/stages/student."
    )


def fetch_from_hub(uri: str) -> Path:
    """The model at hf://OWNER/NAME or hf://OWNER/NAME@REVISION, in Hugging Face's cache: tables, names and texts alone.

    Raises as `fetch_model`, and UnsupportedError without huggingface_hub.
    """
    hub = need("huggingface_hub", uri, "hub")
    name, _, revision = uri.removeprefix(HUB).partition("@")
    with reaching(f"fetching {uri}"):
        folder = find_model(Path(hub.snapshot_download(name, revision=revision or None, allow_patterns=HUB_FILES)))
        check_files(folder, uri)
    return folder


def local_model(model: AnyPath) -> Path:
    """Where a model is on this machine: the path that was given, or what hf://OWNER/NAME names (`fetch_from_hub`)."""
    return fetch_from_hub(model) if isinstance(model, str) and model.startswith(HUB) else Path(model)


def push_to_hub(folder: Path, name: str) -> str:
    """Upload the files of an export to the repository OWNER/NAME of Hugging Face's hub, made where there is none.

    Of the place of its data on this machine config.json keeps the last name there. Returns its address. Raises
    StorageError where it cannot be written, UnsupportedError without huggingface_hub.
    """
    hub = need("huggingface_hub", "--push", "hub")
    api, config = hub.HfApi(), read_json(folder / CONFIG)
    if "source" in config:
        config["source"] = Path(config["source"]).name
    contents = {path.relative_to(folder).as_posix(): str(path) for path in sorted(folder.rglob("*")) if path.is_file()}
    told: dict[str, str | bytes] = {**contents, CONFIG: (json.dumps(config, indent=2) + "\n").encode()}
    with reaching(f"pushing to {HUB}{name}"):
        made = api.create_repo(name, exist_ok=True)
        files = [hub.CommitOperationAdd(path_in_repo=at, path_or_fileobj=one) for at, one in told.items()]
        api.create_commit(repo_id=made.repo_id, operations=files, commit_message="A model of distkgd")
    return str(made)
