"""MED: one croppable model, whose first d columns are a model of their own for every d of a list (Zhu et al., ACL 2025,
"Croppable Knowledge Graph Embedding").

No code of the authors exists, and the formulas reached us second-hand (summaries and reviews of the paper).

Differs from the paper:
- Sums over T and T^- become means: over the batch's queries, and for each over its negatives.
- MED[EI]: pos^i = exp(w1 / s) misorders scores of different signs and blows up near 0. Ours is monotone, the softmax
  over the global batch of -w1 sigmoid(s) (`positives: sigmoid`, bounded) or of -w1 s (`positives: score`). neg^i is
  normalised over each query's own negatives, as RotatE's self-adversarial weights are, not over the batch's. The lower
  model's scores are detached in both; w1 and w2 learn.
- With loss softmax, L_EI of a query is its cross-entropy, weighed by pos^i; there is no neg^i (our listwise form).
- MED[DLW]: exp(w3 d_i / d_n) is divided by its mean over the sub-models. Left alone, the loss that w3 scales drives it
  to minus infinity; so it can only move weight from one sub-model to another.
- w1, w2, w3 stay within bounds: low + (high - low) sigmoid(u), and u learns.
- In place of MED[DLW] the sub-models' weights can be given (`weights`).
- A sub-model may have sharper logits than its scores (`sharpness`): where few columns have to make a whole model's
  logits, they grow until those added to them find nothing left to learn. No crop's ranks change by it.
- The paper names no regulariser. Every sub-model has its own here, times its weight as its loss is: a column is
  regularised with the weights of all sub-models that have it (DURA's queries are those of the whole model). Small ones
  can be regularised more (`small_regulariser`).
- The numbers of an entity can be croppable too (`bits`): the top b bits of every code are a model's. A step sees all
  sub-models in one of the widths, by turns of the step's number, so it costs what it does without.
Differs from the authors' code: none was released.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import BeforeValidator, model_validator
from torch import Tensor

from distkgd.common.metrics import crop_metric
from distkgd.config.fields import Positive, Rate, Real, Weight
from distkgd.config.stage import PackedBits, StageOptions
from distkgd.data.step_inputs import StepInputs
from distkgd.distributed.reductions.batch import batch_softmax
from distkgd.distributed.reductions.candidate_layout import MASKED_SCORE, PairScores, valid_mask
from distkgd.distributed.reductions.loss_requests import LossRequest
from distkgd.distributed.reductions.partials import LogSumExp, Partial, SoftmaxMean, Sum
from distkgd.distributed.reductions.query_blocks import answer_means
from distkgd.errors import UnsupportedError
from distkgd.kernels import nested
from distkgd.kernels.nested_products import Products
from distkgd.methods.base import Curve, KnownCurve, Method, MethodSettings, ParameterGroup, Update
from distkgd.methods.losses.scores import huber
from distkgd.models.nested_scores import NestedScores, check_dims
from distkgd.scorers import Scorer, build_scorer


def _span(value: Any) -> Any:
    # {from: 10, to: 640, step: 10} -> 10, 20, …, 640
    if not isinstance(value, Mapping):
        return value
    if set(value) != {"from", "to", "step"} or not all(type(x) is int and x > 0 for x in value.values()):
        raise ValueError(f"a span of dims has whole numbers from, to and step above 0 (given: {dict(value)})")
    if (value["to"] - value["from"]) % value["step"]:
        raise ValueError(f"steps of {value['step']} from {value['from']} do not lead to {value['to']}")
    return tuple(range(value["from"], value["to"] + 1, value["step"]))


class MedConfig(MethodSettings):
    """MED (Zhu et al., ACL 2025): every crop of a list is a model, all trained at once.

    dims: those of the sub-models, ascending, the last one the stage's; or {from: 10, to: 640, step: 10}. None: eighths
        of the stage's dim.
    bits: ascending widths of an entity's numbers, each the top bits of the next, in place of the stage's bits: every
        dim in every width is a model. Step s trains all dims in width s mod len(bits).
    mutual: neighbours teach each other (MED[ML]). mutual_weight: factor on that (the paper's is 1).
        mutual_delta: of its Huber distance.
    evolution: what the next smaller sub-model gets wrong weighs more (MED[EI]); off: all triples weigh the same.
    positives: what of the smaller model's score of a positive triple counts, its sigmoid or the score itself.
    dynamic: larger sub-models attend more to the labels (MED[DLW]); off: all the same.
    weights: of the sub-models, in place of the dynamic ones, which have to be off; only their ratios count. A column
        mostly serves the sub-models whose weights are the largest among those that have it.
    small_regulariser: what the regulariser of a sub-model of hardly a dim weighs beside the largest's; linear between.
    sharpness: p in the factor (D / d)^p of the logits of a sub-model of d of D numbers, and of its regulariser, as if
        its columns had grown instead; 0: all alike, as in the paper. Loss softmax only.
    w1, w2, w3: bounds of the learned exponents, for positives, negatives and dims; w: where they start, if it is within
        the bounds, or else in their middle. Below 0 w3 gives small sub-models more weight than large ones.
    evaluator_lr: how fast they learn.
    select: validation picks the rows with the best "mean" MRR of all sub-models, or that of the "largest".
    """

    dims: Annotated[
        tuple[Positive, ...] | None,
        BeforeValidator(_span, json_schema_input_type=tuple[Positive, ...] | dict[str, Positive] | None),
    ] = None
    bits: tuple[PackedBits, ...] | None = None
    mutual: bool = True
    mutual_weight: Rate = 1.0
    mutual_delta: Rate = 1.0
    evolution: bool = True
    positives: Literal["sigmoid", "score"] = "sigmoid"
    dynamic: bool = True
    weights: tuple[Rate, ...] | None = None
    small_regulariser: Rate = 1.0
    sharpness: Weight = 0.0
    w: Real = 1.0
    w1: tuple[Real, Real] = (0.25, 4.0)
    w2: tuple[Real, Real] = (0.25, 4.0)
    w3: tuple[Real, Real] = (0.0, 4.0)
    evaluator_lr: Rate = 0.01
    select: Literal["mean", "largest"] = "mean"

    @model_validator(mode="after")
    def _has_sub_models_and_bounds(self) -> "MedConfig":
        if self.dims is not None and len(self.dims) < 2:
            raise ValueError(f"dims {list(self.dims)}: med needs two sub-models at least; one alone is method scratch")
        if self.bits is not None and (len(self.bits) < 2 or any(a >= b for a, b in pairwise(self.bits))):
            raise ValueError(f"bits {list(self.bits)} must ascend, two at least; one width alone is the stage's bits")
        if self.weights is not None and self.dynamic:
            raise ValueError("weights replace the dynamic ones; set dynamic: false beside them")
        for name in ("w1", "w2", "w3"):
            low, high = getattr(self, name)
            if not low < high:
                raise ValueError(f"{name} holds its bounds, lowest first (given: [{low}, {high}])")
        return self

    @property
    def nested_bits(self) -> tuple[int, ...]:
        return self.bits or ()

    def check(self, stage: StageOptions) -> None:
        scorer = build_scorer(stage.scorer, stage.dim, stage.margin, stage.norm)
        dims = sub_dims(self, scorer)
        if dims[-1] != stage.dim:
            raise ValueError(f"distill.dims ends with {dims[-1]}; it must end with the stage's dim {stage.dim}")
        if len(dims) < 2:
            raise ValueError(f"med needs two sub-models at least, and dim {stage.dim} makes one; use method scratch")
        check_dims(scorer, dims)
        if self.bits:
            _check_bits(stage, dims)
        if self.weights is not None and len(self.weights) != len(dims):
            raise ValueError(
                f"distill.weights has {len(self.weights)} numbers; it must have one for each of {len(dims)} dims"
            )
        if stage.loss.name == "margin":
            raise UnsupportedError(
                "med weighs binary or softmax losses; loss margin has no positive and negative part to weigh."
            )
        if self.sharpness and stage.loss.name != "softmax":
            raise UnsupportedError(
                f"distill.sharpness: {self.sharpness} is of loss softmax, not of {stage.loss.name}; set it to 0"
            )
        if stage.loss.label_smoothing or stage.negatives.labels == "known":
            raise ValueError("med has no label_smoothing and no labels: known; set them to 0 and one")
        if stage.bf16:
            raise ValueError("med adds scores up block by block, for which bf16 is too coarse; set bf16: false")
        if self.evolution and stage.accumulate > 1:
            raise ValueError(
                "med's evolution weighs positives over the whole batch, which cannot be cut into accumulate "
                f"{stage.accumulate} parts; set accumulate: 1 or distill.evolution: false"
            )


def _check_bits(stage: StageOptions, dims: Sequence[int]) -> None:
    if stage.bits < 32:
        raise ValueError(
            f"distill.bits are widths of the numbers that bits {stage.bits} is one of; drop one of the two"
        )
    if stage.row_dtype != "full":
        raise ValueError("distill.bits are rounded from rows in full precision; drop row_dtype, or distill.bits")
    torn = [str(dim) for dim in dims if stage.group is not None and dim % stage.group]
    if torn:
        raise ValueError(f"group: {stage.group} columns that share a step do not divide dims {', '.join(torn)}")


def sub_dims(settings: MedConfig, scorer: Scorer) -> tuple[int, ...]:
    """Ascending dims of the sub-models of a model of `scorer`."""
    if settings.dims is not None:
        return settings.dims
    unit = scorer.dim_multiple
    return tuple(sorted({unit * math.ceil(scorer.dim * part / 8 / unit) for part in range(1, 9)}))


class Med(Method[MedConfig]):
    """sum of L_ML of neighbours + sum of dynamic weight * L_EI of each sub-model; no teacher."""

    name = "med"
    Settings = MedConfig
    num_teachers = range(1)

    def prepare(self) -> None:
        self.dims = sub_dims(self.settings, self.student.scorer)
        self.crops = NestedScores(self.student.scorer, self.dims)
        self.turns = [self.student.in_bits(bits) for bits in self.settings.nested_bits] or [self.student]
        relation = self.student.relation
        low, high = torch.tensor([self.settings.w1, self.settings.w2, self.settings.w3], dtype=torch.float64).T
        start = torch.full_like(low, self.settings.w)
        start = torch.where((low < start) & (start < high), start, (low + high) / 2)
        place = torch.logit((start - low) / (high - low))
        self._low, self._span, self.u = (x.to(relation) for x in (low, high - low, place))
        shares = [dim / self.dims[-1] for dim in self.dims]
        self._shares = torch.tensor(shares, device=relation.device, dtype=relation.dtype)
        self.sharp = self._shares**-self.settings.sharpness
        more = (1.0 + (self.settings.small_regulariser - 1.0) * (1.0 - self._shares)) * self.sharp
        self._regularised = [x.to(relation) * more.unsqueeze(1) for x in self.crops.members()]

    @property
    def groups(self) -> Mapping[str, ParameterGroup]:
        how, found = self.settings, {"student": ParameterGroup(self.student)}
        if how.evolution or how.dynamic:
            found["evaluators"] = ParameterGroup(tensors={"u": self.u}, optimizer={"lr": how.evaluator_lr})
        return found

    def logged(self, step: int) -> Mapping[str, float | Tensor]:
        return {"w": self.w.detach()} if "evaluators" in self.groups else {}

    @property
    def w(self) -> Tensor:
        """[3]: w1, w2, w3, within their bounds."""
        return self._low + self._span * torch.sigmoid(self.u)

    def updates(self, inputs: StepInputs) -> Iterator[Update]:
        seen = self.turns[inputs.batch.step % len(self.turns)]
        view = self.task.view(seen, inputs, grad=True)
        queries = self.crops.queries(inputs.batch.queries, self.student.reciprocal, *view.dropped)
        if self.task.loss != "self_adversarial" and self.crops.has_products(queries, inputs.layout):
            field = PairScores(inputs.layout, self.crops.products, queries, view.negatives.rows)
        else:
            field = PairScores(
                inputs.layout, self.crops.score_candidates, queries, view.negatives.rows, len(self.crops.dims)
            )
        own = self.crops.score_own_answers(queries, view.answer)
        w = self.w
        dynamic = self.dynamic_weights(w[2])
        sums = _Sums(self, w)
        asks = {"evolution": (1.0, self._evolution(field, own, inputs, sums, dynamic))}
        if self.settings.mutual:
            asks["mutual"] = self.settings.mutual_weight, self._mutual(field, own, sums)
        terms = answer_means(asks, inputs.batch.num_queries)
        entity, relation = (dynamic.detach() @ x for x in self._regularised)
        penalty = self.task.penalty(view, (entity, relation))
        yield Update(frozenset(self.groups), terms | penalty)

    def validate(self, evaluate: Callable[[], dict[str, float]], curve: KnownCurve) -> dict[str, float]:
        found = {
            crop_metric(dim, bits): one
            for bits in self.settings.nested_bits or (None,)
            for dim, one in curve(self.dims, "valid", bits).items()
        }
        every = list(found.values())  # the largest is last
        chosen = every if self.settings.select == "mean" else every[-1:]
        means = {name: sum(one[name] for one in chosen) / len(chosen) for name in chosen[0]}
        return means | {name: one["mrr"] for name, one in found.items()}

    def report(self, curve: Curve, splits: Sequence[str]) -> dict[str, Any]:
        widths = self.settings.nested_bits
        if not widths:
            return {"curve": {split: curve(self.dims, split) for split in splits}}
        found = {split: {bits: curve(self.dims, split, bits) for bits in widths} for split in splits}
        return {"curve": {split: of_bits[widths[-1]] for split, of_bits in found.items()}, "bits_curve": found}

    @property
    def listwise(self) -> bool:
        """Whether a query's candidates share one cross-entropy."""
        return self.task.loss == "softmax"

    def has_kernel(self, contributions: Tensor) -> bool:
        """Whether a kernel sums such contributions: of all losses at once."""
        return self.crops.form == "sum" and self.task.loss != "self_adversarial" and nested.available(contributions)

    def dynamic_weights(self, w3: Tensor) -> Tensor:
        """[P]: exp(w3 d_i / d_n), or those given, or ones; divided by their mean (MED[DLW])."""
        if self.settings.weights is not None:
            given = self._shares.new_tensor(self.settings.weights)
            return given / given.mean()
        if not self.settings.dynamic:
            return torch.ones_like(self._shares)
        return torch.softmax(w3 * self._shares, 0) * len(self._shares)

    def positive_weights(self, own: Tensor, w1: Tensor, inputs: StepInputs) -> Tensor:
        """[P, Q]: weight of each query's positive triple for each sub-model, 1 on average over the global batch.

        own: [P, Q] scores. pos^i of MED[EI], from the next smaller sub-model; the smallest has none and weighs evenly.
        """
        if not self.settings.evolution:
            return torch.ones_like(own)
        lower = own[:-1].detach()
        lower = torch.sigmoid(lower) if self.settings.positives == "sigmoid" else lower
        shares = batch_softmax(lower, -w1, inputs.layout.ranks)
        return torch.cat([torch.ones_like(own[:1]), shares * inputs.batch.num_queries])

    def negative_logits(self, scores: Tensor, w2: Tensor) -> Tensor:
        """[P, ..., Q, n]: log of neg^i of MED[EI], not normalised, for sub-models' scores [P, ..., Q, n].

        Without a smaller sub-model or evolution, those of the stage's own loss: self-adversarial or even.
        """
        even = (1.0 - valid_mask(scores[:1].detach())) * MASKED_SCORE
        adversarial = self.task.loss == "self_adversarial"
        if not self.settings.evolution:
            return self.task.temperature * scores.detach() if adversarial else even.expand_as(scores)
        first = self.task.temperature * scores[:1].detach() if adversarial else even
        # Where a pair does not count it stays so, however small w2 is.
        lower = w2 * scores[:-1].detach()
        return torch.cat([first, torch.where(even == 0, lower, MASKED_SCORE)])

    def _evolution(
        self, field: PairScores, own: Tensor, inputs: StepInputs, sums: "_Sums", dynamic: Tensor
    ) -> LossRequest:
        # MED[EI]: [Q] of a query's sub-models, each with its dynamic weight, of [P].
        w1, w2, _ = sums.w.unbind()
        scores = self.crops.scores(own)
        positives = self.positive_weights(scores, w1, inputs)
        mine = scores.T, positives.T, dynamic.unsqueeze(1).expand_as(scores).T

        def listed(got: dict[str, Tensor], scores: Tensor, positives: Tensor, dynamic: Tensor) -> Tensor:
            logits = scores.T * self.sharp.unsqueeze(1)
            loss = torch.logaddexp(logits, got["lse"]) - logits
            return (dynamic.T * positives.T * loss).sum(0)

        def averaged(got: dict[str, Tensor], scores: Tensor, positives: Tensor, dynamic: Tensor) -> Tensor:
            negative = got["mean"] * (got["count"] if self.task.loss == "bce" else 1.0)
            return (dynamic.T * (positives.T * F.softplus(-scores.T) + negative)).sum(0)

        finish = listed if self.listwise else averaged
        return LossRequest(sums.evolution, [field], finish, local=mine, parameters=() if self.listwise else (w2,))

    def _mutual(self, field: PairScores, own: Tensor, sums: "_Sums") -> LossRequest:
        # MED[ML]: [Q] Huber distances of neighbours' scores, of the positive triple and averaged over the negatives.
        def finish(got: dict[str, Tensor], positive: Tensor) -> Tensor:
            return (got["gap"] / got["count"].clamp(min=1.0)).sum(0) + positive

        steps = self.crops.steps(own, self.crops.scores(own))
        positive = huber(steps, self.settings.mutual_delta).sum(0)
        return LossRequest(
            sums.mutual, [field], finish, local=(positive,), parameters=() if self.listwise else (sums.w[1],)
        )


class _Sums:
    """The partial sums of both losses over a block of contributions, made together and by a kernel, if one can."""

    def __init__(self, method: Med, w: Tensor) -> None:
        self.method, self.w = method, w
        self._kept: tuple[Tensor | Products, dict[str, Partial]] | None = None  # a block, and what L_ML needs of it

    def evolution(self, block: Tensor | Products, *w2: Tensor) -> dict[str, Partial]:
        """What L_EI needs; w2 unless listwise. What L_ML needs of the same block is kept until it asks."""
        made = self._made(block, *w2)
        if self.method.settings.mutual:
            self._kept = block, {"gap": made["gap"], "count": made["count"]}
        return {name: made[name] for name in (("lse",) if self.method.listwise else ("mean", "count"))}

    def mutual(self, block: Tensor | Products, *w2: Tensor) -> dict[str, Partial]:
        """What L_ML needs of the block that `evolution` was given last."""
        kept, self._kept = self._kept, None
        if kept is None or kept[0] is not block:
            raise AssertionError("both losses ask of each block, evolution first")
        return kept[1]

    def _made(self, block: Tensor | Products, *w2: Tensor) -> dict[str, Partial]:
        method, mutual = self.method, self.method.settings.mutual
        made: dict[str, Partial] = {}
        if mutual or not method.listwise:
            made["count"] = Sum(
                block.count().unsqueeze(-1) if isinstance(block, Products) else valid_mask(block[0].detach())
            )
        if isinstance(block, Products) or method.has_kernel(block):
            lse, *mean, gap = (x.unsqueeze(-1) for x in self._by_kernel(block, *w2))
            made |= {"mean": SoftmaxMean(lse, *mean)} if mean else {"lse": LogSumExp(lse)}
            return made | ({"gap": Sum(gap[1:])} if mutual else {})
        z = method.crops.scores(block)
        if method.listwise:
            made["lse"] = LogSumExp(z * method.sharp.reshape(-1, *[1] * (z.dim() - 1)))
        else:
            made["mean"] = SoftmaxMean(method.negative_logits(z, *w2), F.softplus(z))
        if mutual:
            made["gap"] = Sum(huber(method.crops.steps(block, z), method.settings.mutual_delta))
        return made

    def _by_kernel(self, block: Tensor | Products, *w2: Tensor) -> tuple[Tensor, ...]:
        # [P, ...] each: lse, mean unless listwise, gap.
        method, how = self.method, self.method.settings
        given = method.student.scorer.margin, how.mutual_delta, how.mutual
        if isinstance(block, Products):
            if method.listwise:
                return block.listwise(*given, method.sharp)
            return block.pointwise(*given, how.evolution, *w2)
        if method.listwise:
            return nested.listwise(block, *given, method.sharp)
        return nested.pointwise(block, *given, how.evolution, *w2)
