"""The tasks: what each compares, per which unit, at which size, and what it is meant to reach."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from benchmarks.side_by_side.data import source_of_size
from benchmarks.side_by_side.roofline import Work, full_pass, full_step, sampled_step, times, together

SCORERS = ("transe", "complex", "rotate")
PREDICTED_AT_ONCE = 256  # queries
REGIMES: Mapping[str, dict[str, Any]] = {
    # Equally many negatives per positive triple in each, as PyKEEN's num_negs_per_pos: head or tail is replaced.
    "triple": {"kind": "triple", "num": 64, "sides": "uniform"},
    "chunk": {"kind": "chunk", "num": 64, "chunk": 64, "sides": "uniform"},
    "batch": {"kind": "batch", "num": 64, "sides": "uniform"},
}
TARGETS: Mapping[str, float] = {
    "train/transe/triple": 5.0,
    "train/complex/triple": 10.0,
    "train/rotate/triple": 10.0,
    "train/transe/chunk": 20.0,
    "train/complex/chunk": 20.0,
    "train/rotate/chunk": 20.0,
    "evaluate/transe": 15.0,
    "evaluate/complex": 30.0,
    "distil/complex/all": 1 / 1.15,
    "distil/complex/chunk": 1 / 1.15,
    "load": 10.0,
}
MORE_TARGETS: Mapping[str, Mapping[str, float]] = {
    "train/complex/all": {"gemm_share_at_least": 0.7, "memory_ratio_at_most": 1 / 8}
}


@dataclass(frozen=True)
class Scale:
    """Sizes of a measurement. The number of steps, triples and queries is that of one round; ours may take more of
    them, so that both sides' rounds are long enough to be timed.

    second_peer: whether TorchKGE, the slower of the peers, is measured too.
    """

    name: str
    rounds: int = 5
    source: str = ""
    entities: int = 40_943
    dim: int = 512
    student_dim: int = 64
    batch: int = 1024
    chunk: int = 64
    steps: int = 10
    peer_steps: int = 3
    all_batch: Mapping[str, int] = field(default_factory=lambda: {"complex": 1024, "transe": 64, "rotate": 32})
    evaluated: int = 1024
    peer_evaluated: Mapping[str, int] = field(default_factory=lambda: {"complex": 128, "transe": 128, "rotate": 64})
    second_peer: bool = True
    served: int = 100
    asked: int = 0  # test queries of a whole test split's prediction, 0: all
    students: Mapping[str, int] = field(default_factory=lambda: {"64": 64, "32": 32})  # beside `dim`, by their names
    devices: tuple[str, ...] = ("cpu",)
    loaded: int = 10_000_000
    names: int = 2_000_000
    ceiling_numbers: int = 1 << 26


FULL = Scale("full")
QUICK = Scale(
    "quick",
    steps=4,
    peer_steps=1,
    all_batch={"complex": 256, "transe": 8, "rotate": 2},
    evaluated=256,
    peer_evaluated={"complex": 16, "transe": 8, "rotate": 4},
    second_peer=False,
    served=20,
    asked=256,
    loaded=1_000_000,
    names=200_000,
)
TINY = Scale(
    "tiny",
    rounds=2,
    source="powerlaw:entities=200,triples=900,relations=4,skew=0.5,seed=0,valid=20,test=50",
    entities=200,
    dim=16,
    student_dim=8,
    batch=64,
    chunk=16,
    steps=1,
    peer_steps=1,
    all_batch={"complex": 16, "transe": 16, "rotate": 16},
    evaluated=8,
    peer_evaluated={"complex": 8, "transe": 8, "rotate": 8},
    served=2,
    asked=8,
    students={"64": 8, "32": 4},
    loaded=1000,
    names=100,
    ceiling_numbers=1 << 12,
)


@dataclass(frozen=True)
class Arm:
    """One side of a task: `function` of the family's table, in that family's process."""

    family: str
    function: str
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Task:
    """unit: what is counted per second. group: tasks that are measured side by side, each shared arm once.

    work: the least that a unit needs. memory: measure peaks in fresh processes too, and how many bytes both sides hold
    anyway. products: matrix products on this side, in every round; the task's share of their rate is reported.
    peer_name: of a peer that is ours, too. device: of both sides; the ceilings are the processor's.
    """

    name: str
    unit: str
    group: str
    ours: Arm
    peer: Arm
    work: Work
    target: float | None = None
    more_targets: Mapping[str, float] = field(default_factory=dict)
    memory: int | None = None
    products: Arm | None = None
    peer_name: str | None = None
    device: str = "cpu"


def all_tasks(scale: Scale, folder: str) -> dict[str, Task]:
    """Every task by name. folder: of the text that is to be read; it is made by whoever runs the task."""
    source = scale.source or source_of_size()
    made = [
        *_training(scale, source),
        *_full(scale, source),
        *_evaluation(scale, source),
        *_distillation(scale, source),
    ]
    made += _inference(scale, source)
    made += _rest(scale, source, folder)
    return {t.name: replace(t, target=TARGETS.get(t.name), more_targets=MORE_TARGETS.get(t.name, {})) for t in made}


def stage_of(scorer: str, regime: str, scale: Scale) -> dict[str, Any]:
    """The student's config of a sampled regime."""
    negatives = dict(REGIMES[regime])
    if "chunk" in negatives:
        negatives["chunk"] = scale.chunk
    stage = {"scorer": scorer, "dim": scale.dim, "batch_size": scale.batch, "reciprocal": False}
    return stage | {"negatives": negatives, "loss": {"name": "self_adversarial"}, "optimizer": {"name": "adagrad"}}


