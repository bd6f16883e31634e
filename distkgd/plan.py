"""A plan is data: stages, and who teaches whom. `run_plan` runs one in order inside this process group.

runs/NAME/
  plan.yaml                      the resolved config and its stages
  stages/STAGE/checkpoint/       resumable state; model/ the finished model; metrics.jsonl; result.json
  report.json  report.md         what came out
  mlflow.json                    run ids, so that a resumed run continues its curves
"""

import hashlib
import json
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from distkgd.config import RunConfig, StageConfig, resolved
from distkgd.display import Display
from distkgd.distributed.deepspeed_engine import check_supported
from distkgd.distributed.nodes import shared_answers
from distkgd.distributed.ranks import Ranks
from distkgd.distributed.rendezvous import launch_agent, same_launch
from distkgd.errors import ConfigError, DistkgdError, Stopped, UnsupportedError
from distkgd.evaluate import breakdown, metrics, protocol, ranks_of, ranks_of_crops
from distkgd.exchange import settle_move
from distkgd.graph import Graph
from distkgd.graph.filters import KnownAnswers
from distkgd.graph.relations import relation_categories
from distkgd.graph.sampling import Balanced, Sampler
from distkgd.job import Job, Progress
from distkgd.methods import Method, NoSettings, Setup, build_method
from distkgd.model import Model, new_model
from distkgd.model_folder import bytes_on_disk, find_model, load_model, same_vocabulary, save_model
from distkgd.report import write_atomic, write_report
from distkgd.scenes import SceneBuilder
from distkgd.scorers import build_scorer
from distkgd.tracking import StageTracking, Status, Tracking, open_tracking
from distkgd.train import train_stage

# Keys that do not change what a run computes; a resumed run may set them anew.
FREE_ON_RESUME = frozenset({"name", "device", "threads", "keep", "engine", "mlflow"})


@dataclass(frozen=True)
class Stage:
    """One training run of a plan. teachers: names of earlier stages, or paths of finished models."""

    name: str
    config: StageConfig
    teachers: tuple[str, ...]


def build_plan(config: RunConfig) -> list[Stage]:
    """The stages of a run, in an order in which every teacher comes first."""
    stages: list[Stage] = []
    teachers: tuple[str, ...] = ()
    if isinstance(config.teacher, StageConfig):
        stages.append(Stage("teacher", config.teacher, ()))
        teachers = ("teacher",)
    elif config.teacher is not None:
        teachers = (config.teacher,)
    stages.append(Stage("student", config.student, teachers))
    if config.baseline is not False:
        alone = config.baseline
        if alone is True:
            alone = config.student.model_copy(update={"method": "scratch", "distill": NoSettings()})
        stages.append(Stage("direct", alone, ()))
    return stages


@dataclass
class Run:
    """All that the stages of one run share."""

    config: RunConfig
    graph: Graph
    ranks: Ranks
    folder: Path
    tracking: Tracking
    display: Display
    train_answers: KnownAnswers
    all_answers: KnownAnswers

    @property
    def dtype(self) -> torch.dtype:
        """Of all tables."""
        return dtype_of(self.config)

    @property
    def splits(self) -> tuple[str, ...]:
        """What finished stages are evaluated on."""
        return ("valid", "test") if self.config.test else ("valid",)

    def stage_folder(self, name: str) -> Path:
        """Where a stage keeps everything."""
        return self.folder / "stages" / name

    def evaluate(self, model: Model, split: str) -> tuple[dict[str, float], torch.Tensor]:
        """Metrics and ranks of a model on "valid" or "test"."""
        triples = getattr(self.graph, split).to(self.ranks.device)
        config = self.config
        rank = ranks_of(model, triples, self.all_answers, self.ranks, ties=config.ties, filter_=config.filter)
        return metrics(rank), rank

    def curve(self, model: Model, dims: Sequence[int], split: str) -> dict[int, dict[str, float]]:
        """dim -> metrics of the crop of a model to it, on "valid" or "test"; all dims in one pass."""
        triples, config = getattr(self.graph, split).to(self.ranks.device), self.config
        found = ranks_of_crops(
            model, dims, triples, self.all_answers, self.ranks, ties=config.ties, filter_=config.filter
        )
        return {dim: metrics(rank) for dim, rank in found.items()}


