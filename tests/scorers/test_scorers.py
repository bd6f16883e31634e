"""Every scorer against its paper's formula, and against the contract all scorers share."""

import json
import math

import pytest
import torch
from torch import Tensor

from distkgd.errors import ConfigError, UnsupportedError
from distkgd.kernels.candidates import GatheredRows
from distkgd.scorers import SCORERS, Init, Scorer, build_scorer, from_constants
from tests.scorers import naive
from tests.scorers.naive import NAIVE, RELATION_SIZE

DIM = 8
# Every scorer at its defaults, and every value of an option that selects another formula.
CASES = [*((name, None) for name in SCORERS), ("transe", 2), ("rotate", 2)]
EVERY_CASE = pytest.mark.parametrize(("name", "norm"), CASES, ids=[f"{n}-{p or 'default'}" for n, p in CASES])
EVERY_SCORER = pytest.mark.parametrize("name", list(SCORERS))
INTERLEAVED = ["complex", "simple", "rotate", "cp", "rote", "refe", "roth", "refh", "atth"]
DISTANCES = ["transe", "rotate", "pairre"]


def rows(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def triples(
    scorer: Scorer, *shape: int, dtype: torch.dtype = torch.float64, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    h = rows(*shape, scorer.entity_size, seed=3 * seed, dtype=dtype)
    r = rows(*shape, scorer.relation_size, seed=3 * seed + 1, dtype=dtype)
    t = rows(*shape, scorer.entity_size, seed=3 * seed + 2, dtype=dtype)
    return h, r, t


def steepest(scorer: Scorer) -> float:
    """No gradient of a score of standard normal rows exceeds this; near its edge, hyperbolic space is steep."""
    return 1000 if scorer.candidate_form == "hyperbolic" else 100


# --- The formula ------------------------------------------------------------------------------------------


def test_every_scorer_has_a_naive_formula_and_a_documented_size() -> None:
    assert set(NAIVE) == set(SCORERS)
    assert set(RELATION_SIZE) == set(SCORERS)
    assert all(SCORERS[name].name == name for name in SCORERS)
    for name, scorer in SCORERS.items():
        if "norm" in scorer.options:
            assert (name, 2) in CASES, f"{name}: no test case with norm 2"


@EVERY_CASE
def test_the_score_is_the_formula_of_the_paper(name: str, norm: int | None) -> None:
    scorer = build_scorer(name, DIM, norm=norm)
    h, r, t = triples(scorer, 6)
    expected = [NAIVE[name](h[i].tolist(), r[i].tolist(), t[i].tolist(), scorer.margin, scorer.norm) for i in range(6)]
    torch.testing.assert_close(scorer.score(h, r, t), torch.tensor(expected, dtype=torch.float64))


@EVERY_SCORER
def test_a_relation_has_the_documented_number_of_reals(name: str) -> None:
    for dim in (2, 8, 50):
        assert build_scorer(name, dim).relation_size == RELATION_SIZE[name](dim)


@EVERY_CASE
def test_the_score_broadcasts_over_leading_dimensions(name: str, norm: int | None) -> None:
    scorer = build_scorer(name, DIM, norm=norm)
    h, r, t = triples(scorer, 3)
    grid = scorer.score(h[:, None, None], r[:, None], t)
    assert grid.shape == (3, 3, 3)
    torch.testing.assert_close(grid[2, 0, 1], scorer.score(h[2], r[0], t[1]))


@EVERY_CASE
def test_score_has_the_right_gradient(name: str, norm: int | None) -> None:
    scorer = build_scorer(name, DIM, norm=norm)
    inputs = tuple(x.requires_grad_() for x in triples(scorer, 2))
    assert torch.autograd.gradcheck(scorer.score, inputs)


# --- Meeting candidates -----------------------------------------------------------------------------------


@EVERY_CASE
def test_meet_is_the_score_in_both_directions(name: str, norm: int | None) -> None:
    scorer = build_scorer(name, DIM, norm=norm)
    h, r, t = triples(scorer, 5)
    candidates = rows(7, scorer.entity_size, seed=9)
    tails = scorer.tail_query(h, r)
    assert tails.shape == (5, scorer.query_size)
    for_tails = scorer.score(h[:, None], r[:, None], candidates)
    torch.testing.assert_close(scorer.score_candidates(tails, candidates), for_tails)
    if scorer.tails_only:
        with pytest.raises(UnsupportedError, match=f"{name} with reciprocal: false.*Set reciprocal: true"):
            scorer.head_query(t, r)
        return
    heads = scorer.head_query(t, r)
    assert heads.shape == (5, scorer.query_size)
    for_heads = scorer.score(candidates, r[:, None], t[:, None])
    torch.testing.assert_close(scorer.score_candidates(heads, candidates), for_heads)
    mixed = scorer.score_candidates(torch.cat([tails, heads]), candidates)
    torch.testing.assert_close(mixed, torch.cat([for_tails, for_heads]))


@EVERY_CASE
@pytest.mark.parametrize(
    ("queries", "candidates"),
    [
        pytest.param((3, 5), (3, 7), id="chunks-share-candidates"),
        pytest.param((6, 1), (6, 4), id="candidates-per-triple"),
        pytest.param((3, 5), (7,), id="chunks-against-all"),
        pytest.param((5,), (3, 7), id="queries-against-chunks"),
        pytest.param((2, 3, 5), (3, 7), id="two-leading-dimensions"),
        pytest.param((2, 3, 5), (2, 1, 7), id="broadcast-in-the-middle"),
        pytest.param((1, 5), (1, 7), id="one-chunk"),
        pytest.param((5,), (0,), id="no-candidates"),
        pytest.param((0,), (7,), id="no-queries"),
    ],
)
def test_meet_broadcasts_leading_dimensions(
    name: str, norm: int | None, queries: tuple[int, ...], candidates: tuple[int, ...]
) -> None:
    scorer = build_scorer(name, DIM, norm=norm)
    h, r, _ = (x.requires_grad_() for x in triples(scorer, *queries))
    c = rows(*candidates, scorer.entity_size, seed=9).requires_grad_()
    found = scorer.score_candidates(scorer.tail_query(h, r), c)
    expected = scorer.score(h.unsqueeze(-2), r.unsqueeze(-2), c.unsqueeze(-3))
    torch.testing.assert_close(found, expected)
    weights = rows(*expected.shape, seed=11)
    found_grads = torch.autograd.grad((found * weights).sum(), (h, r, c), materialize_grads=True)
    expected_grads = torch.autograd.grad((expected * weights).sum(), (h, r, c), materialize_grads=True)
    torch.testing.assert_close(found_grads, expected_grads)


@EVERY_CASE
def test_meet_has_the_right_gradient_and_second_derivative(name: str, norm: int | None) -> None:
    scorer = build_scorer(name, 4, norm=norm)
    q, c = rows(2, 2, scorer.query_size).requires_grad_(), rows(2, 3, scorer.entity_size, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(scorer.score_candidates, (q, c))
    assert torch.autograd.gradgradcheck(scorer.score_candidates, (q, c))


@EVERY_CASE
def test_meet_over_many_tiles_has_the_derivatives_of_the_score(
    name: str, norm: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distkgd.scorers.sums.tiles._kernels", lambda _: None)
    monkeypatch.setattr("distkgd.scorers.sums.tiles._CPU_TILE", 90)
    monkeypatch.setattr("distkgd.scorers.sums.tiles._TILE_QUERIES", 2)
    scorer = build_scorer(name, DIM, norm=norm)
    h, r, _ = (x.requires_grad_() for x in triples(scorer, 3, 5))
    c = rows(3, 7, scorer.entity_size, seed=9).requires_grad_()
    found = scorer.score_candidates(scorer.tail_query(h, r), c)
    expected = scorer.score(h[:, :, None], r[:, :, None], c[:, None])
    torch.testing.assert_close(found, expected)
    weights = rows(*expected.shape, seed=11)
    found_grads = torch.autograd.grad((found * weights).sum(), (h, r, c), create_graph=True)
    expected_grads = torch.autograd.grad((expected * weights).sum(), (h, r, c), create_graph=True)
    torch.testing.assert_close(found_grads, expected_grads)
    found_again, expected_again = (
        torch.autograd.grad(sum(grad.square().sum() for grad in grads), (h, r, c))
        for grads in (found_grads, expected_grads)
    )
    torch.testing.assert_close(found_again, expected_again)


@EVERY_CASE
def test_gradients_are_finite_where_query_and_candidate_coincide(name: str, norm: int | None) -> None:
    scorer = build_scorer(name, DIM, norm=norm)
    for dtype in (torch.float32, torch.float64):
        h = rows(2, scorer.entity_size, dtype=dtype).requires_grad_()
        # Phases 0, translations 0 and scales 1 make (h, r) meet h itself at distance 0.
        relation = torch.ones if name in ("pairre", "disth", "hybonet") else torch.zeros
        r = relation(2, scorer.relation_size, dtype=dtype)
        if name == "disth":
            r[:, 2::2] = 0.0
        r.requires_grad_()
        for values in (scorer.score(h, r, h), scorer.score_candidates(scorer.tail_query(h, r), h)):
            if scorer.candidate_form in ("squared", "hyperbolic") and name not in ("refe", "refh", "atth"):
                closest = values if values.dim() == 1 else values.diagonal()
                torch.testing.assert_close(closest, 2 * h[:, 0].detach() + 0.0 * closest, rtol=0, atol=1e-6)
            if name in DISTANCES:
                closest = values if values.dim() == 1 else values.diagonal()
                torch.testing.assert_close(closest, torch.full_like(closest, scorer.margin))
            for gradient in torch.autograd.grad(values.sum(), (h, r)):
                assert gradient.isfinite().all()
                assert gradient.abs().max() < steepest(scorer)


@EVERY_CASE
def test_a_row_of_zeros_has_finite_gradients(name: str, norm: int | None) -> None:
    scorer = build_scorer(name, DIM, norm=norm)
    empty = torch.zeros(2, scorer.entity_size).requires_grad_()
    other = rows(2, scorer.entity_size, seed=5, dtype=torch.float32).requires_grad_()
    r = rows(2, scorer.relation_size, dtype=torch.float32).requires_grad_()
    for h, t in ((empty, other), (other, empty), (empty, empty)):
        for values in (scorer.score(h, r, t), scorer.score_candidates(scorer.tail_query(h, r), t)):
            for gradient in torch.autograd.grad(values.sum(), (empty, r)):
                assert gradient.abs().max() < steepest(scorer)


@EVERY_CASE
def test_float32_scores_stay_near_float64(name: str, norm: int | None) -> None:
    scorer = build_scorer(name, 64, norm=norm)
    q, c = rows(6, scorer.query_size, dtype=torch.float32), rows(9, scorer.entity_size, seed=1, dtype=torch.float32)
    c[:6] = q[:, : scorer.entity_size] + 1e-4 * c[:6]
    if scorer.candidate_form == "hyperbolic":  # between bias and coordinates of a query stands its curvature
        c[:6, 1:] += q[:, 2:] - q[:, 1:-1]
    exact = scorer.score_candidates(q.double(), c.double())
    found = scorer.score_candidates(q, c)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)


def test_transe_l2_keeps_small_distances_in_float32() -> None:
    scorer = build_scorer("transe", 64, margin=0.0, norm=2)
    q = 10 * rows(5, 64, dtype=torch.float32)
    c = q + 1e-3 * rows(5, 64, seed=1, dtype=torch.float32)
    exact = torch.linalg.vector_norm(q.double() - c.double(), dim=-1)
    found = -scorer.score_candidates(q, c).diagonal().double()
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=0)
    assert scorer.score_candidates(q, q).diagonal().abs().max() < 1e-5


@EVERY_CASE
def test_bfloat16_rows_give_bfloat16_scores(name: str, norm: int | None) -> None:
    scorer = build_scorer(name, 16, norm=norm)
    q, c = (
        rows(n, size, seed=n, dtype=torch.bfloat16) for n, size in ((3, scorer.query_size), (5, scorer.entity_size))
    )
    q.requires_grad_()
    found = scorer.score_candidates(q, c)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), scorer.score_candidates(q.float(), c.float()), rtol=3e-2, atol=1e-1)
    found.sum().backward()
    assert q.grad is not None and q.grad.isfinite().all()
    h, r, t = triples(scorer, 3, dtype=torch.bfloat16)
    assert scorer.score(h, r, t).dtype == torch.bfloat16


