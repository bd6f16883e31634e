"""benchmarks/average.py and cached.py: weights of averaged scores, students of a live teacher and of its labels."""

from pathlib import Path

import pytest
import torch

from benchmarks.average import mrrs, search
from benchmarks.cached import tree_of
from distkgd.data.filters import KnownAnswers
from distkgd.distributed.ranks import Ranks
from distkgd.evaluation.ranking import metrics, ranks_of
from distkgd.pipeline.config import parse_config
from distkgd.pipeline.sweep.sweep import found_from_anywhere
from tests.jobs import toy_model
from tests.toys import toy_graph

GRAPH = toy_graph()
KNOWN = KnownAnswers(torch.cat([GRAPH.train, GRAPH.valid, GRAPH.test]), GRAPH.num_entities)
MODELS = [toy_model(GRAPH, "complex", 8), toy_model(GRAPH, "transe", 6, reciprocal=False, seed=4)]


def mrr_of(model: object) -> float | None:
    return metrics(ranks_of(model, GRAPH.valid, KNOWN, Ranks()))["mrr"]


@pytest.mark.parametrize("normalise", ["none", "zscore"])
def test_one_models_scores_rank_as_the_model_does(normalise: str) -> None:
    found = mrrs(MODELS, GRAPH, GRAPH.valid, [(1.0, 0.0), (0.0, 1.0)], normalise)
    assert list(found.values()) == pytest.approx([mrr_of(model) for model in MODELS], rel=1e-9)


def test_z_scores_make_the_average_blind_to_a_models_scale() -> None:
    large = toy_model(GRAPH, "complex", 8)
    large.relation.detach().mul_(100.0)  # its scores too
    plain, scaled = (
        {how: mrrs([one, MODELS[1]], GRAPH, GRAPH.valid, [(1.0, 1.0)], how)[1.0, 1.0] for how in ("none", "zscore")}
        for one in (MODELS[0], large)
    )
    assert scaled["zscore"] == pytest.approx(plain["zscore"], rel=1e-6)
    assert scaled["none"] == pytest.approx(mrr_of(MODELS[0]), rel=0.05) != pytest.approx(plain["none"], rel=1e-3)


def test_the_search_ends_at_weights_in_quarters_no_worse_than_any_model_alone() -> None:
    seen = search(MODELS, GRAPH, "zscore")
    assert list(seen.values())[-1] >= max(seen[1.0, 0.0], seen[0.0, 1.0], seen[1.0, 1.0]) and len(seen) > 4
    assert all(4 * w == int(4 * w) for weights in seen for w in weights)


def test_a_live_teachers_student_and_its_labels_differ_in_where_the_soft_labels_come_from_alone() -> None:
    trees = tree_of("a/path", None, 0, "batch"), tree_of(None, "labels", 0, "batch")
    live, cached = (parse_config(tree, "test").student for tree in trees)
    assert cached.model_copy(update={"distill": live.distill}) == live and cached.distill.labels == "labels"
    assert found_from_anywhere(trees[1])["student"]["distill"]["labels"] == str(Path("labels").resolve())
