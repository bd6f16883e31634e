"""Students of few bits keep the invariants: ranks, parts, resume, files; and every method and scorer can teach them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from distkgd.common.console import Display
from distkgd.data.filters import KnownAnswers
from distkgd.distributed.checkpoint.tables import write_tensors
from distkgd.distributed.ranks import Ranks
from distkgd.errors import ConfigError, ModelError
from distkgd.evaluation import model_metrics
from distkgd.evaluation.model_metrics import evaluate_model, table
from distkgd.evaluation.ranking import ranks_of
from distkgd.kernels.quantiser import Rounding
from distkgd.methods import METHODS
from distkgd.models.export import export_model
from distkgd.models.export.source import open_source
from distkgd.models.model import new_model
from distkgd.models.model_folder import (
    bytes_on_disk,
    check_files,
    check_numbers,
    distinct_rows,
    load_model,
    save_model,
    sizes_on_disk,
)
from distkgd.models.stage_result import read_result
from distkgd.pipeline.config import parse_config
from distkgd.pipeline.plan import run_plan
from distkgd.reporting.run_report import read_report
from distkgd.scorers import SCORERS, build_scorer
from distkgd.tracking.serving.entries import entry_of_model, read_run
from tests.invariants.test_world_size import METHOD_OPTIONS, REGIMES, assert_same, merged, student
from tests.ranks import run_on_threads
from tests.toys import toy_graph, toy_job, train_some

FEW = {"bits": 2, "relation_bits": 4}
PRUNED = {"method": "metasd", "start": "random", "teacher": None}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("regime", ["triple", "all"])
def test_three_ranks_train_the_rows_of_few_bits_that_one_does(method: str, regime: str) -> None:
    config = {"dtype": "float64", "student": student(method, METHOD_OPTIONS[method][0], REGIMES[regime], **FEW)}
    one = run_on_threads(1, train_some, config=config, steps=8)
    plain = {"dtype": "float64", "student": student(method, METHOD_OPTIONS[method][0], REGIMES[regime])}
    assert run_on_threads(1, train_some, config=plain, steps=2)[0]["losses"][0] != one[0]["losses"][0]
    many = run_on_threads(3, train_some, config=config, steps=8)
    assert_same(one, many, rows=1e-9, losses=1e-9)
    for rank in many:
        assert rank["valid"] == pytest.approx(one[0]["valid"], abs=1e-9)


@pytest.mark.parametrize("scorer", SCORERS)
def test_every_scorer_has_rows_of_few_bits(scorer: str) -> None:
    more = {"scorer": scorer, "reciprocal": SCORERS[scorer].tails_only, "bits": 1, "group": 4, "relation_bits": 8}
    config = {"dtype": "float64", "student": student("scratch", {}, REGIMES["batch"], **more)}
    one = run_on_threads(1, train_some, config=config, steps=4)
    assert_same(one, run_on_threads(3, train_some, config=config, steps=4), rows=1e-9, losses=1e-9)


@pytest.mark.parametrize(("move", "name"), [("rows", "n3"), ("queries", "dura")])
def test_regularised_rows_of_few_bits_are_the_same_on_three_ranks(move: str, name: str) -> None:
    penalty = {"regulariser": {"name": name, "weight": 0.1}, "move": move}
    config = {"dtype": "float64", "student": student("bkd", {}, REGIMES["batch"], **FEW, **penalty)}
    one = run_on_threads(1, train_some, config=config, steps=6)
    plain = {"dtype": "float64", "student": student("bkd", {}, REGIMES["batch"], **FEW)}
    assert run_on_threads(1, train_some, config=plain, steps=2)[0]["losses"][1] != one[0]["losses"][1]
    assert_same(one, run_on_threads(3, train_some, config=config, steps=6), rows=1e-9, losses=1e-9)


def test_a_batch_in_four_parts_trains_the_same_rows_of_few_bits() -> None:
    made = student("bkd", {}, REGIMES["chunk"], batch_size=48, **FEW)
    one = run_on_threads(1, train_some, config={"dtype": "float64", "student": made}, steps=6)
    cut = run_on_threads(1, train_some, config={"dtype": "float64", "student": made | {"accumulate": 4}}, steps=6)
    assert_same([merged(one)], cut, rows=1e-9, losses=1e-9)


def run_of(folder: Path, **more: Any) -> Path:
    """A finished run of a teacher (teacher: another, None: none) and a student of few bits, of which `more` is said."""
    sizes = {"dim": 8, "batch_size": 100, "negatives": {"kind": "batch", "num": 8}, "epochs": 2, "validate_every": 1}
    teacher = more.pop("teacher", sizes | {"scorer": "rote"})
    taught = sizes | {"method": "bkd", "start": "crop", "scorer": "rote"} | FEW
    tree = {"data": "toy", "teacher": teacher, "student": taught | more, "report": {"html": False}}
    config = parse_config(tree | {"mlflow": {"enabled": False}, "dtype": "float32"}, "test")
    run_plan(config, toy_graph(), Ranks(), folder, resume=False, display=Display(False))
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_of(tmp_path_factory.mktemp("bits") / "run")


def test_a_run_saves_the_rows_that_it_validated_and_counts_their_bytes(finished: Path) -> None:
    graph, folder = toy_graph(), finished / "stages/student"
    result, loaded = read_result(folder), load_model(folder, Ranks())
    assert result is not None and result.bytes == bytes_on_disk(folder)
    assert result.row_bytes == 2 + 2 + 2 == -(-8 * 2 // 8) + 4  # codes, a step, a bias
    assert result.bytes_per_entity == result.bytes / graph.num_entities
    known = KnownAnswers(torch.cat([graph.train, graph.valid, graph.test]), graph.num_entities)
    rank = ranks_of(loaded.model, graph.test, known, Ranks())
    assert float((1 / rank).mean()) == pytest.approx(result.mrr("test"), abs=1e-12)
    assert loaded.config["packed"]["entity"]["bits"] == 2 and loaded.config["packed"]["relation"]["bits"] == 4
    codes = loaded.model.entity.weight[:, 1:] / loaded.model.entity.weight[:, 1:].abs().amin(1, keepdim=True)
    assert set(codes.abs().round(decimals=3).unique().tolist()) <= {1.0, 3.0}


def test_equal_rows_and_tied_answers_are_counted(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = read_result(finished / "stages/student")
    rows = load_model(finished / "stages/student", Ranks()).model.entity.weight
    assert result is not None and result.distinct_rows == len(rows.unique(dim=0))
    tiny = run_of(tmp_path / "run", scorer="complex", dim=2, bits=1, start="random", method="scratch", teacher=None)
    small = read_result(tiny / "stages/student")
    assert small is not None and small.distinct_rows is not None and small.distinct_rows < small.num_entities
    graph, model = toy_graph(), load_model(tiny / "stages/student", Ranks()).model
    known = KnownAnswers(torch.cat([graph.train, graph.valid, graph.test]), graph.num_entities)
    worst, best = (ranks_of(model, graph.test, known, Ranks(), ties=ties) for ties in ("pessimistic", "optimistic"))
    tied = float((worst > best).double().mean())
    assert tied > 0 and small.metrics("test")["tied"] == tied == small.final_metrics()["final/test/tied"]
    assert small.final_metrics()["final/distinct_rows"] == small.distinct_rows
    said = f"{small.distinct_rows} distinct rows of 41 entities; {100 * tied:.1f}% of the test answers tied"
    assert f"student: 3 bytes a row; {said} with another candidate" in (tiny / "report.md").read_text()
    monkeypatch.setattr(model_metrics, "load_graph", lambda _: graph)
    told = evaluate_model(tiny / "stages/student", Ranks(), split="test", source="toy")
    assert told["overall"]["tied"] == tied and told["distinct_rows"] == small.distinct_rows
    assert f"{small.distinct_rows} distinct rows of 41 entities; {100 * tied:.1f}% of the answers" in str(
        table(told).caption
    )
    plain = run_of(tmp_path / "plain", bits=32, relation_bits=32, method="scratch", start="random", teacher=None)
    whole = evaluate_model(plain / "stages/student", Ranks(), split="test", source="toy")
    assert "tied" not in whole["overall"] and "distinct_rows" not in whole


def test_rows_that_differ_in_their_signs_alone_are_told_apart() -> None:
    signs = 1.0 - 2.0 * ((torch.arange(4096).unsqueeze(1) >> torch.arange(12)) & 1)
    model = new_model(build_scorer("distmult", 12), 4096, 1, Ranks(), reciprocal=False, seed=0)
    model.entity.weight.data.copy_(signs)
    assert distinct_rows(model.quantised(Rounding(1))) == 4096


def test_croppable_models_and_packed_teachers_have_their_own_sizes(finished: Path, tmp_path: Path) -> None:
    med = {"method": "med", "scorer": "complex", "start": "random", "distill": {"dims": [4, 8]}}
    croppable = read_result(run_of(tmp_path / "med", **med, teacher=None) / "stages/student")
    assert croppable is not None and croppable.bits == 2 and set(croppable.curve["test"]) == {4, 8}
    assert not croppable.crop_bytes
    brought = run_of(tmp_path / "run", teacher=str(finished / "stages/student"))
    result = read_report(brought).stage("teacher")
    assert result is not None and (result.bits, result.row_bytes) == (2, 6)
    assert result.bytes == bytes_on_disk(finished / "stages/student")
    assert "equally small" not in (brought / "report.md").read_text()


def test_an_export_of_packed_rows_widens_them_and_is_packed_no_second_time(finished: Path, tmp_path: Path) -> None:
    packed, wide = finished / "stages/student", tmp_path / "wide"
    export_model(packed, wide, "safetensors", Ranks())
    mine, other = load_model(packed, Ranks()), load_model(wide, Ranks())
    assert torch.equal(mine.model.entity.weight, other.model.entity.weight)
    assert torch.equal(mine.model.relation, other.model.relation) and "packed" not in other.config
    with pytest.raises(ModelError, match="packed already"):
        export_model(packed, tmp_path / "again", "packed", Ranks(), rounding=Rounding(2))
    assert not (tmp_path / "again").exists()
    source, ids = open_source(packed), torch.tensor([7, 0, 7])
    assert torch.equal(source.entity.rows(ids), mine.model.entity.weight[ids])
    assert torch.equal(source.crop(4).entity.rows(ids), mine.model.crop(4).entity.weight[ids])


def save_few_bits(ranks: Ranks, folder: str) -> dict[str, Any]:
    config = {"student": student("scratch", {}, REGIMES["all"], scorer="rote", dim=8, **FEW)}
    job = toy_job(config, ranks, Path(folder))
    save_model(Path(folder) / "model", job.method.student, toy_graph(), {})
    rounded = job.method.student.rounded()
    sizes = sizes_on_disk(Path(folder) / "model")
    return {"entity": rounded.entity.weight, "relation": rounded.relation, "bytes": sizes["row_bytes"]}


@pytest.mark.parametrize(("wrote", "reads"), [(1, 3), (3, 1), (3, 2)])
def test_files_of_one_world_size_are_read_by_another(wrote: int, reads: int, tmp_path: Path) -> None:
    saved = run_on_threads(wrote, save_few_bits, folder=str(tmp_path))
    rows = torch.cat([rank["entity"] for rank in saved])
    found = run_on_threads(reads, loaded_rows, folder=str(tmp_path))
    assert torch.equal(torch.cat([entity for entity, _ in found]), rows)
    assert all(torch.equal(relation, saved[0]["relation"]) for _, relation in found)
    check_files(tmp_path / "model")


def loaded_rows(ranks: Ranks, folder: str) -> tuple[torch.Tensor, torch.Tensor]:
    model = load_model(folder, ranks).model
    return model.entity.weight, model.relation


def save_pruned(ranks: Ranks, folder: str, rate: float, scorer: str, bits: int) -> dict[str, Any]:
    config = {"student": student("metasd", {"prune": {"rate": rate}, "meta": False}, REGIMES["all"], scorer=scorer)}
    config["student"] |= {"dim": 20, "bits": bits, "group": 10, "relation_bits": 3}
    job = toy_job(config, ranks, Path(folder))
    product = job.method.output_model
    save_model(Path(folder) / "model", product, toy_graph(), {})
    rounded = product.rounded()
    return {"entity": rounded.entity.weight, "relation": rounded.relation}


@pytest.mark.parametrize("scorer", ["complex", "rote"])
@pytest.mark.parametrize(("wrote", "reads"), [(1, 3), (3, 1)])
@pytest.mark.parametrize(("rate", "bits", "level"), [(0.8, 2, False), (0.1, 2, False), (0.3, 1, True), (0.5, 8, False)])
def test_what_is_pruned_and_rounded_is_written_in_the_fewer_bytes(
    rate: float, bits: int, level: bool, wrote: int, reads: int, scorer: str, tmp_path: Path
) -> None:
    saved = run_on_threads(wrote, save_pruned, folder=str(tmp_path), rate=rate, scorer=scorer, bits=bits)
    rows, biases = torch.cat([rank["entity"] for rank in saved]), SCORERS[scorer].biases
    found = run_on_threads(reads, loaded_rows, folder=str(tmp_path))
    assert torch.equal(torch.cat([entity for entity, _ in found]), rows)
    assert all(torch.equal(relation, saved[0]["relation"]) for _, relation in found)
    kept = rows[:, biases:] != 0
    assert kept.float().mean() == pytest.approx(1 - rate, abs=0.1)
    check_files(tmp_path / "model")
    check_numbers(tmp_path / "model")
    bitmap = int((-(-kept.sum(1) * bits // 8)).sum()) + 41 * 3
    levels = 41 * 2 * -(-20 // {1: 10, 2: 6, 8: 1}[bits])  # so many powers of 2^bits + 1 are below 2^16
    assert (levels <= bitmap) == level
    sizes = {part: 0 for part in ("bitmap", "codes")}
    for part in sizes:
        for path in (tmp_path / "model").glob(f"entity.{part}-*"):
            with safe_open(path, "pt") as file:
                sizes[part] += file.get_tensor(f"entity.{part}").nbytes
    assert sum(sizes.values()) == min(bitmap, levels) and (sizes["bitmap"] == 0) == level
    source, ids = open_source(tmp_path / "model"), torch.tensor([7, 0, 40])
    assert torch.equal(source.entity.rows(ids), rows[ids])
    assert torch.equal(torch.cat([*source.crop(10).entity.blocks()]), rows[:, : biases + 10])


@pytest.mark.parametrize("part", ["entity.codes", "entity.bitmap", "entity.step", "relation.codes"])
def test_damaged_files_of_pruned_rows_are_named(part: str, tmp_path: Path) -> None:
    save_pruned(Ranks(), str(tmp_path), 0.8, "complex", 2)
    assert_damage_is_named(tmp_path, part, 41)


def assert_damage_is_named(folder: Path, part: str, rows: int) -> None:
    """Of a model's file: cut short, with a flipped bit, with rows of another size."""
    (path,) = (folder / "model").glob(f"{part}-*")
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(ModelError, match=path.name):
        load_model(folder, Ranks())
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ModelError, match=path.name):
        check_files(folder / "model")
    path.unlink()
    write_tensors(path, {part: torch.zeros(rows, 99, dtype=torch.uint8)})
    with pytest.raises(ModelError, match=path.name):
        load_model(folder, Ranks())


