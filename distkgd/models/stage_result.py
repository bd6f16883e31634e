"""What a finished stage tells: made once when it ends, kept as its result.json, and a row of the run's report.json."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from distkgd.common.files import write_atomic
from distkgd.common.metrics import Metrics, crop_metric, known_figures
from distkgd.common.paths import AnyPath
from distkgd.errors import ModelError
from distkgd.models.model_folder import read_json
from distkgd.models.run_paths import RESULT, stage_folder

Parts = dict[str, dict[str, Metrics]]  # kind of part (direction, relation, …) -> part -> its metrics


class Record(BaseModel):
    """Base of what is kept as JSON: immutable; keys that this version does not know are kept, and shown nowhere.

    Such keys are of another version's file, or of a method's own report.
    """

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)

    def to_json(self) -> dict[str, Any]:
        """JSON-able; what was not given has no key."""
        return self.model_dump(mode="json", exclude_unset=True)


class Chosen(Record):
    """How the config of a stage with a choice was settled (DualDE sec. 4.1.3).

    between: the two stages or models -> valid MRR. middle: their mean. candidates: stage -> valid MRR. winner: the
    candidate nearest to the middle. dim: of its config.
    """

    between: dict[str, float]
    middle: float
    candidates: dict[str, float]
    winner: str
    dim: int


class Rounded(Record):
    """A model with its numbers rounded to few bits, not trained so. bytes: of its packed tables."""

    bytes: int
    valid: Metrics | None = None
    test: Metrics | None = None

    def mrr(self, split: str) -> float | None:
        """On "valid" or "test"; None where it was not ranked there, or there was nothing to rank."""
        return ((self.valid if split == "valid" else self.test) or {}).get("mrr")


class StageResult(Record):
    """A trained stage; a teacher that was brought from elsewhere (`source`); or what a budget has chosen of a croppable
    model, cropped or rounded.

    method: "brought", "crop" and "rounded" of those that are not trained. source, folder: of a brought teacher, where
        it came from (path, URI or LIBRARY:PATH), and its model as the run folder sees it; None of the run's own.
    dim: numbers per entity; biases: beside them. bytes: of the table files; sparse_bytes: exported as `sparse`.
    bits, relation_bits: of each number of entities and relations. row_bytes: of an entity's row. num_entities: whom
    the table files are shared by. distinct_rows: how many of their rows differ, where they have few bits.
    teachers: names of stages, or paths of models. seconds: of the stage; train_seconds: of its steps; joules: None
        where the machine has no counter. best_step: whose rows were kept, -1 where nothing was validated.
    valid, test: metrics by name (None: the split has no triples); None where the split was not ranked. Of few bits
    they have `tied`, the share of answers that are tied with another candidate.
    valid_by, test_by: metrics in parts, of the last split that has triples. curve: split -> dim of a crop -> metrics.
    crop_bytes: dim -> bytes. bits_curve: split -> nested width -> dim -> metrics; `curve` is that of the widest.
    bits_bytes: width -> dim -> bytes of packed tables. rounded: bits -> the model rounded to so many. early_steps:
    taken on an unfinished teacher. warnings: what speaks against its figures.
    brought: its teachers from elsewhere. digest: sha256 of what determined it; course: but for the
        number of epochs. These stand in result.json alone.
    """

    name: str
    method: str
    source: str | None = None
    folder: str | None = None
    scorer: str
    dim: int
    biases: int = 0
    bytes: int
    sparse_bytes: int | None = None
    bits: int = 32
    relation_bits: int = 32
    row_bytes: int | None = None
    num_entities: int | None = None
    distinct_rows: int | None = None
    num_parameters: int | None = None
    teachers: tuple[str, ...]
    seconds: float | None = None
    joules: float | None = None
    train_seconds: float | None = None
    steps: int | None = None
    triples_per_second: float | None = None
    best_step: int = -1
    valid: Metrics | None = None
    test: Metrics | None = None
    valid_by: Parts | None = None
    test_by: Parts | None = None
    chosen: Chosen | None = None
    early_steps: int | None = None
    curve: dict[str, dict[int, Metrics]] = Field(default={})
    crop_bytes: dict[int, int] = Field(default={})
    bits_curve: dict[str, dict[int, dict[int, Metrics]]] = Field(default={})
    bits_bytes: dict[int, dict[int, int]] = Field(default={})
    rounded: dict[int, Rounded] = Field(default={})
    warnings: tuple[str, ...] = ()
    brought: tuple["StageResult", ...] = Field(default=(), exclude=True)
    digest: str | None = Field(default=None, exclude=True)
    course: str | None = Field(default=None, exclude=True)

    @property
    def bytes_per_entity(self) -> float | None:
        """Of the table files, relations included; None in results of earlier versions."""
        return self.bytes / self.num_entities if self.num_entities else None

    @property
    def is_direct(self) -> bool:
        """Is this a model of a student's dim, trained without a teacher? Told by its name: direct, direct-64, and
        assistant_64, a candidate that was only trained to be measured."""
        return self.name == "direct" or self.name.startswith(("direct-", "direct_", "assistant_"))

    def metrics(self, split: str) -> Metrics:
        """On "valid" or "test"; none where it was not ranked there."""
        return (self.valid if split == "valid" else self.test) or {}

    def mrr(self, split: str) -> float | None:
        """On "valid" or "test"; None where it was not ranked there, or there was nothing to rank."""
        return self.metrics(split).get("mrr")

    def parts(self, split: str) -> Parts:
        """The metrics on "valid" or "test" in parts; none where there are none."""
        return (self.valid_by if split == "valid" else self.test_by) or {}

    def final_metrics(self) -> dict[str, float]:
        """Metrics by flat names, as a tracker has them; of an empty split none.

        Also the MRR and bytes of each of its forms: crops, nested widths, merely rounded.
        """
        figures: Metrics = {"distinct_rows": self.distinct_rows, "bytes_per_entity": self.bytes_per_entity}
        for split in ("valid", "test"):
            figures |= {f"{split}/{name}": value for name, value in self.metrics(split).items()}
        for dim, bits, size, found in self._forms():
            figures |= {f"{split}/{crop_metric(dim, bits)}": one["mrr"] for split, one in found.items()}
            if size is not None and self.num_entities:
                figures[crop_metric(dim, bits, "bytes_per_entity")] = size / self.num_entities
        return {f"final/{name}": value for name, value in known_figures(figures).items()}

    def _forms(self) -> Iterator[tuple[int, int | None, int | None, dict[str, Metrics]]]:
        # (dim, bits, bytes, split -> metrics) of its crops, in nested widths if it has these, and merely rounded.
        for bits, sizes in self.bits_bytes.items():
            for dim, size in sizes.items():
                yield dim, bits, size, {split: of_bits[bits][dim] for split, of_bits in self.bits_curve.items()}
        for dim in {} if self.bits_curve else next(iter(self.curve.values()), {}):
            yield dim, None, self.crop_bytes.get(dim), {split: of_dim[dim] for split, of_dim in self.curve.items()}
        for bits, one in self.rounded.items():
            ranked = {"valid": one.valid, "test": one.test}
            yield self.dim, bits, one.bytes, {split: found for split, found in ranked.items() if found is not None}

    def folder_in(self, run_folder: Path) -> Path:
        """Where its model is: its stage's folder, or where a teacher was brought to."""
        return stage_folder(run_folder, self.name) if self.folder is None else run_folder / self.folder

    def write(self, folder: Path) -> None:
        """As result.json, whole or not at all."""
        brought = [one.to_json() for one in self.brought]
        content = (
            self.to_json() | ({"brought": brought} if brought else {}) | {"digest": self.digest, "course": self.course}
        )
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / RESULT, json.dumps(content, indent=2) + "\n")


def read_result(folder: AnyPath) -> StageResult | None:
    """Of result.json in the folder of a stage, None where the stage is not finished; ModelError where it is damaged."""
    path = Path(folder) / RESULT
    if not path.is_file():
        return None
    try:
        found = StageResult.model_validate(read_json(path))
        if found.digest is None:
            raise ValueError("digest: Field required")
    except ValueError as error:
        raise ModelError(
            f"{path} is damaged ({what_is_wrong(error)}); remove {path.parent} and train it again: "
            "distkgd distill --resume."
        ) from None
    return found


def what_is_wrong(error: ValueError) -> str:
    """The first thing that a record was refused for, in a line."""
    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors(include_url=False)[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
