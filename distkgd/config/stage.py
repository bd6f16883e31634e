"""The config of one stage, but for what its method makes of it (`distkgd.pipeline.config`)."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, model_validator

from distkgd.config.fields import Count, Factor, Frozen, Positive, Rate, Real, Share, Weight, no_flag

Bits = Annotated[Literal[1, 2, 3, 4, 8, 16, 32], BeforeValidator(no_flag)]

PackedBits = Annotated[Literal[1, 2, 3, 4, 8], BeforeValidator(no_flag)]

FewBits = Annotated[Literal[1, 2, 3, 4, 8, 16], BeforeValidator(no_flag)]


class NegativesConfig(Frozen):
    """What a positive triple's answer is compared with.

    kind: "all" entities; `num` drawn per "batch", per "chunk" of triples, or per "triple".
    num: how many are drawn. chunk: how many triples share them, with kind "chunk".
    sides: ask for "both" ends of every triple, or for one end drawn "uniform"ly or by "bernoulli" statistics.
    anchors: with kind "triple", how many anchors are drawn for each query beside its candidates, each of which meets
        num / anchors of these: both ends of a negative are replaced (as many as num: `double_neg` of Chami et al.
        2020's code). 0: negatives keep the query's anchor.
    filtered: leave out candidates that are known training answers of the query.
    labels: with kind "all", "known" makes it k-vs-all: all training answers of a query are its labels.
    """

    kind: Literal["all", "batch", "chunk", "triple"] = "all"
    num: Positive = 4096
    chunk: Positive = 64
    sides: Literal["both", "uniform", "bernoulli"] = "both"
    anchors: Count = 0
    filtered: bool = False
    labels: Literal["one", "known"] = "one"

    @model_validator(mode="after")
    def _labels_need_all(self) -> "NegativesConfig":
        if self.labels == "known" and self.kind != "all":
            raise ValueError(f"labels: known (k-vs-all) needs kind: all, not kind: {self.kind}")
        return self

    @model_validator(mode="after")
    def _anchors_are_of_one_triple(self) -> "NegativesConfig":
        if self.anchors and (self.kind != "triple" or self.filtered):
            given = f"kind: {self.kind}" if self.kind != "triple" else "filtered: true"
            raise ValueError(f"anchors are drawn for each triple: they need kind: triple, filtered: false, not {given}")
        if self.anchors and self.num % self.anchors:
            raise ValueError(f"num {self.num} must be a multiple of anchors {self.anchors}")
        return self


class LossConfig(Frozen):
    """The hard-label loss of a stage (see `distkgd.methods.losses.scores`).

    name: softmax (cross-entropy), bce (summed over candidates), softplus (negatives averaged per query),
        self_adversarial (negatives weighed by their own scores), margin (hinge, averaged).
    temperature: of the self-adversarial weights; margin: of the hinge.
    label_smoothing: share of the label mass spread over all candidates (softmax and bce).
    """

    name: Literal["softmax", "bce", "softplus", "self_adversarial", "margin"] = "softmax"
    temperature: Rate = 1.0
    margin: Rate = 1.0
    label_smoothing: Share = 0.0


class RegulariserConfig(Frozen):
    """Penalty on the embeddings of a batch.

    name: n2, n3 (Lacroix et al. 2018) or dura (Zhang et al. 2020). weight: factor on it.
    relation_weight: factor on the relations' part of n2 and n3; default: weight.
    """

    name: Literal["none", "n2", "n3", "dura"] = "none"
    weight: Weight = 0.0
    relation_weight: Weight | None = None

    @model_validator(mode="after")
    def _dura_has_one_weight(self) -> "RegulariserConfig":
        if self.name == "dura" and self.relation_weight is not None:
            raise ValueError("dura weighs queries, not relations: drop relation_weight, or use n2 or n3")
        return self


class OptimizerConfig(Frozen):
    """Row optimiser of the entity table and dense optimiser of everything else.

    name: rowwise_adagrad keeps one number per row, adam moves only rows that a step touches.
    lr: learning rate. relation_lr: that of relations and other small parameters; default: lr.
    clip: largest global gradient norm; 0 leaves gradients alone.
    offload: keep the rows' optimiser state in host memory.
    """

    name: Literal["sgd", "adagrad", "rowwise_adagrad", "adam"] = "adagrad"
    lr: Rate = 0.1
    relation_lr: Rate | None = None
    clip: Weight = 0.0
    offload: bool = False


class ScheduleConfig(Frozen):
    """Learning rate over the stage; over each phase of a method that has several (dualde).

    name: constant, linear, cosine, or plateau, which waits for validation. final: linear and cosine end at so many
        times the learning rate. factor: plateau multiplies by it. patience: after so many validations without a better
        MRR.
    """

    name: Literal["constant", "linear", "cosine", "plateau"] = "constant"
    final: Weight = 0.0
    factor: Factor = 0.5
    patience: Positive = 2


class StageOptions(Frozen):
    """One training run: one student, one method.

    scorer: the scoring function (`distkgd.scorers`). method: how it is trained (`distkgd.methods`); without a teacher
        scratch, dml, med or metasd. Both may be of another package, `package.module:Class` or an entry point.
    distill: the method's options.
    dim: real coordinates per entity; some scorers add a bias.
    bits: of each number of an entity row that the student may use: 1, 2, 3, 4, 8, 16 (bfloat16) or 32. Below 32 it is
        trained through the rounding, and saved packed (`distkgd.kernels.quantiser`). relation_bits: of the relations'
        numbers. group: columns of an entity row that share a step; default: all of a row.
    margin, norm: constants of distance scorers; default: the scorer's.
    reciprocal: head queries are tail queries of an inverse relation (two relation rows each).
    init_scale: standard deviation or half-width of the initial entity rows; default: the scorer's.
    start: the student's first rows: random, or from its first teacher, which must have the same scorer: crop, its
        first `dim` columns, or pca, its rows along their `dim` principal axes (`distkgd.models.init_from_teacher`).
    first_rows: folder of a finished model of the same entities, relations, scorer and dim, at whose rows the student
        begins (`distkgd.pipeline.autoconfig.update`); null: as `start` says. old_rows: those of entities and
        relations that were there before the graph grew are trained like the others (free), pulled back
        (anchored), or not moved at all (frozen). anchor: weight of the loss term anchor / 2 · |row - first row|².
    epochs: passes over the training triples.
    batch_size: triples in the global batch. accumulate: parts into which each batch is cut to save memory.
    dropout, relation_dropout: on the query's anchor and relation embeddings.
    bf16: score candidates in bfloat16; rows stay in full precision.
    row_dtype: bfloat16 stores entity rows in half the memory and rounds their updates stochastically.
    move: what travels between ranks: candidate "rows" to the queries, "queries" to the candidates, or "nothing":
        then each rank draws its candidates from its own shard, and the model depends on the number of ranks.
        auto: whichever of the first two moves fewer bytes (`distkgd.training.communication`).
    balanced: batches with equally many triples from every (shard of the head, shard of the tail) pair, so that every
        rank sends every other one as many rows; pairs with fewer triples are visited more often, and the batches
        depend on the number of ranks.
    validate_every: epochs between validations, 0: never (the last rows are the model). patience: validations without
        a better MRR before the stage ends, 0: never. checkpoint_every: epochs, 0: only at validations and the end.
    """

    scorer: str = "complex"
    dim: Positive = 32
    method: str = "scratch"
    distill: Any = None
    bits: Bits = 32
    relation_bits: Bits = 32
    group: Positive | None = None
    margin: Real | None = None
    norm: Literal[1, 2] | None = None
    reciprocal: bool = True
    init_scale: Rate | None = None
    start: Literal["random", "crop", "pca"] = "random"
    first_rows: str | None = None
    old_rows: Literal["free", "anchored", "frozen"] = "free"
    anchor: Rate = 0.1
    negatives: NegativesConfig = NegativesConfig()
    loss: LossConfig = LossConfig()
    regulariser: RegulariserConfig = RegulariserConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    batch_size: Positive = 1000
    accumulate: Positive = 1
    epochs: Positive = 20
    dropout: Share = 0.0
    relation_dropout: Share = 0.0
    bf16: bool = False
    row_dtype: Literal["full", "bfloat16"] = "full"
    move: Literal["auto", "rows", "queries", "nothing"] = "auto"
    balanced: bool = False
    validate_every: Count = 5
    patience: Count = 0
    checkpoint_every: Count = 0

    @model_validator(mode="after")
    def _fits_together(self) -> "StageOptions":
        unit = self.accumulate * (self.negatives.chunk if self.negatives.kind == "chunk" else 1)
        if self.batch_size % unit:
            raise ValueError(
                f"batch_size {self.batch_size} must be a multiple of {unit} (accumulate x chunk of triples)"
            )
        if self.first_rows is not None and self.start != "random":
            raise ValueError(f"start: {self.start} and first_rows both say where the student begins; drop one of them")
        if self.old_rows != "free" and self.first_rows is None:
            raise ValueError("old_rows are some of first_rows; set both, or use distkgd update")
        if self.bits < 32 and self.row_dtype != "full":
            raise ValueError("bits below 32 are rounded from rows in full precision; drop row_dtype, or bits")
        if self.move == "nothing" and self.negatives.kind == "all":
            raise ValueError(
                "move: nothing draws candidates from each rank's own shard; negatives.kind all has every one"
            )
        if self.negatives.anchors:
            self._check_anchors()
        if self.loss.label_smoothing and self.loss.name not in ("softmax", "bce"):
            raise ValueError(f"label_smoothing works with loss softmax or bce, not {self.loss.name}")
        if self.schedule.name == "plateau" and not self.validate_every:
            raise ValueError("schedule plateau needs validations: set validate_every above 0")
        if self.regulariser.name == "none" and self.regulariser.weight:
            raise ValueError("regulariser.weight is set but regulariser.name is none; name n2, n3 or dura")
        return self

    def _check_anchors(self) -> None:
        if self.method not in ("scratch", "bkd", "dml"):
            raise ValueError(
                f"negatives.anchors: method {self.method} looks at the anchors of queries beside their scores: use "
                "scratch, bkd or dml, or anchors: 0"
            )
        if self.move not in ("auto", "rows") or self.balanced or self.dropout or self.relation_dropout:
            raise ValueError(
                "negatives.anchors are looked up: they need move: auto or rows, balanced: false and no dropout"
            )
