"""What is chosen when nobody says how."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from distkgd.config.tree import merge
from distkgd.errors import ConfigError
from distkgd.pipeline.autoconfig import rules
from distkgd.pipeline.config import StageConfig, parse_config


def graph(triples: int, entities: int) -> Any:
    return SimpleNamespace(train=torch.empty(triples, 3), num_entities=entities)


@pytest.mark.parametrize("to", [2, 16, 32, 64, 128, 512])
def test_the_teacher_is_larger_but_at_most_eight_times(to: int) -> None:
    plan = rules.choose(graph(90_000, 12_000), to)
    assert plan["student"]["dim"] == to
    assert 2 * to <= plan["teacher"]["dim"] <= 8 * to


@pytest.mark.parametrize("triples", [1, 8, 100, 5_000, 90_000, 10_000_000])
@pytest.mark.parametrize("entities", [5, 100_000])
def test_what_is_chosen_is_a_valid_plan_of_any_graph(triples: int, entities: int) -> None:
    for tree in (rules.choose(graph(triples, entities), 32), rules.choose_croppable(graph(triples, entities))):
        config = parse_config(tree, "rules")
        assert config.student.batch_size <= triples
        stages = [config.student] if config.teacher is None else [config.student, config.teacher]
        for stage in stages:
            assert not isinstance(stage, str) and 5 <= stage.epochs <= 60
            assert (stage.negatives.kind == "all") == (entities <= 2048)


def test_epochs_and_batches_follow_the_number_of_triples() -> None:
    assert [rules.batch_size(n) for n in (1, 20, 45, 10_239, 10_240, 10**7)] == [1, 1, 2, 256, 512, 512]
    assert [rules.epochs(n, 1_800_000, (5, 40)) for n in (10, 60_000, 90_000, 10**7)] == [40, 30, 20, 5]


def test_regularisers_and_soft_labels_follow_the_graphs_size_and_density() -> None:
    for triples, entities, teacher, student, soft, hard in (
        (90_000, 12_000, 0.05, 0.05, 3.0, 0.0),
        (30 * 12_000, 12_000, 0.005, 0.005, 3.0, 0.0),
        (20_000, 2_000, 0.01, 0.05, 1.0, 1.0),
        (60_000, 2_000, 0.005, 0.005, 1.0, 1.0),
    ):
        plan = rules.choose(graph(triples, entities), 32)
        assert plan["teacher"]["regulariser"]["weight"] == teacher
        assert plan["student"]["regulariser"]["weight"] == student
        assert plan["student"]["distill"] == {"weight": soft, "hard_weight": hard}


@pytest.mark.parametrize("to", [16, 64, 128, 512])
@pytest.mark.parametrize("bits", [1, 4, 8])
def test_a_large_student_of_few_bits_begins_at_the_rows_of_a_teacher_of_its_dim(to: int, bits: int) -> None:
    plan = rules.choose(graph(90_000, 12_000), to, bits)
    plain = rules.choose(graph(90_000, 12_000), to)
    config = parse_config(plan, "rules")
    assert (config.student.dim, config.student.bits, config.student.relation_bits) == (to, bits, max(4, 2 * bits))
    assert isinstance(config.teacher, StageConfig)
    if to < 128:
        assert plan["teacher"] == plain["teacher"] and config.student.start == "random" and plan["baseline"] is True
        return
    assert config.teacher.dim == to and config.student.start == "crop"
    assert config.student.epochs * 3 < plain["student"]["epochs"]
    direct = config.baseline
    assert isinstance(direct, StageConfig) and (direct.bits, direct.start) == (bits, "random")
    assert (direct.epochs, direct.optimizer.lr, direct.regulariser.name) == (plain["student"]["epochs"], 0.5, "n3")


def test_of_a_croppable_model_every_size_can_be_taught_and_trained_directly() -> None:
    given = {"row_dtype": "bfloat16", "regulariser": {"relation_weight": 0.1}, "optimizer": {"relation_lr": 0.1}}
    tree = merge(rules.choose_croppable(graph(90_000, 12_000)), {"student": given})
    student = parse_config(tree, "rules").student
    for bits in (*rules.FEW_BITS, 32):
        direct = rules.direct_of(student, 24, bits)
        assert (direct.dim, direct.bits, direct.method, direct.epochs) == (24, bits, "scratch", student.epochs)
        assert (direct.row_dtype == "bfloat16") == (bits == 32)
    for bits in rules.FEW_BITS:
        taught = rules.few_bits(student, 24, bits)
        assert (taught.dim, taught.bits, taught.start, taught.method) == (24, bits, "crop", "bkd")
        assert 1 <= taught.epochs < student.epochs / 3 and taught.regulariser.weight == 0


def test_an_odd_dim_is_refused_with_the_next_one() -> None:
    with pytest.raises(ConfigError, match=r"--to 33.*Use 34"):
        rules.choose(graph(100, 100), 33)
