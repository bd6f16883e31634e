"""From a stage to a job: what all stages of a run share, and everything that one of them is trained with."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from distkgd.common.console import Display
from distkgd.common.metrics import Metrics, known_figures
from distkgd.data.filters import KnownAnswers
from distkgd.data.sampling import Balanced, Sampler
from distkgd.data.step_inputs import StepInputBuilder
from distkgd.distributed.optim.kept import KeptRows
from distkgd.distributed.ranks import Ranks
from distkgd.errors import ConfigError
from distkgd.evaluation.breakdowns import in_parts
from distkgd.evaluation.ranking import metrics, ranks_and_ties_of, ranks_of_crops
from distkgd.kernels.quantiser import Rounding
from distkgd.methods import Method, Setup, build_method
from distkgd.models.init_from_teacher import init_from_teacher
from distkgd.models.model import Model, new_model
from distkgd.models.model_folder import (
    distinct_rows,
    load_model,
    same_vocabulary,
    sizes_on_disk,
    sparse_bytes,
    table_bytes,
    told,
)
from distkgd.models.newcomers import newcomers_of
from distkgd.models.run_paths import stage_folder, teacher_folder
from distkgd.models.stage_result import Rounded, StageResult
from distkgd.pipeline.config import RunConfig, StageConfig
from distkgd.pipeline.stages import Plan, Stage, rounding_of, usual_rounding
from distkgd.pipeline.storage import Storage
from distkgd.scorers import build_scorer
from distkgd.tracking.tracker import StageTracking, Tracking
from distkgd.training.communication import choose_communication
from distkgd.training.job import Job, Watch


@dataclass(frozen=True)
class Run(Plan):
    """A plan in one process group, and all that its stages share. results: of those that are finished by now."""

    ranks: Ranks
    tracking: Tracking
    display: Display
    train_answers: KnownAnswers
    all_answers: KnownAnswers
    watch: Watch | None = None
    storage: Storage | None = None
    results: dict[str, StageResult] = field(default_factory=dict)

    @property
    def dtype(self) -> torch.dtype:
        """Of all tables."""
        return dtype_of(self.config)

    @property
    def splits(self) -> tuple[str, ...]:
        """What finished stages are evaluated on."""
        return ("valid", "test") if self.config.test else ("valid",)

    @property
    def shown_split(self) -> str:
        """Of `splits` the last that has triples: whose figures are told in parts."""
        return next((split for split in reversed(self.splits) if len(getattr(self.graph, split))), self.splits[-1])

    def stage_folder(self, name: str) -> Path:
        """Where a stage keeps everything."""
        return stage_folder(self.folder, name)

    def measured(self, model: Model, folder: Path) -> dict[str, Any]:
        """What a `StageResult` tells of a finished model: sizes, metrics on all `splits`, on `shown_split` in parts."""
        sizes: dict[str, Any] = {"scorer": model.scorer.name, "dim": model.scorer.dim, "biases": model.scorer.biases}
        sizes |= (taken := sizes_on_disk(folder)) | {"num_parameters": model.num_parameters}
        whole = taken["bits"] == taken["relation_bits"] == 32
        sizes |= {"distinct_rows": distinct_rows(model)} if taken["bits"] < 32 else {}
        sizes |= {"sparse_bytes": sparse_bytes(model) if whole else None}
        found = {split: self.evaluate(model, split, taken["bits"] < 32) for split in self.splits}
        last = self.shown_split
        parts = in_parts(found[last][1], getattr(self.graph, last), self.graph)
        return sizes | {split: figures for split, (figures, _) in found.items()} | {f"{last}_by": parts}

    def rounding(self, bits: int, dim: int) -> Rounding:
        """How a teacher of so many numbers is rounded to so many bits.

        Relations and groups are as the student's, where that has few bits; else as `usual_rounding` has them.
        """
        like = self.config.student
        if like.bits == 32:
            return usual_rounding(bits)
        shares = like.group is not None and bits <= 8 and not dim % like.group
        return Rounding(bits, like.relation_bits, like.group if shares else None)

    def rounded(self, model: Model, bits: int) -> Rounded:
        """A model rounded to so many bits as `rounding` says, ranked on all `splits`."""
        seen = model.quantised(self.rounding(bits, model.scorer.dim))
        ranked = {split: self.evaluate(seen, split, few_bits=True)[0] for split in self.splits}
        return Rounded(bytes=table_bytes(seen), **ranked)

    def evaluate(self, model: Model, split: str, few_bits: bool = False) -> tuple[Metrics, torch.Tensor]:
        """Metrics and ranks of a model on "valid" or "test"; of one of few bits also the share of tied answers."""
        triples = getattr(self.graph, split).to(self.ranks.device)
        config = self.config
        rank, tied = ranks_and_ties_of(
            model, triples, self.all_answers, self.ranks, ties=config.ties, filter_=config.filter
        )
        return metrics(rank, tied if few_bits else None), rank

    def curve(self, model: Model, dims: Sequence[int], split: str, bits: int | None = None) -> dict[int, Metrics]:
        """dim -> metrics of the crop of a model to it, on "valid" or "test"; all dims in one pass.

        bits: of its entities' numbers, where these are nested; None: all.
        """
        triples, config = getattr(self.graph, split).to(self.ranks.device), self.config
        seen = model if bits is None else model.in_bits(bits)
        found = ranks_of_crops(
            seen, dims, triples, self.all_answers, self.ranks, ties=config.ties, filter_=config.filter
        )
        return {dim: metrics(rank) for dim, rank in found.items()}


def build_job(run: Run, stage: Stage, digest: str, tracking: StageTracking, teachers: list[Model]) -> Job:
    """Everything `train_stage` needs, from config."""
    config, graph, ranks = stage.config, run.graph, run.ranks
    seed = stage_seed(run.config.seed, stage.name)
    input_builder = build_inputs(run, config, seed)
    student = student_model(run, config, seed)
    if config.start != "random":
        init_from_teacher(student, teachers[0], config.start)
    kept = None
    if config.first_rows is not None:
        begin_at(student, load_teacher(run, config.first_rows), config.first_rows)
        if config.old_rows != "free":
            kept = kept_rows(student, config.first_rows, config.anchor if config.old_rows == "anchored" else None)
    setup = Setup(
        steps_per_epoch=input_builder.sampler.steps_per_epoch,
        epochs=config.epochs,
        fresh=lambda dim, name: fresh_model(run, config, dim, stage_seed(run.config.seed, f"{stage.name}.{name}")),
        input_builder=input_builder,
    )
    method = build_method(config, student, teachers, setup)
    run.display.line(f"{stage.name}: {choose_communication(input_builder, method, config)}")
    names = [one.name for one in run.stages]
    number = names.index(stage.name) + 1 if stage.name in names else 0
    later = run.stages[number:] if number else ()
    can_validate = config.validate_every and len(graph.valid)
    return Job(
        name=stage.name,
        config=config,
        method=method,
        input_builder=input_builder,
        ranks=ranks,
        folder=run.stage_folder(stage.name),
        digest=digest,
        keep=run.config.keep,
        validate=(lambda: validation(run, method)) if can_validate else None,
        tracking=tracking,
        display=run.display,
        engine=run.config.engine,
        watch=run.watch,
        copy=partial(run.storage.copy_checkpoint, stage.name) if run.storage else None,
        place=f" (stage {number} of {len(names)})" if number else "",
        later_epochs=sum(one.configs[0].epochs for one in later if one.name not in run.results),
        told=partial(told, entities=graph.entities, relations=graph.relations),
        kept=kept,
    )


def validation(run: Run, method: Method[Any]) -> dict[str, float]:
    """What a method makes of the metrics of its product on the validation split, which must hold triples."""

    def curve(dims: Sequence[int], split: str, bits: int | None = None) -> dict[int, dict[str, float]]:
        return {dim: known_figures(one) for dim, one in run.curve(method.output_model, dims, split, bits).items()}

    return method.validate(lambda: known_figures(run.evaluate(method.output_model, "valid")[0]), curve)


def student_model(run: Run, config: StageConfig, seed: int) -> Model:
    """An untrained student of `config`, whose rows are seen with as many bits as it has."""
    return fresh_model(run, config, config.dim, seed).quantised(rounding_of(config))


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


def build_inputs(run: Run, config: StageConfig, seed: int) -> StepInputBuilder:
    """Batches of training triples and what each is compared with, as `config` has it."""
    graph, ranks, negatives = run.graph, run.ranks, config.negatives
    train, cuts = graph.train.to(ranks.device), ranks.bounds(graph.num_entities)
    sampler = Sampler(
        train,
        graph.num_entities,
        graph.num_relations,
        batch_size=config.batch_size,
        sides=negatives.sides,
        seed=seed,
        balanced=Balanced(train, cuts, config.batch_size, config.accumulate, seed) if config.balanced else None,
        left_out=config.distill.left_out,
    )
    known_labels = negatives.labels == "known"
    input_builder = StepInputBuilder(
        sampler,
        run.train_answers,
        ranks,
        kind=negatives.kind,
        num=negatives.num,
        chunk=negatives.chunk,
        # k-vs-all: binary labels make the other answers positives of their own triples, not negatives of this one.
        filtered=negatives.filtered or (known_labels and config.loss.name != "softmax"),
        label_shares=known_labels,
        drawn_anchors=negatives.anchors,
    )
    input_builder.together = config.distill.triples_together
    return input_builder


def begin_at(student: Model, model: Model, folder: str) -> None:
    """Put a finished model's rows in place of the student's; ConfigError where they have other columns."""
    if (student.scorer.constants(), student.reciprocal) != (model.scorer.constants(), model.reciprocal):
        raise ConfigError(f"first_rows: {folder} is {model.scorer}, and the student is {student.scorer}.")
    with torch.no_grad():
        student.entity.weight.copy_(model.entity.weight)
        student.relation.copy_(model.relation)


def kept_rows(student: Model, folder: str, anchor: float | None) -> tuple[KeptRows, KeptRows]:
    """This rank's entities and the relations that are not new in what `Grown.save` wrote; without anchor, frozen."""
    tables = []
    for key, rows, lo in (("entity", student.entity.weight, student.entity.lo), ("relation", student.relation, 0)):
        which = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
        new = torch.tensor(newcomers_of(folder)[key], dtype=torch.int64, device=rows.device) - lo
        which[new[(new >= 0) & (new < len(rows))]] = False
        tables.append(KeptRows(which) if anchor is None else KeptRows(which, rows.detach().clone(), anchor))
    return tables[0], tables[1]


def load_teacher(run: Run, name: str) -> Model:
    """A finished stage of this plan, or a model folder; its own copy, so that its files are never overwritten.

    Packed rows are widened: every step opens them.
    """
    return finished_model(run, name).widened()


def finished_model(run: Run, name: str) -> Model:
    """`load_teacher`, with packed rows as they are."""
    folder = teacher_folder(run.folder, name)
    loaded = load_model(folder, run.ranks, run.dtype)
    same_vocabulary(loaded, run.graph, str(folder))
    return loaded.model


def dtype_of(config: RunConfig) -> torch.dtype:
    """Of all computations."""
    return torch.float64 if config.dtype == "float64" else torch.float32


def stage_seed(seed: int, name: str) -> int:
    """A stage's own seed, so that teacher and student of one run do not start from the same numbers."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:7], "big")
