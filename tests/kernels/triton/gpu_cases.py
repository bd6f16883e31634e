"""Checks of the Triton kernels against naive formulas in float64, for any device: tests run them under Triton's
interpreter, `benchmarks/gpu.py` on a GPU. Each raises AssertionError.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from distkgd.common import random as cpu_random
from distkgd.distributed.optim import rows as optim
from distkgd.distributed.reductions.candidate_layout import MASKED_SCORE
from distkgd.kernels.pairs import Kind
from distkgd.kernels.triton import distances as gpu_distances
from distkgd.kernels.triton import draws, dualde, scores
from distkgd.kernels.triton import rows as gpu_rows

HALVES = (torch.bfloat16, torch.float16)
SUMS = {torch.float64: 1e-12, torch.float32: 2e-5} | dict.fromkeys(HALVES, 2e-5)  # halves are summed in float32
ROUNDED = {
    torch.float64: 1e-12,
    torch.float32: 5e-5,
    torch.bfloat16: 1e-2,
    torch.float16: 2e-3,
}  # what comes back in the inputs' dtype
# (groups, queries, candidates, dim, rows, indexed): no size fills its blocks; rows < candidates repeats indices.
SHAPES = {
    "one query per group": (5, 1, 7, 10, 4, True),
    "few queries per group": (2, 5, 19, 34, 11, True),
    "gradients laid out": (2, 9, 19, 34, 11, True),
    "more groups than rows": (9, 1, 2, 6, 3, True),
    "rows in order": (3, 5, 9, 34, 27, False),
    "one shared list": (1, 18, 37, 6, 37, False),
    "long sums cut": (1, 3, 100, 4, 100, False),
    "wider than a block": (2, 1, 3, 300, 5, True),
}


@contextmanager
def programs(number: int) -> Iterator[None]:
    """How many programs long sums are spread over: one walks over all blocks, many have a block each."""
    kept, gpu_distances.PROGRAMS = gpu_distances.PROGRAMS, number
    try:
        yield
    finally:
        gpu_distances.PROGRAMS = kept


def close(found: Tensor, wanted: Tensor, tolerance: float) -> None:
    """Equal up to `tolerance` of the largest number."""
    assert found.shape == wanted.shape, (found.shape, wanted.shape)
    assert bool(found.isfinite().all())
    if wanted.numel():
        error = float((found.double() - wanted.double()).abs().max())
        assert error <= tolerance * max(1.0, float(wanted.abs().max())), f"off by {error}"


def random(*shape: int, dtype: torch.dtype, device: str, seed: int) -> Tensor:
    """Normal numbers, leaves that take a gradient."""
    made = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return made.to(device, dtype).requires_grad_()


def naive_distances(kind: Kind, q: Tensor, table: Tensor, index: Tensor | None) -> Tensor:
    """The formula with all its [G, Q, N, k] differences."""
    dim = table.shape[1]
    c = (table.reshape(len(q), -1, dim) if index is None else table[index]).unsqueeze(1)
    q = q.unsqueeze(2)
    if kind == "dot":
        return (q * c).sum(-1)
    if kind == "square":
        return (q - c).square().sum(-1)
    if kind == "manhattan":
        return (q - c).abs().sum(-1)
    if kind == "scaled_manhattan":
        return (q[..., :dim] - q[..., dim:] * c).abs().sum(-1)
    moduli: Tensor = torch.linalg.vector_norm((q - c).unflatten(-1, (-1, 2)), dim=-1)
    return moduli.sum(-1)


def both_ways(
    kind: Kind, q: Tensor, table: Tensor, index: Tensor | None = None, grad: Tensor | None = None
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Sums, and the gradients of queries and table for `grad`, or for that of their sum."""
    q, table = q.detach(), table.detach()
    candidates = len(table) // max(1, len(q)) if index is None else index.shape[1]
    found = gpu_distances.forward(kind, q, table, index, candidates)
    return found, gpu_distances.backward(kind, q, table, index, torch.ones_like(found) if grad is None else grad)


