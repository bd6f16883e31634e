"""Teachers of a plan that are models of other libraries, `teacher: pykeen:PATH`, or lie elsewhere, `teacher: s3://…`.

They are brought into the run's folder, as imported/KEY/model, before its stages; those of other libraries with the rows
of the run's data set.
"""

from collections.abc import Sequence
from functools import partial

from distkgd.data import anchored
from distkgd.distributed.node_sharing import on_first
from distkgd.distributed.ranks import Ranks
from distkgd.models.importers import Given, import_model, is_foreign
from distkgd.models.remote import fetch_model
from distkgd.models.run_paths import imported_folder, is_brought
from distkgd.pipeline.stages import Plan, Stage


def bring_teachers(plan: Plan, stages: Sequence[Stage], ranks: Ranks) -> list[str]:
    """Bring every foreign or remote teacher of some stages of a plan that its folder lacks, and say what came; all
    ranks call it."""
    said, data, given = [], anchored(plan.config.data), Given(trust_pickle=plan.config.trust_pickle)
    for source in dict.fromkeys(name for stage in stages for name in stage.teachers if is_brought(name)):
        out = imported_folder(plan.folder, source) / "model"
        if any(ranks.gather_objects(out.exists())):
            continue
        if not is_foreign(source):
            on_first(ranks, partial(fetch_model, source, out))
            said.append(f"{source}: fetched")
            continue
        model, notes = import_model(source, out, given, ranks, plan.graph, data)
        said.append(f"{source}: {model.scorer}, {'; '.join(notes)}")
    return said