@EVERY_CASE
def test_meet_and_its_gradient_repeat_bit_for_bit(name: str, norm: int | None) -> None:
    scorer = build_scorer(name, 32, norm=norm)
    results = []
    for _ in range(2):
        q = rows(40, scorer.query_size, dtype=torch.float32).requires_grad_()
        c = rows(700, scorer.entity_size, seed=1, dtype=torch.float32).requires_grad_()
        scores = scorer.score_candidates(q, c)
        results.append((scores, *torch.autograd.grad(scores.square().sum(), (q, c))))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@EVERY_CASE
def test_meet_leaves_its_arguments_alone(name: str, norm: int | None) -> None:
    scorer = build_scorer(name, DIM, norm=norm)
    q, c = rows(3, scorer.query_size), rows(4, scorer.entity_size, seed=1)
    before = q.clone(), c.clone()
    scorer.score_candidates(q, c)
    assert torch.equal(q, before[0]) and torch.equal(c, before[1])


# --- Crops ------------------------------------------------------------------------------------------------


@EVERY_CASE
def test_a_crop_scores_as_the_small_scorer_does(name: str, norm: int | None) -> None:
    big = build_scorer(name, DIM, norm=norm)
    h, r, t = triples(big, 5)
    for dim in (2, 4, 6, DIM):
        small = build_scorer(name, dim, norm=norm)
        columns = big.crop_columns(dim)
        assert columns.dtype == torch.int64 and columns.shape == (small.relation_size,)
        size = small.entity_size
        found = small.score(h[:, :size], r[:, columns], t[:, :size])
        expected = [
            NAIVE[name](a[:size], [b[int(k)] for k in columns], c[:size], small.margin, small.norm)
            for a, b, c in zip(h.tolist(), r.tolist(), t.tolist(), strict=True)
        ]
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))
        assert big.crop(dim).constants() == small.constants()


