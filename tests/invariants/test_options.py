"""Invariant 6: every option changes something. An option without a case here fails, and so does one that is ignored."""

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin
from unittest import mock

import fsspec
import pytest
import torch
from pydantic import BaseModel

from distkgd.common.console import Display
from distkgd.config.tree import merge
from distkgd.distributed.checkpoint.reader import list_steps
from distkgd.distributed.optim.dense import DenseOptimizer
from distkgd.distributed.ranks import Ranks
from distkgd.errors import ConfigError, DistkgdError
from distkgd.evaluation import ranking
from distkgd.methods import METHODS
from distkgd.methods.dualde import StageTwoConfig
from distkgd.models.model_folder import save_model
from distkgd.pipeline import plan, stage_job
from distkgd.pipeline.autoconfig import command
from distkgd.pipeline.config import RunConfig, StageConfig, parse_config
from distkgd.pipeline.plan import run_plan
from distkgd.scorers import SCORERS
from distkgd.tracking.mlflow_runs import open_tracking
from distkgd.tracking.tracker import NoTracking
from distkgd.training import job as job_module
from distkgd.training.loop import train_stage
from launch import distill
from tests.jobs import toy_model
from tests.launches import small_data
from tests.methods.steps import toy_labels
from tests.toys import toy_graph, toy_job

RISING = [0.01 * i for i in range(1, 60)]
FALLING = RISING[::-1]
BASE: dict[str, Any] = {
    "dim": 8,
    "batch_size": 100,
    "epochs": 2,
    "validate_every": 1,
    "negatives": {"num": 8, "chunk": 4},
}

LABELS = "LABELS"  # stands for the folder of `written_labels`
MODEL = "MODEL"  # stands for the folder of `finished_model`


@cache
def finished_model() -> tuple[TemporaryDirectory[str], str]:
    """A model of the toy graph and of BASE's dim, and the folder that goes with this process."""
    folder, graph = TemporaryDirectory(), toy_graph()
    model = f"{folder.name}/model"
    newcomers = {"entity": [0], "relation": [0]}
    save_model(model, toy_model(graph, dim=BASE["dim"], dtype=torch.float32), graph, {"newcomers": newcomers})
    return folder, model


@cache
def written_labels() -> tuple[TemporaryDirectory[str], str]:
    """Soft labels of the toy graph, and the folder that goes with this process."""
    folder, graph = TemporaryDirectory(), toy_graph()
    return folder, toy_labels(Path(folder.name) / "labels", toy_model(graph, dim=BASE["dim"], seed=4), graph, 5, 1.0)


@dataclass(frozen=True)
class Case:
    """Values of one option that must all differ in one aspect of a small training run.

    context: what else of the stage must be set for the option to matter. curve: MRRs of the validations.
    """

    values: list[Any]
    aspect: str = "losses"
    context: dict[str, Any] = field(default_factory=dict)
    curve: list[float] = field(default_factory=lambda: RISING)


SAMPLED = {"negatives": {"kind": "batch"}}
HINGE = {"loss": {"name": "margin"}}
FAR = {"scorer": "transe", "loss": {"name": "self_adversarial"}}
N3 = {"regulariser": {"name": "n3", "weight": 0.1}}
LOWERED = {"epochs": 5, "schedule": {"name": "plateau", "patience": 1}}
BKD = {"method": "bkd"}
DUALDE = {"method": "dualde", "distill": {"stage_two": {"start": 1, "epochs": 2}}}
MULDE = {"method": "mulde"}
DML = {"method": "dml"}
RKD = {"method": "rkd", "distill": {"group": 2}}
ITERDE = {"method": "iterde"}
MED = {"method": "med"}
FAST_MED = merge(MED, {"distill": {"evaluator_lr": 0.5}, "loss": {"name": "softplus"}})
METASD = {"method": "metasd", "distill": {"prune": {"rate": 0.5}}}
GROWN = {"first_rows": MODEL}
BOTH = merge(DUALDE, {"distill": {"stage_one": False}})

