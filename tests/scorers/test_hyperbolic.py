"""Hyperbolic scorers and biases: what the tests of every scorer do not reach."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from distkgd.distributed.ranks import Ranks
from distkgd.errors import UnsupportedError
from distkgd.kernels.candidates import GatheredRows, plain
from distkgd.methods.losses.scores import regulariser
from distkgd.methods.losses.structure import structure
from distkgd.models.model import Model, new_model
from distkgd.models.view import View
from distkgd.scorers import SCORERS, build_scorer
from distkgd.scorers.hyperbolic.poincare import EDGE, curvature, squared_distances, translated
from tests.jobs import toy_inputs, toy_model
from tests.methods.test_losses import whole_inputs
from tests.scorers.naive import NAIVE, distance, exp_0, mobius_add, project
from tests.scorers.test_scorers import rows, triples
from tests.toys import toy_graph

GRAPH = toy_graph(entities=19, relations=3, triples=200)
HYPERBOLIC = [name for name, scorer in SCORERS.items() if scorer.tails_only]
IN_THE_BALL = [name for name, scorer in SCORERS.items() if scorer.candidate_form == "hyperbolic"]
BIASED = [name for name, scorer in SCORERS.items() if scorer.biases]


def some(name: str, *shape: int, size: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    h, r, t = triples(build_scorer(name, 8), *shape, dtype=dtype)
    for entity in (h, t):
        entity[..., 1:] *= size
    return h, r, t


@pytest.mark.parametrize("queries", [1, 3, 5])
@pytest.mark.parametrize("name", BIASED)
def test_listed_candidates_score_as_their_copies_do(name: str, queries: int) -> None:
    scorer, index = build_scorer(name, 8), torch.tensor([[0, 3, 3, 1], [4, 2, 0, 0]])
    h, r, _ = triples(scorer, 2, queries, dtype=torch.float64)
    table = rows(5, scorer.entity_size, seed=3)
    found = []
    for copied in (False, True):
        q, c = scorer.tail_query(h, r).detach().requires_grad_(), table.clone().requires_grad_()
        listed = GatheredRows(c, index)
        scores = scorer.score_candidates(q, plain(listed) if copied else listed)
        first = torch.autograd.grad(scores.sin().sum(), (q, c), create_graph=True)
        second = torch.autograd.grad(first[0].square().sum() + first[1].square().sum(), (q, c))
        found.append([scores, *first, *second])
    for one, other in zip(*found, strict=True):
        assert one.any()
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-9)


# --- The ball ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1e-9, 1e-3, 0.3, 1.0])
@pytest.mark.parametrize("c", [0.01, 1.0, 3.0])
def test_a_translation_between_tangent_vectors_is_mobius_addition_in_the_ball(size: float, c: float) -> None:
    u, v = size * rows(5, 4), size * rows(5, 4, seed=1)
    curved = torch.full((5, 1), c, dtype=torch.float64)
    found = translated(u, v, curved)
    for end, a, b in zip(found.tolist(), u.tolist(), v.tolist(), strict=True):
        assert exp_0(end, c) == pytest.approx(project(mobius_add(exp_0(a, c), exp_0(b, c), c), c), rel=1e-7, abs=1e-30)


def test_translations_are_undone_by_their_opposite_and_end_at_the_edge() -> None:
    c = torch.tensor([0.7], dtype=torch.float64)
    u, v = rows(4, 6), rows(4, 6, seed=1)
    # (-v) (+) (v (+) u) = u; here additions are on the right: ((-u) (+) ...) needs u first.
    back = translated(-u, translated(u, v, c), c)
    torch.testing.assert_close(back, v, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(translated(u, torch.zeros_like(u), c), u)
    torch.testing.assert_close(translated(torch.zeros_like(u), u, c), u)
    far = translated(1e6 * u, 1e6 * v, c)
    assert (c.sqrt() * far.norm(dim=-1)).tanh().max() <= 1.0 - EDGE + 1e-12


@pytest.mark.parametrize("size", [1e-6, 0.1, 1.0])
@pytest.mark.parametrize("c", [0.01, 1.0, 3.0])
def test_distances_by_a_product_are_those_of_mobius_addition(size: float, c: float) -> None:
    u, v = size * rows(3, 4), size * rows(5, 4, seed=1)
    found = squared_distances(u, v, torch.full((3, 1), c, dtype=torch.float64))
    expected = [[distance(exp_0(a, c), exp_0(b, c), c) ** 2 for b in v.tolist()] for a in u.tolist()]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=4e-15 / c)


def test_a_point_is_twice_its_tangent_vector_from_the_centre() -> None:
    v, c = 0.5 * rows(5, 4), curvature(rows(3, 1, seed=1))
    found = squared_distances(torch.zeros(3, 4, dtype=torch.float64), v, c)
    torch.testing.assert_close(found, (4.0 * v.square().sum(-1)).expand(3, 5))


@pytest.mark.parametrize(("curved", "flat"), [("roth", "rote"), ("refh", "refe")])
def test_without_curvature_the_hyperbolic_model_is_the_euclidean_one_at_twice_the_distance(
    curved: str, flat: str
) -> None:
    h, r, t = some(curved, 6, size=1.0, dtype=torch.float64)
    r[:, 0] = -100.0
    for entity in (h, t):
        entity[:, 0] = 0.0
    found = build_scorer(curved, 8).score(h, r, t)
    torch.testing.assert_close(found, 4.0 * build_scorer(flat, 8).score(h, r[:, 1:], t), rtol=1e-4, atol=0.0)


# --- Numerical safety -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BIASED)
@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-12, 1e-4, 1.0, 5.0, 7.0, 1e2, 1e6, 1e15])
def test_scores_and_gradients_are_finite_for_rows_of_every_size(name: str, size: float) -> None:
    scorer = build_scorer(name, 8)
    for raw in (-1e4, -20.0, 0.0, 20.0):
        h, r, t = (x.requires_grad_() for x in some(name, 3, size=size, dtype=torch.float32))
        with torch.no_grad():
            if scorer.tails_only:
                r[:, 0] = raw
        for other in (t, h):
            for values in (scorer.score(h, r, other), scorer.score_candidates(scorer.tail_query(h, r), other)):
                found = torch.autograd.grad(values.sum(), (h, r, t), allow_unused=True, materialize_grads=True)
                assert values.isfinite().all()
                assert all(gradient.isfinite().all() for gradient in found)


@pytest.mark.parametrize("name", HYPERBOLIC)
@pytest.mark.parametrize("size", [1e-4, 1.0, 4.0, 1e3])
def test_float32_scores_are_those_of_float64_up_to_the_edge(name: str, size: float) -> None:
    scorer = build_scorer(name, 8)
    h, r, t = some(name, 20, size=size, dtype=torch.float32)
    exact = scorer.score(h.double(), r.double(), t.double())
    torch.testing.assert_close(scorer.score(h, r, t).double(), exact, rtol=1e-4, atol=1e-5)
    met = scorer.score_candidates(scorer.tail_query(h, r), t).diagonal().double()
    torch.testing.assert_close(met, exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", IN_THE_BALL)
def test_beyond_the_edge_an_entity_scores_as_at_the_edge_and_is_not_pushed_outwards(name: str) -> None:
    scorer = build_scorer(name, 8)
    h, r, t = some(name, 4, size=1.0, dtype=torch.float64)
    outside = torch.cat([t[:, :1], 1e3 * t[:, 1:]], dim=1).requires_grad_()
    further = torch.cat([t[:, :1], 1e5 * t[:, 1:]], dim=1)
    scores = scorer.score(h, r, outside)
    torch.testing.assert_close(scores, scorer.score(h, r, further))
    (gradient,) = torch.autograd.grad(scores.sum(), outside)
    outwards = (gradient[:, 1:] * outside.detach()[:, 1:]).sum(-1)
    torch.testing.assert_close(outwards, torch.zeros_like(outwards), rtol=0.0, atol=1e-6)


@pytest.mark.parametrize("name", HYPERBOLIC)
def test_the_gradient_at_a_row_of_zeros_is_the_slope(name: str) -> None:
    scorer = build_scorer(name, 4)
    h, r, t = (0.3 * x for x in triples(scorer, 1))
    for zero in (h, t):
        zero[:, 1:] = 0.0
        zero.requires_grad_()
        (found,) = torch.autograd.grad(scorer.score(h, r, t).sum(), zero)
        for k in range(scorer.entity_size):
            step = torch.zeros_like(zero)
            step[:, k] = 1e-5
            points = [[h + step, t], [h - step, t]] if zero is h else [[h, t + step], [h, t - step]]
            up, down = (NAIVE[name](a[0].tolist(), r[0].tolist(), b[0].tolist(), 0.0, 1) for a, b in points)
            assert found[0, k].item() == pytest.approx((up - down) / 2e-5, rel=1e-5, abs=1e-7)
        zero.requires_grad_(False)


class _Largest(TorchDispatchMode):
    numbers = 0

    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.numbers = max([self.numbers, *(x.numel() for x in tree_leaves(out) if isinstance(x, Tensor))])
        return out


@pytest.mark.parametrize("name", BIASED)
def test_meeting_candidates_makes_no_tensor_of_queries_times_candidates_times_coordinates(name: str) -> None:
    scorer = build_scorer(name, 16)
    q, c = rows(40, scorer.query_size).requires_grad_(), rows(50, scorer.entity_size).requires_grad_()
    with _Largest() as largest:
        scorer.score_candidates(q, c).sum().backward()
    assert 40 * 50 <= largest.numbers <= 2 * 40 * 50


# --- Biases and inverse relations -------------------------------------------------------------------------


@pytest.mark.parametrize("name", BIASED)
def test_biases_are_added_to_the_score_and_survive_a_crop(name: str) -> None:
    scorer = build_scorer(name, 8)
    h, r, t = triples(scorer, 5)
    small = scorer.crop(4)
    assert (scorer.biases, scorer.entity_size, small.entity_size) == (1, 9, 5)
    for model, columns in ((scorer, torch.arange(scorer.relation_size)), (small, scorer.crop_columns(4))):
        a, b, relation = h[:, : model.entity_size], t[:, : model.entity_size], r[:, columns]
        raised = (torch.cat([x[:, :1] + step, x[:, 1:]], 1) for x, step in ((a, 2.0), (b, 0.5)))
        torch.testing.assert_close(model.score(next(raised), relation, next(raised)), model.score(a, relation, b) + 2.5)
    assert torch.equal(scorer.coordinates(h), h[:, 1:])


@pytest.mark.parametrize("name", BIASED)
def test_a_fresh_model_has_no_bias_no_preference_of_curvature_and_all_angles(name: str) -> None:
    scorer = build_scorer(name, 6)
    model = new_model(scorer, 300, 200, Ranks(), reciprocal=True, seed=1, init_scale=0.3)
    assert model.entity.weight.shape == (300, 7) and model.num_parameters == 300 * 7 + 400 * scorer.relation_size
    assert (model.entity.weight[:, 0] == 0).all()
    assert model.entity.weight[:, 1:].std().item() == pytest.approx(0.3, rel=0.1)
    half_widths = model.relation.abs().amax(0).tolist()
    expected = scorer.relation_init()
    assert half_widths == pytest.approx([expected.scale * factor for factor in expected.columns], rel=0.05)
    assert name not in IN_THE_BALL or half_widths[0] == 0


@pytest.mark.parametrize("name", HYPERBOLIC)
def test_a_model_without_inverse_relations_is_refused(name: str) -> None:
    with pytest.raises(UnsupportedError, match=f"{name} with reciprocal: false.*Set reciprocal: true"):
        new_model(build_scorer(name, 4), 5, 2, Ranks(), reciprocal=False, seed=0)


def biased_model(biases: float) -> Model:
    model = toy_model(GRAPH, "roth", 4)
    model.entity.weight[:, 0] = biases
    return model


def test_biases_are_neither_dropped_nor_penalised() -> None:
    inputs = whole_inputs(toy_inputs(GRAPH, kind="batch"))
    for biases in (0.0, 3.0):
        model = biased_model(biases)
        model.entity.weight[:, 1:] = 0.0
        model.relation.detach()[:] = 0.0
        view = View(model, inputs, grad=False, dropout=0.7)
        torch.testing.assert_close(view.positive, torch.full_like(view.positive, 2 * biases))
        for name in ("n2", "n3"):
            assert regulariser(name, view, 1.0, None).abs().max() == 0
    model = biased_model(1.0)
    kept, dropped = (View(model, inputs, grad=False, dropout=rate).positive for rate in (0.0, 0.7))
    assert not torch.allclose(kept, dropped)


def test_the_structure_of_dualde_is_that_of_the_coordinates() -> None:
    inputs = whole_inputs(toy_inputs(GRAPH, kind="all"))
    view = View(biased_model(50.0), inputs, grad=False)
    heads = inputs.batch.queries.side == 1
    anchor, everyone = view.anchor[:, 1:], view.model.entity.weight[:, 1:]
    cosines = anchor @ everyone.T / anchor.norm(dim=1, keepdim=True) / everyone.norm(dim=1)
    ratios = anchor.norm(dim=1, keepdim=True) / everyone.norm(dim=1)
    ratios = torch.where(heads.unsqueeze(1), 1.0 / ratios, ratios)
    shapes, fields = structure(view, torch.where(heads, -1.0, 1.0).to(anchor.dtype))
    for positive, field, expected in zip(shapes, fields, (cosines, ratios.log()), strict=True):
        torch.testing.assert_close(field.score_candidates(field.queries, field.rows), expected)
        own = expected.gather(1, inputs.batch.queries.answer.unsqueeze(1)).squeeze(1)
        torch.testing.assert_close(positive, own)
