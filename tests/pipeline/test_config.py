"""A config: defaults, then a YAML file, then overrides; what was given, what is allowed, what to change."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from distkgd.config.stage import LossConfig, NegativesConfig, OptimizerConfig
from distkgd.config.tree import merge
from distkgd.errors import ConfigError
from distkgd.methods import METHODS
from distkgd.methods.dualde import DualdeConfig, StageTwoConfig
from distkgd.pipeline.config import RunConfig, StageConfig, load_config, parse_config, resolved

TAUGHT = {"teacher": {"dim": 64}, "student": {"method": "dualde", "dim": 8}}


def written(folder: Path, text: str, name: str = "config.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_without_a_file_everything_has_its_default() -> None:
    assert load_config(None) == RunConfig()


def test_an_empty_file_is_the_default_config_under_its_own_name(tmp_path: Path) -> None:
    config = load_config(written(tmp_path, "# nothing yet\n"))
    assert config == RunConfig(name=f"{tmp_path.name}_config")


def test_the_file_goes_over_the_defaults_and_overrides_go_over_the_file(tmp_path: Path) -> None:
    text = "seed: 3\nstudent: {dim: 16, epochs: 7, optimizer: {name: adam, lr: 0.5}}\n"
    config = load_config(written(tmp_path, text), ["student.optimizer.lr=0.25", "student.dim=24", "threads=2"])
    assert (config.seed, config.threads) == (3, 2)
    assert (config.student.dim, config.student.epochs) == (24, 7)
    assert config.student.optimizer == OptimizerConfig(name="adam", lr=0.25)
    assert config.student.batch_size == StageConfig().batch_size


def test_the_last_of_two_overrides_of_one_key_counts() -> None:
    assert load_config(None, ["seed=1", "seed=2"]).seed == 2


def test_a_run_is_named_after_its_file_and_the_folder_above(tmp_path: Path) -> None:
    for folder, name in (("wn18rr", "wn18rr_bkd"), ("configs", "bkd")):
        (tmp_path / folder).mkdir()
        path = written(tmp_path / folder, "seed: 1\n", "bkd.yaml")
        assert load_config(path).name == name
        assert load_config(path, ["name=mine"]).name == "mine"


@pytest.mark.parametrize(
    ("given", "value"), [("1e-4", 1e-4), ("1E-4", 1e-4), ("'0.5'", 0.5), ("5", 5.0), (".5", 0.5), ("1.e-2", 0.01)]
)
def test_numbers_that_yaml_takes_for_text_are_numbers(given: str, value: float, tmp_path: Path) -> None:
    from_file = load_config(written(tmp_path, f"student: {{optimizer: {{lr: {given}}}}}"))
    from_override = load_config(None, [f"student.optimizer.lr={given}"])
    assert from_file.student.optimizer.lr == from_override.student.optimizer.lr == value


@pytest.mark.parametrize(
    ("override", "path", "expected"),
    [
        ("student.negatives={kind: batch, num: 5}", "student.negatives", NegativesConfig(kind="batch", num=5)),
        ("student.loss.name=bce", "student.loss", LossConfig(name="bce")),
        ("student.regulariser.relation_weight=null", "student.regulariser.relation_weight", None),
        ("student.bf16=true", "student.bf16", True),
        (" student.optimizer.lr = 0.5", "student.optimizer.lr", 0.5),
        ("data=a=b", "data", "a=b"),
        ("data=/some/where.d", "data", "/some/where.d"),
    ],
)
def test_an_override_is_a_dotted_path_and_a_yaml_value(override: str, path: str, expected: Any) -> None:
    found: Any = load_config(None, [override])
    for key in path.split("."):
        found = getattr(found, key)
    assert found == expected


def test_an_override_reaches_below_an_option_the_file_does_not_have(tmp_path: Path) -> None:
    path = written(tmp_path, yaml.safe_dump(TAUGHT))
    config = load_config(path, ["student.distill.stage_two.epochs=3", "baseline.optimizer.lr=0.7"])
    assert config.student.distill.stage_two == StageTwoConfig(epochs=3)
    assert config.baseline.optimizer.lr == 0.7


def test_a_method_brings_its_own_options() -> None:
    kinds = {name: method.Settings for name, method in METHODS.items()}
    for method, kind in kinds.items():
        teacher = {} if 0 in METHODS[method].num_teachers else {"teacher": "a/path"}
        config = parse_config({**teacher, "student": {"method": method}}, "test")
        assert config.student.distill == kind()
    given = {"stage_two": None, "soft": "kl", "alpha": "1e-1"}
    config = parse_config({"teacher": "a/path", "student": {"method": "dualde", "distill": given}}, "test")
    assert config.student.distill == DualdeConfig(stage_two=None, soft="kl", alpha=0.1)


@pytest.mark.parametrize("value", [True, False])
def test_a_baseline_can_be_switched(value: bool) -> None:
    assert parse_config({**TAUGHT, "baseline": value}, "test").baseline is value


def test_a_baseline_mapping_goes_over_the_student_without_its_method() -> None:
    student = {"method": "bkd", "distill": {"weight": 2}, "dim": 8, "optimizer": {"lr": 0.3, "clip": 1}}
    config = parse_config({"teacher": "x", "student": student, "baseline": {"optimizer": {"lr": 0.2}}}, "test")
    expected = StageConfig(dim=8, optimizer=OptimizerConfig(lr=0.2, clip=1))
    assert config.baseline == expected


CONFIGS: list[dict[str, Any]] = [
    {},
    TAUGHT,
    {**TAUGHT, "baseline": True},
    {**TAUGHT, "baseline": {"epochs": 3}},
    {"teacher": "runs/x/stages/teacher", "student": {"method": "bkd", "distill": {"temperature": 4}}},
    {"teacher": "x", "student": {"method": "dualde", "distill": {"stage_two": {"start": 4}}}},
    {"teacher": "x", "student": {"method": "dualde", "distill": {"stage_two": None}}},
]


@pytest.mark.parametrize("tree", CONFIGS, ids=str)
def test_the_resolved_tree_is_plain_complete_and_reads_back_as_the_same_config(
    tree: dict[str, Any], tmp_path: Path
) -> None:
    config = parse_config(tree, "test")
    plain = resolved(config)
    text = yaml.safe_dump(plain)
    assert load_config(written(tmp_path, text)) == config
    assert plain.keys() == RunConfig.model_fields.keys()
    assert plain["student"].keys() == StageConfig.model_fields.keys()
    for key, node in (("negatives", NegativesConfig), ("optimizer", OptimizerConfig)):
        assert plain["student"][key].keys() == node.model_fields.keys()


def test_parsing_leaves_the_given_tree_alone() -> None:
    tree = {**TAUGHT, "baseline": {"dim": 16}}
    before = yaml.safe_dump(tree)
    parse_config(tree, "test")
    assert yaml.safe_dump(tree) == before


def test_a_config_cannot_be_changed_afterwards() -> None:
    config = RunConfig()
    for node, key in ((config, "seed"), (config.student, "dim"), (config.student.loss, "name")):
        with pytest.raises(ValueError, match="frozen"):
            setattr(node, key, 5)


def test_merge_puts_leaves_over_leaves() -> None:
    base = {"a": {"b": 1, "c": {"d": 2}}, "e": 3}
    assert merge(base, {"a": {"c": {"d": 4}}, "e": {"f": 5}}) == {"a": {"b": 1, "c": {"d": 4}}, "e": {"f": 5}}
    assert base == {"a": {"b": 1, "c": {"d": 2}}, "e": 3}


# -- mistakes -----------------------------------------------------------------------------------------------------

UNKNOWN = [
    ("sed", RunConfig),
    ("student.dims", StageConfig),
    ("teacher.dims", StageConfig),
    ("baseline.dims", StageConfig),
    ("student.negatives.nmu", NegativesConfig),
    ("student.optimizer.learning_rate", OptimizerConfig),
    ("teacher.optimizer.learning_rate", OptimizerConfig),
    ("student.distill.alfa", DualdeConfig),
    ("student.distill.stage_two.begin", StageTwoConfig),
    # Words that the parser itself uses for the branches of an option that may be two things.
    ("student.path", StageConfig),
    ("teacher.path", StageConfig),
    ("teacher.stage", StageConfig),
    ("baseline.flag", StageConfig),
    ("path", RunConfig),
]


@pytest.mark.parametrize(("key", "node"), UNKNOWN, ids=[key for key, _ in UNKNOWN])
def test_an_unknown_key_is_named_with_what_is_allowed_beside_it(key: str, node: Any, tmp_path: Path) -> None:
    path = written(tmp_path, yaml.safe_dump(TAUGHT))
    with pytest.raises(ConfigError) as info:
        load_config(path, [f"{key}=5"])
    message = str(info.value)
    assert str(path) in message
    assert re.search(rf"[ (]?{re.escape(key.rpartition('.')[2])}: no such option \(given: 5\)", message), message
    assert all(part in message for part in key.split("."))
    assert f"allowed here: {', '.join(node.model_fields)}" in message


def test_an_option_of_a_method_that_has_none_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"distill \(method scratch\)\.weight: no such option .* allowed here: nothing"
    ):
        load_config(None, ["student.distill.weight=2"])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", "1.5"),
        ("seed", "-1"),
        ("data", "[a, b]"),
        ("data", "null"),
        ("device", "gpu"),
        ("dtype", "float16"),
        ("keep", "0"),
        ("student", "5"),
        ("student", "[]"),
        ("student", "complex"),
        ("student", "null"),
        ("teacher", "5"),
        ("teacher", "true"),
        ("baseline", "some/path"),
        ("baseline", "3"),
        ("student.dim", "0"),
        ("student.dim", "32.5"),
        ("student.dim", "many"),
        ("student.dim", "true"),
        ("student.method", "kd"),
        ("student.norm", "3"),
        ("student.bf16", "5"),
        ("student.dropout", "1.0"),
        ("student.dropout", "-0.1"),
        ("student.dropout", ".nan"),
        ("student.optimizer", "adam"),
        ("student.optimizer.lr", "0"),
        ("student.optimizer.lr", ".inf"),
        ("student.optimizer.lr", "fast"),
        ("student.negatives.kind", "none"),
        ("student.loss.name", "[softmax]"),
        ("student.margin", ".nan"),
        ("mlflow", "false"),
        ("mlflow.enabled", "5"),
    ],
)
def test_a_wrong_value_is_named_with_its_key(key: str, value: str) -> None:
    with pytest.raises(ConfigError) as info:
        load_config(None, [f"{key}={value}"])
    assert key in str(info.value)
    assert str(yaml.safe_load(value)) in str(info.value)


@pytest.mark.parametrize("value", ["5", "0", "false", "''", "[]", "[1]", "none"])
def test_method_options_that_are_no_mapping_are_refused(value: str, tmp_path: Path) -> None:
    path = written(tmp_path, yaml.safe_dump(TAUGHT))
    with pytest.raises(ConfigError, match=r"distill \(method dualde\)"):
        load_config(path, [f"student.distill={value}"])


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"student": {"method": "bkd"}}, ["student.method bkd", "needs a teacher", "scratch"]),
        ({"teacher": "x"}, ["student.method is scratch", "bkd", "drop the teacher"]),
        ({"teacher": {"method": "bkd"}, "student": {"method": "bkd"}}, ["teacher.method", "scratch", "bkd"]),
        ({"student": {"batch_size": 30, "accumulate": 4}}, ["batch_size 30", "multiple of 4"]),
        (
            {"student": {"batch_size": 32, "accumulate": 2, "negatives": {"kind": "chunk", "chunk": 12}}},
            ["batch_size 32", "multiple of 24"],
        ),
        ({"student": {"negatives": {"kind": "batch", "labels": "known"}}}, ["labels: known", "kind: all"]),
        ({"student": {"loss": {"name": "margin", "label_smoothing": 0.1}}}, ["label_smoothing", "margin"]),
        ({"student": {"schedule": {"name": "plateau"}, "validate_every": 0}}, ["plateau", "validate_every"]),
        ({"student": {"regulariser": {"weight": 0.1}}}, ["regulariser.weight", "none"]),
        (
            {"teacher": "x", "student": {"method": "dualde", "distill": {"stage_one": False, "stage_two": None}}},
            ["stage_one", "stage_two", "nothing to train"],
        ),
    ],
)
def test_options_that_contradict_each_other_are_refused_with_a_cure(tree: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as info:
        parse_config(tree, "my.yaml")
    for word in ["my.yaml", *words]:
        assert word in str(info.value)


def test_all_mistakes_of_a_file_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as info:
        load_config(None, ["seed=x", "student.dim=y", "colour=red"])
    assert all(word in str(info.value) for word in ("seed", "student.dim", "colour"))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config file .*nowhere\.yaml"):
        load_config(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize("override", ["seed", "=5", "a..b=5", ".seed=5", "seed.=5", ""])
def test_an_override_without_key_or_value_is_refused(override: str) -> None:
    with pytest.raises(ConfigError, match=r"key=value"):
        load_config(None, [override])


def test_the_keys_that_tracking_errors_name_are_keys_of_the_config() -> None:
    config = load_config(None, ["mlflow.uri=sqlite:///x.db", "mlflow.enabled=false"])
    assert config.mlflow.uri == "sqlite:///x.db"
    assert not config.mlflow.enabled
