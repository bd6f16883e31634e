"""Softmax losses of bilinear scorers on a GPU without a [Q, N] tensor of scores: cross-entropy, self-adversarial,
KL.

Forward is one kernel: a program multiplies blocks of queries and candidates, keeps running sums of the softmax, and
writes a few numbers per query; scores live in registers. Each split of the candidates has its own numbers, merged
as those of two ranks are (`distributed/reductions/loss_requests.py`). Every sum has a fixed order.

Backward visits candidates in blocks of at most `SCRATCH` weights (queries × candidates), which stay in the
second-level cache: one kernel computes the scores of the block again and turns them into weights, two matrix
products of the library make dq and dcandidates of them. A single kernel for all three would have to add dq through
atomics, two kernels would compute the scores twice: with 6 products' worth counted, 8 are done here, 10 there. No
[Q, N] tensor exists either way.

Inputs are bfloat16, float16 or float32 (float64 under the interpreter), all of one dtype; sums are float32. float32
inputs are multiplied as such unless `allow_tf32`.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from distkgd.kernels.triton.loss_code import partials_code, weights_code
from distkgd.kernels.triton.runtime import OPTIONS, in_triton, pieces, refuse_second_order, sum_dtype

Reduction = Literal["log_sum_exp", "self_adversarial", "kl"]

MASKED_SCORE = -1e30  # as in distributed/reductions/candidate_layout.py
SCRATCH = 1 << 23
_STRIDE = 1 << 31  # more than there are candidates
PROGRAMS = 512  # that keep a large GPU busy; each walks over as many blocks of candidates as that leaves


@dataclass(frozen=True)
class Tile:
    """Queries × candidates of one block of scores, coordinates multiplied at once, warps and stages of loading."""

    queries: int = 128
    candidates: int = 128
    coordinates: int = 64
    warps: int = 8
    stages: int = 3


@dataclass(frozen=True)
class Excluded:
    """Pairs that do not count, by query, candidates ascending within each.

    keys: [p] int64 query · 2^31 + candidate, ascending. columns: [p] int32 candidates of these pairs. ends: [Q] int32
    places where each query's pairs end.
    """

    keys: Tensor
    columns: Tensor
    ends: Tensor

    @staticmethod
    def of(query: Tensor, candidate: Tensor, num_queries: int) -> "Excluded":
        """From ([p] query, [p] candidate) in any order."""
        keys = torch.sort(query * _STRIDE + candidate).values
        after = torch.arange(1, num_queries + 1, device=query.device) * _STRIDE
        return Excluded(keys, (keys % _STRIDE).int(), torch.searchsorted(keys, after).int())

    def starts(self, firsts: Tensor) -> Tensor:
        """[k, Q] int32 places in `columns` of the first candidate >= each of firsts ([k]), per query."""
        queries = torch.arange(len(self.ends), device=self.keys.device)
        return torch.searchsorted(self.keys, queries * _STRIDE + firsts.unsqueeze(1)).int()


def log_sum_exp(q: Tensor, c: Tensor, excluded: Excluded, **options: Any) -> Tensor:
    """[Q] log Σ exp(q · c) over candidates that count; q [Q, a], c [N, a]. Cross-entropy = this − the answer's score.

    With no candidate left the result is below MASKED_SCORE / 2 and its gradient 0. options: see `Run`.
    """
    found: Tensor = _Reduced.apply("log_sum_exp", Run(excluded, **options), q, c, q, c)  # type: ignore[no-untyped-call]
    return found[0]


def self_adversarial(q: Tensor, c: Tensor, excluded: Excluded, temperature: float = 1.0, **options: Any) -> Any:
    """([Q] mean of softplus(z) under softmax(temperature · z), [Q] log Σ exp(temperature · z)), z = q · c.

    The weights are detached, and so is their log-sum-exp (for merging with further candidates).
    """
    run = Run(excluded, temperature=temperature, **options)
    found: Tensor = _Reduced.apply("self_adversarial", run, q, c, q, c)  # type: ignore[no-untyped-call]
    return found[1], found[0].detach()


def kl(
    student_q: Tensor, student_c: Tensor, teacher_q: Tensor, teacher_c: Tensor, excluded: Excluded, **options: Any
) -> Any:
    """What `losses.kl_divergence` asks for, three numbers [Q]: log Σ exp z_t, mean of z_t − z_s under softmax(z_t),
    log Σ exp z_s. scale = 1 / temperature multiplies both scores."""
    run = Run(excluded, **options)
    found: Tensor = _Reduced.apply("kl", run, student_q, student_c, teacher_q, teacher_c)  # type: ignore[no-untyped-call]
    return found[0], found[1], found[2]


@dataclass(frozen=True)
class Run:
    """Everything but the matrices.

    scale: multiplies q · c. scratch: weights that backward holds at once.
    """

    excluded: Excluded
    scale: float = 1.0
    temperature: float = 1.0
    allow_tf32: bool = False
    tile: Tile | None = None
    scratch: int = SCRATCH

    def options(self, size: Tile, wide: torch.dtype) -> dict[str, Any]:
        """Keyword arguments of both kernels."""
        return {
            "ACC": in_triton(wide), "PRECISION": "tf32" if self.allow_tf32 else "ieee",
            "BQ": size.queries, "BN": size.candidates, "BK": size.coordinates,
            "num_warps": size.warps, "num_stages": size.stages, **OPTIONS,
        }  # fmt: skip


def tile_of(kind: Reduction, dtype: torch.dtype) -> Tile:
    """The block of scores for numbers of this size; two models need twice the registers."""
    if dtype.itemsize > 2:
        return Tile(64, 32 if kind == "kl" else 64, 32, 4, 2)
    return Tile(128, 64, 64, 8, 3) if kind == "kl" else Tile()


def partials(kind: Reduction, run: Run, q: Tensor, c: Tensor, other_q: Tensor, other_c: Tensor) -> Tensor:
    """[3, Q] numbers per query, see `gpu_loss_code.partials_code`; other_*: the teacher's (kl), else ignored."""
    queries, candidates = len(q), len(c)
    wide = sum_dtype(q, c)
    if queries == 0 or candidates == 0:
        empty = q.new_zeros(3, queries, dtype=wide)
        empty[0], empty[2] = MASKED_SCORE, MASKED_SCORE
        return empty
    size = run.tile or tile_of(kind, q.dtype)
    steps, blocks_q = pieces(candidates, size.candidates), pieces(queries, size.queries)
    per_split = size.candidates * pieces(steps, min(steps, pieces(PROGRAMS, blocks_q)))
    splits = pieces(candidates, per_split)
    starts = run.excluded.starts(torch.arange(splits, device=q.device) * per_split)
    out = q.new_zeros(splits, 3, queries, dtype=wide)
    partials_code[(blocks_q * splits,)](
        q, c, other_q, other_c, run.excluded.columns, starts, run.excluded.ends, out, queries, candidates, per_split,
        q.shape[1], other_q.shape[1], run.scale, run.temperature, KIND=kind, **run.options(size, wide),
    )  # fmt: skip
    if splits == 1:
        return out[0]
    shares = torch.softmax(out[:, 0], 0)
    lse, other = torch.logsumexp(out[:, 0], 0), torch.logsumexp(out[:, 2], 0)
    return torch.stack((lse, (shares * out[:, 1]).sum(0), other))