def run_plan(
    config: RunConfig, graph: Graph, ranks: Ranks, folder: Path, *, resume: bool, display: Display
) -> dict[str, Any]:
    """Train every unfinished stage, write the report, and return it.

    Raises ConfigError when `folder` already holds a run and resume is off.
    """
    stages = build_plan(config)
    for stage in stages:
        check_stage(stage, graph, ranks.world)
        if config.engine.name == "deepspeed":
            tensors = {"relation": torch.empty(0, dtype=dtype_of(config))}
            check_supported(stage.config.optimizer.name, config.engine.zero, tensors)
    prepare_folder(config, stages, graph, folder, ranks, resume)
    track = config.mlflow
    tracking = open_tracking(
        run_folder=folder, name=config.name, uri=track.uri, enabled=track.enabled, active=ranks.first
    )
    run = Run(
        config,
        graph,
        ranks,
        folder,
        tracking,
        display,
        shared_answers(ranks, [graph.train], graph.num_entities),
        shared_answers(ranks, [graph.train, graph.valid, graph.test], graph.num_entities),
    )
    tags = {"git_sha": git_sha(), "world": str(ranks.world), "device": str(ranks.device)}
    tags |= {f"protocol.{key}": str(value) for key, value in protocol(config.ties, config.filter).items()}
    tracking.start(resolved(config), tags, graph.summary())
    status: Status = "FAILED"
    try:
        results = [run_stage(run, stage) for stage in stages]
        report = make_report(run, results)
        if ranks.first:
            write_report(folder, report)
        ranks.barrier()
        status = "FINISHED"
    except (KeyboardInterrupt, Stopped):
        status = "KILLED"
        raise
    finally:
        done = status == "FINISHED"
        tracking.finish(status, [folder / "report.json", folder / "report.md"] if done else [])
    return report


def run_stage(run: Run, stage: Stage) -> dict[str, Any]:
    """One stage's row of the report; trains it unless it is finished."""
    folder = run.stage_folder(stage.name)
    result = folder / "result.json"
    digest = stage_digest(run, stage)
    if result.exists():
        row: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
        if row.pop("digest") != digest:
            raise ConfigError(f"{folder} was made by another config, data set or teacher; use another --out.")
        run.display.line(f"{stage.name}: finished before, valid MRR {row['valid']['mrr']:.4f}")
        return row
    tracking = run.tracking.stage(stage.name, stage.config.model_dump(mode="json"), {"method": stage.config.method})
    status: Status = "FAILED"
    try:
        teachers = [load_teacher(run, name) for name in stage.teachers]
        job = build_job(run, stage, digest, tracking, teachers)
        progress = train_stage(job)
        row = finish_stage(run, stage, job.method.product, progress)
        row |= job.method.report(partial(run.curve, job.method.product), run.splits)
        if run.ranks.first:
            write_atomic(result, json.dumps({**row, "digest": digest}, indent=2) + "\n")
        run.ranks.barrier()
        status = "FINISHED"
    finally:
        found = {} if status != "FINISHED" else flatten_metrics(row)
        tracking.finish(status, folder / "model" if status == "FINISHED" else None, found)
    scores = ", ".join(f"{split} MRR {row[split]['mrr']:.4f}" for split in run.splits)
    run.display.line(f"{stage.name}: done in {row['seconds']:.0f} s, {scores}")
    return row


def check_stage(stage: Stage, graph: Graph, world: int = 1) -> None:
    """Refuse what cannot work before any stage has cost time: ConfigError or UnsupportedError, naming the stage."""
    config, name = stage.config, stage.name
    try:
        scorer = build_scorer(config.scorer, config.dim, config.margin, config.norm)
    except DistkgdError as error:
        raise type(error)(f"{name}: {error}") from None
    if config.bf16 and scorer.candidate_form != "dot":
        raise ConfigError(
            f"{name}.bf16 works for bilinear scorers; {scorer.name} would lose its distances to rounding."
        )
    if config.regulariser.name == "dura" and scorer.candidate_form != "dot":
        raise UnsupportedError(f"{name}.regulariser dura is defined for bilinear scorers, not {scorer.name}; use n3.")
    if config.batch_size > len(graph.train):
        raise ConfigError(
            f"{name}.batch_size {config.batch_size} does not fit {len(graph.train)} training triples; choose less."
        )
    if config.balanced:
        check_balanced(name, config, world)