@EVERY_SCORER
def test_a_crop_is_the_big_model_with_the_other_columns_silenced(name: str) -> None:
    big, dim = build_scorer(name, DIM), 4
    h, r, t = triples(big, 5)
    kept = torch.zeros(big.relation_size, dtype=torch.float64)
    kept[big.crop_columns(dim)] = 1
    small = big.crop(dim)
    size = small.entity_size
    silent = torch.arange(big.entity_size) >= size
    found = big.score(h.masked_fill(silent, 0), r * kept, t.masked_fill(silent, 0))
    torch.testing.assert_close(found, small.score(h[:, :size], r[:, big.crop_columns(dim)], t[:, :size]))


@pytest.mark.parametrize("of_heads", [False, True])
@pytest.mark.parametrize("name", ["rescal", "complex"])
def test_queries_of_listed_relations_are_those_of_their_copies(name: str, of_heads: bool) -> None:
    scorer = build_scorer(name, 4)
    generator = torch.Generator().manual_seed(6)
    rows = torch.randn(7, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    table = torch.randn(5, scorer.relation_size, generator=generator, dtype=torch.float64, requires_grad=True)
    index = torch.tensor([3, 0, 3, 1, 4, 3, 0])  # 2 is asked by nobody
    copied = (scorer.head_query if of_heads else scorer.tail_query)(rows, table[index])
    found = scorer.listed_query(rows, GatheredRows(table, index), of_heads=of_heads)
    torch.testing.assert_close(found, copied)
    for one, other in zip(*(torch.autograd.grad(x.sin().sum(), (rows, table)) for x in (found, copied)), strict=True):
        torch.testing.assert_close(one, other)
    nothing = scorer.listed_query(rows[:0], GatheredRows(table, index[:0]), of_heads=of_heads)
    assert nothing.shape == (0, 4)


def test_rescal_crops_to_the_top_left_corner() -> None:
    assert build_scorer("rescal", 4).crop_columns(2).tolist() == [0, 1, 4, 5]


@EVERY_SCORER
def test_a_crop_larger_than_the_model_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"crop to dim={DIM + 2}; allowed is at most {DIM}"):
        build_scorer(name, DIM).crop_columns(DIM + 2)