class _Reduced(torch.autograd.Function):
    """`partials`, once differentiable."""

    @staticmethod
    def forward(ctx: Any, kind: Reduction, run: Run, q: Tensor, c: Tensor, other_q: Tensor, other_c: Tensor) -> Tensor:
        assert q.dtype == c.dtype == other_q.dtype == other_c.dtype, "one dtype for all matrices"
        q, c, other_q, other_c = (x.contiguous() for x in (q, c, other_q, other_c))
        found = partials(kind, run, q, c, other_q, other_c)
        ctx.kind, ctx.run = kind, run
        ctx.save_for_backward(q, c, other_q, other_c, found)
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        refuse_second_order()
        *matrices, found = ctx.saved_tensors
        need = ctx.needs_input_grad[2:] if ctx.kind == "kl" else (*ctx.needs_input_grad[2:4], False, False)
        return None, None, *gradients(ctx.kind, ctx.run, matrices, found, grads[0].contiguous(), need)


def gradients(
    kind: Reduction, run: Run, matrices: list[Tensor], found: Tensor, grad: Tensor, need: tuple[bool, ...]
) -> list[Tensor | None]:
    """Gradients of q, c, other_q, other_c, for the gradient [3, Q] of what `partials` found."""
    q, c, other_q, other_c = matrices
    queries, candidates, wide = len(q), len(c), found.dtype
    taught = kind == "kl" and (need[2] or need[3])
    # Those of queries are sums over blocks of candidates, those of candidates are written once.
    out = [torch.zeros_like(x, dtype=wide if i % 2 == 0 else None) if need[i] else None for i, x in enumerate(matrices)]
    if queries == 0 or candidates == 0:
        return _narrowed(out, matrices)
    size = run.tile or tile_of(kind, q.dtype)
    block = size.candidates * max(1, run.scratch // (queries * size.candidates * (2 if taught else 1)))
    # What the last block of scores would hold of them comes by itself: the library is fast on whole blocks only.
    whole = candidates // size.candidates * size.candidates
    cuts = sorted({*range(0, whole, block), whole, candidates})
    scratch = [q.new_empty(queries * min(block, candidates)) for _ in range(2 if taught else 1)]
    for first, stop in pairwise(cuts):
        stride = stop - first
        starts = run.excluded.starts(torch.arange(first, stop, size.candidates, device=q.device))
        weights = [x[: queries * stride].view(queries, stride) for x in scratch]
        grid = (pieces(queries, size.queries) * pieces(stride, size.candidates),)
        weights_code[grid](
            q, c, other_q, other_c, run.excluded.columns, starts, run.excluded.ends, found, grad,
            weights[0], weights[-1], queries, candidates, first, stop, stride, q.shape[1], other_q.shape[1], run.scale,
            run.temperature, KIND=kind, OTHER=taught, **run.options(size, wide),
        )  # fmt: skip
        for w, mine, at in zip(weights, ((q, c), (other_q, other_c)), (0, 2), strict=False):
            for_q, for_c = out[at], out[at + 1]
            if for_q is not None:
                for_q += _product(w, mine[1][first:stop])
            if for_c is not None:
                torch.mm(w.T, mine[0], out=for_c[first:stop])
    return _narrowed(out, matrices)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in the dtype sums are kept in."""
    if a.dtype.itemsize > 2:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def _narrowed(out: list[Tensor | None], matrices: list[Tensor]) -> list[Tensor | None]:
    return [None if x is None else x.to(m.dtype) for x, m in zip(out, matrices, strict=True)]
