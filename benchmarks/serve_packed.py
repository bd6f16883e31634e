"""Top-10 queries a second of rows of few bits beside float32 rows, selection included, on one thread.

python -m benchmarks.serve_packed [--entities 40943] [--bits 2] [--rounds 15]   # benchmarks/results/serve_packed.json

The models are untrained: how long an answer takes does not depend on what was learned. All arms take their rounds in
turn; a figure is the median of the rounds, a ratio the median of the rounds' ratios.
"""

import json
import statistics
import time
from pathlib import Path
from typing import Annotated

import torch
import typer

from distkgd.common.files import write_atomic
from distkgd.common.provenance import machine
from distkgd.data.filters import Queries
from distkgd.distributed.ranks import Ranks
from distkgd.distributed.tables import ShardedTable
from distkgd.evaluation.prediction import top_k
from distkgd.kernels.packed import PackedRows, chosen
from distkgd.kernels.quantiser import Quantiser
from distkgd.models.model import Model, new_model
from distkgd.scorers import build_scorer

RESULTS = Path(__file__).resolve().parent / "results" / "serve_packed.json"
RELATIONS, ANSWERS = 11, 10
SINGLE_QUERIES, BATCH = 20, 256  # of a round
TARGETS = {"one/float32 512": 3.0, "one/float32 64": 1.0, "batch/float32 512": 1.0}


def model_of(entities: int, dim: int, bits: int | None = None) -> Model:
    """A ComplEx, packed if it has `bits`."""
    scorer = build_scorer("complex", dim)
    model = new_model(scorer, entities, RELATIONS, Ranks(), reciprocal=True, seed=0)
    if bits is None:
        return model
    quantiser = Quantiser(bits)
    rows = PackedRows(quantiser.pack(model.entity.weight), quantiser)
    return Model(scorer, ShardedTable(rows, entities, Ranks()), model.relation, RELATIONS, True)


def seconds(model: Model, at_once: int, num: int) -> float:
    """Of each of `num` top-10 queries, asked `at_once`."""
    generator = torch.Generator().manual_seed(0)
    anchor = torch.randint(0, model.entity.total, (num,), generator=generator)
    relation, side = torch.randint(0, RELATIONS, (num,), generator=generator), torch.zeros(num, dtype=torch.int64)
    begun = time.perf_counter()
    for lo in range(0, num, at_once):
        part = slice(lo, lo + at_once)
        top_k(model, Queries(anchor[part], relation[part], side[part], anchor[part]), ANSWERS)
    return (time.perf_counter() - begun) / num


def main(
    entities: Annotated[int, typer.Option(min=10, help="Rows of the tables.")] = 40_943,
    bits: Annotated[int, typer.Option(help="Of each number of the packed rows.")] = 2,
    rounds: Annotated[int, typer.Option(min=1)] = 15,
    json_: Annotated[Path, typer.Option("--json", help="Where the figures go.")] = RESULTS,
) -> None:
    """Measure, print and write."""
    torch.set_num_threads(1)
    packed = f"{bits} bits 512"
    models = {packed: model_of(entities, 512, bits)}
    models |= {f"float32 {dim}": model_of(entities, dim) for dim in (512, 64)}
    rows = {}
    for name, at_once, num in (("one", 1, SINGLE_QUERIES), ("batch", BATCH, BATCH)):
        taken: dict[str, list[float]] = {arm: [] for arm in models}
        for turn in range(rounds + 1):
            for arm, model in models.items():
                found = seconds(model, at_once, num)
                taken[arm] += [found] if turn else []  # the first one warms up
        for arm, found in taken.items():
            ratios = sorted(theirs / mine for theirs, mine in zip(found, taken[packed], strict=True))
            row = {"queries_per_second": 1 / statistics.median(found), "bytes": _bytes(models[arm])}
            if arm != packed:
                row |= {"ratio": statistics.median(ratios), "smallest": ratios[0], "largest": ratios[-1]}
            rows[f"{name}/{arm}"] = row | {"target": TARGETS.get(f"{name}/{arm}")}
            told = f"; packed is {row['ratio']:.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f}) times" if arm != packed else ""
            print(f"{name:5} {arm:12} {row['queries_per_second']:10.1f} queries/s{told}")
    about = {"machine": machine(), "entities": entities, "kernel": chosen(), "rounds": rounds, "rows": rows}
    write_atomic(json_, json.dumps(about, indent=2) + "\n")


def _bytes(model: Model) -> int:
    shard = model.entity.shard
    return shard.packed.nbytes if isinstance(shard, PackedRows) else shard.nbytes


if __name__ == "__main__":
    typer.run(main)
