"""Tables of methods beside the direct model of equal size, all under one tuning budget; resumable.

    python benchmarks/tables.py benchmarks/tables/umls_16.yaml [--arm NAME]… [--beside NAME] [--workers 2] [--out …]

The YAML names the data, the teachers (trained once per seed and shared; one with a `teacher` is taught by that one of
them), what every arm's plan has (`plan`), the arms (each a `plan`, or `round`: a teacher, bits and, if it is cropped,
a dim, which is not trained), and `space`: keys of the plan with the values that trials draw from, those of an arm
beside those of all. Trial 0 takes the first value of each key; the others are drawn, the same for every run of this
script. Every arm has as many trials as the others, with the first seed, or with seed `chosen_by`, and if there is a
`trial_share`, in that share of the epochs; the one with the best validation MRR (of a croppable model the mean of its
sub-models') is trained with all seeds. No run reads the test split: the models of the chosen trials, and the teachers,
are ranked on it in the end. A finished run is repeated only if the file has come to say another plan.
benchmarks/results/table_NAME.json is written after every run.

An arm is compared with arm `beside` (default: direct), pair by pair of seeds; --beside prints the table with all arms
compared with another one instead, and leaves the results file as it is. `curve` lists dims to which arms of a
larger dim are cropped, too.
"""

import hashlib
import itertools
import json
import os
import random
import statistics
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
import yaml
from foundation import RESULTS, machine

from distkgd.common.console import Display
from distkgd.common.intervals import paired_interval
from distkgd.common.text import fixed
from distkgd.config.tree import merge
from distkgd.data import Graph, load_graph
from distkgd.data.filters import KnownAnswers
from distkgd.distributed.ranks import Ranks
from distkgd.errors import DivergedError
from distkgd.evaluation.ranking import metrics, ranks_of, ranks_of_crops
from distkgd.kernels.quantiser import Rounding
from distkgd.models.export import export_model
from distkgd.models.model_folder import bytes_on_disk, load_model
from distkgd.models.stage_result import StageResult
from distkgd.pipeline.config import RunConfig, parse_config
from distkgd.pipeline.plan import run_plan

DIRECT = "direct"
KEPT = {"name", "method", "scorer", "dim", "bits", "num_entities", "bytes", "sparse_bytes", "train_seconds"}
Tree = dict[str, Any]


def main(
    table: Annotated[Path, typer.Argument(help="What to compare (YAML).")],
    arm: Annotated[list[str] | None, typer.Option(help="Only these arms; default: all.")] = None,
    beside: Annotated[str | None, typer.Option(help="Print all gains over this arm.")] = None,
    workers: Annotated[int, typer.Option(help="Runs side by side, one thread each.")] = 2,
    out: Annotated[Path, typer.Option(help="Folder of the runs.")] = Path("runs/tables"),
) -> None:
    """Run whatever has no result yet, then print the table."""
    spec = yaml.safe_load(table.read_text(encoding="utf-8"))
    if unknown := {*(arm or ()), beside or DIRECT} - set(spec["arms"]):
        raise SystemExit(f"{table} has no arm {', '.join(sorted(unknown))}; it has {', '.join(spec['arms'])}.")
    os.environ["OMP_NUM_THREADS"] = "1"  # before the workers import torch
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        try:
            asked = Table(spec, table.stem, arm or list(spec["arms"]), out / table.stem, pool)
            asked.run()
            print(asked.table(beside))
        except BaseException:
            pool.shutdown(cancel_futures=True)  # what was not begun
            raise