@pytest.mark.parametrize(
    ("rate", "part", "wrong"),
    [
        (0.8, "entity.codes", lambda x: torch.cat([x, x[:1]])),  # more than the bitmap names
        (0.8, "entity.step", lambda x: x.float()),
        (0.3, "entity.codes", lambda x: torch.full_like(x, 255)),  # words that no levels make
        (0.3, "entity.codes", lambda x: x.to(torch.int8)),
    ],
)
def test_files_of_pruned_rows_that_nobody_wrote_are_named(
    rate: float, part: str, wrong: Callable[[torch.Tensor], torch.Tensor], tmp_path: Path
) -> None:
    save_pruned(Ranks(), str(tmp_path), rate, "complex", 1 if rate == 0.3 else 2)
    (path,) = (tmp_path / "model").glob(f"{part}-*")
    with safe_open(path, "pt") as file:
        found = file.get_tensor(part)
    path.unlink()
    write_tensors(path, {part: wrong(found)})
    with pytest.raises(ModelError, match=path.name):
        load_model(tmp_path, Ranks())


@pytest.mark.parametrize("scope", ["global", "row", "column"])
def test_a_pruned_and_rounded_run_saves_what_it_validated(scope: str, tmp_path: Path) -> None:
    more = {"scorer": "complex", "dim": 8, "distill": {"prune": {"rate": 0.5, "scope": scope}, "quiz": 0.1}}
    folder = run_of(tmp_path / "run", **PRUNED, **more) / "stages/student"
    graph, result = toy_graph(), read_result(folder)
    loaded = load_model(folder, Ranks())
    assert result is not None and result.bytes == bytes_on_disk(folder)
    assert (result.bits, result.relation_bits, result.row_bytes) == (2, 4, 4 - 1 if scope == "column" else None)
    known = KnownAnswers(torch.cat([graph.train, graph.valid, graph.test]), graph.num_entities)
    rank = ranks_of(loaded.model, graph.test, known, Ranks())
    assert float((1 / rank).mean()) == pytest.approx(result.mrr("test"), abs=1e-12)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    validated = max(line["valid/mrr"] for line in lines if "valid/mrr" in line)
    assert result.mrr("valid") == pytest.approx(validated, abs=1e-12)
    zeros = float((loaded.model.entity.weight == 0).float().mean())
    assert loaded.model.scorer.dim == (4 if scope == "column" else 8) and (zeros == 0) == (scope == "column")
    wide = tmp_path / "wide"
    export_model(folder, wide, "sparse", Ranks())
    assert torch.equal(load_model(wide, Ranks()).model.entity.weight, loaded.model.entity.weight)
    assert f"{result.distinct_rows} distinct rows of 41" in (tmp_path / "run/report.md").read_text()


