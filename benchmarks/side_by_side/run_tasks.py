"""The inference tasks of a finished run: every model of it beside the one that taught."""

from pathlib import Path

from benchmarks.side_by_side.roofline import FORWARD, SPEAKS, Work, full_pass
from benchmarks.side_by_side.tasks import PREDICTED_AT_ONCE, Arm, Scale, Task
from distkgd.errors import ConfigError
from distkgd.models.stage_result import StageResult
from distkgd.reporting.html.page import read_run
from distkgd.reporting.html.pairs import pair_of


def run_tasks(folder: Path, scale: Scale) -> dict[str, Task]:
    """ "inference/STAGE" of every stage but the teacher, by name.

    Raises ConfigError where the folder holds no finished run, or one without a larger model to compare with.
    """
    report, config = read_run(folder)
    pair = pair_of(report, folder)
    if pair is None or pair.teacher.folder == pair.student.folder:
        raise ConfigError(f"{folder} has no two models to compare; give a run with a teacher or a direct model.")
    others = [stage for stage in report.stages if stage.folder_in(folder) != pair.teacher.folder]
    tasks = {}
    for device in scale.devices:
        shared = {"source": str(config["data"]), "device": device, "queries": scale.asked}
        teacher = Arm("ours", "inference", shared | {"model": str(pair.teacher.folder)})
        for stage in others:
            ours = Arm("ours", "inference", shared | {"model": str(stage.folder_in(folder))})
            name = f"inference/{stage.name}" if device == "cpu" else f"inference/{stage.name}:{device}"
            group, work = f"inference:{device}", _work(stage, report.data.num_entities)
            peer = pair.teacher.name
            tasks[name] = Task(name, "queries/s", group, ours, teacher, work, peer_name=peer, device=device)
    return tasks


def _work(stage: StageResult, entities: int) -> Work:
    # Of scorers that are not counted on paper, the bytes alone.
    if stage.scorer in FORWARD:
        return full_pass(stage.scorer, entities, stage.dim, PREDICTED_AT_ONCE)
    return Work(SPEAKS * stage.dim * entities / PREDICTED_AT_ONCE)