class Table:
    """One comparison and what is known of it."""

    def __init__(self, spec: Tree, name: str, arms: list[str], folder: Path, pool: ProcessPoolExecutor) -> None:
        self.spec, self.name, self.arms, self.folder, self.pool = spec, name, arms, folder, pool
        self.seeds: list[int] = spec.get("seeds", [0, 1, 2])
        self.chosen_by: int = spec.get("chosen_by", self.seeds[0])
        self.path = RESULTS / f"table_{name}.json"
        before = json.loads(self.path.read_text(encoding="utf-8")) if self.path.exists() else {}
        # What the file no longer says is no result of it.
        known = {name: self.folder_of(plan).name for name, plan in self.plans().items()}
        self.runs: dict[str, Tree] = {
            name: run for name, run in before.get("runs", {}).items() if run["digest"] == known.get(name)
        }

    def plans(self) -> dict[str, Tree]:
        """{name: plan} of every run that there may be."""
        found = {f"teacher {name} {seed}": self.teacher(name, seed) for name, seed in self.teachers()}
        for arm, n in itertools.product(self.spec["arms"], range(self.trials())):
            found |= self.trial(arm, n) | {key(arm, n, seed): self.plan(arm, n, seed) for seed in self.seeds}
        return found

    def run(self) -> None:
        """Teachers, then trials, then the chosen trials with the other seeds, and all but the other trials on test."""
        needed = self.needed(json.dumps([self.spec["plan"], *(self.spec["arms"][arm] for arm in self.arms)]))
        teachers = {
            f"teacher {name} {seed}": self.teacher(name, seed) for name, seed in self.teachers() if name in needed
        }
        for taught in (False, True):  # those that are taught by others in the end
            self.finish({name: tree for name, tree in teachers.items() if ("teacher" in tree) == taught})
        trials = [self.trial(arm, n) for n in range(self.trials()) for arm in self.arms]
        self.finish({name: tree for trial in trials for name, tree in trial.items()})
        chosen = {arm: self.chosen(arm) for arm in self.arms}
        final = {key(arm, n, seed): self.plan(arm, n, seed) for seed in self.seeds for arm, n in chosen.items()}
        self.finish(final)
        self.rank_test(teachers | final)
        self.write()

    def trials(self) -> int:
        """Of every arm."""
        return int(self.spec["trials"])

    def teachers(self) -> Iterator[tuple[str, int]]:
        """(name, seed) of all of them."""
        for seed in sorted({self.chosen_by, *self.seeds}):
            for name in self.spec["teachers"]:
                yield name, seed

    def needed(self, text: str) -> set[str]:
        """The teachers that a text names with an @, and theirs."""
        named = {name for name in self.spec["teachers"] if f'"@{name}"' in text}
        return named | {other for name in named for other in self.needed(json.dumps(self.spec["teachers"][name]))}

    def teacher(self, name: str, seed: int) -> Tree:
        """Its plan."""
        student = dict(self.spec["teachers"][name])
        taught_by = student.pop("teacher", None)
        tree = {"data": self.spec["data"], "seed": seed, "student": student, "baseline": False}
        return tree if taught_by is None else tree | {"teacher": self.student_of(taught_by, seed)}

    def student_of(self, name: str, seed: int) -> str:
        """Where the model of teacher "@name" lies."""
        return str(self.folder_of(self.teacher(name.removeprefix("@"), seed)) / "stages/student")

    def overrides(self, arm: str, number: int) -> Tree:
        """{key: value} of a trial."""
        spaces = {"": self.spec.get("space", {}), arm: self.spec["arms"][arm].get("space", {})}
        drawn = {}
        for owner, space in spaces.items():
            # All arms draw alike what they share; no two trials are alike while others are left.
            first, *others = itertools.product(*space.values())
            random.Random(owner).shuffle(others)
            values = first if number == 0 or not others else others[(number - 1) % len(others)]
            drawn |= dict(zip(space, values, strict=True))
        return drawn

    def trial_key(self, arm: str, number: int) -> str:
        """Of a trial's run."""
        return ("trial " if "trial_share" in self.spec else "") + key(arm, number, self.chosen_by)

    def trial(self, arm: str, number: int) -> dict[str, Tree]:
        """{its key: its plan} of a trial, with the seed that chooses."""
        tree = self.plan(arm, number, self.chosen_by)
        return {self.trial_key(arm, number): shortened(tree, self.spec.get("trial_share", 1.0))}

    def plan(self, arm: str, number: int, seed: int) -> Tree:
        """The plan of an arm with a trial's values; its teachers are paths."""
        if (how := self.spec["arms"][arm].get("round")) is not None:
            how = how | {"teacher": self.student_of(how["teacher"], seed)}
            return {"data": self.spec["data"], "seed": seed, "round": how}
        tree = merge(self.spec["plan"], self.spec["arms"][arm].get("plan", {}))
        for name, value in self.overrides(arm, number).items():
            for part in reversed(name.split(".")):
                value = {part: value}  # noqa: PLW2901 - from the leaf to the root
            tree = merge(tree, value)
        tree = merge({"data": self.spec["data"], "seed": seed, "baseline": False}, tree)
        if "teacher" in tree:
            tree["teacher"] = self.student_of(tree["teacher"], seed)
        if "teachers" in tree:
            tree["teachers"] = {name: self.student_of(at, seed) for name, at in tree["teachers"].items()}
        return tree

    def folder_of(self, tree: Tree) -> Path:
        """Named by what is trained; where its teachers lie does not matter."""
        text = json.dumps(tree, sort_keys=True).replace(f"{self.folder}/", "")
        return self.folder / hashlib.sha256(text.encode()).hexdigest()[:16]

    def finish(self, plans: Mapping[str, Tree]) -> None:
        """Run what has no result, and note each result as it comes."""
        waiting: dict[Future[Tree], list[str]] = {}
        submitted: dict[Path, Future[Tree]] = {}  # equal plans run once
        for name, tree in plans.items():
            folder = self.folder_of(tree)
            teacher_gone = name.startswith("teacher") and not (folder / "report.json").exists()
            if name not in self.runs or teacher_gone:
                if folder not in submitted:
                    submitted[folder] = self.pool.submit(train, tree, str(folder))
                waiting.setdefault(submitted[folder], []).append(name)
        for done in as_completed(waiting):
            for name in waiting[done]:
                digest = {"digest": self.folder_of(plans[name]).name}
                try:
                    self.runs[name] = digest | done.result()
                    student = self.runs[name]["stages"][-1]
                    print(f"{name}: valid MRR {student['valid_mrr']:.4f}, {student['train_seconds']:.0f} s", flush=True)
                except DivergedError as error:
                    if name.startswith("teacher"):
                        raise
                    self.runs[name] = digest | {"diverged": str(error)}
                    print(f"{name}: {error}", flush=True)
            self.write()

    def rank_test(self, plans: Mapping[str, Tree]) -> None:
        """Add test figures to the finished runs of these plans that have none."""
        waiting: dict[Future[tuple[Tree, Tree]], str] = {}
        for name, tree in plans.items():
            if "diverged" in self.runs[name]:
                continue
            if "test_mrr" not in (student := self.runs[name]["stages"][-1]):
                smaller = [dim for dim in self.spec.get("curve", []) if dim < student["dim"]]
                dims = [int(dim) for dim in student.get("curve", {}).get("valid", smaller)]
                waiting[self.pool.submit(ranked_on_test, tree, str(self.folder_of(tree)), dims)] = name
        for done in as_completed(waiting):
            student, (found, curve) = self.runs[waiting[done]]["stages"][-1], done.result()
            student |= found | ({"curve": student.get("curve", {}) | {"test": curve}} if curve else {})
            self.write()

    def chosen(self, arm: str) -> int:
        """The trial with the best validation MRR; DivergedError where none has any."""
        if not self.sound(arm):
            raise DivergedError(f"All trials of arm {arm} have diverged; lower the rates of its space.")
        return max(self.sound(arm), key=lambda n: self.valid_mrr(arm, n))

    def sound(self, arm: str) -> list[int]:
        """The trials of an arm that have not diverged."""
        return [n for n in range(self.trials()) if "diverged" not in self.runs[self.trial_key(arm, n)]]

    def valid_mrr(self, arm: str, number: int) -> float:
        """Of a trial's student, or the mean of its sub-models."""
        student = self.runs[self.trial_key(arm, number)]["stages"][-1]
        sub_models = student.get("curve", {}).get("valid")
        return statistics.mean(one["mrr"] for one in sub_models.values()) if sub_models else float(student["valid_mrr"])

    def summary(self, beside: str | None = None) -> Tree:
        """{arm: figures over the seeds}, for arms that are through; gains over arm `beside`, or each one's own."""
        found: Tree = {}
        for arm in self.spec["arms"]:
            trials = [n for n in range(self.trials()) if self.trial_key(arm, n) in self.runs]
            if len(trials) < self.trials():
                continue
            if not self.sound(arm):
                continue
            number = self.chosen(arm)
            runs = [self.runs.get(key(arm, number, seed), {}).get("stages") for seed in self.seeds]
            if all(stages is not None and "test_mrr" in stages[-1] for stages in runs):
                found[arm] = {"trial": number, "overrides": self.overrides(arm, number)} | self.over_seeds(arm, number)
        for arm, row in found.items():
            other = found.get(beside or self.spec["arms"][arm].get("beside", DIRECT))
            for split in ("valid", "test") if other else ():
                pairs = zip(row[f"{split}_mrr"], other[f"{split}_mrr"], strict=True)
                if None not in (*row[f"{split}_mrr"], *other[f"{split}_mrr"]):
                    row[f"{split}_gain"] = paired_interval([mine - theirs for mine, theirs in pairs])
        return found

    def over_seeds(self, arm: str, number: int) -> Tree:
        """Figures of a trial, one for each seed; seconds of all its stages but those outside of its plan."""
        runs = [self.runs[key(arm, number, seed)]["stages"] for seed in self.seeds]
        names = ("valid_mrr", "test_mrr", "test_hits_at_1", "test_hits_at_10")
        found: Tree = {name: [stages[-1][name] for stages in runs] for name in names}
        # As exported: a pruned model in its smallest sparse form, one of few bits as it is.
        found["bytes"] = [stages[-1].get("sparse_bytes") or stages[-1]["bytes"] for stages in runs]
        entities = runs[0][-1].get("num_entities")  # earlier results lack it
        found |= {"bits": runs[0][-1].get("bits", 32)} | (
            {"bytes_each": found["bytes"][0] / entities} if entities else {}
        )
        found["seconds"] = [sum(stage["train_seconds"] for stage in stages) for stages in runs]
        curves = [stages[-1]["curve"] for stages in runs if "curve" in stages[-1]]
        return found | {"dim": runs[0][-1]["dim"]} | ({"curve": curves} if curves else {})

    def table(self, beside: str | None = None) -> str:
        """Markdown; `beside` as in `summary`."""
        heads = ("arm", "bytes", "each", "valid MRR", "test MRR", "±", "test gain (95%)", "H@1", "H@10", "training s")
        lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
        for arm, row in self.summary(beside).items():
            names = ("valid_mrr", "test_mrr", "test_hits_at_1", "test_hits_at_10", "seconds", "bytes")
            # Without test triples there are no test figures.
            mean = {name: None if None in row[name] else statistics.mean(row[name]) for name in names}
            known = mean["test_mrr"] is not None
            spread = f"{statistics.stdev(row['test_mrr']):.4f}" if known and len(self.seeds) > 1 else ""
            gain = spelled_out(row["test_gain"]) if "test_gain" in row else ""
            cells = [arm, f"{mean['bytes']:,.0f}", fixed(row.get("bytes_each"), 1)]
            cells += [*(fixed(mean[name], 4) for name in names[:2]), spread, gain]
            cells += [*(fixed(mean[name], 4) for name in names[2:4]), f"{mean['seconds']:.0f}"]
            lines.append(f"| {' | '.join(cells)} |")
        diverged = [f"{name} diverged" for name, run in self.runs.items() if "diverged" in run]
        return "\n".join(lines + ([f"\n{'; '.join(diverged)}"] if diverged else []))

    def write(self) -> None:
        """The results file; what it says of the machine and the commit is of the last run, not of the last look."""
        content = {"data": self.spec["data"], "selected_on": "valid", "seeds": self.seeds, "trials": self.trials()}
        content |= {"machine": machine(), "arms": self.summary(), "table": self.table().splitlines(), "runs": self.runs}
        text = json.dumps(content, indent=1) + "\n"
        before = json.loads(self.path.read_text(encoding="utf-8")) if self.path.exists() else {}
        if before | {"machine": content["machine"]} == json.loads(text):
            return
        aside = self.path.with_suffix(".part")
        aside.write_text(text, encoding="utf-8")
        aside.replace(self.path)