@pytest.mark.parametrize("part", ["entity.codes", "entity.step", "entity.bias", "relation.codes"])
def test_damaged_files_are_named(part: str, tmp_path: Path) -> None:
    save_few_bits(Ranks(), str(tmp_path))
    assert_damage_is_named(tmp_path, part, 41 if part.startswith("entity") else 10)


def test_a_step_that_is_no_number_is_named(tmp_path: Path) -> None:
    save_few_bits(Ranks(), str(tmp_path))
    (path,) = (tmp_path / "model").glob("entity.step-*")
    path.unlink()
    step = torch.ones(41, 1, dtype=torch.bfloat16)
    step[3] = torch.nan
    write_tensors(path, {"entity.step": step})
    for read in (lambda: load_model(tmp_path, Ranks()), lambda: check_numbers(tmp_path / "model")):
        with pytest.raises(ModelError, match=rf"{path.name}: tensor 'entity.step', row 3 \(entity 'e003'\), holds nan"):
            read()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"bits": 5}, "bits"),
        ({"bits": True}, "a number is needed"),
        ({"bits": 2, "group": 3}, "do not divide 8"),
        ({"group": 4, "bits": 16}, "student: group: 4 columns share a step, and 16 bits have none"),
        ({"bits": 2, "row_dtype": "bfloat16"}, "rounded from rows in full precision"),
        ({"bits": 16, "method": "metasd", "start": "random"}, "no file for zeros among 16 bits"),
        (PRUNED | {"group": 4, "scorer": "complex", "distill": {"prune": {"scope": "column"}}}, "drop group"),
    ],
)
def test_what_few_bits_cannot_do_is_refused(given: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        run_of(tmp_path / "run", **given)
    assert not (tmp_path / "run").exists()


def test_a_config_says_what_it_was_packed_by(finished: Path) -> None:
    config = json.loads((finished / "stages/student/model/config.json").read_text())
    assert config["format"] == "distkgd-packed/1" and set(config["files"]) >= {"entity.codes", "relation.step"}


def chain_of(chain: dict[str, Any], **more: Any) -> dict[str, Any]:
    sizes = {"dim": 8, "batch_size": 100, "negatives": {"kind": "batch", "num": 8}, "epochs": 1, "validate_every": 1}
    tree = {"teacher": {**sizes}, "student": {**sizes, "method": "bkd"}, "chain": chain, "report": {"html": False}}
    if "dims" in chain:
        del tree["teacher"]["dim"], tree["student"]["dim"]
    return tree | {"mlflow": {"enabled": False}, "baseline": True} | more


@pytest.mark.parametrize(
    ("chain", "sizes"),
    [
        ({"bits": [8, 2]}, {"student_8bit": (8, 8), "student": (8, 2), "direct": (8, 2)}),
        ({"dims": [8, 8, 4], "bits": [4, 2]}, {"student_8_4bit": (8, 4), "student": (4, 2), "direct": (4, 2)}),
    ],
)
def test_a_chain_along_bits(chain: dict[str, Any], sizes: dict[str, tuple[int, int]], tmp_path: Path) -> None:
    config = parse_config(chain_of(chain), "test")
    report = run_plan(config, toy_graph(), Ranks(), tmp_path / "run", resume=False, display=Display(False))
    taught = {stage.name: stage for stage in report.stages}
    assert {name: (taught[name].dim, taught[name].bits) for name in sizes} == sizes
    middle = next(iter(sizes))
    assert taught[middle].teachers == ("teacher",) and taught["student"].teachers == (middle,)
    dim = sizes["student"][0]
    assert {entry.alias for entry in read_run(tmp_path / "run").entries()} == {
        "teacher",
        f"student-{dim}-2bit",
        f"direct-{dim}-2bit",
    }
    assert entry_of_model(tmp_path / "run/stages/student/model").alias == f"student-{dim}-2bit"
    assert f"| {sizes['student'][0]} × 2 bit |" in (tmp_path / "run/report.md").read_text()


def test_keys_of_one_of_the_bits_are_that_students_alone() -> None:
    config = parse_config(chain_of({"bits": [8, 2], "per_bits": {8: {"epochs": 3}, 2: {"epochs": 2}}}), "test")
    assert [student_.epochs for student_ in config.students().values()] == [3, 2]
    assert parse_config(chain_of({"bits": [8]}, baseline={}), "test").baseline.bits == 8  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("chain", "said"),
    [
        ({"bits": [2, 4]}, "dims must fall from teacher to student, or bits where dims stay"),
        ({"bits": [2, 2]}, "or bits where dims stay"),
        ({"dims": [8, 4], "bits": [4, 2]}, "2 bits for 1 students"),
        ({"dims": [8]}, "dims: at least two are needed"),
        ({"bits": [7]}, "chain.bits.0"),
        ({"bits": [4, 2], "per_bits": {3: {}}}, "per_bits has 3, which is none of the bits 4, 2"),
        ({"bits": [4, 2], "per_bits": {4: {"dim": 4}}}, "per_bits of 4 sets dim again"),
        ({"bits": [4, 2], "per_bits": {4: {"bits": 8}}}, "per_bits of 4 sets bits again"),
        ({"bits": [4, 2], "per_bits": {4: {"epochs": -1}}}, r"chain\.per_bits\.4"),
    ],
)
def test_a_chain_that_does_not_fall_is_refused(chain: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse_config(chain_of(chain), "test")
    with pytest.raises(ConfigError, match=r"chain ends at 2 and student.bits is 4; leave student.bits out"):
        tree = chain_of({"bits": [8, 2]})
        tree["student"]["bits"] = 4
        parse_config(tree, "test")


def test_a_teacher_is_also_only_rounded_where_the_report_asks_for_it(tmp_path: Path) -> None:
    config = parse_config(chain_of({"bits": [8, 2]}, report={"html": True, "rounded": [8, 2], "queries": 4}), "test")
    graph = toy_graph()
    run_plan(config, graph, Ranks(), tmp_path / "run", resume=False, display=Display(False))
    result, student_ = (read_result(tmp_path / f"run/stages/{name}") for name in ("teacher", "student"))
    assert result is not None and student_ is not None and not student_.rounded
    known = KnownAnswers(torch.cat([graph.train, graph.valid, graph.test]), graph.num_entities)
    teacher = load_model(tmp_path / "run/stages/teacher", Ranks()).model
    for bits in (8, 2):
        how = Rounding(bits, config.student.relation_bits)  # as the student has them
        export_model(tmp_path / "run/stages/teacher", tmp_path / f"{bits}", "packed", Ranks(), rounding=how)
        rank = ranks_of(load_model(tmp_path / f"{bits}", Ranks()).model, graph.test, known, Ranks())
        assert result.rounded[bits].mrr("test") == pytest.approx(float((1 / rank).mean()), abs=1e-12)
        tensors = teacher.entity.total * Rounding(bits).quantisers(teacher.scorer)["entity"].row_bytes(8)
        assert tensors < result.rounded[bits].bytes < bytes_on_disk(tmp_path / f"{bits}")
        told = result.final_metrics()
        assert told[f"final/test/mrr_8_{bits}bit"] == result.rounded[bits].mrr("test")
        assert told[f"final/bytes_per_entity_8_{bits}bit"] == result.rounded[bits].bytes / graph.num_entities
    assert "teacher, only rounded, test MRR: 8 bit (" in (tmp_path / "run/report.md").read_text()
    assert "2 bit" in (tmp_path / "run/report.html").read_text()
