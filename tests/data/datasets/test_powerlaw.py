"""Made graphs: exactly as many triples as asked for, as skewed as asked for, the same for the same arguments."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from distkgd.data import Graph, load_graph, power_law_graph
from distkgd.data.datasets import powerlaw
from distkgd.data.datasets.powerlaw import EXAMPLE, _PowerLaw
from distkgd.data.triples import SPLITS
from distkgd.errors import DataError
from distkgd.pipeline.config import parse_config

SMALL: dict[str, Any] = {
    "entities": 60, "triples": 500, "relations": 5, "skew": 0.8, "seed": 3, "valid": 40, "test": 30,
}  # fmt: skip
SPEC = "powerlaw:entities=60,triples=500,relations=5,skew=0.8,seed=3,valid=40,test=30"


def make(**changes: Any) -> Graph:
    return power_law_graph(**SMALL | changes)


def rows_of(graph: Graph) -> Tensor:
    return torch.cat([graph.train, graph.valid, graph.test])


@pytest.mark.parametrize("skew", [0, 0.8, 1, 1.5])
@pytest.mark.parametrize(("valid", "test"), [(0, 0), (40, 30), (1, 0)])
def test_a_graph_has_exactly_the_triples_asked_for_each_of_them_once(skew: float, valid: int, test: int) -> None:
    graph = make(skew=skew, valid=valid, test=test, triples=300)
    assert [len(getattr(graph, split)) for split in SPLITS] == [300, valid, test]
    assert (graph.num_entities, graph.num_relations) == (60, 5)
    rows = rows_of(graph)
    assert rows.dtype == torch.int64 and rows.is_contiguous()
    assert len(rows.unique(dim=0)) == len(rows)
    assert rows.min() >= 0 and (rows.amax(0) < torch.tensor([60, 5, 60])).all()


def test_all_triples_there_are_can_be_asked_for_and_none_more() -> None:
    graph = make(entities=6, relations=2, triples=60, valid=7, test=5, skew=0)
    assert len(rows_of(graph).unique(dim=0)) == 72
    with pytest.raises(DataError, match="73 distinct triples are wanted and 72 exist"):
        make(entities=6, relations=2, triples=61, valid=7, test=5, skew=0)


def test_triples_too_unlikely_to_be_found_are_refused_in_time() -> None:
    with pytest.raises(DataError, match=r"distinct triples of the 100 wanted; ask for fewer, .*less skew"):
        make(entities=8, relations=2, triples=100, valid=0, test=0, skew=5)


def test_a_graph_is_the_same_each_time_and_however_many_draws_are_made_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    one = make()
    monkeypatch.setattr(powerlaw, "_CHUNK", 37)
    two = make()
    assert one.sha256 == two.sha256
    assert all(torch.equal(getattr(one, split), getattr(two, split)) for split in SPLITS)
    # Whoever resumes a run next year needs the same graph again.
    assert one.sha256 == "8b8c448eb72ef45cc04df2d4fabeca1c86972b713fc8e9a85786a8c2e3735ef4"


@pytest.mark.parametrize("changed", SMALL)
def test_every_argument_changes_the_graph(changed: str) -> None:
    one, two = make(), make(**{changed: SMALL[changed] + 1})
    assert one.sha256 != two.sha256 and one.name != two.name
    assert not all(torch.equal(getattr(one, split), getattr(two, split)) for split in SPLITS)


@pytest.mark.parametrize("skew", [0, 0.5, 0.8, 1, 1 + 1e-9, 1.7, 2, 5])
@pytest.mark.parametrize("size", [1, 2, 40, 3000])
def test_the_chance_of_rank_k_is_proportional_to_its_power(skew: float, size: int) -> None:
    number = 40_000
    drawn = _PowerLaw(size, skew).ranks(1, 0, 0, number)
    weights = torch.arange(1, size + 1).double().pow(-skew)
    expected = number * weights / weights.sum()
    counts = torch.bincount(drawn, minlength=size).double()
    # Ranks too rare for a chi-square of their own are put together.
    likely = expected >= 10
    tail = expected[~likely].sum().unsqueeze(0)
    expected = torch.cat([expected[likely], tail[tail > 5]])
    counts = torch.cat([counts[likely], counts[~likely].sum().unsqueeze(0)[tail > 5]])
    freedom = max(1, len(expected) - 1)
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert chi_square < freedom + 5 * (2 * freedom) ** 0.5


def test_columns_and_draws_are_independent() -> None:
    law = _PowerLaw(50, 0.5)
    draws = [law.ranks(1, column, 0, 20_000) for column in range(3)]
    draws += [law.ranks(1, 0, 20_000, 40_000), law.ranks(2, 0, 0, 20_000), draws[0].roll(1)]
    correlations = torch.corrcoef(torch.stack(draws).double()) - torch.eye(len(draws))
    assert correlations.abs().max() < 5 / 20_000**0.5


@pytest.mark.parametrize("column", [0, 1, 2], ids=["heads", "relations", "tails"])
def test_degrees_follow_the_power_law(column: int) -> None:
    graph = power_law_graph(2000, 60_000, 400, skew=0.7, seed=1)
    counts = torch.bincount(graph.train[:, column]).sort(descending=True).values.double()
    weights = torch.arange(1, graph.num_relations + 1 if column == 1 else 2001).double().pow(-0.7)
    expected = 60_000 * weights / weights.sum()
    top = slice(0, 30)
    assert (counts[top] / expected[top] - 1).abs().max() < 0.2
    assert float(counts[top].sum() / expected[top].sum()) == pytest.approx(1, abs=0.02)


def test_popular_entities_are_popular_at_both_ends_and_their_ids_tell_nothing() -> None:
    graph = power_law_graph(2000, 60_000, 400, skew=0.7, seed=1)
    heads, tails = (torch.bincount(graph.train[:, column], minlength=2000).double() for column in (0, 2))
    assert torch.corrcoef(torch.stack([heads, tails]))[0, 1] > 0.9
    assert torch.corrcoef(torch.stack([heads, torch.arange(2000).double()]))[0, 1].abs() < 5 / 2000**0.5
    quarters = heads.reshape(4, 500).sum(1)
    assert quarters.max() < 1.3 * quarters.min()


@pytest.mark.parametrize("split", ["valid", "test"])
def test_held_out_triples_are_a_fair_sample(split: str) -> None:
    graph = power_law_graph(500, 20_000, 20, skew=0.7, seed=1, valid=2000, test=2000)
    held, train = (getattr(graph, name) for name in (split, "train"))
    for column, size in ((0, 500), (1, 20), (2, 500)):
        popular = torch.bincount(train[:, column], minlength=size).sort(descending=True).indices[: size // 10]
        shares = [float(torch.isin(rows[:, column], popular).double().mean()) for rows in (held, train)]
        assert shares[0] == pytest.approx(shares[1], abs=0.05)


def test_names_are_numbered_and_sorted() -> None:
    graph = make(entities=101, relations=1)
    assert graph.entities.names.head(3).to_list() == ["e000", "e001", "e002"] and graph.entities.name(100) == "e100"
    assert graph.entities.id("e077") == 77 and graph.relations.names.to_list() == ["r0"]


def test_held_out_triples_with_entities_that_train_lacks_are_reported() -> None:
    graph = make(entities=2000, triples=200, valid=100, test=0)
    seen = torch.isin(graph.valid[:, [0, 2]], graph.train[:, [0, 2]]).all(1)
    unseen = int((~seen).sum())
    assert 0 < unseen < 100
    assert graph.warnings == (f"valid: {unseen} of 100 triples hold an entity that train lacks; they are kept",)


def test_a_config_names_a_graph_by_its_arguments(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / SPEC).mkdir()  # a folder of that name changes nothing
    config = parse_config({"data": SPEC}, "test")
    graph = load_graph(config.data)
    assert graph.sha256 == make().sha256 and torch.equal(graph.train, make().train)
    assert load_graph(graph.name).sha256 == graph.sha256
    spaced = "powerlaw: seed=3, triples=5_00, relations=5, entities=60, skew=.8, valid=40, test=30"
    assert load_graph(spaced).sha256 == graph.sha256
    assert load_graph(EXAMPLE).num_entities == 100_000


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("powerlaw", "entities, triples, relations, skew, seed missing; e.g. powerlaw:"),
        ("powerlaw:", "entities, triples, relations, skew, seed missing"),
        ("powerlaw:entities=5,triples=9", "relations, skew, seed missing"),
        (SPEC + ",size=3", "'size' is no option of it; allowed: entities, triples"),
        (SPEC + ",seed=4", "'seed' stands there twice"),
        (SPEC + ",60", "'60' is no option of it"),
        (SPEC.replace("=60", "=6e1"), "entities must be a whole number, not '6e1'"),
        (SPEC.replace("=60", "="), "entities must be a whole number, not ''"),
        (SPEC.replace("=60", "=-60"), "entities must be a whole number, not '-60'"),
        (SPEC.replace("0.8", "much"), "skew must be a number, not 'much'"),
        (SPEC.replace("0.8", "nan"), "skew must be a number, not 'nan'"),
        (SPEC.replace("0.8", "5.1"), "skew=5.1 is outside 0 … 5"),
        (SPEC.replace("=60", "=0"), "entities=0 is too small; at least 1"),
        (SPEC.replace("=500", "=0"), "triples=0 is too small; at least 1"),
        (SPEC.replace("=60", "=4000000000"), "entities² x relations must stay below 2^63"),
    ],
)
def test_a_malformed_description_is_refused_by_name_value_and_cure(spec: str, words: str) -> None:
    with pytest.raises(DataError) as info:
        load_graph(spec)
    assert words in str(info.value) and "\n" not in str(info.value)
