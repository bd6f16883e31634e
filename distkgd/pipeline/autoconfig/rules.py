"""What is trained when nobody says how: the table of docs/your_own_graph.md as code. Pure functions of a few sizes.

The settings were found on graphs of 5,000 to 90,000 triples (benchmarks/LOG.md), those of the student and of the direct
model in trials of their own; what scales with the graph is said beside each rule. Nothing here looks at the machine, so
a resumed or repeated command chooses the same.
"""

from collections.abc import Collection
from typing import Any

from distkgd.data import Graph
from distkgd.errors import ConfigError, UnsupportedError
from distkgd.pipeline.config import RunConfig, StageConfig, alone, resized
from distkgd.pipeline.stages import usual_rounding
from distkgd.scorers import build_scorer

SCORER = "complex"  # at home on all kinds of relations, croppable, and served by inner products
RATIO = 8  # teacher's dim over the student's: above it DualDE finds no gain
LARGEST_TEACHER = 256  # for the sake of time; students of 128 and more get a teacher of twice their dim
CROPPABLE = 128  # dim of the model whose crops are measured against a budget
CROP_STEP = 8
CROP_W3 = (-3.5, -2.5)  # the smaller a crop, the more it weighs: small ones are what budgets are about
FEW_BITS = (8, 4, 2, 1)  # that its crops are rounded to
FEW_BITS_LR = 0.05  # of what begins at rounded rows, and has a quarter of the epochs
FEW_ENTITIES = 2048  # up to here every entity is a negative
DENSE = 30  # triples per entity, from which on there is little to regularise
N3_OF_DENSE = 0.005
LARGEST_BATCH = 512
STEPS_PER_EPOCH = 20  # at least, so that small graphs take steps too
TEACHER_VISITS, STUDENT_VISITS = 1_800_000, 2_700_000  # training triples seen in all, repeats counted
TEACHER_EPOCHS, STUDENT_EPOCHS = (5, 40), (8, 60)  # at least and at most, whatever the visits say
VALIDATIONS = 5


def choose(graph: Graph, to: int, bits: int = 32) -> dict[str, Any]:
    """The config of a teacher, a student of `to` numbers of `bits` per entity, and the direct model, as in YAML.

    Where the teacher of a student of few bits would have only twice its dim, it has the student's own, and the student
    begins at its rows.
    """
    check_dim(to)
    triples, entities = len(graph.train), graph.num_entities
    few = entities <= FEW_ENTITIES
    teacher = {
        "scorer": SCORER,
        "dim": min(RATIO * to, max(LARGEST_TEACHER, 2 * to)),
        **_training(triples, few, TEACHER_VISITS, TEACHER_EPOCHS, negatives=2048, lr=0.5 if few else 0.2),
        "regulariser": n3(triples, entities, 0.01 if few else 0.05),
    }
    student = {
        "scorer": SCORER,
        "dim": to,
        "method": "bkd",
        **_training(triples, few, STUDENT_VISITS, STUDENT_EPOCHS, negatives=1024, lr=0.5),
        "regulariser": n3(triples, entities, 0.05),
        "distill": _soft_labels(few),
    }
    baseline: bool | dict[str, Any] = True
    if bits < 32:
        student |= _bits(bits)
    if bits < 32 and teacher["dim"] == 2 * to:
        given = {key: student[key] for key in ("epochs", "validate_every", "optimizer", "regulariser")}
        teacher, baseline = teacher | {"dim": to}, given
        student = {key: value for key, value in student.items() if key != "regulariser"}
        student |= _from_rows(student["epochs"])
    return {"teacher": teacher, "student": student, "baseline": baseline}


def choose_croppable(graph: Graph) -> dict[str, Any]:
    """The config of one model whose crops are models, as in YAML."""
    triples, entities = len(graph.train), graph.num_entities
    few = entities <= FEW_ENTITIES
    student = {
        "scorer": SCORER,
        "dim": CROPPABLE,
        "method": "med",
        **_training(triples, few, TEACHER_VISITS, TEACHER_EPOCHS, negatives=1024, lr=0.5),
        "regulariser": n3(triples, entities, 0.02 if few else 0.05),
        "distill": {
            "dims": {"from": CROP_STEP, "to": CROPPABLE, "step": CROP_STEP},
            "mutual_weight": 0.1,
            "w3": list(CROP_W3),
        },
    }
    return {"student": student, "baseline": False}