# --- Building, options, constants -------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCORERS)
def test_a_turned_relation_asks_tail_queries_for_heads(name: str) -> None:
    scorer = build_scorer(name, 8)
    side = torch.tensor([0, 1, 1, 0, 1])
    anchor = torch.randn(5, scorer.entity_size, dtype=torch.float64)
    relation = torch.randn(5, scorer.relation_size, dtype=torch.float64)
    if (turned := scorer.turned(relation, side)) is not None:
        asked = torch.where(
            (side == 1)[:, None], scorer.head_query(anchor, relation), scorer.tail_query(anchor, relation)
        )
        torch.testing.assert_close(scorer.tail_query(anchor, turned), asked)
    assert (turned is not None) == (name in ("complex", "distmult", "rotate", "transe"))


@EVERY_CASE
def test_constants_survive_json(name: str, norm: int | None) -> None:
    scorer = build_scorer(name, DIM, norm=norm)
    if "margin" in scorer.options:
        scorer = build_scorer(name, DIM, margin=3.5, norm=norm)
    again = from_constants(json.loads(json.dumps(scorer.constants())))
    assert type(again) is type(scorer)
    assert again.constants() == scorer.constants()
    h, r, t = triples(scorer, 4)
    assert torch.equal(again.score(h, r, t), scorer.score(h, r, t))