def shortened(tree: Tree, share: float) -> Tree:
    """A plan with every number of epochs cut to a share of it."""
    found = {name: shortened(value, share) for name, value in tree.items() if isinstance(value, dict)}
    return tree | found | ({"epochs": max(1, round(share * tree["epochs"]))} if "epochs" in tree else {})


def key(arm: str, number: int, seed: int) -> str:
    """Of a run."""
    return f"{arm} {number} {seed}"


def spelled_out(gain: Mapping[str, float]) -> str:
    """A `paired_interval` for a table."""
    return f"{gain['mean']:+.4f}" + (f" ({gain['low']:+.4f} … {gain['high']:+.4f})" if "low" in gain else "")


@cache
def graph_of(data: str) -> Graph:
    """Read once per process."""
    return load_graph(data)


def train(tree: Tree, folder: str) -> Tree:
    """{"stages": rows} of one plan, which leaves the test split unread; in a worker."""
    if "round" in tree:
        return rounded(tree, Path(folder))
    config, graph = config_of(tree), graph_of(tree["data"])
    if not len(graph.valid):
        raise SystemExit(f"{graph.name} has no valid triples to choose trials by.")
    report = run_plan(config, graph, Ranks(), Path(folder), resume=True, display=Display(False))
    stages = sorted(report.trained, key=lambda stage: stage.name == "student")  # last, whatever was trained beside it
    return {"stages": [row(stage) for stage in stages]}