def few_bits(croppable: StageConfig, dim: int, bits: int) -> StageConfig:
    """How the crop of a model to `dim` numbers is taught to have few bits, by that model."""
    over = {"method": "bkd", "row_dtype": "full", **_bits(bits), **_from_rows(croppable.epochs)}
    over["regulariser"] = {"name": "none", "weight": 0.0, "relation_weight": None}
    over["distill"] = _soft_labels(croppable.negatives.kind == "all")
    return resized(croppable, dim, over, f"student_{dim}_{bits}bit")


def direct_of(croppable: StageConfig, dim: int, bits: int) -> StageConfig:
    """How a model of the size of such a crop is trained without a teacher."""
    over = {"method": "scratch"} | ({"row_dtype": "full", **_bits(bits)} if bits < 32 else {})
    return alone(resized(croppable, dim, over, "direct"))


def n3(triples: int, entities: int, weight: float) -> dict[str, Any]:
    """The regulariser: of `weight`, but of little where entities have many triples each."""
    return {"name": "n3", "weight": weight if triples < DENSE * entities else N3_OF_DENSE}


def check_dim(to: int) -> None:
    """ConfigError for a dim that the scorer of the rules cannot have."""
    try:
        build_scorer(SCORER, to, None, None)
    except UnsupportedError as error:
        raise ConfigError(f"--to {to}: {error}") from None


def batch_size(triples: int) -> int:
    """The largest power of two with at least STEPS_PER_EPOCH batches in `triples`, at most LARGEST_BATCH."""
    size = LARGEST_BATCH
    while size > 1 and size * STEPS_PER_EPOCH > triples:
        size //= 2
    return size


def fitted(config: RunConfig, triples: int, free: Collection[str]) -> tuple[RunConfig, list[str]]:
    """A config whose stages `free` have batches that so many training triples can fill, and what was changed."""
    update, said = dict[str, Any](), []
    for name in sorted(free):
        stage = getattr(config, name)
        if not isinstance(stage, StageConfig) or stage.batch_size <= triples:
            continue
        unit = stage.accumulate * (stage.negatives.chunk if stage.negatives.kind == "chunk" else 1)
        size = max(unit, batch_size(triples) // unit * unit)
        update[name] = stage.model_copy(update={"batch_size": size})
        said.append(f"{name}.batch_size {stage.batch_size} does not fit {triples} training triples; {size} is taken")
    return config.model_copy(update=update), said


def epochs(triples: int, visits: int, bounds: tuple[int, int]) -> int:
    """As many as make `visits` of `triples`, within `bounds`."""
    return max(bounds[0], min(bounds[1], round(visits / triples)))


def _bits(bits: int) -> dict[str, Any]:
    return {"bits": bits, "relation_bits": usual_rounding(bits).relation_bits}


def _from_rows(number: int) -> dict[str, Any]:
    # Of a student of few bits that begins at its teacher's rows, which took `number` epochs.
    optimizer = {"name": "adagrad", "lr": FEW_BITS_LR}
    return {"start": "crop", "epochs": max(1, round(number / 4)), "validate_every": 1, "optimizer": optimizer}


def _soft_labels(few: bool) -> dict[str, float]:
    return {"weight": 1.0, "hard_weight": 1.0} if few else {"weight": 3.0, "hard_weight": 0.0}


def _training(
    triples: int, few: bool, visits: int, bounds: tuple[int, int], negatives: int, lr: float
) -> dict[str, Any]:
    number = epochs(triples, visits, bounds)
    return {
        "epochs": number,
        "batch_size": batch_size(triples),
        "negatives": {"kind": "all"} if few else {"kind": "batch", "num": negatives},
        "optimizer": {"name": "adagrad", "lr": lr},
        "schedule": {"name": "linear", "final": 0.05},
        "validate_every": max(1, number // VALIDATIONS),
    }
