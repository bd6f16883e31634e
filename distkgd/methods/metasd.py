"""MetaSD (Li et al., "Self-Distillation with Meta Learning for Knowledge Graph Completion", Findings of EMNLP 2022).

S, the pruned model, is T, the source model, seen through a mask: the weights are shared. A step is two updates:
T learns from how S, taught by it, does on a quiz (Eq. 4-6); then both learn from the batch and each other (Eq. 7-11).

Differs from the paper:
- Algorithm 1 prunes T anew in every iteration, which would undo Eq. 7 unless weights are shared; so they are, and Eq. 7
  and 11 are one simultaneous step. `prune.every` says how often the mask is made anew; the text says once per epoch.
- In Eq. 4 theta_S is a constant, masked copy: Eq. 6 reaches T through the scores it lends to the KL term alone. Its
  gradient needs no second derivatives of tables: by the chain rule it is that of -lambda times the slope of L_KD along
  the quiz gradient, and of a KL divergence that is a covariance of scores under a softmax (`divergence_slope`).
- Eq. 5 is meant at theta'_S, and Eq. 10's cross-entropy is T's own, as Eq. 8 has it.
- KL divergences are of softmaxes at a temperature, times its square; both directions may be weighed.
- The regulariser joins L_S and L_T. Relation prediction (Chen et al. 2021) joins the cross-entropies of Eq. 7 and 11.
- The quiz set may be drawn anew for every pass over the training triples (`quiz_set`), so that none is lost for good.
- What is validated and saved is pruned anew, at the final rate: it is what would be served.
- S may have few bits: it is T's rows pruned and rounded, zeros as zeros; T keeps full precision. Gradients pass
  straight through the rounding, in Eq. 4-6 too.
Differs from the authors' code:
- It ranks masked queries against unmasked candidates; here both sides are pruned. It selects on test, we on valid.
- Its quiz set is the first 2% of the rows and stays in training; ours is drawn and held out, of one pass or of all.
- It makes an extra step of T alone before each batch, leaks 1e-8 through the mask, and leaves T^2 out:
  its divergences are kl: 0.333, reverse_kl: 0.111, teacher_kl: 0.111, teacher_reverse_kl: 0.333 at temperature 3.
"""

from collections.abc import Iterator, Mapping
from typing import Annotated, Literal

import torch
from pydantic import BeforeValidator, Field, model_validator
from torch import Tensor

from distkgd.config.fields import Count, Frozen, Positive, Rate, Share, Weight, no_flag
from distkgd.config.stage import StageOptions
from distkgd.data.sampling import LeftOut
from distkgd.data.step_inputs import StepInputBuilder, StepInputs
from distkgd.distributed.checkpoint.tables import Rows
from distkgd.distributed.pruning import Mask, Scope, changed
from distkgd.distributed.reductions.loss_requests import LossRequest
from distkgd.distributed.reductions.query_blocks import answer_means
from distkgd.errors import ConfigError, UnsupportedError
from distkgd.methods.base import Method, MethodSettings, MethodState, ParameterGroup, Update
from distkgd.methods.losses.meta_gradient import divergence_slope, gradient_of, model_like
from distkgd.methods.losses.scores import batch_mean, kl_divergence, relation_loss
from distkgd.models.model import Model
from distkgd.models.pruned import keeping_zeros, mask_of, masked_view, pruned, unrounded
from distkgd.models.view import View
from distkgd.scorers import Scorer, scorer_class

Part = Annotated[float, BeforeValidator(no_flag), Field(ge=0, le=1)]


class PruneConfig(Frozen):
    """Magnitude pruning (sec. 2.1 of MetaSD): numbers of least magnitude are masked, and may come back.

    rate: share that goes; 0: no pruning. scope: over both tables together ("global"), each "table", each "row", or
    whole columns of the entity table by their norm ("column"): then the finished model has as many fewer.
    ramp: epochs over which the rate rises to its final value, fast first (Zhu & Gupta 2017, Eq. 1); 0: it stands.
    every: steps between two prunings; 0: one at the start of every epoch.
    """

    rate: Share = 0.9
    scope: Scope = "global"
    ramp: Count = 0
    every: Count = 0


