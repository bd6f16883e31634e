"""Teachers that a run did not train itself: ranked like all others, and asked whether they have seen what is held out.

A result for each, kept beside the teacher's import in the run folder and in the result of the stage that it
teaches, so that a resumed run, or another machine, need not rank it again.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from distkgd.common.text import fixed
from distkgd.data import Graph, load_graph
from distkgd.data.triples import words_of
from distkgd.distributed.node_sharing import on_first
from distkgd.errors import DistkgdError, ModelError
from distkgd.evaluation.ranking import protocol
from distkgd.models.importers.writing import held_out_among
from distkgd.models.model import Model
from distkgd.models.model_folder import find_model, read_config, sha256_of
from distkgd.models.run_paths import imported_folder, teacher_folder
from distkgd.models.stage_result import StageResult, read_result
from distkgd.pipeline.config import RunConfig, StageConfig
from distkgd.pipeline.stage_job import Run
from distkgd.pipeline.stages import Stage
from distkgd.reporting.run_report import RunReport


def rank_brought(run: Run, stage: Stage, teachers: Sequence[Model]) -> tuple[StageResult, ...]:
    """The results of those teachers of a stage that are no stages of this plan. All ranks call it.

    Nothing of a trial of a sweep, whose table has no place for them.
    """
    sources = named_sources(run.config)
    if run.watch is not None:
        return ()
    pairs = zip(stage.teachers, teachers, strict=True)
    return tuple(brought_result(run, source, model) for source, model in pairs if source in sources)


def named_sources(config: RunConfig) -> dict[str, str]:
    """Path, URI or LIBRARY:PATH of each teacher that a run does not train -> its name."""
    given = config.all_teachers().items()
    return {str(one): name for name, one in given if one is not None and not isinstance(one, StageConfig)}


def brought_result(run: Run, source: str, model: Model) -> StageResult:
    """The result of a teacher from elsewhere, `model`: as it was kept, or ranked now. All ranks call it."""
    folder = find_model(teacher_folder(run.folder, source))
    place = imported_folder(run.folder, source)
    ranked: dict[str, Any] = {
        "model": sha256_of(folder / "config.json"),
        "data": run.graph.identity,
        "splits": run.splits,
    }
    ranked |= {"dtype": run.config.dtype, "protocol": protocol(run.config.ties, run.config.filter)}
    digest = hashlib.sha256(json.dumps(ranked, sort_keys=True).encode()).hexdigest()
    kept: StageResult | None = run.ranks.gather_objects(_kept(place) if run.ranks.first else None)[0]
    if kept is not None and kept.digest == digest:
        return kept
    warnings: list[str] = []
    on_first(run.ranks, lambda: warnings.extend(seen_held_out(folder, run.graph)))
    warnings = run.ranks.gather_objects(warnings)[0]
    name = named_sources(run.config)[source]
    for text in warnings:
        run.display.warn(f"{name}: {text}")
    result = StageResult(
        name=name,
        method="brought",
        source=source,
        # As the run folder sees it, so that the folder can be moved.
        folder=str(folder.relative_to(run.folder) if folder.is_relative_to(run.folder) else folder.resolve()),
        teachers=(),
        warnings=tuple(warnings),
        digest=digest,
        **run.measured(model, folder),
    )
    on_first(run.ranks, partial(result.write, place))
    scores = ", ".join(f"{split} MRR {fixed(result.mrr(split))}" for split in run.splits)
    run.display.line(f"{name}: brought from {source}, {scores}")
    return result


def _kept(place: Path) -> StageResult | None:
    try:
        return read_result(place)
    except ModelError:  # it can be made again
        return None


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


def with_brought(results: Sequence[StageResult]) -> list[StageResult]:
    """Those of a run's stages, before them those of the teachers that came from elsewhere, by their names."""
    found: dict[str | None, StageResult] = {}
    for result in results:
        for one in result.brought:
            found.setdefault(one.source, one)
    own = []
    for result in results:
        teachers = tuple(found[name].name if name in found else name for name in result.teachers)
        own.append(result.model_copy(update={"teachers": teachers}))
    return [*found.values(), *own]


def warnings_of(report: RunReport) -> list[str]:
    """What a reader must know of the teachers: what they have seen, and which are worse than a model taught by none."""
    said = [f"Warning: {stage.name}: {text}." for stage in report.stages for text in stage.warnings]
    directs = [(mrr, stage.name) for stage in report.stages if stage.is_direct and (mrr := stage.mrr("valid"))]
    heads = [report.teacher_of(stage) for stage in report.stages if not stage.is_direct]
    best, direct = max(directs, default=(0.0, ""))
    for name, mrr in {head.name: head.mrr("valid") for head in heads if head is not None}.items():
        if mrr is not None and mrr < best:
            said.append(
                f"Warning: {name} (valid MRR {fixed(mrr)}) is worse than {direct} ({fixed(best)}), which no one has "
                "taught; what it teaches is worth little."
            )
    return said