def distances_are_the_naive_sums(kind: Kind, shape: str, dtype: torch.dtype, device: str) -> None:
    groups, queries, candidates, dim, rows, indexed = SHAPES[shape]
    q = random(groups, queries, dim * (2 if kind == "scaled_manhattan" else 1), dtype=dtype, device=device, seed=1)
    table = random(rows, dim, dtype=dtype, device=device, seed=2)
    index = torch.randint(rows, (groups, candidates), generator=torch.Generator().manual_seed(3)).to(device)
    chosen = index if indexed else None
    with torch.no_grad():  # one pair at distance 0
        q[0, 0, :dim] = table[index[0, 0] if indexed else 0]
        q[0, 0, dim:] = 1.0
    grad = torch.randn(groups, queries, candidates, generator=torch.Generator().manual_seed(4))
    grad = grad.to(device, torch.promote_types(dtype, torch.float32))
    with programs(512 if shape == "long sums cut" else 1):
        found, got = both_ways(kind, q, table, chosen, grad)
        _, again = both_ways(kind, q, table, chosen, grad)
    wide = [x.detach().double().requires_grad_() for x in (q, table)]
    wanted = naive_distances(kind, wide[0], wide[1], chosen)
    close(found, wanted, SUMS[dtype])
    expected = torch.autograd.grad(wanted, wide, grad.double())
    for one, other in zip(got, expected, strict=True):
        assert one.dtype == dtype
        close(one, other, ROUNDED[dtype])
    assert all(torch.equal(one, other) for one, other in zip(got, again, strict=True)), "two runs, two results"


def distances_take_narrow_rows(kind: Kind, device: str) -> None:
    """bfloat16 rows meet float32 queries without being widened first."""
    q = random(2, 3, 8 * (2 if kind == "scaled_manhattan" else 1), dtype=torch.float32, device=device, seed=1)
    table = random(6, 8, dtype=torch.bfloat16, device=device, seed=2)
    found, got = both_ways(kind, q, table)
    wanted = naive_distances(kind, q.double(), table.double(), None)
    close(found, wanted, SUMS[torch.float32])
    expected = torch.autograd.grad(wanted.sum(), (q, table))
    assert got[0].dtype == torch.float32
    assert got[1].dtype == torch.bfloat16
    close(got[0], expected[0], ROUNDED[torch.float32])
    close(got[1], expected[1], ROUNDED[torch.bfloat16])


def equal_rows_have_gradient_zero(kind: Kind, device: str) -> None:
    row = random(1, 6, dtype=torch.float32, device=device, seed=1).detach()
    query = torch.cat((row, torch.ones_like(row)), 1) if kind == "scaled_manhattan" else row
    index = torch.tensor([[0, 1, 1], [3, 3, 3]], device=device)
    found, gradients = both_ways(kind, query.expand(2, 3, -1), row.expand(4, -1), index)
    assert bool((found == 0).all())
    assert all(bool((grad == 0).all()) for grad in gradients)


def empty_groups_give_empty_sums(kind: Kind, device: str) -> None:
    wide = 2 if kind == "scaled_manhattan" else 1
    for groups, queries, candidates in ((0, 2, 3), (2, 0, 3), (2, 3, 0)):
        q = random(groups, queries, 4 * wide, dtype=torch.float32, device=device, seed=1)
        table = random(5, 4, dtype=torch.float32, device=device, seed=2)
        index = torch.zeros(groups, candidates, dtype=torch.int64, device=device)
        found, gradients = both_ways(kind, q, table, index)
        assert found.shape == (groups, queries, candidates)
        for grad, x in zip(gradients, (q, table), strict=True):
            assert grad.shape == x.shape
            assert bool((grad == 0).all())


# -- rows -----------------------------------------------------------------------------------------------------------


def rows_are_added_up(num: int, few: int, device: str) -> None:
    """few: from so many rows on they are sorted first."""
    table, values = (random(*shape, dtype=torch.float32, device=device, seed=i).detach() for i, shape in
                     enumerate(((7, 21), (num, 21))))  # fmt: skip
    rows = torch.randint(7, (num,), generator=torch.Generator().manual_seed(3)).to(device) // 2 * 2
    wanted = table.double().index_add(0, rows, values.double())
    kept, gpu_rows.FEW = gpu_rows.FEW, few
    try:
        again = table.clone()
        for out in (table, again):
            gpu_rows.add(out, rows, values)
    finally:
        gpu_rows.FEW = kept
    close(table, wanted, SUMS[torch.float32])
    assert torch.equal(table, again), "two runs, two results"


def segments_are_those_of_sorted_numbers(num: int, below: int, device: str) -> None:
    ids = torch.randint(below, (num,), generator=torch.Generator().manual_seed(0))
    most = min(num, below)
    found = gpu_rows.segments(ids.to(device), most)
    unique, place, counts = torch.unique(ids, return_inverse=True, return_counts=True)
    assert found.unique.tolist() == unique.tolist() + [int(unique[-1])] * (most - len(unique))
    assert torch.equal(found.place.cpu(), place)
    assert torch.equal(found.order.cpu(), torch.sort(ids, stable=True).indices)
    offsets = [0, *counts.cumsum(0).tolist()]
    assert found.offsets.tolist() == offsets + [num] * (most + 1 - len(offsets))