def rounded(tree: Tree, folder: Path) -> Tree:
    """As `train`, of a teacher that is rounded to few bits and not trained."""
    how, out = tree["round"], folder / "stages/student/model"
    if not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        rounding = Rounding(how["bits"], how.get("relation_bits", 32), how.get("group"))
        export_model(how["teacher"], out, "packed", Ranks(), how.get("dim"), rounding)
    graph, loaded = graph_of(tree["data"]), load_model(out, Ranks())
    known = KnownAnswers(torch.cat([graph.train, graph.valid, graph.test]), graph.num_entities)
    scorer = loaded.model.scorer
    stage = {"name": "student", "method": "round", "scorer": scorer.name, "dim": scorer.dim, "bits": how["bits"]}
    stage |= {"num_entities": graph.num_entities, "bytes": bytes_on_disk(out), "train_seconds": 0.0}
    return {"stages": [stage | figures("valid", metrics(ranks_of(loaded.model, graph.valid, known, Ranks())))]}


def config_of(tree: Tree) -> RunConfig:
    """Of a plan here."""
    return parse_config(tree | {"mlflow": {"enabled": False}, "threads": 1, "test": False}, "table")


def ranked_on_test(tree: Tree, folder: str, dims: list[int]) -> tuple[Tree, Tree]:
    """Test figures of a run's student, trained again if it is gone, and {dim: metrics} of its crops; in a worker."""
    if not (Path(folder) / ("stages/student/model" if "round" in tree else "report.json")).exists():
        train(tree, folder)
    graph, config = graph_of(tree["data"]), config_of({key: tree[key] for key in tree if key != "round"})
    model = load_model(Path(folder) / "stages/student", Ranks()).model
    known = KnownAnswers(torch.cat([graph.train, graph.valid, graph.test]), graph.num_entities)
    rules = {"ties": config.ties, "filter_": config.filter}
    found = figures("test", metrics(ranks_of(model, graph.test, known, Ranks(), **rules)))
    crops = ranks_of_crops(model, dims, graph.test, known, Ranks(), **rules) if dims else {}
    return found, {dim: metrics(ranks) for dim, ranks in crops.items()}


def row(stage: StageResult) -> Tree:
    """What a table needs of a stage."""
    found = {name: value for name, value in stage.to_json().items() if name in KEPT | {"curve", "chosen"}}
    return found | figures("valid", stage.metrics("valid"))


def figures(split: str, found: Mapping[str, float | None]) -> Tree:
    """Those of a split that a table shows."""
    return {f"{split}_{name}": found[name] for name in ("mrr", "hits_at_1", "hits_at_10")}


if __name__ == "__main__":
    typer.run(main)