def test_constants_hold_exactly_what_the_formula_needs() -> None:
    transe = build_scorer("transe", 64, margin=9.0)
    assert transe.constants() == {"name": "transe", "dim": 64, "norm": 1, "margin": 9.0}
    assert build_scorer("cp", 64).constants() == {"name": "cp", "dim": 64}


@pytest.mark.parametrize(
    "constants",
    [
        {"name": "rotate", "dim": 8},
        {"name": "distmult", "dim": 8, "margin": 0.0},
        {"name": "distmult", "dim": 8, "bias": True},
    ],
)
def test_constants_with_missing_or_unknown_keys_are_refused(constants: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="needed are exactly"):
        from_constants(constants)


def test_a_rotate_written_before_it_had_a_norm_is_read() -> None:
    assert from_constants({"name": "rotate", "dim": 8, "margin": 9.0}).norm == 1
    assert build_scorer("rotate", 8, norm=2).constants() == {"name": "rotate", "dim": 8, "margin": 9.0, "norm": 2}


def test_constants_of_an_unknown_scorer_are_refused() -> None:
    with pytest.raises(ConfigError, match="'tucker'; known are atth, complex, cp"):
        from_constants({"name": "tucker", "dim": 8})


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        (name, option, {"margin": 2.5, "norm": 2}[option])
        for name in SCORERS
        for option in sorted(SCORERS[name].options)
    ],
)
def test_every_option_changes_the_score(name: str, option: str, value: float) -> None:
    default = build_scorer(name, DIM)
    changed = build_scorer(name, DIM, **{option: value})  # type: ignore[arg-type]
    h, r, t = triples(default, 4)
    q = default.tail_query(h, r)
    assert not torch.allclose(default.score(h, r, t), changed.score(h, r, t))
    assert not torch.allclose(default.score_candidates(q, t), changed.score_candidates(q, t))


@pytest.mark.parametrize(
    ("name", "option"),
    [(name, option) for name in SCORERS for option in ("margin", "norm") if option not in SCORERS[name].options],
)
def test_an_option_the_formula_lacks_is_refused(name: str, option: str) -> None:
    message = f"{name}: {option}=.* was given, but its formula has no {option}"
    with pytest.raises(ConfigError, match=message):
        SCORERS[name](DIM, **{option: 2})  # type: ignore[arg-type]
    # At the door a value that would change nothing is refused too.
    with pytest.raises(ConfigError, match=message):
        build_scorer(name, DIM, **{option: {"margin": 0.0, "norm": 1}[option]})  # type: ignore[arg-type]


def test_margins_and_norms_outside_their_range_are_refused() -> None:
    for margin in (-1.0, math.inf, math.nan):
        with pytest.raises(ConfigError, match="allowed is any finite number >= 0"):
            build_scorer("transe", DIM, margin=margin)
    with pytest.raises(ConfigError, match="norm=3; allowed are 1 and 2"):
        build_scorer("transe", DIM, norm=3)


def test_an_unknown_scorer_is_refused_with_the_known_names() -> None:
    with pytest.raises(ConfigError, match="there is no scorer 'tucker'; there are") as raised:
        build_scorer("tucker", DIM)
    assert all(name in str(raised.value) for name in SCORERS)


@EVERY_SCORER
def test_a_dim_below_one_is_refused(name: str) -> None:
    for dim in (0, -2, 2.0, True):
        with pytest.raises(ConfigError, match=f"{name}: dim={dim}; allowed is a whole number >= 1"):
            build_scorer(name, dim)  # type: ignore[arg-type]


@EVERY_SCORER
def test_an_odd_dim_is_refused_where_coordinates_come_in_pairs(name: str) -> None:
    if name not in INTERLEAVED:
        assert build_scorer(name, 3).dim == 3
        assert build_scorer(name, DIM).crop(3).dim == 3
        return
    with pytest.raises(UnsupportedError, match=r"dim=3; allowed are multiples of 2.*Use 4 instead"):
        build_scorer(name, 3)
    with pytest.raises(UnsupportedError, match="crop to dim=3; allowed are multiples of 2"):
        build_scorer(name, DIM).crop_columns(3)


@EVERY_SCORER
def test_the_default_margin_belongs_to_distance_scorers(name: str) -> None:
    scorer = build_scorer(name, DIM)
    assert (scorer.margin > 0) == (name in (*DISTANCES, "hybonet")) == ("margin" in scorer.options)