def directions_are_those_of_torch(device: str) -> None:
    rows = random(5, 21, dtype=torch.float32, device=device, seed=0)
    with torch.no_grad():
        rows[2] *= 1e-9
    grad, of_length = (random(*shape, dtype=torch.float32, device=device, seed=1).detach() for shape in ((5, 21), (5,)))
    unit, length = gpu_rows.directions(rows.detach(), 1e-6)
    norms = torch.linalg.vector_norm(rows.double(), dim=-1).clamp(min=1e-6)
    wanted = rows.double() / norms.unsqueeze(-1), norms.log()
    close(unit, wanted[0], SUMS[torch.float32])
    close(length, wanted[1], SUMS[torch.float32])
    (expected,) = torch.autograd.grad(wanted, rows, (grad.double(), of_length.double()))
    found = gpu_rows.undirected(unit, length, grad, of_length, 1e-6)
    for one, other in zip(found, expected, strict=True):
        close(one, other, ROUNDED[torch.float32])


def updates_are_those_of_the_formula(name: str, listed: bool, device: str) -> None:
    """Of listed rows one stands there three times, with nothing but zeros as its second and third gradient."""
    table = random(9, 37, dtype=torch.float32, device=device, seed=0).detach()
    state = optim.new_state(name, table)
    wanted, kinds = table.double(), {kind: value.double() for kind, value in state.items()}
    once = torch.tensor([1, 4, 8]) if listed else torch.arange(9)
    rows = torch.tensor([1, 4, 8, 8, 8], device=device) if listed else None
    for step in (1, 2, 3):
        grad = random(len(once), 37, dtype=torch.float32, device=device, seed=step).detach()
        given = torch.cat([grad, grad.new_zeros(2, 37)]) if listed else grad
        clip = torch.tensor(0.5, dtype=torch.float64, device=device) if step > 1 else 0.5
        eps = optim.ADAM_EPS if name == "adam" else optim.ADAGRAD_EPS
        numbers = gpu_rows.StepNumbers(0.1, clip, eps, optim.ADAM_BETAS, step)
        gpu_rows.update(name, table, rows, given.contiguous(), state, numbers)
        new, old = wanted[once], {kind: value[once] for kind, value in kinds.items()}
        optim.update(name, new, 0.5 * grad.double(), old, 0.1, step)
        wanted[once] = new
        for kind, value in old.items():
            kinds[kind][once] = value
    close(table, wanted, SUMS[torch.float32])
    for kind, value in state.items():
        close(value, kinds[kind], SUMS[torch.float32])


def drawn_numbers_are_those_of_the_cpu(device: str) -> None:
    for seed, first, high in ((0, 0, 41), (7, 5000, 3), (-3, 2**40, 2**33)):
        key = cpu_random.key_of(seed, cpu_random.Stream.NEGATIVES, 12)
        found = draws.integers(key, cpu_random.FACTORS, first, 1100, 5, high + 5, torch.device(device))
        index = torch.arange(first, first + 1100)
        wanted = cpu_random.integers(seed, cpu_random.Stream.NEGATIVES, 12, index, high) + 5
        assert torch.equal(found.cpu(), wanted)


# -- scores ---------------------------------------------------------------------------------------------------------


def naive_gap(student: Tensor, teacher: Tensor) -> list[Tensor]:
    """From [Q, N] scores with MASKED_SCORE where a pair does not count."""
    share = torch.softmax(teacher, -1)
    return [torch.logsumexp(teacher, -1), (share * (teacher - student)).sum(-1), torch.logsumexp(student, -1)]


