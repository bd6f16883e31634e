"""Triple classification against formulas written out."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import distkgd
from distkgd.data import Graph
from distkgd.data.filters import KnownAnswers
from distkgd.errors import ConfigError, DataError
from distkgd.evaluation.classification import Classifier, calibration_error, false_triples, fit_classifier
from distkgd.models.model_folder import save_model
from tests.jobs import toy_model
from tests.toys import toy_graph

ENTITIES, RELATIONS = 31, 4


@pytest.fixture(scope="module")
def graph() -> Graph:
    return toy_graph(ENTITIES, RELATIONS)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, graph: Graph) -> distkgd.TrainedModel:
    """A model whose data set lies beside it."""
    folder = tmp_path_factory.mktemp("classified")
    for split in ("train", "valid", "test"):
        write(folder / "data" / f"{split}.tsv", getattr(graph, split), graph)
    save_model(folder / "model", toy_model(graph, "complex", 8), graph, {"source": str(folder / "data")})
    return distkgd.load(folder / "model")


def write(path: Path, triples: torch.Tensor, graph: Graph) -> Path:
    path.parent.mkdir(exist_ok=True)
    words = ((graph.entities.name(h), graph.relations.name(r), graph.entities.name(t)) for h, r, t in triples.tolist())
    path.write_text("".join("\t".join(one) + "\n" for one in words))
    return path


def drawn(number: int = 4000) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scores, relations, labels, and true probabilities: relation 0 needs 5 to be true, relation 1 needs -3, 2 is rare,
    3 has nothing."""
    generator = torch.Generator().manual_seed(3)
    relation = (torch.rand(number, generator=generator) > 0.5).long()
    relation[:8] = 2
    needs, slope = torch.tensor([5.0, -3.0, 1.0, 0.0]), torch.tensor([2.0, 0.5, 1.0, 1.0])
    scores = needs[relation] + 3 * torch.randn(number, generator=generator)
    true = (slope[relation] * (scores - needs[relation])).sigmoid()
    return scores, relation, torch.rand(number, generator=generator) < true, true


def minus_log_posterior(
    scores: torch.Tensor, relation: torch.Tensor, labels: torch.Tensor, fitted: Classifier
) -> float:
    """The formula, with the best centre of the prior."""
    mean, spread = scores.double().mean(), scores.double().std()
    slope = (fitted.slopes * spread).log()
    offset = fitted.offsets + fitted.slopes * mean
    kinds = relation.unique()
    center = torch.stack([slope[kinds].sum() / (len(kinds) + 1), offset[kinds].mean()])
    logit = fitted.slopes[relation] * scores.double() + fitted.offsets[relation]
    hard = F.binary_cross_entropy_with_logits(logit, labels.double(), reduction="sum")
    prior = (torch.stack([slope, offset])[:, kinds] - center.unsqueeze(1)).square().sum() + center[0] ** 2
    return float(hard + prior / 2)


def test_the_fit_is_the_most_likely_one_and_finds_thresholds_of_relations() -> None:
    scores, relation, labels, true = drawn()
    fitted = fit_classifier(scores, relation, labels, 4)
    assert fitted.thresholds[:2].tolist() == pytest.approx([5.0, -3.0], abs=0.4)
    best = minus_log_posterior(scores, relation, labels, fitted)
    for column in (0, 1, 2):
        for factor, shift in ((1.02, 0.0), (0.98, 0.0), (1.0, 0.02), (1.0, -0.02)):
            slopes, offsets = fitted.slopes.clone(), fitted.offsets.clone()
            slopes[column] *= factor
            offsets[column] += shift
            assert minus_log_posterior(scores, relation, labels, Classifier(slopes, offsets)) > best - 1e-6
    found = fitted.probabilities(scores, relation)
    assert calibration_error(found, labels) < 0.03 and calibration_error(scores.sigmoid(), labels) > 0.2
    assert (found - true).abs().mean() < 0.03


