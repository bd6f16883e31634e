"""Models that are croppable in dims and in bits keep the invariants: ranks, parts, resume, files, exports, reports."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from distkgd import load
from distkgd.common.console import Display
from distkgd.data.filters import KnownAnswers
from distkgd.distributed.ranks import Ranks
from distkgd.errors import ConfigError, ModelError, Stopped
from distkgd.evaluation.ranking import ranks_of
from distkgd.kernels.quantiser import Rounding
from distkgd.models.export import export_model
from distkgd.models.model import Model
from distkgd.models.model_folder import bytes_on_disk, check_files, load_model, save_model, sizes_on_disk
from distkgd.models.stage_result import StageResult, read_result
from distkgd.pipeline.config import parse_config
from distkgd.pipeline.plan import run_plan
from distkgd.scorers import SCORERS
from distkgd.training.job import Progress
from distkgd.training.loop import train_stage, train_step
from tests.invariants.test_world_size import REGIMES, assert_same, merged, student
from tests.ranks import run_on_threads
from tests.toys import toy_graph, toy_job, train_some

DIMS, BITS = (2, 4, 8), (1, 2, 4, 8)
NESTED = {"dims": DIMS, "bits": BITS, "evaluator_lr": 0.1}
EVERY = [(dim, bits) for dim in DIMS for bits in BITS]


@pytest.mark.parametrize(("regime", "world"), [("triple", 2), ("all", 3), ("chunk", 3)])
def test_any_number_of_ranks_trains_the_same_rows(regime: str, world: int) -> None:
    config = {"dtype": "float64", "student": student("med", NESTED, REGIMES[regime], relation_bits=4)}
    one = run_on_threads(1, train_some, config=config, steps=9)
    many = run_on_threads(world, train_some, config=config, steps=9)
    assert_same(one, many, rows=1e-9, losses=1e-9)
    assert {f"mrr_{dim}_{bits}bit" for dim, bits in EVERY} < one[0]["valid"].keys()
    for rank in many:
        assert rank["valid"] == pytest.approx(one[0]["valid"], abs=1e-9)


def test_a_batch_in_four_parts_trains_the_same_rows() -> None:
    made = student("med", NESTED | {"evolution": False}, REGIMES["chunk"], batch_size=48)
    one = run_on_threads(1, train_some, config={"dtype": "float64", "student": made}, steps=6)
    cut = run_on_threads(1, train_some, config={"dtype": "float64", "student": made | {"accumulate": 4}}, steps=6)
    assert_same([merged(one)], cut, rows=1e-9, losses=1e-9)


@pytest.mark.parametrize("scorer", SCORERS)
def test_every_scorer_can_be_nested(scorer: str) -> None:
    more = {"scorer": scorer, "reciprocal": SCORERS[scorer].tails_only, "group": 2}
    config = {"dtype": "float64", "student": student("med", {"dims": [4, 8], "bits": [2, 4]}, REGIMES["batch"], **more)}
    one = run_on_threads(1, train_some, config=config, steps=3)
    assert_same(one, run_on_threads(3, train_some, config=config, steps=3), rows=1e-9, losses=1e-9)


def test_each_step_sees_one_width_by_turns_and_trains_the_rows_of_all(tmp_path: Path) -> None:
    job = toy_job({"student": student("med", NESTED, REGIMES["batch"])}, Ranks(), tmp_path)
    seen: list[int] = []
    view, table = job.method.task.view, job.method.student.entity

    def spied(model: Model, *args: Any, **more: Any) -> Any:
        assert model.entity.quantiser is not None
        seen.append(model.entity.quantiser.bits)
        return view(model, *args, **more)

    object.__setattr__(job.method.task, "view", spied)
    for step in range(6):
        before, progress = table.weight.clone(), Progress()
        progress.step = step
        train_step(job, progress, 0)
        assert not torch.equal(table.weight, before) and not table.opened
    assert seen == [1, 2, 4, 8, 1, 2]


def test_a_stage_that_is_stopped_in_a_turn_goes_on_with_the_next(tmp_path: Path) -> None:
    made = {"epochs": 3, "validate_every": 1, "checkpoint_every": 1, "batch_size": 100}
    config = {"student": student("med", NESTED, REGIMES["batch"], **made), "keep": 99}
    whole, cut = (toy_job(config, Ranks(), tmp_path / name) for name in ("whole", "cut"))
    train_stage(whole)
    assert whole.input_builder.sampler.steps_per_epoch % len(BITS)  # epochs begin in different turns
    cut.watch = lambda *_: False
    with pytest.raises(Stopped):
        train_stage(cut)
    again = toy_job(config, Ranks(), tmp_path / "cut")
    train_stage(again)
    assert torch.equal(again.method.student.entity.weight, whole.method.student.entity.weight)
    assert torch.equal(again.method.student.relation, whole.method.student.relation)


def run_of(folder: Path, report: dict[str, Any] | None = None, **more: Any) -> Path:
    """A finished run of a nested student."""
    made = {"scorer": "rote", "dim": 8, "batch_size": 100, "negatives": {"kind": "batch", "num": 8}, "epochs": 2}
    made |= {"validate_every": 1, "relation_bits": 4, "group": 2, "method": "med", "distill": NESTED}
    tree = {"data": "toy", "student": made | more, "report": report or {"html": False}}
    config = parse_config(tree | {"mlflow": {"enabled": False}}, "test")
    run_plan(config, toy_graph(), Ranks(), folder, resume=False, display=Display(False))
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_of(tmp_path_factory.mktemp("nested") / "run", {"html": True, "queries": 4})


def result_of(run: Path) -> StageResult:
    found = read_result(run / "stages/student")
    assert found is not None
    return found


def mrr_of(model: Model) -> float:
    graph = toy_graph()
    known = KnownAnswers(torch.cat([graph.train, graph.valid, graph.test]), graph.num_entities)
    return float((1 / ranks_of(model, graph.test, known, Ranks())).mean())


@pytest.mark.parametrize(("dim", "bits"), EVERY)
def test_every_crop_of_a_saved_model_is_what_training_ranked_and_an_ordinary_packed_folder(
    dim: int, bits: int, finished: Path, tmp_path: Path
) -> None:
    result, folder, out = result_of(finished), finished / "stages/student", tmp_path / "out"
    loaded = load_model(folder, Ranks()).model
    crop = loaded.crop(dim, bits)
    wanted = result.bits_curve["test"][bits][dim]["mrr"]
    assert mrr_of(crop) == pytest.approx(wanted, abs=1e-12)
    export_model(folder, out, "packed", Ranks(), dim, Rounding(bits))
    check_files(out)
    small = load_model(out, Ranks())
    assert torch.equal(small.model.entity.weight, crop.entity.weight)
    assert torch.equal(small.model.relation, crop.relation)
    assert small.config["packed"]["entity"] == {"bits": bits, "group": 2, "biases": 1}
    assert small.config["packed"]["relation"]["bits"] == 4 and "entity.coarser" not in small.config["files"]
    sizes = sizes_on_disk(out)
    assert sizes["row_bytes"] == -(-dim * bits // 8) + 2 * dim // 2 + 2  # codes, a step for two numbers, a bias
    tensors = sum(path.stat().st_size - 8 - header_of(path) for path in out.glob("*.safetensors"))
    assert tensors == result.bits_bytes[bits][dim]
    with pytest.raises(ModelError, match="packed already"):
        export_model(out, tmp_path / "again", "packed", Ranks(), rounding=Rounding(bits))


def header_of(path: Path) -> int:
    with path.open("rb") as file:
        return int.from_bytes(file.read(8), "little")


def test_codes_of_fewer_bits_are_the_top_of_the_widest(finished: Path) -> None:
    model = load(finished / "stages/student")
    assert model.scorer.dim == 8
    rows = {bits: model.crop(bits=bits).entity_rows for bits in BITS}
    assert torch.equal(rows[8], model.entity_rows)
    for bits in BITS:
        assert torch.equal(model.crop(dim=4, bits=bits).entity_rows, rows[bits][:, :5])
        assert torch.equal(rows[bits][:, 1:] > 0, rows[1][:, 1:] > 0)
    for few in (16, 3):
        with pytest.raises(ConfigError, match=f"{few} bits: the model has 1, 2, 4, 8; take one of these"):
            model.crop(dim=4, bits=few)


def test_a_result_counts_what_all_widths_take_and_picks_rows_by_all_of_them(finished: Path) -> None:
    result, folder = result_of(finished), finished / "stages/student"
    assert result.bytes == bytes_on_disk(folder) and result.bits == 8 and not result.crop_bytes
    assert result.row_bytes == 8 + 4 * 2 * len(BITS) + 2  # codes, four steps of each width, a bias
    assert result.curve["test"] == result.bits_curve["test"][8]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    validations = [line for line in lines if "valid/mrr" in line]
    for line in validations:
        every = [line[f"valid/mrr_{dim}_{bits}bit"] for dim, bits in EVERY]
        assert line["valid/mrr"] == pytest.approx(sum(every) / len(every))
    best = max(validations, key=lambda line: line["valid/mrr"])
    assert best["valid/mrr_4_2bit"] == pytest.approx(result.bits_curve["valid"][2][4]["mrr"], abs=1e-12)
    told = result.final_metrics()
    assert told["final/test/mrr_4_2bit"] == result.bits_curve["test"][2][4]["mrr"]
    assert told["final/bytes_per_entity_4_2bit"] == result.bits_bytes[2][4] / 41
    forms = [name for name in told if "mrr_" in name]
    assert len(forms) == 2 * len(EVERY) and "final/test/mrr_4" not in told


def test_reports_show_every_crop_with_its_bytes(finished: Path) -> None:
    result = result_of(finished)
    text, page = ((finished / f"report.{kind}").read_text() for kind in ("md", "html"))
    assert "| dim | bits | size | valid MRR |" in text
    assert f"| 4 | 2 | {result.bits_bytes[2][4]:,} B |" in text and "first 4 × 2 bit numbers" in page
    assert "first 8 × 8 bit" in page and "a line for each number of bits" in page


def save_nested(ranks: Ranks, folder: str) -> dict[str, Any]:
    made = student("med", NESTED, REGIMES["all"], scorer="rote", relation_bits=16)
    job = toy_job({"student": made}, ranks, Path(folder))
    model = job.method.student
    save_model(Path(folder) / "model", model, toy_graph(), {})
    return {f"{bits}": model.crop(4, bits).entity.weight for bits in BITS} | {"relation": model.crop(4).relation}


def load_nested(ranks: Ranks, folder: str) -> dict[str, Any]:
    model = load_model(folder, ranks).model
    return {f"{bits}": model.crop(4, bits).entity.weight for bits in BITS} | {"relation": model.crop(4).relation}


@pytest.mark.parametrize(("wrote", "reads"), [(1, 3), (3, 1), (3, 2)])
def test_files_of_one_world_size_are_read_by_another(wrote: int, reads: int, tmp_path: Path) -> None:
    saved = run_on_threads(wrote, save_nested, folder=str(tmp_path))
    found = run_on_threads(reads, load_nested, folder=str(tmp_path))
    for bits in map(str, BITS):
        assert torch.equal(torch.cat([one[bits] for one in found]), torch.cat([one[bits] for one in saved]))
    export_model(tmp_path, tmp_path / "out", "packed", Ranks(), 4, Rounding(2))
    out = load_model(tmp_path / "out", Ranks())
    assert torch.equal(out.model.entity.weight, torch.cat([one["2"] for one in saved]))
    assert torch.equal(out.model.relation, saved[0]["relation"]) and out.config["packed"]["relation"]["bits"] == 16


def test_an_export_without_bits_has_the_widest(finished: Path, tmp_path: Path) -> None:
    folder = finished / "stages/student"
    whole = load_model(folder, Ranks()).model
    export_model(folder, tmp_path / "packed", "packed", Ranks())
    export_model(folder, tmp_path / "wide", "safetensors", Ranks())
    for out in ("packed", "wide"):
        assert torch.equal(load_model(tmp_path / out, Ranks()).model.entity.weight, whole.entity.weight)
    assert bytes_on_disk(tmp_path / "packed") < bytes_on_disk(folder)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (Rounding(3), "3 bits: the model has 1, 2, 4, 8; take one of these"),
        (Rounding(2, group=4), "group 4: which columns share a step was settled in training"),
        (Rounding(2, 8), "relation_bits 8: the relations have 4 already"),
    ],
)
def test_an_export_of_rows_that_a_nested_model_has_not_is_refused(
    asked: Rounding, said: str, finished: Path, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=said):
        export_model(finished / "stages/student", tmp_path / "out", "packed", Ranks(), 4, asked)
    assert not (tmp_path / "out").exists()


def test_columns_that_share_a_step_are_not_torn_apart(tmp_path: Path) -> None:
    made = student("med", {"dims": [4, 8], "bits": BITS}, REGIMES["all"], group=4)
    save_model(tmp_path / "model", toy_job({"student": made}, Ranks(), tmp_path).method.student, toy_graph(), {})
    with pytest.raises(ModelError, match="group: 4 columns that share a step do not divide 6"):
        export_model(tmp_path, tmp_path / "out", "packed", Ranks(), 6, Rounding(2))
    assert load(tmp_path).crop(6, 2).entity_rows.equal(load(tmp_path).crop(8, 2).entity_rows[:, :6])


def test_bits_of_a_model_that_has_none_nested_are_refused(tmp_path: Path) -> None:
    run_of(tmp_path / "run", distill={"dims": DIMS}, relation_bits=32, group=None)
    model = load(tmp_path / "run/stages/student")
    with pytest.raises(ConfigError, match="2 bits: these rows have none that are nested"):
        model.crop(dim=4, bits=2)
    run_of(tmp_path / "few", distill={"dims": DIMS}, bits=4)
    with pytest.raises(ConfigError, match="2 bits: the model has 4; take one of these"):
        load(tmp_path / "few/stages/student").crop(bits=2)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"bits": 2}, "distill.bits are widths of the numbers that bits 2 is one of"),
        ({"distill": {"bits": [4, 2]}}, "must ascend"),
        ({"distill": {"bits": [2, 2]}}, "must ascend"),
        ({"distill": {"bits": [2]}}, "one width alone is the stage's bits"),
        ({"distill": {"bits": [8, 16]}}, "bits.1: Input should be 1, 2, 3, 4 or 8"),
        ({"distill": {"bits": [8, 32]}}, "bits.1: Input should be 1, 2, 3, 4 or 8"),
        ({"distill": {"bits": [True, 2]}}, "a number is needed"),
        ({"group": 4}, "group: 4 columns that share a step do not divide dims 2"),
        ({"row_dtype": "bfloat16"}, "rounded from rows in full precision"),
        ({"loss": {"name": "margin"}}, "loss margin has no positive and negative part"),
    ],
)
def test_what_nested_bits_cannot_do_is_refused(given: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        run_of(tmp_path / "run", **given)
    assert not (tmp_path / "run").exists()
