"""What the sharded engine costs; results in benchmarks/results/, with the machine and versions.

python benchmarks/engine.py memory     # peak memory of a 1-vs-all KL step at 0.25, 1 and 2.5 M entities
python benchmarks/engine.py traffic    # bytes at the collectives beside the rehearsal's: every loss and move
python benchmarks/engine.py speed      # 2 ranks of one thread beside 1 process of two threads
python benchmarks/engine.py scale      # 10 M entities on 2 ranks; 2.5 M entities 1-vs-all with distillation
python benchmarks/engine.py project    # a table for machines that were not measured
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import typer
from foundation import ROOT, save

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where `benchmarks` is found

from benchmarks.projection import choose, projected
from benchmarks.projection import traffic as traffic_of
from benchmarks.side_by_side.jobs import bare_job, random_triples
from benchmarks.side_by_side.machine import status_bytes
from distkgd.distributed.cost import memory as memory_of
from distkgd.distributed.ranks import Ranks, join_ranks, leave_ranks
from distkgd.kernels.memory import keep_freed_memory
from distkgd.training.communication import expected_memory, expected_traffic
from distkgd.training.job import Progress
from distkgd.training.loop import train_step

RELATIONS = 50
app = typer.Typer(help=__doc__)


def child(cases: Sequence[Mapping[str, Any]], world: int, threads: int) -> list[list[dict[str, Any]]]:
    """What `measure` says of each case, [case][rank], in fresh processes."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable]
        if world > 1:
            command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
        command += [str(Path(__file__).resolve()), "measure", json.dumps(list(cases)), folder]
        env = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
        subprocess.run(command, check=True, cwd=ROOT, env=env)
        by_rank = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(world)]
        return [list(case) for case in zip(*by_rank, strict=True)]


@app.command(hidden=True)
def measure(cases: str, out: Path) -> None:
    """One process of a measurement."""
    keep_freed_memory()
    ranks = join_ranks("cpu")
    found = [measure_case(case, ranks) for case in json.loads(cases)]
    (out / f"{ranks.rank}.json").write_text(json.dumps(found))
    leave_ranks(ranks)


def measure_case(case: Mapping[str, Any], ranks: Ranks) -> dict[str, Any]:
    """`steps` steps of a bare job after `warm` ones: their seconds, peak memory, and bytes sent."""
    entities = case["entities"]
    train = random_triples(entities, case["triples"], RELATIONS, ranks, case.get("skew", 0.0))
    job = bare_job(case["stage"], train, entities, RELATIONS, ranks, case.get("teacher_dim", 0))
    ready = status_bytes("VmHWM")
    progress, seconds, warm = Progress(), [], case.get("warm", 1)
    for step in range(warm + case["steps"]):
        if step == warm:
            ranks.traffic.clear()
        progress.step = step
        ranks.barrier()
        started = time.monotonic()
        train_step(job, progress, 0)
        seconds.append(time.monotonic() - started)
    sent = {kind: n / case["steps"] for kind, n in ranks.traffic.items()}
    job.prefetcher.drop()
    inputs, steps = job.input_builder, range(warm, warm + case["steps"] + 1)
    expected = [
        expected_traffic(inputs, job.method, job.config, inputs.move, step) for step in steps if ranks.world > 1
    ]
    model = {}
    if expected:
        model = {kind: statistics.mean(e[kind] for e in expected[:-1]) for kind in expected[0]}
        model["ids"] = statistics.mean(e["ids"] for e in expected[1:])  # they travel a step ahead
    return {
        "seconds": seconds[warm:],
        "triples_per_second": job.config.batch_size / statistics.median(seconds[warm:]),
        "peak": status_bytes("VmHWM"),
        "peak_before_steps": ready,
        "sent": sent,
        "model": model,
        "memory": expected_memory(inputs, job.method, job.config),
    }


KL_STEP = {"scorer": "complex", "dim": 32, "method": "bkd", "batch_size": 512, "negatives": {"kind": "all"}}