def test_a_relation_without_validation_triples_has_the_numbers_of_all() -> None:
    scores, relation, labels, _ = drawn()
    fitted = fit_classifier(scores, relation, labels, 4)
    assert fitted.slopes[1] < fitted.slopes[3] < fitted.slopes[0]


def test_triples_that_a_score_tells_apart_have_finite_numbers() -> None:
    scores = torch.tensor([-2.0, -1.0, 1.0, 2.0])
    fitted = fit_classifier(scores, torch.zeros(4, dtype=torch.int64), scores > 0, 1)
    assert fitted.slopes.isfinite().all() and abs(float(fitted.thresholds)) < 0.1
    with pytest.raises(DataError, match="4 of 4 are true"):
        fit_classifier(scores, torch.zeros(4, dtype=torch.int64), scores > -9, 1)


def test_the_calibration_error_is_its_formula() -> None:
    scores, _, labels, _ = drawn(500)
    found, total = scores.sigmoid().double(), 0.0
    for low in range(15):
        here = (found >= low / 15) & ((found < (low + 1) / 15) | (low == 14))
        if here.any():
            total += float(here.double().mean() * (found[here].mean() - labels[here].double().mean()).abs())
    assert calibration_error(found, labels) == pytest.approx(total, abs=1e-12)


def test_false_triples_are_none_that_are_known_and_keep_to_what_a_relation_has(graph: Graph) -> None:
    every = torch.cat([graph.train, graph.valid, graph.test])
    known = KnownAnswers(every, ENTITIES)
    found = false_triples(graph.valid, graph, known, 0)
    assert not {tuple(one) for one in found.tolist()} & {tuple(one) for one in every.tolist()}
    tails = {(r, t) for _, r, t in graph.train.tolist()}
    heads = {(h, r) for h, r, _ in graph.train.tolist()}
    changed_tails = 0
    for (h, r, t), (a, s, b) in zip(found.tolist(), graph.valid.tolist(), strict=True):  # each has one
        assert r == s and (h == a) != (t == b)
        assert (r, t) in tails if h == a else (h, r) in heads
        changed_tails += t != b
    assert 0 < changed_tails < len(found)
    assert torch.equal(found, false_triples(graph.valid, graph, known, 0))
    assert not torch.equal(found, false_triples(graph.valid, graph, known, 1))


def test_a_model_classifies_by_the_mean_of_its_scores(made: distkgd.TrainedModel, graph: Graph, tmp_path: Path) -> None:
    false = torch.tensor([[1, 0, 2], [5, 1, 6], [7, 2, 8], [3, 3, 4]])
    classifier = made.classifier(negatives=write(tmp_path / "false.tsv", false, graph))
    names = [(made.entities.name(h), made.relations.name(r), made.entities.name(t)) for h, r, t in false.tolist()]
    assert torch.equal(classifier.slopes, made.classifier(negatives=names).slopes)
    found = made.classify([*names, ("nobody", "r000", "e001")], classifier=classifier)
    scores = (made.score(false, ids=True) + made.score(false, ask="head", ids=True)) / 2
    torch.testing.assert_close(found.scores[:4], scores)
    wanted = (classifier.slopes[false[:, 1]] * scores.double() + classifier.offsets[false[:, 1]]).sigmoid()
    torch.testing.assert_close(found.probabilities[:4], wanted)
    assert torch.equal(found.accepted[:4], found.scores[:4].double() >= found.thresholds[:4])
    assert list(found.errors) == [4] and not found.accepted[4] and found.probabilities[4].isnan()
    table = found.table()
    assert table["error"].is_not_null().to_list() == [False] * 4 + [True] and table["accepted"].to_list()[4] is False
    assert made.classify(false, ids=True).probabilities.isfinite().all()


def test_what_a_classifier_lacks_is_said(made: distkgd.TrainedModel, graph: Graph, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nobody"):
        made.classifier(negatives=[("nobody", "r000", "e001")])
    save_model(tmp_path / "model", toy_model(graph, "complex", 8), graph, {"source": str(tmp_path / "gone")})
    with pytest.raises(ConfigError, match="data set"):
        distkgd.load(tmp_path / "model").classify([("e001", "r000", "e002")])
