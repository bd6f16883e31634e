"""Hard and soft losses over score rows, written once for any world size; each asks for one number per query, [Q].

A step puts all its asks together and has them answered in one pass over the candidates (`reduce_over_candidates`); the
Jensen-Shannon divergence alone answers a pass of its own before.

Notation: z the scores of a query's candidates, z+ that of its own answer, N(q) its other candidates; "all candidates"
means N(q) and the answer. A batch loss is the mean over the global batch's queries (`batch_mean`).
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from distkgd.data.step_inputs import StepInputs
from distkgd.distributed.reductions.candidate_layout import valid_mask
from distkgd.distributed.reductions.loss_requests import LossRequest, reduce_over_candidates
from distkgd.distributed.reductions.partials import LogSumExp, Partial, SoftmaxGap, SoftmaxMean, SoftplusSum, Sum
from distkgd.errors import UnsupportedError
from distkgd.kernels.scores import softplus_summable
from distkgd.models.view import View


def batch_mean(per_query: Tensor, inputs: StepInputs) -> Tensor:
    """[]: this rank's share of the mean over the global batch; the shares of all ranks (and parts) add up to it."""
    return per_query.sum() / inputs.batch.num_queries


def batch_means(per_query: Mapping[str, Tensor], inputs: StepInputs) -> dict[str, Tensor]:
    """{name: `batch_mean`}; on a GPU all at once."""
    if inputs.batch.triples.device.type == "cpu":
        return {name: batch_mean(value, inputs) for name, value in per_query.items()}
    means = torch.stack(list(per_query.values())).sum(1) / inputs.batch.num_queries
    return dict(zip(per_query, means.unbind(), strict=True))


def batch_sum(shares: Sequence[Tensor], inputs: StepInputs) -> list[Tensor]:
    """[] each: the sum over ranks of each share ([]), on every rank; a gradient reaches the shares of all of them.

    What is made of it is the same on every rank: a loss term takes 1 / world of it as each rank's share.
    """
    ranks = inputs.layout.ranks
    return list(ranks.gather(torch.stack(list(shares)).unsqueeze(0), [1] * ranks.world, "totals").sum(0).unbind())


def hard_loss(
    name: str, view: View, *, temperature: float = 1.0, margin: float = 1.0, label_smoothing: float = 0.0
) -> LossRequest:
    """Asks for [Q]: the loss of the true labels.

    softmax: -log of the answer's share of exp(z) over all candidates.
    bce: softplus(-z+) + sum over N of softplus(z).
    softplus: softplus(-z+) + mean over N of softplus(z).
    self_adversarial: softplus(-z+) + mean over N of softplus(z) under softmax(temperature * z), the weights detached
        (Sun et al., ICLR 2019, Eq. 5-6; there the answer and the negatives share the factor 1/2 that we leave out).
    margin: mean over N of max(0, margin - z+ + z).
    label_smoothing e moves the share e of the label from the answer to all candidates evenly (softmax, bce).
    With k-vs-all labels, the answers of a query share its loss: the pass over its triples adds up to one k-vs-all row.
    """
    positive, share = view.positive, view.inputs.label_share
    share = None if share is None else share.to(positive.dtype)

    def partials(z: Tensor, own: Tensor | None = None) -> dict[str, Partial]:
        out: dict[str, Partial] = {}
        if name == "softmax":
            out["lse"] = LogSumExp(z)
        elif name in ("softplus", "bce") and softplus_summable(z):
            out[""] = SoftplusSum(z)
        elif name == "self_adversarial":
            out["mean"] = SoftmaxMean(temperature * z.detach(), F.softplus(z))
        elif name == "margin":
            assert own is not None
            out["sum"] = Sum(F.relu(margin - own + z))
        else:
            out["sum"] = Sum(F.softplus(z))
        if label_smoothing:
            out["scores"] = Sum(z * valid_mask(z.detach()))
        if "" not in out and (label_smoothing or name in ("softplus", "margin")):
            out["count"] = Sum(valid_mask(z.detach()))
        return out

    def finish(got: dict[str, Tensor], positive: Tensor, share: Tensor | None = None) -> Tensor:
        match name:
            case "softmax":
                loss = _missed(positive, got["lse"])
            case "bce":
                loss = F.softplus(-positive) + got["sum"] * (1.0 if share is None else share)
            case "softplus":
                loss = got["sum"] / candidate_count(got)
                # The same in one kernel less.
                loss = F.softplus(-positive) + loss if loss.device.type == "cpu" else loss - F.logsigmoid(positive)
            case "self_adversarial":
                loss = F.softplus(-positive) + got["mean"]
            case "margin":
                loss = got["sum"] / candidate_count(got)
            case _:
                raise AssertionError(name)
        if label_smoothing:
            loss = loss + label_smoothing * (positive - (positive + got["scores"]) / (1.0 + got["count"].detach()))
        return loss * share if share is not None and name != "bce" else loss

    own = (positive,) if share is None else (positive, share)
    return LossRequest(partials, [view.negatives], finish, (positive,) if name == "margin" else (), own)