@EVERY_CASE
def test_starting_values_are_sane(name: str, norm: int | None) -> None:
    scorer = build_scorer(name, 64, norm=norm)
    generator = torch.Generator().manual_seed(0)

    def draw(init: Init, *shape: int) -> Tensor:
        scale = init.scale * torch.tensor(init.columns or (1.0,) * shape[-1])
        if init.kind == "normal":
            return scale * torch.randn(*shape, generator=generator)
        return scale * (2 * torch.rand(*shape, generator=generator) - 1)

    h, t = (draw(scorer.entity_init(), 200, scorer.entity_size) for _ in range(2))
    scores = scorer.score(h, draw(scorer.relation_init(), 200, scorer.relation_size), t)
    assert scores.std() > 1e-3, "all triples start with the same score"
    assert scores.mean().abs() < 12, "the sigmoid of a starting score is saturated"


@EVERY_CASE
def test_the_candidate_form_says_how_meet_computes(name: str, norm: int | None) -> None:
    scorer = build_scorer(name, DIM, norm=norm)
    q, c = rows(3, scorer.query_size), rows(4, scorer.entity_size, seed=1)
    if scorer.candidate_form == "dot":
        torch.testing.assert_close(scorer.score_candidates(q, c), q @ c.mT)
    elif scorer.candidate_form == "l2":
        distance = torch.linalg.vector_norm(q[:, None] - c, dim=-1)
        torch.testing.assert_close(scorer.score_candidates(q, c), scorer.margin - distance)
    elif scorer.candidate_form == "squared":
        apart = (q[:, None, 1:] - c[:, 1:]).square().sum(-1)
        torch.testing.assert_close(scorer.score_candidates(q, c), q[:, :1] + c[:, 0] - apart)
    elif scorer.candidate_form == "hyperbolic":
        expected = [[naive.less_square(a, b) for b in c.tolist()] for a in q.tolist()]
        torch.testing.assert_close(scorer.score_candidates(q, c), torch.tensor(expected, dtype=torch.float64))
    elif scorer.candidate_form == "lorentz":
        inner = (q[:, None, 2:] * c[:, 1:]).sum(-1) - q[:, 1:2] * (1 + c[:, 1:].square().sum(1)).sqrt()
        torch.testing.assert_close(scorer.score_candidates(q, c), scorer.margin + q[:, :1] + c[:, 0] + 2 * inner)
    else:
        # A sum over coordinates: the shares of two complementary sets of coordinates add up.
        assert scorer.candidate_form == "coordinates"
        kept = (torch.arange(DIM) < 4).double()
        # PairRE's query scales its candidates, so silencing the query is enough (and keeps their length).
        repeats = scorer.query_size // DIM
        shares = [
            scorer.margin - scorer.score_candidates(q * part.repeat(repeats), c if repeats > 1 else c * part)
            for part in (kept, 1 - kept)
        ]
        torch.testing.assert_close(scorer.score_candidates(q, c), scorer.margin - sum(shares))


# --- Relations as candidates, and columns that go -----------------------------------------------------------


@EVERY_CASE
def test_a_relation_meets_what_head_and_tail_make_of_it(name: str, norm: int | None) -> None:
    scorer = build_scorer(name, DIM, norm=norm)
    h, r, t = triples(scorer, 5)
    if scorer.candidate_form != "dot":
        with pytest.raises(UnsupportedError, match=f"{name}: .*relations cannot be predicted"):
            scorer.relation_query(h, t)
        return
    torch.testing.assert_close((scorer.relation_query(h, t) * r).sum(-1), scorer.score(h, r, t))


@EVERY_CASE
def test_columns_that_are_0_everywhere_might_as_well_not_be_there(name: str, norm: int | None) -> None:
    scorer = build_scorer(name, DIM, norm=norm)
    h, r, t = triples(scorer, 5)
    kept = torch.tensor([0, 1, 0, 1], dtype=torch.bool).repeat_interleave(2)
    if scorer.biases:
        with pytest.raises(UnsupportedError, match="whole columns of a model with biases cannot go"):
            scorer.relation_columns(kept)
        return
    columns = scorer.relation_columns(kept)
    small = scorer.crop(4)
    assert columns.shape == (scorer.relation_size,) and int(columns.sum()) == small.relation_size
    torch.testing.assert_close(
        small.score(h[:, kept], r[:, columns], t[:, kept]), scorer.score(h * kept, r * columns, t * kept)
    )