@app.command()
def memory(sizes: str = "250000,1000000,2500000", worlds: str = "1,2") -> None:
    """Peak memory of a 1-vs-all KL step: 512 triples, so 1024 queries, teacher of 64 numbers, student of 32."""
    rows = []
    for world in map(int, worlds.split(",")):
        for entities in map(int, sizes.split(",")):
            case = {"stage": KL_STEP, "entities": entities, "triples": 100_000, "teacher_dim": 64, "steps": 1}
            (found,) = child([case], world, 2 // world)
            most = max(found, key=lambda one: one["peak"])
            shard = sum(most["memory"][kind] for kind in ("tables", "state", "gradients"))
            rows.append(
                {
                    "world": world,
                    "entities": entities,
                    "peak": most["peak"],
                    "tables_state_gradient": shard,
                    "left_over": most["peak"] - shard,
                    "seconds": statistics.median(most["seconds"]),
                }
            )
            print(
                f"{world} ranks, {entities:,} entities: peak {most['peak'] / 1e6:,.0f} MB, "
                f"tables + state + gradient {shard / 1e6:,.0f} MB, left over {rows[-1]['left_over'] / 1e6:,.0f} MB"
            )
            save("memory", {"step": KL_STEP, "teacher_dim": 64, "queries": 1024, "rows": rows})


MOVES = {"triple": ("rows", "queries"), "chunk": ("rows", "queries"), "batch": ("rows", "queries"), "all": ("queries",)}
REGIMES = {
    "triple": {"kind": "triple", "num": 64},
    "chunk": {"kind": "chunk", "num": 256, "chunk": 64},
    "batch": {"kind": "batch", "num": 4096},
    "all": {"kind": "all"},
}
DISTIL = {
    "kl": ({"method": "bkd"}, "softmax"),
    "reverse kl": ({"method": "bkd", "distill": {"divergence": "reverse_kl"}}, "softmax"),
    "js": ({"method": "bkd", "distill": {"divergence": "js"}}, "softmax"),
    "huber (dualde stage 1)": ({"method": "dualde", "distill": {"stage_two": None}}, "softplus"),
    "huber (dualde stage 2)": ({"method": "dualde", "distill": {"stage_one": False}}, "self_adversarial"),
}
HARD = ("softmax", "bce", "softplus", "self_adversarial", "margin")


@app.command()
def traffic(worlds: str = "2,3", entities: int = 20_000) -> None:
    """Payload at the collectives beside the rehearsal's: every loss and move; 256 triples, 64 numbers, teacher 128."""
    losses = {name: ({}, name) for name in HARD} | DISTIL
    names, cases = [], []
    for regime, negatives in REGIMES.items():
        for move in MOVES[regime]:
            for loss, (more, hard) in losses.items():
                stage = {"scorer": "complex", "dim": 64, "batch_size": 256, "negatives": negatives, "move": move}
                stage |= {"loss": {"name": hard}, **more}
                case = {"stage": stage, "entities": entities, "triples": 50_000, "steps": 2, "warm": 1}
                names.append({"negatives": regime, "move": move, "loss": loss})
                cases.append(case | {"teacher_dim": 128 if more else 0})
    rows = []
    for world in map(int, worlds.split(",")):
        for name, found in zip(names, child(cases, world, 1), strict=True):
            sent = statistics.mean(sum(one["sent"].values()) for one in found)
            model = statistics.mean(sum(one["model"].values()) for one in found)
            rows.append({"world": world, **name, "sent": sent, "model": model, "ratio": sent / model})
    worst = max(rows, key=lambda row: abs(row["ratio"] - 1.0))
    print(f"{len(rows)} cases; furthest from the model: {worst}")
    save("traffic", {"entities": entities, "worst": worst, "rows": rows})


SPEED = {
    "chunk": {"negatives": {"kind": "chunk", "num": 256, "chunk": 64}, "loss": {"name": "self_adversarial"}},
    "all": {"negatives": {"kind": "all"}, "loss": {"name": "softmax"}},
    "triple": {"negatives": {"kind": "triple", "num": 64}, "loss": {"name": "self_adversarial"}},
}
SPEED_SCORERS = {"transe": {"dim": 128}, "complex": {"dim": 128}}


@app.command()
def speed(rounds: int = 5, entities: int = 40_000) -> None:
    """Throughput of 2 ranks of one thread over that of 1 process of two threads; interleaved, median of ratios."""
    rows = []
    for scorer, size in SPEED_SCORERS.items():
        for regime, more in SPEED.items():
            batch = 128 if (scorer, regime) == ("transe", "all") else 1024
            stage = {"scorer": scorer, "batch_size": batch, "optimizer": {"name": "adagrad"}, **size, **more}
            case = {"stage": stage, "entities": entities, "triples": 100_000, "steps": 5, "warm": 2}
            pairs = []
            for _ in range(rounds):
                one = child([case], 1, 2)[0][0]["triples_per_second"]
                pairs.append((one, child([case], 2, 1)[0][0]["triples_per_second"]))
            ratios = sorted(two / one for one, two in pairs)
            rows.append(
                {
                    "scorer": scorer,
                    "negatives": regime,
                    "batch": batch,
                    "one_process": statistics.median(one for one, _ in pairs),
                    "two_ranks": statistics.median(two for _, two in pairs),
                    "ratio": statistics.median(ratios),
                    "ratio_min": ratios[0],
                    "ratio_max": ratios[-1],
                }
            )
            print({key: round(v, 2) if isinstance(v, float) else v for key, v in rows[-1].items()})
            save("speed_two_ranks", {"entities": entities, "rounds": rounds, "rows": rows})


SCALE = {
    "10 M entities, 64 numbers, 2 ranks": {
        "stage": {
            "scorer": "complex",
            "dim": 64,
            "batch_size": 8192,
            "negatives": {"kind": "chunk", "num": 256, "chunk": 64},
            "loss": {"name": "self_adversarial"},
            "optimizer": {"name": "rowwise_adagrad"},
        },
        "entities": 10_000_000,
        "triples": 20_000_000,
        "steps": 40,
        "warm": 5,
        "skew": 0.8,
    },
    "2.5 M entities 1-vs-all, 256 -> 32 numbers, 2 ranks": {
        "stage": {
            "scorer": "complex",
            "dim": 32,
            "method": "bkd",
            "batch_size": 512,
            "negatives": {"kind": "all"},
            "optimizer": {"name": "adagrad"},
        },
        "entities": 2_500_000,
        "triples": 10_000_000,
        "teacher_dim": 256,
        "steps": 3,
        "warm": 1,
        "skew": 0.8,
    },
}


@app.command()
def scale() -> None:
    """Large tables on this machine: throughput, peak memory and bytes per rank beside the model's."""
    rows: list[dict[str, Any]] = []
    for name, case in SCALE.items():
        (found,) = child([case], 2, 1)
        first = found[0]
        row = {
            "name": name,
            **case,
            "triples_per_second": min(one["triples_per_second"] for one in found),
            "seconds_per_step": statistics.median(first["seconds"]),
            "peak_per_rank": [one["peak"] for one in found],
            "model_memory": first["memory"],
            "sent_per_step": {kind: statistics.mean(one["sent"][kind] for one in found) for kind in first["sent"]},
            "model_sent": first["model"],
        }
        rows.append(row)
        print(f"{name}: {row['triples_per_second']:,.0f} triples/s, {row['seconds_per_step']:.2f} s a step")
        print(
            f"  peak {max(row['peak_per_rank']) / 1e9:.2f} GB, model {sum(row['model_memory'].values()) / 1e9:.2f} GB"
        )
        sent, model = sum(row["sent_per_step"].values()), sum(row["model_sent"].values())
        print(f"  sent {sent / 1e6:.2f} MB a step, model {model / 1e6:.2f} MB")
        save("scale", {"rows": rows})


@app.command()
def project() -> None:
    """What machines that were not measured would hold and send: a markdown table."""
    print("| entities | GPUs | step (1024 triples per GPU) | tables + state + gradients per GPU | sent per GPU |")
    print("|---|---|---|---|---|")
    kinds = [("chunk", 256, "ComplEx 256, 256 negatives per 64 triples"), ("all", 32, "1-vs-all KL, 256 to 32")]
    for entities in (100_000_000, 1_000_000_000):
        for world in (8, 64):
            for kind, dim, what in kinds:
                step = projected(entities, world, kind, dim)
                move = choose(step)
                held = memory_of(step.shape, move, lambda numbers: min(numbers, 1 << 26))
                kept = held["tables"] + held["state"] + held["gradients"]
                sent = sum(traffic_of(step, move).values())
                cells = f"{kept / 1e9:.1f} GB | {sent / 1e6:.0f} MB ({move} travel)"
                print(f"| {entities // 1_000_000:,} M | {world} | {what} | {cells} |")


if __name__ == "__main__":
    app()
