"""Figures of exported files by a NumPy script of its own are those of the engine."""

from pathlib import Path

import pytest
import torch

from distkgd.data import load_graph
from distkgd.data.filters import KnownAnswers
from distkgd.distributed.ranks import Ranks
from distkgd.evaluation.ranking import metrics, ranks_of
from distkgd.models.export import export_model
from distkgd.models.model import new_model
from distkgd.models.model_folder import save_model
from distkgd.scorers import build_scorer
from tests.evaluation.rerank import SCORES, rerank
from tests.launches import small_data


@pytest.mark.parametrize("name", SCORES)
def test_a_rank_by_numpy_alone_is_the_engines(name: str, tmp_path: Path) -> None:
    for file in small_data(tmp_path / "data").iterdir():
        file.rename(file.with_suffix(".txt"))
    graph, ranks = load_graph(str(tmp_path / "data")), Ranks()
    options = {"seed": 3, "init_scale": 0.5, "dtype": torch.float64}
    model = new_model(
        build_scorer(name, 8), graph.num_entities, graph.num_relations, ranks, reciprocal=name != "complex", **options
    )
    model.entity.weight[7] = model.entity.weight[9]  # some scores are equal
    save_model(tmp_path / "model", model, graph, {})
    export_model(tmp_path / "model", tmp_path / "exported", "numpy", ranks)
    known = KnownAnswers(torch.cat([graph.train, graph.valid, graph.test]), graph.num_entities)
    for split in ("valid", "test"):
        expected = metrics(ranks_of(model, getattr(graph, split), known, ranks))
        found = rerank(tmp_path / "exported", tmp_path / "data", split)
        assert found["questions"] == 2 * len(getattr(graph, split))
        assert found["mrr"] == pytest.approx(expected["mrr"], rel=1e-12)
        assert found["hits_at_10"] == pytest.approx(expected["hits_at_10"])
