"""The divergence from soft labels in files, which name the best answers of a query and what all others weigh."""

from functools import partial

import torch
from torch import Tensor

from distkgd.data.soft_labels import Labels, SoftLabels
from distkgd.distributed.reductions.candidate_layout import MASKED_SCORE, PairScores, valid_mask
from distkgd.distributed.reductions.loss_requests import LossRequest
from distkgd.distributed.reductions.partials import LogSumExp, Partial, SoftmaxGap, Sum
from distkgd.kernels.candidates import Candidates, plain
from distkgd.models.view import View


def cached_divergence(student: View, labels: SoftLabels, temperature: float) -> LossRequest:
    """Asks for [Q]: T^2 KL(labels || student) over all candidates, those without a label of their own as one outcome.

    With p the labels, q the student's softmax, L the candidates that have labels and R the others:
    KL = sum over L of p log(p / q) + p(R) log(p(R) / q(R)), where p(R), q(R) are the sums over R. By the log-sum
    inequality it is the KL of the whole distributions where p and q agree within R, and else less: what the teacher
    thinks of the entities in R relative to each other is not known, and nothing is asked of the student there (p(R)
    spread evenly would teach it that they are all alike). Where all candidates have labels it is the KL itself.
    Of drawn candidates R holds some of the unlabelled entities, whose mass it has in that proportion.
    """
    inputs, total = student.inputs, student.model.entity.total
    found, z = labels.of(inputs.batch.queries, total), student.positive / temperature
    is_own = found.entities == inputs.batch.queries.answer.unsqueeze(1)
    own = torch.where(is_own, found.logits, MASKED_SCORE).amax(1).to(z.dtype)
    # Of each unlabelled entity, were they all alike.
    unlabelled = (total - (found.entities >= 0).sum(1)).clamp(min=1)
    each = (found.rest - unlabelled.double().log()).clamp(min=MASKED_SCORE).to(z.dtype)

    def partials(zs: Tensor, known: Tensor) -> dict[str, Partial]:
        zs = zs / temperature
        others = zs.masked_fill(known > MASKED_SCORE / 2, MASKED_SCORE)
        return {
            "gap": SoftmaxGap(zs, known),
            "others": LogSumExp(others),
            "count": Sum(valid_mask(others.detach())),
        }

    def finish(got: dict[str, Tensor], *numbers: Tensor) -> Tensor:
        z, own, each, *share = numbers
        alone = own < MASKED_SCORE / 2  # the answer is one of the others
        count = got["count"].detach() + alone.to(z.dtype)
        others = torch.where(alone, torch.logaddexp(got["others"], z), got["others"])
        rest = torch.where(count > 0, each + count.clamp(min=1.0).log(), MASKED_SCORE).clamp(min=MASKED_SCORE)
        whole = torch.logsumexp(torch.stack([got["gap.lse"], own, rest]), 0)
        divergence = torch.exp(got["gap.lse"] - whole) * got["gap"] + torch.exp(own - whole) * (own - z)
        divergence = divergence + torch.exp(rest - whole) * (rest - others) - whole
        divergence = divergence + torch.logaddexp(z, got["gap.student"])
        # Where no candidate has any mass, there is nothing to learn.
        divergence = temperature**2 * torch.where(whole > MASKED_SCORE / 2, divergence, 0.0)
        return divergence * share[0] if share else divergence

    local = [z, own, each]
    if inputs.label_share is not None:
        local.append(inputs.label_share.to(z.dtype))
    return LossRequest(partials, [student.negatives, _logits(student, found)], finish, local=local)


def _logits(student: View, found: Labels) -> PairScores:
    # The labels' logits of (query, candidate), MASKED_SCORE where there is none. Ids and logits travel with their query
    # as float64, in which ids are exact.
    inputs, table = student.inputs, student.model.entity
    ids = inputs.candidate_ids
    if ids is None:
        ids = torch.arange(table.lo, table.lo + len(table.weight), device=found.entities.device)
    asked = torch.cat([found.entities.double(), found.logits], 1)
    return PairScores(
        inputs.layout, partial(_of_candidates, dtype=student.positive.dtype), asked, ids.double()[:, None]
    )


def _of_candidates(labels: Tensor, rows: Candidates, dtype: torch.dtype) -> Tensor:
    # [Q, n] of [Q, 2k] labels and [n, 1] ascending ids, of which some may be there twice.
    entities, logits = labels.chunk(2, 1)
    ids = plain(rows)[:, 0].contiguous()
    found = logits.new_full((len(labels), len(ids)), MASKED_SCORE, dtype=dtype)
    if not len(ids):
        return found
    at = torch.searchsorted(ids, entities.contiguous()).clamp(max=len(ids) - 1)
    known = torch.where(ids[at] == entities, logits, MASKED_SCORE).to(dtype)
    found.scatter_reduce_(1, at, known, "amax")
    first = torch.searchsorted(ids, ids)
    return found if bool((first[1:] > first[:-1]).all()) else found.index_select(1, first)