CASES: dict[str, Case] = {
    "scorer": Case(list(SCORERS), "rows"),
    "dim": Case([6, 8], "rows"),
    "method": Case(list(METHODS)),
    "distill": Case([{"weight": 0.5}, {"weight": 2.0}], context=BKD),
    "bits": Case([1, 2, 3, 4, 8, 16, 32]),
    "relation_bits": Case([1, 2, 3, 4, 8, 16, 32]),
    "group": Case([None, 2, 4], context={"bits": 2}),
    "margin": Case([None, 0.5, 3.0], context=FAR),
    "norm": Case([1, 2], context=FAR),
    "reciprocal": Case([False, True], "rows"),
    "init_scale": Case([None, 0.02, 0.5], "rows"),
    "start": Case(["random", "crop", "pca"], "rows", context=BKD | {"scorer": "transe"}),
    "first_rows": Case([None, MODEL], "rows"),
    "old_rows": Case(["free", "anchored", "frozen"], "rows", context=GROWN),
    "anchor": Case([0.1, 1.0], "rows", context=GROWN | {"old_rows": "anchored"}),
    "negatives.kind": Case(["all", "batch", "chunk", "triple"]),
    "negatives.num": Case([5, 8], context=SAMPLED),
    "negatives.chunk": Case([2, 4], context={"negatives": {"kind": "chunk"}}),
    "negatives.sides": Case(["both", "uniform", "bernoulli"]),
    "negatives.anchors": Case([0, 4, 8], context={"negatives": {"kind": "triple"}}),
    "negatives.filtered": Case([False, True], context=SAMPLED),
    "negatives.labels": Case(["one", "known"]),
    "loss.name": Case(["softmax", "bce", "softplus", "self_adversarial", "margin"]),
    "loss.temperature": Case([0.2, 5.0], context={"loss": {"name": "self_adversarial"}, "init_scale": 0.5}),
    "loss.margin": Case([0.5, 2.0], context=HINGE),
    "loss.label_smoothing": Case([0.0, 0.2]),
    "regulariser.name": Case(["n2", "n3", "dura"], context={"regulariser": {"weight": 0.1}}),
    "regulariser.weight": Case([0.1, 0.2], context=N3),
    "regulariser.relation_weight": Case([None, 0.0, 0.7], context=N3),
    "optimizer.name": Case(["sgd", "adagrad", "rowwise_adagrad", "adam"], "rows"),
    "optimizer.lr": Case([0.05, 0.1], "rows"),
    "optimizer.relation_lr": Case([None, 0.01], "relation"),
    "optimizer.clip": Case([0.0, 0.001], "rows", context={"optimizer": {"name": "sgd"}}),
    "optimizer.offload": Case([False, True], "offload"),
    "schedule.name": Case(["constant", "linear", "cosine", "plateau"], context=LOWERED, curve=FALLING),
    "schedule.final": Case([0.0, 0.5], context={"schedule": {"name": "cosine"}}),
    "schedule.factor": Case([0.1, 0.5], context=LOWERED, curve=FALLING),
    "schedule.patience": Case([1, 2], context=LOWERED, curve=FALLING),
    "batch_size": Case([60, 100], "rows"),
    "accumulate": Case([1, 2, 4], "parts"),
    "epochs": Case([1, 2, 3], "steps"),
    "dropout": Case([0.0, 0.3]),
    "relation_dropout": Case([0.0, 0.3]),
    "bf16": Case([False, True], context={"init_scale": 0.5}),
    "row_dtype": Case(["full", "bfloat16"], "rows"),
    "move": Case(["rows", "queries", "nothing"], "move", context=SAMPLED),
    "balanced": Case([False, True]),
    "validate_every": Case([0, 1, 2, 3], "validations", context={"epochs": 4}),
    "patience": Case([0, 1, 2], "steps", context={"epochs": 5}, curve=FALLING),
    "checkpoint_every": Case([0, 1, 2], "checkpoints", context={"epochs": 4, "validate_every": 0}),
    # Methods
    "bkd.weight": Case([0.5, 1.0], context=BKD),
    "bkd.hard_weight": Case([0.0, 0.5, 1.0], context=BKD),
    "bkd.temperature": Case([1.0, 4.0], context=BKD),
    "bkd.divergence": Case(["kl", "reverse_kl", "js"], context=BKD),
    "bkd.labels": Case([None, LABELS], context=BKD),
    "dualde.evaluation": Case([False, True], context=DUALDE),
    "dualde.structure": Case([False, True], context=DUALDE),
    "dualde.delta": Case([0.1, 1.0], context=DUALDE),
    "dualde.probabilities": Case([False, True], context=DUALDE),
    "dualde.alpha": Case([0.5, 1.0], context=DUALDE),
    "dualde.beta": Case([0.0, 0.5], context=DUALDE),
    "dualde.evaluator_lr": Case([0.01, 0.1], "evaluators", context=DUALDE),
    "dualde.soft": Case(["huber", "kl"], context=DUALDE),
    "dualde.soft_weight": Case([0.5, 1.0], context=DUALDE),
    "dualde.temperature": Case([1.0, 4.0], context=merge(DUALDE, {"distill": {"soft": "kl"}})),
    "dualde.stop_opposite": Case([False, True], "rows", context=BOTH),
    "dualde.stage_one": Case([False, True], "teacher", context=DUALDE),
    "dualde.weights": Case([(1.0, 1.0), (1.0, 0.25)], context=DUALDE),
    "dualde.normalise": Case(["none", "zscore"], context=merge(DUALDE, {"distill": {"weights": (1.0, 1.0)}})),
    "dualde.stage_two": Case([None, {"start": 1, "epochs": 1}], "teacher", context=DUALDE),
    "dualde.stage_two.start": Case([1, 2, "plateau"], "losses", context=merge(DUALDE, {"epochs": 3})),
    "dualde.stage_two.epochs": Case([1, 2], "steps", context=DUALDE),
    "dualde.stage_two.lr_scale": Case([0.1, 1.0], "rows", context=DUALDE),
    "dualde.stage_two.teacher_lr_scale": Case([0.1, 1.0], "teacher", context=DUALDE),
    "mulde.weight": Case([0.5, 1.0], context=MULDE),
    "mulde.hard_weight": Case([0.0, 0.5, 1.0], context=MULDE),
    "mulde.temperature": Case([1.0, 4.0], context=MULDE),
    "mulde.relation_scaling": Case([False, True], "rows", context=MULDE),
    "mulde.contrast_attention": Case([False, True], context=MULDE),
    "mulde.attention": Case([0.0, 1.0], context=MULDE),
    "mulde.evaluator_lr": Case([0.01, 0.1], context=MULDE),
    "mulde.weights": Case([None, (1.0, 0.25)], context=MULDE),
    "mulde.normalise": Case(["none", "zscore"], context=MULDE),
    "dml.weight": Case([0.5, 1.0], context=DML),
    "dml.hard_weight": Case([0.0, 0.5, 1.0], context=DML),
    "dml.temperature": Case([1.0, 4.0], context=DML),
    "dml.peer_dim": Case([None, 6, 12], context=DML),
    "rkd.group": Case([2, 4, 5], context=RKD),
    "rkd.vectors": Case(["entity", "query"], context=RKD),
    "rkd.distance_weight": Case([0.0, 1.0], context=RKD),
    "rkd.angle_weight": Case([0.0, 1.0], context=RKD),
    "rkd.hard_weight": Case([0.5, 1.0], context=RKD),
    "rkd.delta": Case([0.1, 1.0], context=RKD),
    "iterde.k": Case([0.0, 0.5, 1.0], context=ITERDE),
    "iterde.p": Case([0.5, 2.0], context=ITERDE),
    "iterde.schedule": Case(["polynomial", "constant", "two_phase"], context=ITERDE),
    "iterde.combination": Case(["add", "convex"], context=ITERDE),
    "iterde.soft": Case(["huber", "kl"], context=ITERDE),
    "iterde.delta": Case([0.01, 1.0], context=ITERDE),
    "iterde.temperature": Case([1.0, 4.0], context=merge(ITERDE, {"distill": {"soft": "kl"}})),
    "med.dims": Case([None, (2, 8), (4, 8)], context=MED),
    "med.bits": Case([None, (1, 2), (1, 8), (2, 3, 4)], context=MED),
    "med.mutual": Case([False, True], context=MED),
    "med.mutual_weight": Case([0.5, 1.0], context=MED),
    "med.mutual_delta": Case([0.01, 1.0], context=MED),
    "med.evolution": Case([False, True], context=MED),
    "med.positives": Case(["sigmoid", "score"], context=MED),
    "med.dynamic": Case([False, True], context=MED),
    "med.weights": Case(
        [None, (4.0, 1.0), (1.0, 4.0)], context=merge(MED, {"distill": {"dims": (4, 8), "dynamic": False}})
    ),
    "med.small_regulariser": Case([1.0, 4.0], context=merge(MED, {"regulariser": {"name": "n3", "weight": 0.5}})),
    "med.sharpness": Case([0.0, 0.5], context=MED),
    "med.w": Case([0.5, 1.0], context=MED),
    "med.w1": Case([(0.25, 4.0), (0.999, 1.001)], "evaluators", context=FAST_MED),
    "med.w2": Case([(0.25, 4.0), (0.999, 1.001)], "evaluators", context=FAST_MED),
    "med.w3": Case([(0.0, 4.0), (0.999, 1.001)], "evaluators", context=FAST_MED),
    "med.evaluator_lr": Case([0.01, 0.1], context=MED),
    "med.select": Case(["mean", "largest"], "validated", context=MED),
    "metasd.prune.rate": Case([0.0, 0.5, 0.8], context=METASD),
    "metasd.prune.scope": Case(["global", "table", "row", "column"], context=METASD),
    "metasd.prune.ramp": Case([0, 1, 2], context=METASD),
    "metasd.prune.every": Case([0, 1, 2], context=METASD),
    "metasd.alpha": Case([0.0, 0.5], context=METASD),
    "metasd.beta": Case([0.0, 0.5, 1.0], context=METASD),
    "metasd.kl": Case([0.5, 1.0], context=METASD),
    "metasd.reverse_kl": Case([0.0, 1.0], context=METASD),
    "metasd.teacher_kl": Case([0.5, 1.0], context=METASD),
    "metasd.teacher_reverse_kl": Case([0.0, 1.0], context=METASD),
    "metasd.temperature": Case([1.0, 3.0], context=METASD),
    "metasd.relation_weight": Case([0.0, 0.5], context=METASD),
    "metasd.meta": Case([False, True], context=METASD),
    "metasd.virtual_lr": Case([0.1, 1.0], context=METASD),
    "metasd.meta_lr": Case([1e-4, 1e-2], "rows", context=METASD),
    "metasd.meta_optimizer": Case(["sgd", "adagrad"], "rows", context=merge(METASD, {"distill": {"meta_lr": 0.1}})),
    "metasd.quiz": Case([0.02, 0.1], context=METASD),
    "metasd.quiz_batch": Case([3, 6], context=METASD),
    "metasd.quiz_set": Case(["fixed", "anew"], context=METASD),
}