class MetasdConfig(MethodSettings):
    """MetaSD (Li et al., EMNLP 2022). `dim` is that of the source model.

    alpha, beta: share of the labels, against that of the other model, in the losses of S (Eq. 3) and T (Eq. 10).
    kl, reverse_kl: weights of KL(S || T) and KL(T || S) in what S learns from T (the paper: 1 and 0, Eq. 2);
    teacher_kl, teacher_reverse_kl: the same two in what T learns from S (Eq. 9).
    temperature: of the softmaxes in them.
    relation_weight: of the cross-entropy of the relation, given head and tail; bilinear scorers only.
    meta: T learns from the quiz (Eq. 4-6); off: no quiz set is held out. virtual_lr: lambda of Eq. 4.
    meta_lr, meta_optimizer: mu of Eq. 6, and its optimiser (the equation: sgd; the experiments: adagrad).
    quiz: share of the training triples that is held out as quiz set. quiz_batch: of which this many make one quiz.
    quiz_set: "fixed" as in the paper, or drawn "anew" for every epoch, so that no triple is lost to training for good.
    """

    prune: PruneConfig = PruneConfig()
    alpha: Part = 0.5
    beta: Part = 0.5
    kl: Weight = 1.0
    reverse_kl: Weight = 0.0
    teacher_kl: Weight = 1.0
    teacher_reverse_kl: Weight = 0.0
    temperature: Rate = 3.0
    relation_weight: Weight = 0.0
    meta: bool = True
    virtual_lr: Rate = 0.1
    meta_lr: Rate = 1e-4
    meta_optimizer: Literal["sgd", "adagrad"] = "adagrad"
    quiz: Share = 0.02
    quiz_batch: Positive = 500
    quiz_set: Literal["fixed", "anew"] = "fixed"

    @model_validator(mode="after")
    def _has_labels_and_a_way_to_the_teacher(self) -> "MetasdConfig":
        if not self.alpha and not self.beta:
            raise ValueError("alpha: 0 and beta: 0 leave nothing to learn from the labels; raise one of them")
        if self.meta and (self.alpha == 1 or not (self.kl or self.reverse_kl)):
            raise ValueError(
                "meta: true reaches the source model through what the pruned one learns from it: set alpha below 1 and "
                "kl or reverse_kl above 0, or meta: false"
            )
        if self.meta and not self.quiz:
            raise ValueError("meta: true needs a quiz set: set quiz above 0, or meta: false")
        return self

    @property
    def left_out(self) -> LeftOut:
        return LeftOut(self.quiz, self.quiz_set == "anew") if self.meta else LeftOut()

    def check(self, stage: StageOptions) -> None:
        if stage.accumulate > 1:
            raise UnsupportedError(
                f"metasd cannot cut its batch (accumulate: {stage.accumulate}): its virtual step needs all of it"
            )
        if 16 in (stage.bits, stage.relation_bits):
            raise UnsupportedError("metasd prunes, and has no file for zeros among 16 bits: use 8 bits or fewer, or 32")
        if stage.group is not None and self.prune.scope == "column":
            raise UnsupportedError("distill.prune.scope: column leaves other columns than share a step: drop group")
        kind = scorer_class(stage.scorer)
        if self.prune.scope == "column" and kind.biases:
            raise UnsupportedError(
                f"distill.prune.scope: column cannot prune {stage.scorer}, which has biases; use global, table or row"
            )
        if self.relation_weight and kind.relation_query is Scorer.relation_query:
            raise UnsupportedError(f"metasd.relation_weight needs a bilinear scorer, not {stage.scorer}; set it to 0")
        if not self.meta:
            return
        if stage.balanced or stage.negatives.labels == "known":
            raise UnsupportedError(
                "metasd with meta: true holds triples out of training, which neither balanced: true nor labels: known "
                "allow for; use meta: false, or leave them out"
            )
        if kind(kind.dim_multiple, margin=stage.margin, norm=stage.norm).candidate_form != "dot":
            raise UnsupportedError(
                f"metasd with meta: true needs a bilinear scorer, not {stage.scorer}; use meta: false"
            )


