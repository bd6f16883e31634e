"""What a plan will take, before it starts: memory by the cost model, time from a few measured steps of each stage."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from distkgd.common.console import Display
from distkgd.common.text import of_bits
from distkgd.distributed.cost import human
from distkgd.distributed.ranks import Ranks
from distkgd.models.model import Model, new_model
from distkgd.models.model_folder import table_bytes
from distkgd.pipeline.stage_job import Run, build_job, fresh_model, stage_seed, validation
from distkgd.pipeline.stages import Stage, shape_of_teacher
from distkgd.tracking.tracker import NoTracking
from distkgd.training.communication import expected_memory
from distkgd.training.job import Job, Progress
from distkgd.training.loop import train_step

WARM_STEPS = 3  # kernels are compiled and memory is fetched in the first ones
MOST_STEPS = 40
PROBE_SECONDS = 2.0  # of the steps of one stage
RANKED = 256  # triples


@dataclass(frozen=True)
class Forecast:
    """Of one stage. bytes: of tables, optimiser state, gradients and the scores of a step, per rank.

    table_bytes: of the model's tables, as they are saved.
    once_seconds: of ranking its model once on validation, and on test where that is read.
    """

    stage: Stage
    steps: int
    bytes: float
    train_seconds: float
    rank_seconds: float
    once_seconds: float = 0.0
    table_bytes: int = 0

    @property
    def seconds(self) -> float:
        """Of training, validations and the final ranking."""
        return self.train_seconds + self.rank_seconds

    def __str__(self) -> str:
        config = self.stage.config
        taught = f", taught by {', '.join(self.stage.teachers)}" if self.stage.teachers else ""
        return (
            f"{self.stage.name}: {config.scorer}, {config.dim} numbers per entity{of_bits(config.bits)}, "
            f"{config.method}{taught}; "
            f"{config.epochs} epochs of {self.steps // max(1, config.epochs)} batches of {config.batch_size} triples; "
            f"tables {human(self.table_bytes)}, memory {human(self.bytes)}; time about {duration(self.seconds)} "
            f"(training {duration(self.train_seconds)}, ranking {duration(self.rank_seconds)})"
        )


def forecast(run: Run, stages: Sequence[Stage]) -> list[Forecast]:
    """Build each stage on untrained models, take a few steps, and scale them up. Nothing is written.

    stages: those to measure; their teachers may be other stages of the run. All ranks call it.
    """
    names = {stage.name for stage in stages}
    known = [*stages, *(stage for stage in run.stages if stage.name not in names)]
    silent = replace(run, stages=known, display=Display(False), tracking=NoTracking())
    return [_forecast(silent, stage) for stage in stages]


def format_forecast(found: Sequence[Forecast], held: int, free: int | None, further_rankings: int = 0) -> list[str]:
    """The lines that say it. held: bytes this process has now; free: bytes the machine has left, None if unknown.

    further_rankings: of models of the last stage's size, beside those of the stages.
    """
    most = max(one.bytes for one in found)
    lines = [str(one) for one in found]
    further = further_rankings * found[-1].once_seconds
    if further_rankings:
        lines.append(f"choice: up to {further_rankings} rounded sizes ranked; time about {duration(further)}")
    lines.append(
        f"in all about {duration(further + sum(one.seconds for one in found))}, measured just now: up to {MOST_STEPS} "
        f"steps and {RANKED} ranked triples of each stage, scaled up. Memory by the cost model (tables, optimiser, "
        f"gradients, scores of a step), beside {human(held)} that Python, torch and the data hold already"
    )
    if free is not None and most > free:
        lines.append(f"this needs {human(most)}, and {human(free)} are free: choose a smaller --to or teacher.dim")
    return lines


def duration(seconds: float) -> str:
    """95 -> "1 min 35 s"."""
    whole = round(seconds)
    if whole < 1:
        return "under 1 s"
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"


def free_memory() -> int | None:
    """Bytes that this machine can still give, where Linux says so."""
    path = Path("/proc/meminfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    return found[0] if found else None


def held_memory() -> int:
    """Bytes that this process holds; 0 where nobody says."""
    path = Path("/proc/self/status")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:")), 0)


def _forecast(run: Run, stage: Stage) -> Forecast:
    config, graph = stage.config, run.graph
    teachers = [_untrained(run, name) for name in stage.teachers]
    job = build_job(run, stage, "forecast", NoTracking().stage("", {}, {}), teachers)
    steps = config.epochs * job.input_builder.sampler.steps_per_epoch
    held = sum(expected_memory(job.input_builder, job.method, config).values())
    few = replace(run, graph=replace(graph, valid=graph.valid[:RANKED]))
    per_step = _per_step(job, run.ranks)
    per_triple = 0.0
    if len(few.graph.valid):
        per_triple = _seconds(run.ranks, lambda: validation(few, job.method)) / len(few.graph.valid)
    number = -(-config.epochs // config.validate_every) if config.validate_every else 0
    ranked = (number + 1) * len(graph.valid) + len(graph.test) * run.config.test
    if config.method == "med":
        ranked += len(graph.valid) + len(graph.test) * run.config.test
    once = len(graph.valid) + len(graph.test) * run.config.test
    size = table_bytes(job.method.output_model)
    return Forecast(stage, steps, held, per_step * steps, per_triple * ranked, per_triple * once, size)


def _untrained(run: Run, name: str) -> Model:
    teacher = run.stage(name)
    if teacher is not None:
        return fresh_model(run, teacher.config, teacher.config.dim, stage_seed(run.config.seed, name))
    shape = shape_of_teacher(name, run.config.trust_pickle)
    sizes = run.graph.num_entities, run.graph.num_relations
    seed = stage_seed(run.config.seed, name)
    return new_model(shape.scorer, *sizes, run.ranks, reciprocal=shape.reciprocal, seed=seed, dtype=run.dtype)


def _per_step(job: Job, ranks: Ranks) -> float:
    progress, begun = Progress(), 0.0
    limit = WARM_STEPS + MOST_STEPS
    for step in range(limit):
        if step == WARM_STEPS:
            begun = time.monotonic()
        progress.step = step
        terms, _ = train_step(job, progress, 0)
        any(map(float, terms.values()))  # the time of a step is that until it is done
        late = step > WARM_STEPS and time.monotonic() - begun > PROBE_SECONDS
        if ranks.gather_objects(late)[0]:
            limit = step + 1
            break
    job.prefetcher.drop()
    return (time.monotonic() - begun) / (limit - WARM_STEPS)


def _seconds(ranks: Ranks, work: Callable[[], object]) -> float:
    work()
    begun = time.monotonic()
    work()
    return float(max(ranks.gather_objects(time.monotonic() - begun)))