def _missed(own: Tensor, rest: Tensor) -> Tensor:
    # [Q]: -log of the share of exp(own), of rest the log-sum-exp is known; on a GPU in fewer kernels.
    if own.device.type == "cpu":
        return torch.logaddexp(own, rest) - own
    return F.softplus(rest - own, threshold=40.0)


def candidate_count(got: Mapping[str, Tensor]) -> Tensor:
    """[Q]: how many candidates count, at least 1, of the sum "count" of their `valid_mask`, which takes no gradient."""
    return got["count"].detach().clamp(min=1.0)


def kl_divergence(
    student: View,
    teacher: View,
    temperature: float = 1.0,
    *,
    stop_teacher: bool = False,
    stop_student: bool = False,
) -> LossRequest:
    """Asks for [Q]: T^2 KL(teacher || student) of softmaxes over all candidates at temperature T (Hinton et al. 2015).

    stop_teacher, stop_student: no gradient reaches that side, though it is learning itself.

    With k-vs-all labels a query's answers share its divergence, as they share its hard loss.
    KL = sum p_t (z_t - z_s) / T - lse_t + lse_s: three numbers per query, and no scores leave their shard.
    """

    def partials(zs: Tensor, zt: Tensor) -> dict[str, Partial]:
        zt = zt.detach() if stop_teacher else zt
        zs = zs.detach() if stop_student else zs
        if temperature != 1.0:
            zs, zt = zs / temperature, zt / temperature
        return {"gap": SoftmaxGap(zs, zt)}

    def finish(got: dict[str, Tensor], own_s: Tensor, own_t: Tensor, share: Tensor | None = None) -> Tensor:
        divergence = kl_of(got, own_s, own_t)
        divergence = divergence if temperature == 1.0 else temperature**2 * divergence
        return divergence if share is None else divergence * share

    own_t = teacher.positive.detach() if stop_teacher else teacher.positive
    own_s = student.positive.detach() if stop_student else student.positive
    own = (own_s, own_t) if temperature == 1.0 else (own_s / temperature, own_t / temperature)
    local = *own, *_share(student)
    return LossRequest(partials, [student.negatives, teacher.negatives], finish, local=local)


def kl_of(got: Mapping[str, Tensor], own_s: Tensor, own_t: Tensor) -> Tensor:
    """[Q]: KL(t || s) of two softmaxes over all candidates. got: their `SoftmaxGap` "gap" over N(q). own: the answer's
    logits."""
    if own_s.device.type != "cpu":  # the same in half as many kernels
        apart, others_t = own_t - own_s, got["gap.lse"] - own_t
        missed = _missed(own_s, got["gap.student"]) - F.softplus(others_t, threshold=40.0)
        return torch.sigmoid(others_t) * (got["gap"] - apart) + missed
    lse_s, lse_t = torch.logaddexp(own_s, got["gap.student"]), torch.logaddexp(own_t, got["gap.lse"])
    gap = torch.exp(got["gap.lse"] - lse_t) * got["gap"] + torch.exp(own_t - lse_t) * (own_t - own_s)
    return gap - lse_t + lse_s


def relation_loss(view: View) -> Tensor:
    """[Q]: cross-entropy of each query's relation among all relations, given both of its ends (Chen et al. 2021).

    With reciprocal relations those of the other direction compete too, as in their code. Relations are replicated, so
    nothing travels; for scorers that have a `relation_query`.
    """
    model, queries = view.model, view.inputs.batch.queries
    head, tail = view.anchor, view.answer
    if not model.reciprocal:
        asks_head = (queries.side == 1).unsqueeze(1)
        head, tail = torch.where(asks_head, tail, head), torch.where(asks_head, head, tail)
    scores = model.scorer.relation_query(head, tail) @ view.relations.T
    return F.cross_entropy(scores, model.relation_ids(queries), reduction="none")


def js_divergence(student: View, teacher: View, temperature: float = 1.0) -> LossRequest:
    """Asks for [Q]: T^2 (KL(teacher || m) + KL(student || m)) / 2, m the mean of the two softmaxes over all candidates
    at temperature T: the Jensen-Shannon divergence (Lin 1991), symmetric and at most T^2 log 2.

    m mixes normalised shares, so both log-sum-exps must be known before anything can be summed: a first pass, answered
    here, brings them home, and they travel out again with the asks of the second. The student's takes a gradient.
    """

    def logs(zs: Tensor, zt: Tensor) -> dict[str, Partial]:
        return {"student": LogSumExp(zs / temperature), "teacher": LogSumExp(zt / temperature)}

    fields = [student.negatives, teacher.negatives]
    own_s, own_t = student.positive / temperature, teacher.positive / temperature
    got = reduce_over_candidates({"": LossRequest(logs, fields)})[""]
    lse_s, lse_t = torch.logaddexp(own_s, got["student"]), torch.logaddexp(own_t, got["teacher"])
    if not own_t.requires_grad:
        lse_t = lse_t.detach()  # both came home in one tensor: a frozen teacher's would ask for a gradient too

    def partials(zs: Tensor, zt: Tensor, lse_s: Tensor, lse_t: Tensor) -> dict[str, Partial]:
        return {"sum": Sum(_js_terms(zs / temperature - lse_s, zt / temperature - lse_t))}

    def finish(got: dict[str, Tensor], log_s: Tensor, log_t: Tensor, share: Tensor | None = None) -> Tensor:
        divergence = temperature**2 * (got["sum"] + _js_terms(log_s, log_t))
        return divergence if share is None else divergence * share

    return LossRequest(partials, fields, finish, (lse_s, lse_t), (own_s - lse_s, own_t - lse_t, *_share(student)))