def check_balanced(name: str, config: StageConfig, world: int) -> None:
    """ConfigError unless every rank's share of a balanced batch is whole."""
    negatives, unit = config.negatives, config.accumulate * world * world
    if config.batch_size % unit:
        raise ConfigError(
            f"{name}.balanced: batch_size {config.batch_size} must be a multiple of {unit} "
            f"(accumulate {config.accumulate} x {world} x {world} pairs of shards)."
        )
    if negatives.kind in ("chunk", "triple") and negatives.num % world:
        raise ConfigError(f"{name}.balanced: negatives.num {negatives.num} must be a multiple of {world} ranks.")
    if negatives.kind == "chunk" and (config.batch_size // config.accumulate // world) % negatives.chunk:
        raise ConfigError(
            f"{name}.balanced: a rank's {config.batch_size // config.accumulate // world} triples of a batch must be "
            f"a multiple of negatives.chunk {negatives.chunk}."
        )


def build_job(run: Run, stage: Stage, digest: str, tracking: StageTracking, teachers: list[Model]) -> Job:
    """Everything `train_stage` needs, from config."""
    config, graph, ranks = stage.config, run.graph, run.ranks
    seed = stage_seed(run.config.seed, stage.name)
    train = graph.train.to(ranks.device)
    scenes = build_scenes(run, config, train, config.batch_size, seed)
    student = fresh_model(run, config, config.dim, seed)
    setup = Setup(
        steps_per_epoch=scenes.sampler.steps_per_epoch,
        epochs=config.epochs,
        train=train,
        fresh=lambda dim, name: fresh_model(run, config, dim, stage_seed(run.config.seed, f"{stage.name}.{name}")),
        scenes=lambda triples, batch_size: build_scenes(run, config, triples, batch_size, seed),
    )
    method = build_method(config, student, teachers, setup)
    run.display.line(f"{stage.name}: {settle_move(scenes, method, config)}")
    can_validate = config.validate_every and len(graph.valid)
    return Job(
        name=stage.name,
        config=config,
        method=method,
        scenes=scenes,
        ranks=ranks,
        folder=run.stage_folder(stage.name),
        digest=digest,
        keep=run.config.keep,
        validate=(lambda: validation(run, method)) if can_validate else None,
        tracking=tracking,
        display=run.display,
        engine=run.config.engine,
    )


def validation(run: Run, method: Method[Any]) -> dict[str, float]:
    """What a method makes of the metrics of its product on the validation split."""
    return method.validate(lambda: run.evaluate(method.product, "valid")[0], partial(run.curve, method.product))


def fresh_model(run: Run, config: StageConfig, dim: int, seed: int) -> Model:
    """An untrained model as `config` has it, of `dim` numbers per entity."""
    return new_model(
        build_scorer(config.scorer, dim, config.margin, config.norm),
        run.graph.num_entities,
        run.graph.num_relations,
        run.ranks,
        reciprocal=config.reciprocal,
        seed=seed,
        init_scale=config.init_scale,
        dtype=run.dtype,
        row_dtype=torch.bfloat16 if config.row_dtype == "bfloat16" else None,
    )


def build_scenes(run: Run, config: StageConfig, triples: torch.Tensor, batch_size: int, seed: int) -> SceneBuilder:
    """Batches of `batch_size` of `triples` ([n, 3] int64) and what each is compared with, as `config` has it."""
    graph, ranks, negatives = run.graph, run.ranks, config.negatives
    cuts = ranks.bounds(graph.num_entities)
    sampler = Sampler(
        triples,
        graph.num_entities,
        graph.num_relations,
        batch_size=batch_size,
        sides=negatives.sides,
        seed=seed,
        balanced=Balanced(triples, cuts, batch_size, config.accumulate, seed) if config.balanced else None,
    )
    known_labels = negatives.labels == "known"
    return SceneBuilder(
        sampler,
        run.train_answers,
        ranks,
        kind=negatives.kind,
        num=negatives.num,
        chunk=negatives.chunk,
        # k-vs-all: binary labels make the other answers positives of their own triples, not negatives of this one.
        filtered=negatives.filtered or (known_labels and config.loss.name != "softmax"),
        label_shares=known_labels,
    )


def teacher_folder(run: Run, name: str) -> Path:
    """The folder of a teacher: a finished stage of this plan, or a path."""
    own = run.stage_folder(name)
    return own if (own / "model").is_dir() else Path(name)


def load_teacher(run: Run, name: str) -> Model:
    """A finished stage of this plan, or a model folder; its own copy, so that its files are never overwritten."""
    folder = teacher_folder(run, name)
    loaded = load_model(folder, run.ranks, run.dtype)
    same_vocabulary(loaded, run.graph, str(folder))
    return loaded.model


def finish_stage(run: Run, stage: Stage, student: Model, progress: Progress) -> dict[str, Any]:
    """Save the model, evaluate it, and say what the stage was."""
    folder = run.stage_folder(stage.name)
    config = stage.config
    source = run.config.data
    if source != run.graph.name and Path(source).is_dir():
        source = str(Path(source).resolve())  # found again from any working directory
    about = {"data": run.graph.summary(), "source": source, "stage": stage.name, "method": config.method}
    save_model(folder / "model", student, run.graph, about)
    found = {split: run.evaluate(student, split) for split in run.splits}
    last = run.splits[-1]
    categories = relation_categories(run.graph.train, run.graph.num_relations)
    names = {i: run.graph.relations.name(i) for i in range(run.graph.num_relations)}
    details = breakdown(found[last][1], getattr(run.graph, last), categories, names)
    triples = progress.step * config.batch_size
    return {
        "name": stage.name,
        "method": config.method,
        "scorer": config.scorer,
        "dim": config.dim,
        "bytes": bytes_on_disk(folder),
        "num_parameters": student.num_parameters,
        "teachers": list(stage.teachers),
        "seconds": progress.seconds,
        "steps": progress.step,
        "triples_per_second": triples / max(progress.train_seconds, 1e-9),
        "best_step": progress.best_step,
        **{split: found[split][0] for split in run.splits},
        f"{last}_by": details,
    }


def make_report(run: Run, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """report.json's content."""
    return {
        "name": run.config.name,
        "data": run.graph.summary(),
        "protocol": protocol(run.config.ties, run.config.filter),
        "seed": run.config.seed,
        "world": run.ranks.world,
        "device": str(run.ranks.device),
        "stages": rows,
    }


def prepare_folder(
    config: RunConfig, stages: list[Stage], graph: Graph, folder: Path, ranks: Ranks, resume: bool
) -> None:
    """Create the run folder and plan.yaml, or check that an existing one is the same run.

    A folder that this very torchrun launch has made needs no `resume`: torchrun has started the ranks anew.
    """
    path, launch = folder / "plan.yaml", folder / "launch.json"
    agents = sorted({agent for agent in ranks.gather_objects(launch_agent()) if agent})
    exists, known = ranks.gather_objects((path.exists(), same_launch(launch, agents)))[0]
    if exists and not resume and not known:
        raise ConfigError(f"{folder} already holds a run; add --resume to go on with it, or choose another --out.")
    plan = {
        "config": resolved(config),
        "data_sha256": graph.sha256,
        "stages": [{"name": s.name, "teachers": list(s.teachers), **s.config.model_dump(mode="json")} for s in stages],
    }
    if exists:
        refuse_other_plan(path, plan)
    if ranks.first:
        folder.mkdir(parents=True, exist_ok=True)
    if ranks.first and agents:
        write_atomic(launch, json.dumps({"agents": agents}, indent=2) + "\n")
    if ranks.first and not exists:
        write_atomic(path, yaml.safe_dump(plan, sort_keys=False, allow_unicode=True))
    ranks.barrier()


def refuse_other_plan(path: Path, plan: Mapping[str, Any]) -> None:
    """ConfigError when a run folder was made by another plan; how it is run and watched may change."""
    try:
        before = yaml.safe_load(path.read_text(encoding="utf-8"))
        old, new = dict(before["config"]), dict(plan["config"])
        changed = [key for key in new if key not in FREE_ON_RESUME and old.get(key) != new[key]]
        if before["data_sha256"] != plan["data_sha256"]:
            changed.append("the data's content")
    except (yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path} is damaged ({error!r}); choose another --out.") from None
    if changed:
        raise ConfigError(
            f"{path.parent} was made by another plan (differs in: {', '.join(changed)}); "
            "give the same config and overrides to resume it, or choose another --out."
        )


def stage_digest(run: Run, stage: Stage) -> str:
    """sha256 of what determines a stage's result: its config, seed, dtype, data, and the teachers' files."""
    teachers = {}
    for name in stage.teachers:
        folder = find_model(teacher_folder(run, name))
        teachers[name] = hashlib.sha256((folder / "config.json").read_bytes()).hexdigest()
    content = {
        "stage": stage.config.model_dump(mode="json"),
        "seed": run.config.seed,
        "dtype": run.config.dtype,
        "data": run.graph.sha256,
        "teachers": teachers,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def dtype_of(config: RunConfig) -> torch.dtype:
    """Of all computations."""
    return torch.float64 if config.dtype == "float64" else torch.float32


def stage_seed(seed: int, name: str) -> int:
    """A stage's own seed, so that teacher and student of one run do not start from the same numbers."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:7], "big")


def flatten_metrics(row: Mapping[str, Any]) -> dict[str, float]:
    """valid and test metrics of a report row as flat names."""
    return {f"final/{split}/{k}": float(v) for split in ("valid", "test") for k, v in row.get(split, {}).items()}


def git_sha() -> str:
    """The commit this code is run from, or "unknown" outside a checkout."""
    with suppress(OSError, subprocess.SubprocessError):
        here = Path(__file__).resolve().parent
        out = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, timeout=5, check=True
        )
        return out.stdout.strip()
    return "unknown"
