"""Teachers of a plan that are models of other libraries: `teacher: pykeen:PATH`.

They are brought into the run's folder, as imported/KEY/model, with the rows of the run's data set, before its stages.
"""

from collections.abc import Sequence
from pathlib import Path

from distkgd.distributed.ranks import Ranks
from distkgd.graph import Graph
from distkgd.imports import Given, import_model, imported_folder, is_foreign
from distkgd.stages import Stage


def bring_teachers(
    stages: Sequence[Stage], graph: Graph, folder: Path, ranks: Ranks, *, data: str, trust: bool
) -> list[str]:
    """Import every foreign teacher of `stages` that `folder` lacks, and say what came; all ranks call it."""
    said = []
    for source in dict.fromkeys(name for stage in stages for name in stage.teachers if is_foreign(name)):
        out = imported_folder(folder, source) / "model"
        if any(ranks.gather_objects(out.exists())):
            continue
        model, notes = import_model(source, out, Given(trust_pickle=trust), ranks, graph, data)
        said.append(f"{source}: {model.scorer}, {'; '.join(notes)}")
    return said