def _training(scale: Scale, source: str) -> list[Task]:
    tasks = []
    number = REGIMES["triple"]["num"]
    groups = {"triple": scale.batch, "chunk": scale.batch // scale.chunk, "batch": 1}
    for scorer in SCORERS:
        size = {"source": source, "scorer": scorer, "dim": scale.dim, "batch": scale.batch, "negatives": number}
        group, peer = f"train/{scorer}", {**size, "steps": scale.peer_steps}
        for regime in REGIMES:
            ours = {"source": source, "stage": stage_of(scorer, regime, scale), "steps": scale.steps}
            work = sampled_step(scorer, scale.entities, scale.dim, scale.batch, number, groups[regime])
            arm = Arm("ours", "train", ours)
            task = Task(f"{group}/{regime}", "positives/s", group, arm, Arm("pykeen", "train", peer), work)
            tasks.append(task)
            if scale.second_peer and regime == "triple" and scorer != "rotate":
                tasks.append(replace(task, name=f"{task.name}:torchkge", peer=Arm("torchkge", "train", peer)))
    return tasks


def _full(scale: Scale, source: str) -> list[Task]:
    tasks = []
    for scorer in SCORERS:
        batch, name = scale.all_batch[scorer], f"train/{scorer}/all"
        stage = {"scorer": scorer, "dim": scale.dim, "batch_size": batch, "negatives": {"kind": "all"}}
        ours = {"source": source, "stage": stage, "steps": 1}
        plain = {"source": source, "scorer": scorer, "dim": scale.dim, "batch": batch, "steps": 1}
        work = full_step(scorer, scale.entities, scale.dim, batch)
        task = Task(name, "positives/s", name, Arm("ours", "train", ours), Arm("plain", "one_vs_all", plain), work)
        if scorer == "complex":  # table, gradient, state
            products = Arm("ours", "products", {"numbers": scale.ceiling_numbers})
            task = replace(task, memory=3 * 4 * scale.dim * scale.entities, products=products)
        tasks.append(task)
    return tasks


def _evaluation(scale: Scale, source: str) -> list[Task]:
    tasks = []
    for scorer in SCORERS:
        size = {"source": source, "scorer": scorer, "dim": scale.dim}
        name, peer = f"evaluate/{scorer}", {**size, "triples": scale.peer_evaluated[scorer]}
        work = full_pass(scorer, scale.entities, scale.dim, 2 * scale.evaluated)
        arm = Arm("ours", "evaluate", {**size, "triples": scale.evaluated})
        task = Task(name, "queries/s", name, arm, Arm("pykeen", "evaluate", peer), work)
        tasks.append(task)
        if scale.second_peer and scorer != "rotate":
            tasks.append(replace(task, name=f"{name}:torchkge", peer=Arm("torchkge", "evaluate", peer)))
    return tasks


def _distillation(scale: Scale, source: str) -> list[Task]:
    tasks = []
    for regime in ("all", "chunk"):
        batch = scale.all_batch["complex"] if regime == "all" else scale.batch
        stage = stage_of("complex", "chunk", scale) | {"dim": scale.student_dim, "batch_size": batch}
        teacher, student = scale.dim, scale.student_dim
        if regime == "all":
            stage |= {"negatives": {"kind": "all"}, "reciprocal": True}
            learns = full_step("complex", scale.entities, student, batch)
            speaks = times(full_pass("complex", scale.entities, teacher, 2 * batch), 2)
        else:
            groups, number = scale.batch // scale.chunk, REGIMES["chunk"]["num"]
            learns = sampled_step("complex", scale.entities, student, batch, number, groups)
            rows = sampled_step("complex", scale.entities, teacher, batch, number, groups)
            speaks = Work(rows.bytes / 4, rows.gemm / 3)
        stage["loss"] = {"name": "softmax"}
        options = {"source": source, "teacher": teacher, "steps": 1 if regime == "all" else scale.steps}
        ours = Arm("ours", "train", {**options, "stage": {**stage, "method": "bkd"}})
        apart = Arm("ours", "distil_apart", {**options, "stage": stage})
        name = f"distil/complex/{regime}"
        tasks.append(Task(name, "positives/s", name, ours, apart, together(learns, speaks)))
    return tasks


def _inference(scale: Scale, source: str) -> list[Task]:
    # DualDE Table 6: a teacher and its students answer all tail queries of the test split.
    tasks = []
    for device in scale.devices:
        for scorer in SCORERS:
            for name, dim in scale.students.items():
                size = {"source": source, "scorer": scorer, "device": device, "queries": scale.asked}
                ours, teacher = (Arm("ours", "inference", size | {"dim": d}) for d in (dim, scale.dim))
                group = f"inference/{scorer}" if device == "cpu" else f"inference/{scorer}:{device}"
                tasks.append(
                    Task(
                        f"inference/{scorer}/{name}" if device == "cpu" else f"inference/{scorer}/{name}:{device}",
                        "queries/s",
                        group,
                        ours,
                        teacher,
                        full_pass(scorer, scale.entities, dim, PREDICTED_AT_ONCE),
                        peer_name=f"dim {scale.dim}",
                        device=device,
                    )
                )
    return tasks


def _rest(scale: Scale, source: str, folder: str) -> list[Task]:
    text = {"folder": folder, "triples": scale.loaded, "entities": scale.names}
    size = {"source": source, "scorer": "complex", "dim": scale.dim}
    negatives = REGIMES["triple"]["num"]
    sampled = {"source": source, "stage": stage_of("complex", "triple", scale) | {"dim": 2}}
    peer = {"source": source, "batch": scale.batch, "negatives": negatives}
    tables = {"entities": scale.entities, "dim": scale.dim}
    served = size | {"queries": scale.served}
    line = 2 * (len(str(scale.names)) + 2) + 5  # bytes of text of a triple
    drawn = Work(8.0 * (negatives + 3))
    load = Task("load", "triples/s", "load", Arm("ours", "load", text), Arm("pykeen", "load", text), Work(line + 24.0))
    return [
        replace(load, memory=0),
        Task("sample", "positives/s", "sample", Arm("ours", "sample", sampled), Arm("pykeen", "sample", peer), drawn),
        Task(
            "checkpoint",
            "bytes/s",
            "checkpoint",
            Arm("ours", "checkpoint", tables),
            Arm("plain", "checkpoint", tables),
            Work(2.0),  # read once, written once
        ),
        Task(
            "serve",
            "queries/s",
            "serve",
            Arm("ours", "serve", served),
            Arm("pykeen", "serve", served),
            full_pass("complex", scale.entities, scale.dim, 1),
        ),
    ]