# What was seen of a run, by its resolved config: most options have one value that is the default.
SEEN: dict[tuple[str, ...], dict[str, Any]] = {}


def observe(student: dict[str, Any], folder: Path, curve: list[float], anew: bool = False) -> dict[str, Any]:
    """Everything that can be seen of a small training run, by aspect; anew: also of a config that was seen before."""
    with mock.patch.object(job_module, "RowOptimizer", wraps=job_module.RowOptimizer) as optimizers:
        job = toy_job({"keep": 99, "student": student}, Ranks(), folder)
    key = job.config.model_dump_json(), *map(str, curve)
    if key in SEEN and not anew:
        return SEEN[key]
    if job.validate is not None:
        left = iter(curve)
        job.validate = lambda: {"mrr": next(left)}
    sizes: list[int] = []
    real = job.method.updates

    def updates(inputs: Any) -> Iterator[Any]:
        sizes.append(len(inputs.batch.triples))
        return real(inputs)

    with mock.patch.object(job.method, "updates", updates):
        progress = train_stage(job)
    lines = (job.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    log = [json.loads(line) for line in lines]
    teacher = getattr(job.method, "teacher", None)
    SEEN[key] = {
        "losses": [{k: v for k, v in row.items() if k.startswith("loss/")} for row in log],
        "evaluators": [{k: v for k, v in row.items() if k.startswith("evaluator/")} for row in log],
        "validations": [row["step"] for row in log if "valid/mrr" in row],
        "steps": progress.step,
        "offload": optimizers.call_args.kwargs["offload"],
        "move": job.input_builder.move,
        "parts": max(sizes),
        "checkpoints": list_steps(job.checkpoints),
        "rows": digest(job.method.student.entity.weight),
        "relation": digest(job.method.student.relation),
        "validated": job.method.validate(dict, lambda dims, *_: {dim: {"mrr": dim / 100} for dim in dims}).get("mrr"),
        "teacher": digest(teacher.entity.weight) if teacher is not None else None,
    }
    return SEEN[key]


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(
        str(tuple(tensor.shape)).encode() + tensor.detach().view(torch.uint8).numpy().tobytes()
    ).hexdigest()


def with_option(case: Case, name: str, value: Any) -> dict[str, Any]:
    """The stage of a case with one option set."""
    path = name.split(".")
    if path[0] in METHODS:
        path[0] = "distill"
    stage = merge(BASE, case.context)
    node = stage
    for key in path[:-1]:
        node[key] = dict(node.get(key) or {})
        node = node[key]
    node[path[-1]] = value
    if stage.get("distill", {}).get("labels") == LABELS:
        stage["distill"]["labels"] = written_labels()[1]
    if stage.get("first_rows") == MODEL:
        stage["first_rows"] = finished_model()[1]
    if name == "method":
        stage = merge(stage, {"dualde": DUALDE, "rkd": RKD}.get(value, {}))
    return stage


def all_differ(observations: list[Any]) -> bool:
    return len({json.dumps(x, sort_keys=True) for x in observations}) == len(observations)


@pytest.mark.parametrize("name", CASES)
def test_every_stage_option_changes_something(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    seen = [observe(with_option(case, name, v), tmp_path / str(i), case.curve) for i, v in enumerate(case.values)]
    assert all_differ([x[case.aspect] for x in seen]), f"{name}: {case.aspect} is the same for some of {case.values}"


def test_dualde_whose_second_stage_starts_at_epoch_0_has_no_first_stage_or_is_refused(tmp_path: Path) -> None:
    with_start = with_option(CASES["dualde.stage_two.start"], "dualde.stage_two.start", 0)
    try:
        losses = observe(with_start, tmp_path, RISING)["losses"]
    except ConfigError:
        return
    assert any(key.startswith("loss/teacher_") for key in losses[0])


@pytest.mark.parametrize("context", [{}, BKD, DUALDE, MED, METASD], ids=["scratch", "bkd", "dualde", "med", "metasd"])
def test_two_runs_of_one_config_differ_in_nothing(context: dict[str, Any], tmp_path: Path) -> None:
    stage = merge(BASE | {"dropout": 0.1}, context)
    first, second = (observe(stage, tmp_path / run, RISING, anew=True) for run in ("first", "second"))
    assert first == second


def test_a_batch_in_parts_is_the_same_training(tmp_path: Path) -> None:
    """The other half of `accumulate`: it may change the memory only."""
    losses = [observe(BASE | {"accumulate": n}, tmp_path / str(n), RISING)["losses"] for n in (1, 4)]
    for whole, parts in zip(*losses, strict=True):
        assert parts == pytest.approx(whole, rel=1e-4)


# -- options of a run ---------------------------------------------------------------------------------------------


def run_toy(folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """report.json of a small run on a toy graph, without what depends on the clock."""
    base = {"mlflow": {"enabled": False}, "student": BASE}
    config = parse_config(merge(base, options), "test")
    run_plan(config, toy_graph(), Ranks(), folder, resume=False, display=Display(False))
    report: dict[str, Any] = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    for stage in report["stages"]:
        del stage["seconds"], stage["train_seconds"], stage["triples_per_second"]
    return report


# All scores are 0, as products of such numbers are: the rule for ties decides everything.
TIED = {"student": {"init_scale": 1e-20, "optimizer": {"lr": 1e-20}}}


def rows_after(folder: Path, options: dict[str, Any]) -> str:
    run_toy(folder, options)
    (file,) = (folder / "stages/student/model").glob("entity-*.safetensors")
    return hashlib.sha256(file.read_bytes()).hexdigest()


def rounded_after(folder: Path, options: dict[str, Any]) -> list[Any]:
    report = run_toy(folder, merge({"teacher": BASE, "student": {**BASE, **BKD}}, options))
    return [stage.get("rounded") for stage in report["stages"]]


def checkpoints_after(folder: Path, options: dict[str, Any]) -> list[int]:
    run_toy(folder, merge({"student": {"epochs": 5, "checkpoint_every": 1, "validate_every": 0}}, options))
    return list_steps(folder / "stages/student/checkpoint")


def stored_after(folder: Path, options: dict[str, Any]) -> list[str]:
    """What a run has left at its storage."""
    run_toy(folder, options)
    return [
        name for name in fsspec.filesystem("memory").find("/options") if f"{options['storage']}/" in f"memory:/{name}"
    ]


def dtype_after(folder: Path, options: dict[str, Any]) -> str:
    run_toy(folder, options)
    config = json.loads((folder / "stages/student/model/config.json").read_text(encoding="utf-8"))
    return str(config["dtype"])


def stages_after(folder: Path, options: dict[str, Any]) -> list[Any]:
    tree = {"student": {"method": "bkd"}} if options.get("teacher") else {}
    return [(s["name"], s["dim"], s["teachers"]) for s in run_toy(folder, merge(tree, options))["stages"]]


def plan_after(folder: Path, options: dict[str, Any]) -> list[Any]:
    """Stages between a teacher of 12 numbers and a student of 6, with the teachers each was given and its steps."""
    stage = {"batch_size": 100, "epochs": 1}
    tree = {"student": {"method": "bkd", "dim": 6}, "baseline": True}
    if not options.get("teachers"):
        tree["teacher"] = stage | {"dim": 12}
    stages = run_toy(folder, merge(tree, options))["stages"]
    return [(s["name"], s["dim"], s["teachers"], s["steps"]) for s in stages]


def metrics_after(folder: Path, options: dict[str, Any]) -> list[Any]:
    return [stage["valid"] for stage in run_toy(folder, options)["stages"]]


def tied_metrics_after(folder: Path, options: dict[str, Any]) -> list[Any]:
    return metrics_after(folder, merge(TIED, options))


def splits_after(folder: Path, options: dict[str, Any]) -> list[str]:
    (stage,) = run_toy(folder, options)["stages"]
    return sorted({"valid", "test"} & stage.keys())


def tracking_of(folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """What tracking is asked for; what it does with it is tested beside it."""
    asked: dict[str, Any] = {}

    def opened(**given: Any) -> Any:
        asked.update({key: given[key] for key in ("enabled", "uri", "name")})
        return open_tracking(**{**given, "enabled": False})

    with mock.patch.object(plan, "open_tracking", opened):
        run_toy(folder, options)
    return asked


def registered_by(folder: Path, options: dict[str, Any]) -> list[tuple[str, float | None]]:
    """What the registry is asked for at the end of a run; what it does is tested beside it."""
    asked: list[tuple[str, float | None]] = []

    def register(_: Any, entries: Any, name: str, max_mb: float | None) -> list[str]:
        asked.append((name, max_mb))
        return []

    untracked: Callable[..., Any] = lambda **given: open_tracking(**{**given, "enabled": False})  # noqa: E731
    with mock.patch.object(plan, "open_tracking", untracked), mock.patch.object(NoTracking, "register", register):
        run_toy(folder, merge({"mlflow": {"enabled": True}}, options))
    return asked


def launched(folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """What launch/distill.py hands to the plan, or how it ended instead."""
    got: dict[str, Any] = {}

    def caught(config: RunConfig, graph: Any, ranks: Ranks, out: Path, **_: Any) -> dict[str, Any]:
        got.update(out=str(out), data=graph.sha256, device=ranks.device.type, threads=torch.get_num_threads())
        raise SystemExit(0)

    folder.mkdir()
    if "data" not in options:
        options = {"data": str(small_data(folder / "data"))} | options
    before = torch.get_num_threads()
    try:
        with mock.patch.object(command, "run_plan", caught), pytest.raises(SystemExit) as end:
            distill.main([f"{key}={value}" for key, value in options.items()], data=None, out=None, resume=False)
    finally:
        torch.set_num_threads(before)
    return got | {"code": end.value.code}


def launched_with_and_without_gpu(folder: Path, options: dict[str, Any]) -> list[Any]:
    found = []
    for gpu in (True, False):
        with mock.patch("torch.cuda.is_available", lambda gpu=gpu: gpu), mock.patch("torch.cuda.set_device"):
            got = launched(Path(f"{folder}-{gpu}"), options)
            found.append((got.get("device"), got["code"]))
    return found


def data_after(folder: Path, options: dict[str, Any]) -> str:
    data = small_data(Path(f"{folder}-data"), seed=options["data"])
    return str(launched(folder, {"data": data})["data"])


def engines_of(folder: Path, options: dict[str, Any]) -> list[int]:
    """The ZeRO stages of the DeepSpeed engines that a run makes; what they do is tested beside them."""
    made: list[int] = []

    def engine(name: str, tensors: Any, *, lr: float, ranks: Ranks, zero: int) -> DenseOptimizer:
        made.append(zero)
        return DenseOptimizer(name, tensors, lr=lr)

    if "zero" in options["engine"]:
        options = {"engine": {"name": "deepspeed", **options["engine"]}}
    with mock.patch.object(job_module, "DeepSpeedDense", engine):
        run_toy(folder, options)
    return made


def refused_pickle_after(folder: Path, options: dict[str, Any]) -> str:
    """What is wrong with a teacher that is a pickle, and no model of PyKEEN."""
    folder.mkdir()
    (folder / "trained_model.pkl").write_bytes(b"not a model")
    taught = {"teacher": f"pykeen:{folder}", "student": {**BASE, "method": "bkd"}}
    with pytest.raises(DistkgdError) as refused:
        run_toy(folder / "run", merge(taught, options))
    return str(refused.value).replace(str(folder), "")


def page_after(folder: Path, options: dict[str, Any]) -> tuple[bool, int]:
    """Whether there is a page, and how many answers it tells of."""
    run_toy(folder, merge({"teacher": {**BASE, "dim": 12}, "student": {**BASE, "method": "bkd"}}, options))
    examples = folder / "examples.json"
    asked = json.loads(examples.read_text(encoding="utf-8"))["queries"] if examples.exists() else 0
    return (folder / "report.html").exists(), asked


RUN_CASES: dict[str, tuple[list[Any], Callable[[Path, dict[str, Any]], Any]]] = {
    "name": (["one", "two"], lambda f, o: launched(f, o)["out"]),
    "data": ([0, 1], data_after),
    "seed": ([0, 1], rows_after),
    "device": (["auto", "cpu", "cuda"], launched_with_and_without_gpu),
    "dtype": (["float32", "float64"], dtype_after),
    "threads": ([1, 2], lambda f, o: launched(f, o)["threads"]),
    "teacher": ([None, {**BASE, "dim": 12}], stages_after),
    "teachers": ([None, {"one": {**BASE, "dim": 12}}, {"two": {**BASE, "dim": 10}}], plan_after),
    "chain": (
        [None, {"dims": [12, 8, 6]}, {"dims": [12, 8, 6], "per_dim": {8: {"epochs": 3}}}, {"dims": [12, 10, 6]}],
        plan_after,
    ),  # chain.overlap: tests/pipeline/test_overlap.py
    "assistant": ([None, 8, {"dims": [8], "per_dim": {8: {"epochs": 3}}}, {"dims": [10, 8]}], plan_after),
    "student": ([{"dim": 6}, {"dim": 8}], stages_after),
    "baseline": ([False, True, {"dim": 6}], stages_after),
    "ties": (["realistic", "optimistic", "pessimistic"], tied_metrics_after),
    "filter": (["filtered", "raw"], metrics_after),
    "test": ([False, True], splits_after),
    "trust_pickle": ([False, True], refused_pickle_after),
    "keep": ([1, 2, 3], checkpoints_after),
    "storage": ([None, "memory://options/a", "memory://options/b"], stored_after),
    "engine.name": (["ddp", "deepspeed"], engines_of),
    "engine.zero": ([0, 1, 2, 3], engines_of),
    "mlflow.enabled": ([False, True], tracking_of),
    "mlflow.uri": ([None, "sqlite:///other.db"], tracking_of),
    "mlflow.registry": ([False, True], registered_by),
    "mlflow.registered_as": ([None, "other"], registered_by),
    "mlflow.champion_max_mb": ([None, 1.5, 20.0], registered_by),
    "report.html": ([False, True], page_after),
    "report.queries": ([0, 20, 60], page_after),
    "report.rounded": ([[], [4], [4, 2], [1, 3, 8, 16]], rounded_after),
}


@pytest.mark.parametrize("name", RUN_CASES)
def test_every_run_option_changes_something(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    values, effect = RUN_CASES[name]
    seen = []
    for i, value in enumerate(values):
        options: Any = value
        for key in reversed(name.split(".")):
            options = {key: options}
        seen.append(effect(tmp_path / str(i), options))
    assert all_differ(seen), f"{name}: the same for some of {values}: {seen}"


def test_a_run_option_that_says_how_to_rank_is_also_what_the_best_rows_are_chosen_by(tmp_path: Path) -> None:
    """Validation uses the protocol of the report."""
    asked = []
    real = ranking.ranks_and_ties_of

    def asked_of(*arguments: Any, ties: str, filter_: str) -> tuple[torch.Tensor, torch.Tensor]:
        asked.append((ties, filter_))
        return real(*arguments, ties=ties, filter_=filter_)

    with mock.patch.object(stage_job, "ranks_and_ties_of", asked_of):
        run_toy(tmp_path, {"ties": "pessimistic", "filter": "raw"})
    # Two validations, then valid and test of the finished model.
    assert asked == [("pessimistic", "raw")] * 4


# -- nothing is left out ------------------------------------------------------------------------------------------


def leaves(node: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, annotation) of every option below a node; sub-nodes are walked, not named."""
    for name, info in node.model_fields.items():
        kind = info.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel) and kind is not StageConfig:
            yield from leaves(kind, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", kind


def stage_options() -> dict[str, Any]:
    found = dict(leaves(StageConfig))
    for name, method in METHODS.items():
        found |= dict(leaves(method.Settings, f"{name}."))
    return found | dict(leaves(StageTwoConfig, "dualde.stage_two."))


def choices(kind: Any) -> set[Any]:
    """The values that an annotation lists one by one."""
    if kind is bool:
        return {False, True}
    if get_origin(kind) is Literal:
        return set(get_args(kind))
    return set(itertools.chain.from_iterable(map(choices, get_args(kind)))) - {NoneType}


def test_every_stage_option_has_a_case() -> None:
    assert stage_options().keys() == CASES.keys()


def test_every_run_option_has_a_case() -> None:
    assert dict(leaves(RunConfig)).keys() == RUN_CASES.keys()


def test_every_optional_node_is_walked() -> None:
    """A new `SomeConfig | None` must be added to `stage_options`, or its options would go unseen."""
    nodes = [StageConfig, *(method.Settings for method in METHODS.values())]
    optional = set()
    for node in nodes:
        for info in node.model_fields.values():
            if isinstance(info.annotation, UnionType):
                optional |= {k for k in get_args(info.annotation) if isinstance(k, type) and issubclass(k, BaseModel)}
    assert optional == {StageTwoConfig}


def test_every_choice_of_an_option_is_tried() -> None:
    tried = {name: case.values for name, case in CASES.items()} | {k: v for k, (v, _) in RUN_CASES.items()}
    # Without a regulariser there is nothing to weigh; `weight` 0 and "none" are the same by construction.
    # `move: auto` is one of the others.
    missing_on_purpose = {"regulariser.name": {"none"}, "move": {"auto"}}
    for name, kind in (stage_options() | dict(leaves(RunConfig))).items():
        hashable = {value for value in tried[name] if not isinstance(value, dict | list)}
        hashable |= {one for value in tried[name] if isinstance(value, list | tuple) for one in value}
        missing = choices(kind) - hashable - missing_on_purpose.get(name, set())
        assert not missing, f"{name}: no case tries {missing}"


def test_without_a_regulariser_there_is_no_penalty(tmp_path: Path) -> None:
    assert all(row.keys() <= {"loss/hard"} for row in observe(BASE, tmp_path, RISING)["losses"])
