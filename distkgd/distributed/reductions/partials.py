"""Sums over candidates, block by block and rank by rank: how each is made and merged."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from distkgd.distributed.reductions.candidate_layout import MASKED_SCORE
from distkgd.kernels import scores as kernels

# A partial's tensors may have planes in front, [P, ..., Q, N]: scores of several models for each pair, as in `Field`.
# What is made of them is then [P, Q].


@dataclass(frozen=True)
class Sum:
    """Sum over candidates of `value` [Q, N], which must vanish where the scores are MASKED_SCORE."""

    value: Tensor


@dataclass(frozen=True)
class Summed:
    """A sum over candidates that is there already, `value` [Q]."""

    value: Tensor


@dataclass(frozen=True)
class LogSumExp:
    """log of the sum over candidates of exp(`logit` [Q, N])."""

    logit: Tensor


@dataclass(frozen=True)
class Count:
    """Number of candidates for which `value` ([Q, N] bool) holds, as float64."""

    value: Tensor


@dataclass(frozen=True)
class SoftmaxMean:
    """Mean over candidates of `value` [Q, N] under softmax(`logit` [Q, N]); gives `name` and `name.lse`, the weights'
    log-sum-exp, so that the mean can be merged with further candidates."""

    logit: Tensor
    value: Tensor


@dataclass(frozen=True)
class SoftmaxGap:
    """Mean over candidates of `teacher` - `student` [Q, N] under softmax(`teacher`); gives `name`, and the log-sum-exps
    of both, `name.lse` (the teacher's) and `name.student`."""

    student: Tensor
    teacher: Tensor


@dataclass(frozen=True)
class SoftplusSum:
    """Sum over candidates of softplus(`scores` [Q, N]), `name` + "sum", and how many count, `name` + "count", which
    takes no gradient; where `kernels.softplus_summable` says so."""

    scores: Tensor


Partial = Sum | Summed | Count | SoftplusSum | LogSumExp | SoftmaxMean | SoftmaxGap


Kind = tuple[int, str, type[Partial], int]


# What a kind's columns are called, after the name of the partial.
PARTS: Mapping[type[Partial], tuple[str, ...]] = {
    SoftmaxMean: (".lse", ""),
    SoftmaxGap: (".lse", "", ".student"),
    SoftplusSum: ("sum", "count"),
}


def only_logsumexp(found: Mapping[str, Partial], scores: Sequence[Tensor]) -> bool:
    """Whether all that is asked of these scores is the log-sum-exp of the scores themselves."""
    (first, *more) = found.values()
    return not more and isinstance(first, LogSumExp) and any(first.logit is z for z in scores)


def only_gap(found: Mapping[str, Partial], alone: Sequence[Tensor]) -> bool:
    """Whether all that is asked is a gap, and the teacher's scores in it are among those that nobody else needs."""
    (first, *more) = found.values()
    return not more and isinstance(first, SoftmaxGap) and any(first.teacher is z for z in alone)


class Known(NamedTuple):
    """What was computed already of logits, by their identity: (logits, their log-sum-exp), and their softmax."""

    sums: dict[int, tuple[Tensor, Tensor]]
    shares: dict[int, Tensor]


def columns_of(partial: Partial, last: bool, known: Known) -> list[Tensor]:
    # The [Q] numbers that stand for one block of one partial. last: nothing else needs its scores (of a gap: the
    # teacher's).
    match partial:
        case Sum(value) | Summed(value):
            return [value.sum(-1) if isinstance(partial, Sum) else value]
        case Count(value):
            return [value.sum(-1).double()]
        case SoftplusSum(scores):
            return list(kernels.softplus_sums(scores))
        case LogSumExp(logit):
            if id(logit) not in known.sums:
                known.sums[id(logit)] = logit, _logsumexp(logit, last)
            return [known.sums[id(logit)][1]]
        case SoftmaxMean(logit, value):
            (total,) = columns_of(LogSumExp(logit), False, known)
            if id(logit) not in known.shares:
                known.shares[id(logit)] = torch.exp(logit - total.unsqueeze(-1))
            return [total, (known.shares[id(logit)] * value).sum(-1)]
        case SoftmaxGap(student, teacher):
            if kernels.summable(student, teacher):
                found = kernels.softmax_gap(student, teacher, last and not teacher.requires_grad)
            else:
                total = _logsumexp(teacher)
                mean = (torch.exp(teacher - total.unsqueeze(-1)) * (teacher - student)).sum(-1)
                found = total, mean, _logsumexp(student)
            known.sums[id(student)] = student, found[2]
            return list(found)


def _logsumexp(logit: Tensor, last: bool = False) -> Tensor:
    if logit.shape[-1] == 0:
        # A sum, not a constant: a rank without candidates has to take part in the exchanges of backward.
        return logit.sum(-1) + MASKED_SCORE
    return kernels.logsumexp(logit, last) if kernels.summable(logit) else torch.logsumexp(logit, -1)


def merge(kinds: Sequence[Kind], parts: Tensor) -> Tensor:
    # [pieces, columns, Q] -> [columns, Q], in the order of columns_of, so that what was merged can be merged again.
    if len(parts) == 1:
        return parts.squeeze(0)
    out: list[Tensor] = []
    at = 0
    for _, _, kind, planes in kinds:
        width = planes or 1
        first, *others = parts[:, at : at + width * len(PARTS.get(kind, ("",)))].split(width, 1)
        at += width * (1 + len(others))
        if kind in (SoftmaxMean, SoftmaxGap):
            weight = torch.softmax(first, 0)
            out += [torch.logsumexp(first, 0), (weight * others[0]).sum(0)]
            out += [torch.logsumexp(log_sum, 0) for log_sum in others[1:]]
        elif kind is LogSumExp:
            out.append(torch.logsumexp(first, 0))
        else:
            out += [part.sum(0) for part in (first, *others)]
    return torch.cat(out)


def unmerge(kinds: Sequence[Kind], part: Tensor, merged: Tensor, grad: Tensor) -> Tensor:
    # The gradient [columns, Q] of one of the parts that were merged, given that of what they were merged to.
    out: list[Tensor] = []
    at = 0
    for _, _, kind, planes in kinds:
        width = planes or 1
        stop = at + width * len(PARTS.get(kind, ("",)))
        mine, whole, pulled = (x[at:stop].split(width) for x in (part, merged, grad))
        at = stop
        if kind in (SoftmaxMean, SoftmaxGap):
            weight = torch.exp(mine[0] - whole[0])
            out += [weight * (pulled[0] + pulled[1] * (mine[1] - whole[1])), weight * pulled[1]]
            out += [torch.exp(mine[2] - whole[2]) * pulled[2]] if kind is SoftmaxGap else []
        elif kind is LogSumExp:
            out.append(torch.exp(mine[0] - whole[0]) * pulled[0])
        else:
            out += pulled
    return torch.cat(out)
