"""Sweeps as data: what their files may say, and which trials, teachers and budgets come of it."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from distkgd.errors import ConfigError
from distkgd.pipeline.config import load_config
from distkgd.pipeline.sweep.config import Domain, SweepConfig, Tree, expand, load_sweep, put_over, with_seeds
from distkgd.pipeline.sweep.search import budgets, note_draw, read_draws, search_arms
from distkgd.pipeline.sweep.trials import Trial, table_trials, with_teachers
from tests.docs.pages import blocks, section

CONFIGS = Path(__file__).resolve().parent.parent.parent.parent / "configs"
TABLES = sorted((CONFIGS / "tables").glob("*.yaml"))
SHIPPED = sorted([*(CONFIGS / "ablations").rglob("*.yaml"), *(CONFIGS / "search").rglob("*.yaml")])
BASE: Tree = {
    "data": "umls",
    "teacher": {"dim": 32, "epochs": 3},
    "student": {"dim": 8, "method": "bkd", "epochs": 2, "distill": {"temperature": 2.0}},
    "baseline": True,
}


def sha(data: str) -> str:
    return f"sha of {data}"


def loaded(folder: Path, **sweep: Any) -> tuple[SweepConfig, Tree]:
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump({"base": BASE, **sweep}, sort_keys=False), encoding="utf-8")
    return load_sweep(path)


def trials_of(folder: Path, **sweep: Any) -> list[Trial]:
    return table_trials(*loaded(folder, **sweep), sha)


# -- shipped ones ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: str(p.relative_to(CONFIGS)))
def test_every_shipped_sweep_expands(path: Path) -> None:
    sweep, base = load_sweep(path)
    if sweep.space is not None:
        arms = search_arms(sweep, base, sha)
        assert {arm.name for arm in arms} == {"student", "direct"}
        assert len(set(budgets(sweep, arms))) == 1
        return
    trials = table_trials(sweep, base, sha)
    rows = len(sweep.rows or ()) or 1
    for values in (sweep.grid or {}).values():
        rows *= len(values)
    taught = [trial for trial in trials if trial.kind == "student"]
    assert len(taught) == rows * max(1, len(sweep.groups)) * len(sweep.seeds)
    assert len({trial.digest for trial in trials}) == len(trials)
    assert any(trial.kind == "direct" for trial in trials), "no direct model stands beside the students"
    if "codex-s" in path.parts:
        assert {trial.config.data for trial in trials} == {"codex-s"} and sweep.seeds == [0]
        assert len({trial.scored.scorer for trial in trials}) == 1


def test_every_ablation_has_a_small_version() -> None:
    for path in (CONFIGS / "ablations").rglob("*.yaml"):
        large = re.search(r"tables/([\w-]+)\.yaml", path.read_text(encoding="utf-8"))
        assert large is not None and (CONFIGS / "tables" / f"{large[1]}.yaml").is_file()


@pytest.mark.parametrize("path", TABLES, ids=lambda p: p.stem)
def test_a_table_of_a_paper_is_a_plan_at_both_sizes_with_the_same_rows_and_figures(path: Path) -> None:
    found = []
    for cpu in (True, False):
        sweep, base = load_sweep(path, cpu)
        trials = table_trials(sweep, base, sha)
        assert all(trial.plan(trial.config) for trial in trials)
        assert sweep.cpu is not None
        found.append({(trial.group, trial.row): trial.paper for trial in trials})
    if sweep.grid is None:
        small, large = ({key: one for key, one in some.items() if "direct" not in key[1]} for some in found)
        assert small == large
    assert path.stem.startswith(("dualde-", "iterde-", "med-", "metasd-"))


def test_the_papers_tables_and_their_figure_have_a_command_each() -> None:
    names = {path.stem for path in TABLES}
    assert names >= {*(f"dualde-table{n}" for n in range(3, 8)), "dualde-figure3"}
    assert names >= {*(f"metasd-table{n}" for n in range(1, 5)), "med-curve", "med-ablation", "med-scorers"}
    assert names >= {"iterde-ablation", "iterde-wn18rr", "iterde-time", "iterde-table6"}


# Looked up in the papers, and of IterDE and MED in what is told of them: table, group, row, figure.
PUBLISHED: list[tuple[str, str, str, Any]] = [
    ("dualde-table3", "ComplEx 32", "DualDE", 0.397),
    ("dualde-table3", "RotatE 64", "RKD", 0.469),
    ("dualde-table3", "SimplE 32", "TA", 0.359),
    ("dualde-table3", "TransE 64", "direct of DualDE", 0.192),
    ("dualde-table3", "SimplE 64", "teacher", 0.421),
    ("dualde-table4", "TransE 32", "BKD", 0.223),
    ("dualde-table4", "RotatE 32", "DualDE", 0.306),
    ("dualde-table4", "ComplEx 32", "direct of DualDE", 0.162),
    ("dualde-table4", "ComplEx 64", "teacher", 0.298),
    ("dualde-table5", "WN18RR RotH", "M-DualDE", 0.483),
    ("dualde-table5", "FB15k-237 TransH", "MulDE", 0.328),
    ("dualde-table6", "WN18RR", "RotatE 32", "161.3 s (7.81×)"),
    ("dualde-table6", "FB15k-237", "ComplEx 512", "1606.6 s (1×)"),
    ("dualde-table7", "RotatE 64", "-SEM", 0.462),
    ("dualde-table7", "SimplE 32", "-S1", 0.302),
    ("iterde-ablation", "ComplEx", "without iteration", "−11.2%"),
    ("iterde-wn18rr", "RotatE", "IterDE", ".465–.469"),
    ("iterde-time", "TransE", "IterDE", "−50%"),
    ("med-curve", "", "DT 640", 0.508),
    ("med-curve", "", "DualDE 40", 0.441),
    ("med-ablation", "", "MED", ".324 / .466 / .471 / .476"),
    ("med-scorers", "WN18RR RotatE", "direct", 0.131),
    ("metasd-table1", "FB15k-237", "RP", 0.388),
    ("metasd-table1", "WN18RR", "DML", 0.472),
    ("metasd-table2", "", "DURA", 0.452),
    ("metasd-table3", "", "w/o M", 0.378),
    ("metasd-table4", "RESCAL", "MetaSD", 0.372),
]


@pytest.mark.parametrize(("name", "group", "row", "figure"), PUBLISHED)
def test_published_figures_are_those_of_the_papers(name: str, group: str, row: str, figure: Any) -> None:
    sweep, base = load_sweep(CONFIGS / f"tables/{name}.yaml")
    trials = with_teachers(table_trials(sweep, base, sha), sweep.paper_teacher)
    assert {trial.paper for trial in trials if (trial.group, trial.row) == (group, row)} == {figure}


def test_table_7_has_the_figures_of_the_paper_and_four_teachers_a_seed() -> None:
    sweep, base = load_sweep(CONFIGS / "tables/dualde-table7.yaml")
    trials = table_trials(sweep, base, sha)
    figures = {(trial.group, trial.row): trial.paper for trial in trials}
    assert figures["RotatE 64", "-SEM"] == 0.462 and figures["SimplE 32", "-S1"] == 0.302
    assert figures["ComplEx 32", "direct"] == 0.268
    teachers = {one.digest for trial in trials for one in trial.teachers().values()}
    assert len(teachers) == 4 * len(sweep.seeds)


# -- rows --------------------------------------------------------------------------------------------------------------


def test_rows_stand_in_every_group_at_every_seed_beside_one_direct_model(tmp_path: Path) -> None:
    rows = {"hot": {"student.distill.temperature": 9.0}, "plain": {"paper": {"A": 0.5}}}
    trials = trials_of(tmp_path, rows=rows, groups={"A": {}, "B": {"student.dim": 16}}, seeds=[3, 4])
    assert [(t.group, t.row, t.seed) for t in trials] == [
        (group, row, seed) for group in "AB" for row in ("hot", "plain", "direct") for seed in (3, 4)
    ]
    assert {t.scored.dim for t in trials if t.group == "B"} == {16}
    assert [t.paper for t in trials if t.row == "plain"] == [0.5, 0.5, None, None]
    assert trials[0].scored.distill.temperature == 9.0
    assert {t.scored.method for t in trials if t.row == "direct"} == {"scratch"}


def test_trials_share_a_teacher_exactly_when_nothing_of_it_differs(tmp_path: Path) -> None:
    rows = {"a": {}, "b": {"student.dim": 4}, "c": {"teacher.epochs": 4}, "d": {"dtype": "float64"}}
    found = {t.row: t.teachers()["teacher"].digest for t in trials_of(tmp_path, rows=rows) if t.kind == "student"}
    assert found["a"] == found["b"]
    assert len({found["a"], found["c"], found["d"]}) == 3
    seeds = [t.teachers()["teacher"].digest for t in trials_of(tmp_path, rows={"a": {}}, seeds=[0, 1]) if t.row == "a"]
    assert len(set(seeds)) == 2


def test_a_chain_shares_its_first_model_as_the_chain_has_it(tmp_path: Path) -> None:
    chain = {"from": 32, "to": 8, "per_dim": {32: {"epochs": 7}}}
    rows = {"halves": {"chain": chain}, "a jump": {"chain": {**chain, "ratio": 4}}}
    base = {"student": {"method": "bkd"}, "teacher": {}, "baseline": True}
    trials = trials_of(tmp_path, base=base, rows=rows)
    teachers = [trial.teachers()["teacher"] for trial in trials[:2]]
    assert teachers[0].digest == teachers[1].digest
    assert (teachers[0].scored.dim, teachers[0].scored.epochs) == (32, 7)
    config = trials[0].with_teachers(tmp_path)
    assert [stage.name for stage in trials[0].plan(config)] == ["student_16", "student"]
    assert config.teacher == str(teachers[0].folder(tmp_path) / "stages" / "teacher")
    assert [trial.row for trial in trials] == ["halves", "a jump", "direct"]


def test_a_row_of_another_method_has_none_of_the_options_of_the_old_one(tmp_path: Path) -> None:
    trials = trials_of(tmp_path, rows={"rkd": {"student.method": "rkd"}, "bkd": {}})
    assert [trial.scored.method for trial in trials] == ["rkd", "bkd", "scratch"]


def test_a_digest_is_of_what_is_trained_and_not_of_where_or_how_fast(tmp_path: Path) -> None:
    rows = {"a": {}}
    first = trials_of(tmp_path, rows=rows)[0].digest
    same = [{"threads": 2}, {"data": "elsewhere"}, {"name": "x"}, {"device": "cpu"}]
    for changes in same:
        sweep, base = loaded(tmp_path, rows=rows, set=changes)
        assert table_trials(sweep, base, lambda _: sha("umls"))[0].digest == first, changes
    for changes in ({"seed": 1, "seeds": [1]}, {"student.epochs": 3}, {"ties": "optimistic"}):
        seeds = {"seeds": changes.pop("seeds")} if "seeds" in changes else {}
        sweep, base = loaded(tmp_path, rows=rows, set=changes, **seeds)
        assert table_trials(sweep, base, sha)[0].digest != first, changes


def test_a_grid_is_every_combination_and_direct_models_are_told_apart(tmp_path: Path) -> None:
    trials = trials_of(tmp_path, grid={"teacher.dim": [32, 16], "student.dim": [8, 4]})
    assert [t.row for t in trials if t.kind == "student"][1] == "teacher.dim=32, student.dim=4"
    assert [t.row for t in trials if t.kind == "direct"] == ["direct 8", "direct 4"]


def test_the_base_may_be_a_path_from_the_file_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "plans").mkdir()
    (tmp_path / "plans" / "p.yaml").write_text(yaml.safe_dump(BASE), encoding="utf-8")
    _, base = loaded(tmp_path, base="plans/p.yaml", data="kinship", set={"student.epochs": 9}, rows={"a": {}})
    assert (base["data"], base["student"]["epochs"], base["teacher"]["dim"]) == ("kinship", 9, 32)


# -- searches ----------------------------------------------------------------------------------------------------------


def test_the_direct_model_is_searched_over_what_concerns_it_as_often(tmp_path: Path) -> None:
    space = {
        "student.optimizer.lr": {"loguniform": [0.01, 1.0]},
        "student.optimizer.relation_lr": {"sample_from": "times", "of": "student.optimizer.lr", "by": 0.5},
        "student.distill.temperature": {"choice": [1.0, 2.0]},
        "teacher.dim": {"grid": [16, 32]},
        "baseline.dropout": {"uniform": [0.0, 0.5]},
    }
    sweep, base = loaded(tmp_path, space=space, trials=6)
    taught, direct = search_arms(sweep, base, sha)
    assert set(taught.space) == set(space) - {"baseline.dropout"}
    assert set(direct.space) == {"student.optimizer.lr", "student.optimizer.relation_lr", "student.dropout"}
    assert budgets(sweep, [taught, direct]) == [3, 6]  # of two grid points, and of one
    trial = direct.trial({"student.optimizer.lr": 0.4, "student.dropout": 0.1})
    assert (trial.kind, trial.scored.method, trial.config.teacher) == ("direct", "scratch", None)
    assert trial.scored.optimizer.relation_lr == pytest.approx(0.2)
    assert trial.config.test is False


def test_draws_are_found_again_once_each_whatever_a_kill_left_of_the_list(tmp_path: Path) -> None:
    sweep, base = loaded(tmp_path, space={"student.optimizer.lr": {"uniform": [0.1, 1.0]}}, trials=2)
    arm = search_arms(sweep, base, sha)[0]
    path = tmp_path / "draws.jsonl"
    for lr in (0.2, 0.3, 0.2):
        note_draw(path, "student", {"student.optimizer.lr": lr})
    note_draw(path, "direct", {"student.optimizer.lr": 0.9})
    with path.open("a", encoding="utf-8") as file:
        file.write('{"arm": "student", "dra')
    assert [trial.scored.optimizer.lr for trial in read_draws(path, arm)] == [0.2, 0.3]


def test_rules_by_name_keep_whole_numbers_whole() -> None:
    assert Domain(sample_from="times", of="x", by=0.5).derived(7) == 4
    assert Domain(sample_from="times", of="x", by=0.5).derived(0.3) == pytest.approx(0.15)
    assert Domain(sample_from="same_as", of="x").derived("adam") == "adam"


# -- what is refused -------------------------------------------------------------------------------------------------

LR = {"student.optimizer.lr": {"uniform": [0.1, 1.0]}}


@pytest.mark.parametrize(
    ("sweep", "said"),
    [
        ({}, "exactly one of rows, grid and space"),
        ({"rows": {"a": {}}, "grid": {"student.dim": [8]}}, "exactly one of rows, grid and space"),
        ({"row": {"a": {}}}, "no such option; allowed here: .*rows"),
        ({"rows": {"a": {}}, "reference": "b"}, "reference 'b' is none of the rows a"),
        ({"rows": {"a": {}}, "trials": 3}, "belong to a space"),
        ({"rows": {"a": {}}, "seeds": [1, 1]}, "seeds must differ"),
        ({"space": LR}, "student.optimizer.lr is drawn: say how often with trials"),
        ({"space": {"student.dim": {"grid": [8]}}, "trials": 2}, "trials is for drawn keys"),
        (
            {"space": {"student.dim": {"grid": [8]}} | LR, "trials": 2, "search": "optuna"},
            "use choice in place of grid",
        ),
        ({"space": {"student.dim": {"grid": [8], "choice": [4]}}}, "give exactly one of grid"),
        ({"space": {"student.dim": {"uniform": [2, 1]}}, "trials": 2}, "low < high"),
        ({"space": {"student.dim": {"loguniform": [0, 1]}}, "trials": 2}, "low > 0"),
        ({"space": {"student.dim": {"sample_from": "same_as"}}}, "belong together"),
        ({"space": LR | {"student.dim": {"sample_from": "same_as", "of": "x"}}, "trials": 1}, "must be a key of the"),
        ({"space": LR, "trials": 2, "scheduler": "hyperband"}, "scheduler"),
        ({"space": LR, "trials": 2, "rows": {"a": {}}}, "exactly one"),
    ],
)
def test_a_file_that_cannot_be_a_sweep_says_why(tmp_path: Path, sweep: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        loaded(tmp_path, **sweep)
    assert str(caught.value).startswith(str(tmp_path / "sweep.yaml"))


@pytest.mark.parametrize(
    ("sweep", "said"),
    [
        ({"rows": {"a": {"student.dimm": 3}}}, "a.*dimm.*no such option"),
        ({"rows": {"a": {}, "b": {}}}, "a, seed 0 and b, seed 0 are the same config"),
        ({"grid": {"student.dim": 8}}, "grid.student.dim|list"),
        ({"space": {"student.distill.temperature": {"uniform": [1.0, 2.0]}}, "trials": 2}, "equal budget"),
        ({"space": {"student.dropout": {"uniform": [0.5, 1.5]}}, "trials": 2}, "dropout"),
        ({"space": {"student.dims": {"choice": [8]}}, "trials": 2}, "dims.*no such option"),
        ({"space": LR | {"student.dim": {"grid": [4, 8]}}, "trials": 3}, "no multiple of the 2 points"),
    ],
)
def test_a_sweep_that_cannot_be_expanded_says_where(tmp_path: Path, sweep: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        config, base = loaded(tmp_path, **sweep)
        if config.space is None:
            table_trials(config, base, sha)
        else:
            budgets(config, search_arms(config, base, sha))


def test_seeds_from_the_command_line(tmp_path: Path) -> None:
    sweep, _ = loaded(tmp_path, rows={"a": {}})
    assert with_seeds(sweep, "4,2").seeds == [4, 2]
    for text in ("a", "1,1", "-1", ""):
        with pytest.raises(ConfigError, match="--seeds"):
            with_seeds(sweep, text)


def test_dotted_and_nested_keys_are_the_same() -> None:
    assert expand({"a.b": 1, "a": {"c": 2}, "chain.per_dim.64.epochs": 3}) == {
        "a": {"b": 1, "c": 2},
        "chain": {"per_dim": {64: {"epochs": 3}}},
    }
    assert put_over({"a": {"b": 1, "c": 1}}, {"a": {"b": 2}}) == {"a": {"b": 2, "c": 1}}


def test_a_sweep_of_one_row_has_the_config_that_distill_would_have(tmp_path: Path) -> None:
    path = CONFIGS / "umls" / "bkd_complex.yaml"
    trial = trials_of(tmp_path, base=str(path), rows={"a": {}})[0]
    config = load_config(path)
    assert trial.scored == config.student
    assert trial.teachers()["teacher"].scored == config.teacher


def test_the_sweeps_of_the_documentation_are_sweeps() -> None:
    shown = blocks(section("docs/cluster.md", "Sweeps"), "yaml")
    kinds = [SweepConfig.model_validate(yaml.safe_load(block)).space is None for block in shown]
    assert kinds == [True, False]
