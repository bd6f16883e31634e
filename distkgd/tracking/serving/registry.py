"""Models in MLflow's registry: one version per model, and aliases that say which is which.

A registered model NAME has the aliases of `distkgd.tracking.serving.entries` and `champion`: of the versions of the
same data and protocol as the newest run's, the one with the best validation MRR that fits the budget; the smaller one
of equals. The budget is `champion_max_mb` million bytes of tables. Without one the teachers are left out, for they are
what is to be replaced, and where the run itself chose its student by a budget, that student is it; with one all compete
that fit.

A model that has a version is never given another, unless its known triples are to go along now: its tags `model_sha256`
and `known` tell it. What a killed call has left behind,
a logged model without files or without a version, is taken up again.
"""

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from distkgd.common.text import size_text
from distkgd.errors import ConfigError
from distkgd.models.model_folder import find_model
from distkgd.tracking.run_ids import locked
from distkgd.tracking.serving.entries import NAME, Entry
from distkgd.tracking.serving.packing import pack

CHAMPION = "champion"
SCRATCH = ".registering-"


@dataclass(frozen=True)
class Registered:
    """lines: what became of each model, for the user. versions: of each, in the order of the entries."""

    lines: list[str]
    versions: list[str]


def register(
    client: Any,
    experiment_id: str,
    name: str,
    entries: Sequence[Entry],
    *,
    max_mb: float | None,
    runs: Mapping[str, str],
) -> Registered:
    """Register those entries that have no version of `name` yet, and set all aliases.

    client: an MlflowClient. runs: stage -> id of its run, where it has one.

    Raises ConfigError for an impossible name, ModelError for a damaged model, and whatever the store raises.
    """
    if not NAME.fullmatch(name) or not name.strip():
        raise ConfigError(f"{name!r} cannot name a registered model; use letters, digits, _, ., - and spaces.")
    exceptions = import_module("mlflow.exceptions")
    try:
        client.create_registered_model(name)
    except exceptions.MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    lines, numbers = [], []
    with locked(entries[0].folder):  # one caller at a time
        for entry in entries:
            for left in find_model(entry.folder).parent.glob(f"{SCRATCH}*"):  # of a call that was killed
                shutil.rmtree(left)
            earlier = [
                one
                for one in versions(client, name)
                if one.tags.get("model_sha256") == entry.sha256 and (not entry.known or "known" in one.tags)
            ]
            made = earlier[0] if earlier else add_version(client, experiment_id, name, entry, runs.get(entry.stage))
            client.set_registered_model_alias(name, entry.alias, made.version)
            numbers.append(str(made.version))
            lines.append(f"registered{' before' if earlier else ''}: {name} version {made.version}, {entry.alias}")
        chosen = next((i for i, entry in enumerate(entries) if entry.chosen and max_mb is None), None)
        if chosen is None:
            lines.append(crown_best(client, name, entries[-1], max_mb))
        else:
            lines.append(crown(client, name, numbers[chosen], entries[chosen].tags()))
    return Registered(lines, numbers)


def add_version(client: Any, experiment_id: str, name: str, entry: Entry, run_id: str | None) -> Any:
    """A new version of `name`, its files uploaded before it exists."""
    tags = entry.tags()
    left = client.search_logged_models([experiment_id], f"tags.model_sha256 = '{tags['model_sha256']}'")
    left = [one for one in left if ("known" in one.tags) == entry.known]
    logged = next(iter(sorted(left, key=lambda one: str(one.status) != "READY")), None)
    if logged is None:
        params = {key: tags[key] for key in ("stage", "dim", "bytes")}
        logged = client.create_logged_model(experiment_id, entry.alias, run_id, tags, params, "distkgd")
    if str(logged.status) != "READY":
        upload(client, logged.model_id, entry)
        logged = client.finalize_logged_model(logged.model_id, "READY")
        if run_id is not None:
            output = import_module("mlflow.entities").LoggedModelOutput(logged.model_id, 0)
            client.log_outputs(run_id, [output])
    # A database looks a model without a run up in whatever store the process has as its default; a server needs the id.
    model_id = logged.model_id if run_id is not None or client.tracking_uri.startswith("http") else None
    tags |= {"model_id": logged.model_id}
    return client.create_model_version(name, logged.artifact_location, run_id, tags, model_id=model_id)


def upload(client: Any, model_id: str, entry: Entry) -> None:
    """Pack a model beside its folder, where there is room for it, and send it."""
    place = find_model(entry.folder).parent
    try:
        with tempfile.TemporaryDirectory(prefix=SCRATCH, dir=place) as scratch:
            packed = Path(scratch) / "packed"
            pack(entry.folder, packed, entry.known)
            client.log_model_artifacts(model_id, str(packed))
    except OSError as error:
        raise ConfigError(f"{place} or MLflow's store has no room for a copy of {entry.stage}: {error}.") from error


def versions(client: Any, name: str) -> list[Any]:
    """All versions of a registered model, oldest first."""
    found: list[Any] = []
    token = None
    while True:
        page = client.search_model_versions(f"name = '{name}'", page_token=token)
        found += page
        token = page.token
        if not token:
            return sorted(found, key=lambda one: int(one.version))


def crown_best(client: Any, name: str, like: Entry, max_mb: float | None) -> str:
    """Give the alias `champion` to the best version on the data and protocol of `like`, and say to which."""
    same = like.data_sha256, like.protocol
    found = versions(client, name)
    rivals = [(one, one.tags) for one in found if (one.tags.get("data_sha256"), one.tags.get("protocol")) == same]
    best = champion(rivals, max_mb)
    if best is None:
        limit = "is no teacher and has a valid MRR" if max_mb is None else f"has at most {max_mb:g} MB and a valid MRR"
        return f"no version of {name} {limit}: {CHAMPION} stays as it was"
    return crown(client, name, best.version, best.tags)


def crown(client: Any, name: str, version: str, tags: Mapping[str, str]) -> str:
    """Give the alias `champion` to a version, and say so."""
    client.set_registered_model_alias(name, CHAMPION, version)
    size = size_text(int(tags["bytes"]))
    return f"{CHAMPION}: {name} version {version}, {tags['stage']}, valid MRR {float(tags['valid_mrr']):.4f}, {size}"


def champion(rivals: Sequence[tuple[Any, Mapping[str, str]]], max_mb: float | None) -> Any | None:
    """The first of the best of (version, its tags), None where no one may be it."""

    def fits(tags: Mapping[str, str]) -> bool:
        if not float(tags.get("valid_mrr", "nan")) > 0.0:  # 0 is what once stood for an empty split
            return False
        return tags["role"] != "teacher" if max_mb is None else int(tags["bytes"]) <= max_mb * 1e6

    ranked = [
        (-float(tags["valid_mrr"]), int(tags["bytes"]), "known" not in tags, i)
        for i, (_, tags) in enumerate(rivals)
        if fits(tags)
    ]
    return rivals[min(ranked)[-1]][0] if ranked else None