def sums_of_scores_are_those_of_torch(kind: scores.Kind, num: int, device: str) -> None:
    z, other = (3.0 * random(4, num, dtype=torch.float32, device=device, seed=i).detach() for i in range(2))
    hidden = torch.rand(4, num, generator=torch.Generator().manual_seed(5)).to(device) < 0.3
    hidden[:, num // 2] = False
    z, other = (x.masked_fill(hidden, MASKED_SCORE) for x in (z, other))
    wide = [x.double().requires_grad_() for x in (z, other)]
    if kind == "logsumexp":
        wanted = [torch.logsumexp(wide[0], -1)]
    elif kind == "softplus":
        wanted = [torch.nn.functional.softplus(wide[0]).sum(-1), (~hidden).sum(-1).double()]
    else:
        wanted = naive_gap(*wide)
    found = scores.sums(kind, z, other)
    for one, wants in zip(found, wanted, strict=True):
        close(one, wants, SUMS[torch.float32])
    grad = torch.randn(3, 4, generator=torch.Generator().manual_seed(9)).to(device)
    got = scores.pulls(kind, z, other, found, list(grad[: len(found)]), (True, kind == "gap"))
    taken = [x for x in wanted if x.requires_grad]
    expected = torch.autograd.grad(taken, wide[: 2 if kind == "gap" else 1], list(grad[: len(taken)].double()))
    for one, wants in zip(got, expected, strict=False):
        assert one is not None
        close(one, wants, ROUNDED[torch.float32])


# -- DualDE ---------------------------------------------------------------------------------------------------------


def naive_terms(
    how: dualde.How, alpha: Tensor, beta: Tensor, numbers: list[Tensor], counts: Tensor
) -> tuple[Tensor, Tensor]:
    """[2 learning, Q] of Eq. 10-11 (and 14-15), and [1 + learning, Q]: how many pairs count, qualities."""
    summed, seen = [], [counts.sum(-1).double()]
    for model in range(how.learning):
        own, other = numbers[model], numbers[1 - model]
        sigma = torch.sigmoid(
            alpha[2 * model + 1 - how.positive] * (other.detach() + beta[2 * model + 1 - how.positive])
        )
        quality = sigma if how.positive else 1 - sigma
        distance = torch.zeros_like(own)
        for i, field in enumerate(numbers[model::2]):
            theirs = numbers[1 - model + 2 * i]
            theirs = theirs.detach() if how.stop_opposite else theirs
            pair = (field.exp(), theirs.exp()) if i == 2 else (field, theirs)
            distance = distance + torch.nn.functional.huber_loss(*pair, reduction="none", delta=how.delta)
        soft, hard = (quality, 1 - quality) if how.evaluation else (torch.ones_like(own), torch.ones_like(own))
        missed = torch.nn.functional.softplus(-own if how.positive else own)
        for weighed in (how.soft_weight * soft * distance, hard * missed):
            summed.append(weighed.where(counts, 0.0).sum(-1))
        seen.append(soft.detach().where(counts, 0.0).sum(-1))
    return torch.stack(summed), torch.stack(seen)


def dualde_terms_are_those_of_the_formula(how: dualde.How, shaped: bool, num: int, device: str) -> None:
    queries = 3
    fields = [
        random(queries, num, dtype=torch.float32, device=device, seed=i).detach() for i in range(6 if shaped else 2)
    ]
    counts = torch.rand(queries, num, generator=torch.Generator().manual_seed(5)).to(device) < 0.7
    counts |= torch.full_like(counts, num == 1)
    alpha, beta = (torch.tensor(x, device=device) for x in ((0.9, -0.4, 1.3, 0.6), (0.2, -0.3, 0.5, 0.1)))
    given = [x.masked_fill(~counts, MASKED_SCORE) for x in fields]
    wide = [x.double().requires_grad_() for x in (alpha, beta, *fields)]
    summed, seen = naive_terms(how, wide[0], wide[1], wide[2:], counts)
    found = dualde.terms(how, alpha, beta, given)
    close(found, torch.cat([summed, seen]), SUMS[torch.float32])
    grad = torch.randn(summed.shape, generator=torch.Generator().manual_seed(9)).to(device)
    expected = torch.autograd.grad(summed, wide, grad.double(), allow_unused=True)
    pulled, evaluators = dualde.pulls(how, alpha, beta, given, grad)
    for one, wants in zip([*evaluators.sum(-1), *pulled], expected, strict=True):
        if one is not None:
            close(one, torch.zeros_like(one) if wants is None else wants, ROUNDED[torch.float32])


def dualde_shapes_are_those_of_the_formula(device: str) -> None:
    anchor, answer = (random(5, 21, dtype=torch.float32, device=device, seed=i).detach() for i in range(2))
    anchor[2] *= 1e-9
    answer[3] *= 1e-9
    sign, least = torch.tensor([1.0, -1.0, 1.0, 1.0, -1.0], device=device), 1e-6
    wide = [x.double().requires_grad_() for x in (anchor, answer)]
    norms = [torch.linalg.vector_norm(x, dim=-1).clamp(min=least) for x in wide]
    units = [x / norm.unsqueeze(-1) for x, norm in zip(wide, norms, strict=True)]
    asked = torch.stack([sign * norms[0].log(), -sign.double()], 1)
    wanted = [units[0], asked, (units[0] * units[1]).sum(-1), sign * (norms[0] / norms[1]).log()]
    unit, asked, found = dualde.shapes(anchor, answer, sign, least)
    for one, wants in zip((unit, asked, found[0], found[1]), wanted, strict=True):
        close(one, wants, SUMS[torch.float32])
    grads = [random(*x.shape, dtype=torch.float32, device=device, seed=7).detach() for x in wanted]
    expected = torch.autograd.grad(wanted, wide, [x.double() for x in grads])
    for one, wants in zip(dualde.unshaped(anchor, answer, sign, found, grads, least), expected, strict=True):
        close(one, wants, ROUNDED[torch.float32])
