"""What a method's step sends, found by letting its own `updates` run on a miniature whose ranks only count.

But for the rows that are looked up, all that a step sends is so many numbers per query of a rank, and some that do not
depend on the batch at all; no term has queries times candidates in it. So two miniatures, with the real scorers and
dims, few entities and batches of two sizes, tell what a step of any size sends.
"""

from collections import Counter
from collections.abc import Generator
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch

from distkgd.config.stage import StageOptions
from distkgd.data.filters import KnownAnswers
from distkgd.data.sampling import Batch, Sampler
from distkgd.data.step_inputs import Move, StepInputBuilder, StepInputs
from distkgd.distributed.counting import CountingRanks
from distkgd.methods import Method, Setup
from distkgd.methods.base import trained_models
from distkgd.models.model import Model, new_model
from distkgd.scorers import Scorer, build_scorer

TRIPLES = 4  # of a rank, in the smaller miniature
RELATIONS = 2
NEGATIVES = 8  # of a group; of a whole batch as many for every rank


@dataclass(frozen=True)
class Made:
    """Inputs that were made in a miniature: what makes the real ones, queries of this rank, rows needed of others."""

    of: StepInputBuilder
    queries: int
    rows: int


class Miniature:
    """A step of a method in its present phase when `move` travels, with batches of `size` times the smallest.

    It is the same on all ranks, and nothing of the method changes.

    sent: bytes by kind. made: its inputs. queries, rows: of the batch's. relations: in its tables.
    updates: of each, its groups and how many loss terms are told with it.
    """

    def __init__(
        self, input_builder: StepInputBuilder, method: Method[Any], config: StageOptions, move: Move, size: int
    ) -> None:
        ranks = CountingRanks(input_builder.ranks.world, input_builder.ranks.device)
        self.relations = min(RELATIONS, method.student.num_relations)
        inputs = _SmallInputs(input_builder, ranks, move, size, self.relations)
        self.method = self._method(method, config, inputs)
        self.made: list[Made] = inputs.made
        self.sent: Counter[str] = ranks.traffic
        self.updates: list[tuple[frozenset[str], int]] = []
        # The first step of an epoch may do more than others (prune): the second is kept.
        for step in (0, 1):
            for of_last_step in (self.made, self.sent, self.updates):
                of_last_step.clear()
            self._step(inputs.inputs(*inputs.parts(step, 1)))
        (mine,) = [one for one in self.made if one.of is input_builder]
        self.queries, self.rows = mine.queries, mine.rows

    def _method(self, method: Method[Any], config: StageOptions, inputs: "_SmallInputs") -> Method[Any]:
        # The same method in the same phase, with tables of few rows.
        def small(scorer: Scorer, like: Model, seed: int) -> Model:
            found = new_model(
                scorer,
                inputs.sampler.num_entities,
                self.relations,
                inputs.ranks,
                reciprocal=like.reciprocal,
                seed=seed,
                dtype=like.entity.dtype,
                row_dtype=like.entity.weight.dtype,
            )
            found.entity.quantiser = like.entity.quantiser
            return found

        def fresh(dim: int, _name: str) -> Model:
            return small(build_scorer(config.scorer, dim, config.margin, config.norm), method.student, 1)

        student = small(method.student.scorer, method.student, 0)
        teachers = [small(teacher.scorer, teacher, 2 + i) for i, teacher in enumerate(method.teachers)]
        setup = Setup(method.setup.steps_per_epoch, method.setup.epochs, fresh, inputs)
        made = type(method)(student, method.task, teachers, method.settings, setup)
        made.restore(method.state().values)
        for group in made.groups.values():
            for tensor in group.replicated.values():
                tensor.requires_grad_(True)
        return made

    def _step(self, inputs: StepInputs) -> None:
        names: set[str] = set()
        for update in self.method.updates(inputs):
            torch.stack(list(update.terms.values())).sum().backward()
            names |= update.terms.keys() | update.watched.keys()
            self.updates.append((update.groups, len(names)))
            for model in trained_models(self.method).values():
                model.entity.opened.clear()


class _SmallInputs(StepInputBuilder):
    """Inputs as another builder makes them, of small batches that meet few candidates.

    of: the other builder. made: what was made, here and by its quizzes.
    """

    def __init__(self, of: StepInputBuilder, ranks: CountingRanks, move: Move, size: int, relations: int) -> None:
        vars(self).update(vars(of))
        self.of, self.ranks, self.move = of, ranks, move
        self.made: list[Made] = []
        self.chunk, self.filtered = 1, False
        self.num = min(of.num, NEGATIVES if self.grouped else NEGATIVES * ranks.world)
        triples = size * -(-TRIPLES // of.together) * of.together
        # In both miniatures alike, and enough that no two of a rank's triples share a row.
        entities = ranks.world * NEGATIVES * (triples // size)
        sampler = _SmallSampler(of.sampler, triples * ranks.world, entities, relations, ranks.world)
        self.sampler = sampler
        self.known = KnownAnswers(sampler.batch(0).triples, entities)
        self.cuts = ranks.bounds(entities)

    def quizzes(self, batch_size: int) -> "_SmallInputs":
        """As large as the real ones, but for equally many triples on every rank."""
        quizzes = copy(self)
        quizzes.of, quizzes.together = self.of.quizzes(batch_size), 1
        whole = -(-quizzes.of.sampler.batch_size // self.ranks.world) * self.ranks.world
        quizzes.sampler = self.sampler.quizzes(whole)
        return quizzes

    def foresees(self, part: Batch, move: Move) -> bool:
        """No: the other ranks, which are not there, ask for nothing."""
        return False

    def prepare_async(self, part: Batch) -> Generator[None, None, StepInputs]:
        """Takes note of what is made."""
        inputs = yield from super().prepare_async(part)
        self.made.append(Made(self.of, len(inputs.batch.queries.anchor), sum(inputs.route.receive[1:])))
        return inputs


class _SmallSampler(Sampler):
    """Always the same triples, whose ends are spread evenly over the shards."""

    def __init__(self, of: Sampler, batch_size: int, entities: int, relations: int, world: int) -> None:
        vars(self).update(vars(of))
        self.batch_size, self.num_entities, self.balanced = batch_size, entities, None
        self._relations, self._stride = relations, entities // world + 1

    def quizzes(self, batch_size: int) -> "_SmallSampler":
        """Batches of another size."""
        quizzes = copy(self)
        quizzes.batch_size = batch_size
        return quizzes

    def batch(self, step: int) -> Batch:
        """The whole global batch."""
        numbers = torch.arange(2 * self.batch_size, device=self.train.device).reshape(-1, 2)
        head, tail = (numbers * self._stride % self.num_entities).unbind(1)
        triples = torch.stack([head, numbers[:, 0] % self._relations, tail], 1)
        sides = 2 if self.sides == "both" else 1
        return Batch(step, self.batch_size, 0, triples, sides, self._queries(triples, step))