class MetaSD(Method[MetasdConfig]):
    """The student is T; S is seen through `mask`. Group "student" takes mutual steps, group "meta" quiz steps."""

    name = "metasd"
    Settings = MetasdConfig
    num_teachers = range(1)

    def prepare(self) -> None:
        tables = self.student.entity.weight, self.student.relation
        self.mask = Mask(*(torch.ones_like(table, dtype=torch.bool) for table in tables))
        # Of few bits, S is what is seen rounded, zeros as zeros; T is the master rows.
        self.source = unrounded(self.student)
        small = keeping_zeros(self.student) if self.settings.prune.rate else self.student
        self.small = masked_view(small, self.mask)
        self.pruned_at = -1
        self.masked, self.churn = 0.0, 0.0  # shares of all numbers: hidden; shown or hidden anew by the last pruning
        if self.settings.meta:
            self.quiz_inputs()  # what cannot be drawn is refused now

    @property
    def output_model(self) -> Model:
        how = self.settings.prune
        return pruned(self.student, mask_of(self.student, how.rate, how.scope)) if how.rate else self.student

    @property
    def groups(self) -> Mapping[str, ParameterGroup]:
        how, found = self.settings, {"student": ParameterGroup(self.student)}
        if how.meta:
            optimizer = {"name": how.meta_optimizer, "lr": how.meta_lr, "relation_lr": None}
            found["meta"] = ParameterGroup(self.student, optimizer=optimizer)
        return found

    def state(self) -> MethodState:
        table = self.student.entity
        rows = {"entity_mask": Rows(self.mask.entity, table.lo, table.total)}
        values = {"pruned_at": self.pruned_at, "masked": self.masked, "churn": self.churn}
        return MethodState(values, rows, {"relation_mask": self.mask.relation})

    def restore(self, values: Mapping[str, float]) -> None:
        self.pruned_at = int(values["pruned_at"])
        self.masked, self.churn = values.get("masked", 0.0), values.get("churn", 0.0)

    def logged(self, step: int) -> Mapping[str, float | Tensor]:
        return {"mask/hidden": self.masked, "mask/churn": self.churn} if self.settings.prune.rate else {}

    def updates(self, inputs: StepInputs) -> Iterator[Update]:
        self.prune(inputs.batch.step)
        if self.settings.meta:
            quizzes = self.quiz_inputs()
            quiz = quizzes.inputs(*quizzes.parts(inputs.batch.step, 1))
            yield Update(frozenset({"meta"}), {"quiz": self._meta(inputs, quiz)})
        # Eq. 7 and 11 in one step.
        small, source = self.task.view(self.small, inputs, grad=True), self.task.view(self.source, inputs, grad=True)
        asks = self._asks(small, source) | self._asks(small, source, teacher=True)
        terms = answer_means(asks, inputs.batch.num_queries) | self.task.penalty(small)
        terms |= {f"teacher_{name}": value for name, value in self.task.penalty(source).items()}
        how = self.settings
        if how.relation_weight:
            for name, view, part in (("relation", small, how.alpha), ("teacher_relation", source, how.beta)):
                terms[name] = part * how.relation_weight * batch_mean(relation_loss(view), inputs)
        yield Update(frozenset({"student"}), terms)

    def prune(self, step: int) -> None:
        """Make the mask anew if that is due at `step`; all ranks call it."""
        how = self.settings.prune
        if not how.rate:
            return
        per_epoch = self.setup.steps_per_epoch
        due = step - step % (how.every or per_epoch)
        if due == self.pruned_at:
            return
        # Zhu & Gupta 2017, Eq. 1
        missing = max(0.0, 1.0 - due / (how.ramp * per_epoch)) if how.ramp else 0.0
        found = mask_of(self.student, how.rate * (1.0 - missing**3), how.scope)
        self.masked, self.churn = changed(self.mask, found, self.student.entity.ranks)
        self.mask.entity.copy_(found.entity)
        self.mask.relation.copy_(found.relation)
        self.pruned_at = due

    def quiz_inputs(self) -> StepInputBuilder:
        """What a quiz is made of."""
        input_builder = self.setup.input_builder
        size = min(self.settings.quiz_batch, input_builder.sampler.num_left_out)
        unit = input_builder.chunk if input_builder.kind == "chunk" else 1
        if size < unit:
            raise ConfigError(
                f"distill.quiz and distill.quiz_batch make quizzes of {size} triples, fewer than negatives.chunk "
                f"({unit}); raise them, or lower the chunk."
            )
        return input_builder.quizzes(size)

    def _asks(self, small: View, source: View, teacher: bool = False) -> dict[str, tuple[float, LossRequest]]:
        # Eq. 1-3 for S, Eq. 8-10 for the teacher T; the other one's scores are constants.
        how = self.settings
        labels, kl, reverse_kl = how.alpha, how.kl, how.reverse_kl
        if teacher:
            labels, kl, reverse_kl = how.beta, how.teacher_kl, how.teacher_reverse_kl
        there = kl_divergence(source, small, how.temperature, stop_student=not teacher, stop_teacher=teacher)
        back = kl_divergence(small, source, how.temperature, stop_student=teacher, stop_teacher=not teacher)
        asks = {
            "hard": (labels, self.task.request(source if teacher else small)),
            "kl": ((1 - labels) * kl, there),
            "reverse_kl": ((1 - labels) * reverse_kl, back),
        }
        return {("teacher_" if teacher else "") + name: ask for name, ask in asks.items() if ask[0]}

    def _meta(self, inputs: StepInputs, quiz: StepInputs) -> Tensor:
        # [] the quiz loss of Eq. 5 (this rank's share), with the gradient of Eq. 6 towards T.
        how, task = self.settings, self.task
        virtual = self._virtual(inputs)
        ask = task.request(task.view(virtual, quiz, grad=True, dropped=False))
        loss = answer_means({"quiz": (1.0, ask)}, quiz.batch.num_queries)["quiz"]
        loss.backward()
        pull = gradient_of(virtual)
        pull.entity.weight.mul_(self.mask.entity)
        pull.relation.mul_(self.mask.relation)
        small, way = (task.view(model, inputs, grad=False, dropped=True) for model in (self.small, pull))
        source = task.view(self.source, inputs, grad=True, dropped=False)
        weight = -how.virtual_lr * (1 - how.alpha)
        ask = divergence_slope(small, way, source, how.temperature, how.kl, how.reverse_kl)
        slope = answer_means({"": (weight, ask)}, inputs.batch.num_queries)[""]
        return slope - slope.detach() + loss.detach()

    def _virtual(self, inputs: StepInputs) -> Model:
        # Eq. 4: theta'_S, on tables of its own; T's scores are constants.
        student, mask = self.student, self.mask
        table = student.entity
        relation = student.relation.detach().clone().requires_grad_()
        copy = model_like(self.small, table.weight, relation, mask, rounded=True)
        view = self.task.view(copy, inputs, grad=True)
        asks = self._asks(view, self.task.view(self.source, inputs, grad=False))
        terms = answer_means(asks, inputs.batch.num_queries) | self.task.penalty(view)
        torch.stack(list(terms.values())).sum().backward()
        gradient = gradient_of(copy)
        lr = self.settings.virtual_lr
        with torch.no_grad():
            weight = gradient.entity.weight.mul_(-lr).add_(table.weight * mask.entity)
            relation = gradient.relation.mul_(-lr).add_(student.relation * mask.relation)
        return model_like(self.small, weight, relation.requires_grad_(), rounded=True)
