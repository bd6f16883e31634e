"""Teachers that a run did not train itself: ranked like all others, and asked whether they have seen what is held out.

A row of the report for each, kept beside the teacher's import in the run folder and in the result of the stage that it
teaches, so that a resumed run, or another machine, need not rank it again.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from distkgd.common.files import write_atomic
from distkgd.common.text import fixed
from distkgd.data import Graph, load_graph
from distkgd.data.triples import words_of
from distkgd.distributed.node_sharing import on_first
from distkgd.errors import DistkgdError
from distkgd.evaluation.breakdowns import in_parts
from distkgd.evaluation.ranking import protocol
from distkgd.models.importers.writing import held_out_among
from distkgd.models.model import Model
from distkgd.models.model_folder import bytes_on_disk, find_model, read_config, sha256_of, sparse_bytes
from distkgd.models.run_paths import RESULT, imported_folder, teacher_folder
from distkgd.pipeline.config import RunConfig, StageConfig
from distkgd.pipeline.stage_job import Run
from distkgd.pipeline.stages import Stage
from distkgd.reporting.report import is_direct, mrr_of, teacher_of

Row = dict[str, Any]


def rank_brought(run: Run, stage: Stage, teachers: Sequence[Model]) -> list[Row]:
    """The rows of those teachers of a stage that are no stages of this plan. All ranks call it.

    Nothing of a trial of a sweep, whose table has no place for them.
    """
    sources = named_sources(run.config)
    if run.watch is not None:
        return []
    pairs = zip(stage.teachers, teachers, strict=True)
    return [brought_row(run, source, model) for source, model in pairs if source in sources]


def named_sources(config: RunConfig) -> dict[str, str]:
    """Path, URI or LIBRARY:PATH of each teacher that a run does not train -> its name."""
    given = config.all_teachers().items()
    return {str(one): name for name, one in given if one is not None and not isinstance(one, StageConfig)}


def brought_row(run: Run, source: str, model: Model) -> Row:
    """The row of a teacher from elsewhere, `model`: as it was kept, or ranked now. All ranks call it."""
    folder = find_model(teacher_folder(run.folder, source))
    path = imported_folder(run.folder, source) / RESULT
    ranked: dict[str, Any] = {
        "model": sha256_of(folder / "config.json"),
        "data": run.graph.identity,
        "splits": run.splits,
    }
    ranked |= {"dtype": run.config.dtype, "protocol": protocol(run.config.ties, run.config.filter)}
    digest = hashlib.sha256(json.dumps(ranked, sort_keys=True).encode()).hexdigest()
    kept = run.ranks.gather_objects(_kept(path) if run.ranks.first else None)[0]
    if kept is not None and kept.get("digest") == digest:
        return {key: value for key, value in kept.items() if key != "digest"}
    warnings: list[str] = []
    on_first(run.ranks, lambda: warnings.extend(seen_held_out(folder, run.graph)))
    warnings = run.ranks.gather_objects(warnings)[0]
    name = named_sources(run.config)[source]
    for text in warnings:
        run.display.warn(f"{name}: {text}")
    found = {split: run.evaluate(model, split) for split in run.splits}
    last = run.shown_split
    row: Row = {
        "name": name,
        "method": "brought",
        "source": source,
        # As the run folder sees it, so that the folder can be moved.
        "folder": str(folder.relative_to(run.folder) if folder.is_relative_to(run.folder) else folder.resolve()),
        "scorer": model.scorer.name,
        "dim": model.scorer.dim,
        "biases": model.scorer.biases,
        "bytes": bytes_on_disk(folder),
        "sparse_bytes": sparse_bytes(model),
        "num_parameters": model.num_parameters,
        "teachers": [],
        **{split: found[split][0] for split in run.splits},
        f"{last}_by": in_parts(found[last][1], getattr(run.graph, last), run.graph),
        "warnings": warnings,
    }
    on_first(run.ranks, partial(_keep, path, {**row, "digest": digest}))
    scores = ", ".join(f"{split} MRR {fixed(mrr_of(row, split))}" for split in run.splits)
    run.display.line(f"{name}: brought from {source}, {scores}")
    return row


def _kept(path: Path) -> Row | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # it can be made again
        return None
    return found if isinstance(found, dict) else None


def _keep(path: Path, row: Row) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(row, indent=2) + "\n")


def seen_held_out(folder: Path, graph: Graph) -> list[str]:
    """What is known of a model's having been trained on valid or test triples of `graph`; nothing where all is well."""
    config = read_config(folder)
    about: dict[str, Any] = config.get("data") or {}
    same = graph.is_of(about)
    if "imported_from" in config:  # its `data` is whose rows it has been given, not what it was trained on
        seen = config.get("trained_on_held_out")
        return _told(seen) if same and isinstance(seen, Mapping) else []
    if same or "sha256" not in about:
        return []
    source = Path(str(config.get("source", "")))
    try:
        other = load_graph(str(source)) if source.is_absolute() and source.exists() else None
    except DistkgdError:
        other = None
    if other is None or not other.is_of(about):
        return [
            f"it was trained on other data ({about.get('name')}, sha256 {str(about['sha256'])[:12]}), which is not at "
            "hand: whether it has seen valid and test triples is not known"
        ]
    return _told(held_out_among(words_of(other.train, other.entities.names, other.relations.names), graph))


def _told(seen: Mapping[str, int]) -> list[str]:
    parts = [f"{number:,} {split}" for split, number in seen.items() if number]
    return [f"it was trained on {' and '.join(parts)} triples: its figures there are no measure"] if parts else []


def with_brought(rows: Sequence[Mapping[str, Any]]) -> list[Row]:
    """The rows of a run's stages, before them those of the teachers that came from elsewhere, by their names."""
    found: dict[str, Row] = {}
    for row in rows:
        for one in row.get("brought", []):
            found.setdefault(one["source"], one)
    own = []
    for row in rows:
        teachers = [found[name]["name"] if name in found else name for name in row.get("teachers", [])]
        own.append({key: value for key, value in row.items() if key != "brought"} | {"teachers": teachers})
    return [*found.values(), *own]


def warnings_of(rows: Sequence[Row]) -> list[str]:
    """What a reader must know of the teachers: what they have seen, and which are worse than a model taught by none."""
    said = [f"Warning: {row['name']}: {text}." for row in rows for text in row.get("warnings", [])]
    direct = max((row for row in rows if is_direct(row) and mrr_of(row, "valid")), key=_valid, default=None)
    heads = [teacher_of(row, rows) for row in rows if not is_direct(row)]
    for head in {str(one["name"]): one for one in heads if one is not None}.values():
        if direct is not None and mrr_of(head, "valid") is not None and _valid(head) < _valid(direct):
            said.append(
                f"Warning: {head['name']} (valid MRR {fixed(_valid(head))}) is worse than {direct['name']} "
                f"({fixed(_valid(direct))}), which no one has taught; what it teaches is worth little."
            )
    return said


def _valid(row: Mapping[str, Any]) -> float:
    return mrr_of(row, "valid") or 0.0