def _js_terms(log_p: Tensor, log_q: Tensor) -> Tensor:
    # (p log(p / m) + q log(q / m)) / 2 of each candidate, m = (p + q) / 2. p / m is 2 sigmoid(log p - log q): log m =
    # logaddexp(log p, log q) - log 2 without the difference of two large numbers. No term is negative, and where a
    # pair does not count both shares and all of this are 0.
    gap = log_p - log_q
    first = torch.exp(log_p) * (F.logsigmoid(gap) + math.log(2.0))
    second = torch.exp(log_q) * (F.logsigmoid(-gap) + math.log(2.0))
    return 0.5 * (first + second)


def _share(view: View) -> tuple[Tensor, ...]:
    # With k-vs-all labels the answers of a query share its divergence.
    share = view.inputs.label_share
    return () if share is None else (share.to(view.positive.dtype),)


DIVERGENCES: Mapping[str, Callable[[View, View, float], LossRequest]] = {
    "kl": kl_divergence,
    "reverse_kl": lambda student, teacher, temperature: kl_divergence(teacher, student, temperature),
    "js": js_divergence,
}


def huber(difference: Tensor, delta: float = 1.0) -> Tensor:
    """Huber's loss of a difference: x^2 / 2 up to delta, then delta (|x| - delta / 2)  (DualDE Eq. 6)."""
    return F.huber_loss(difference, difference.new_zeros(()).expand_as(difference), reduction="none", delta=delta)


def regulariser(
    name: str,
    view: View,
    weight: float,
    relation_weight: float | None,
    times: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """[Q]: penalty on the rows of each query, of few bits on the master rows. All ranks call it.

    times: how often each column counts, [dim] of entities and queries and [relation_size] of relations; default: once.

    n2: sum of squares of anchor, relation, answer. The biases of entities are free.
    n3: sum of cubed absolute values, for complex scorers of cubed moduli (Lacroix et al., ICML 2018, Eq. 4).
    dura: |a|^2 + |q(a, r)|^2 + |e|^2 + |q'(e, r)|^2 for anchor a, answer e and the two queries they make
        (Zhang et al., NeurIPS 2020, Eq. 8); bilinear scorers only.
    """
    scorer = view.model.scorer
    if name == "dura":
        return weight * _dura(view, None if times is None else times[0])
    anchor, relation, answer = view.masters()
    rows = scorer.coordinates(anchor), relation, scorer.coordinates(answer)
    weights = weight, weight if relation_weight is None else relation_weight, weight
    power = {"n2": 2, "n3": 3}[name]
    if power == 3 and scorer.complex_pairs:
        sizes = [_moduli(x) for x in rows]
    else:
        sizes = [x.abs() for x in rows]
    powers = [size.pow(power) for size in sizes]
    if times is not None:
        # Where two columns make one modulus they count alike.
        counts = times[0], times[1], times[0]
        powers = [x * count[:: len(count) // x.shape[-1]] for x, count in zip(powers, counts, strict=True)]
    parts = [w * x.sum(-1) for w, x in zip(weights, powers, strict=True)]
    return parts[0] + parts[1] + parts[2]


def _dura(view: View, times: Tensor | None) -> Tensor:
    # [Q]: Zhang et al., NeurIPS 2020, Eq. 8.
    model, scorer = view.model, view.model.scorer
    if scorer.candidate_form != "dot":
        raise UnsupportedError(f"regulariser dura is defined for bilinear scorers, not {scorer.name}; use n2 or n3.")
    if view.lists_relations:
        anchor, answer = view.master_entities()
        listed = view.listed(model.master_relations)
        forth, back = scorer.listed_query(anchor, listed), scorer.listed_query(answer, listed, of_heads=True)
    else:
        anchor, relation, answer = view.masters()
        forth = scorer.tail_query(anchor, relation)
        back = scorer.head_query(answer, relation)
        if not model.reciprocal:
            asks_head = (view.inputs.batch.queries.side == 1).unsqueeze(1)
            forth = torch.where(asks_head, scorer.head_query(anchor, relation), forth)
            back = torch.where(asks_head, scorer.tail_query(answer, relation), back)
    squares = anchor.square() + forth.square() + back.square() + answer.square()
    return (squares if times is None else squares * times).sum(-1)


def _moduli(rows: Tensor) -> Tensor:
    # [..., d] interleaved complex numbers -> [..., d / 2]; the tiny term keeps the gradient at 0 finite.
    re, im = rows[..., 0::2], rows[..., 1::2]
    return torch.sqrt(re.square() + im.square() + 1e-30)
