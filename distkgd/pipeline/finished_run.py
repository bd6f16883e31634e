"""A finished run in a program: its stages, tables, charts and models."""

import html
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path

import polars as pl

from distkgd.common.paths import AnyPath
from distkgd.evaluation.trained_model import TrainedModel, load
from distkgd.models.stage_result import StageResult
from distkgd.reporting.html import Drawing, drawings
from distkgd.reporting.html.curves import read_curves
from distkgd.reporting.report import HEADER, markdown, notes, rows
from distkgd.reporting.run_report import RunReport, read_report

SPLITS = ("valid", "test")


class Models(Mapping[str, TrainedModel]):
    """Name of a stage -> its model, loaded when it is first asked for."""

    def __init__(self, folder: Path, stages: Mapping[str, StageResult]) -> None:
        self._folder, self._stages = folder, stages
        self._loaded: dict[str, TrainedModel] = {}

    def __getitem__(self, name: str) -> TrainedModel:
        if name not in self._loaded:
            self._loaded[name] = load(self._stages[name].folder_in(self._folder))
        return self._loaded[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._stages)

    def __len__(self) -> int:
        return len(self._stages)

    def __repr__(self) -> str:
        return f"Models({', '.join(self._stages)})"


class Run:
    """A finished run in its folder, as `distkgd.distill` and `distkgd.train` leave it.

    folder: with report.json and report.html. report: what it tells (`distkgd.reporting.run_report`).
    Raises ModelError where there is no finished run.
    """

    def __init__(self, folder: AnyPath, report: RunReport | None = None) -> None:
        self.folder = Path(folder)
        self.report = read_report(self.folder) if report is None else report

    @property
    def stages(self) -> dict[str, StageResult]:
        """Name -> what came of a stage, in the order of the plan; teachers from elsewhere first."""
        return {stage.name: stage for stage in self.report.stages}

    @cached_property
    def models(self) -> Models:
        """Name of a stage -> its model, loaded when it is first asked for."""
        return Models(self.folder, self.stages)

    @property
    def student(self) -> TrainedModel:
        """The model that the run is about."""
        return self.models[self.report.student.name]

    @property
    def remarks(self) -> list[str]:
        """What stands below the table of the report: protocol, data, comparisons, warnings."""
        return notes(self.report)

    def table(self) -> pl.DataFrame:
        """One row per stage: stage, role, method, scorer, dim, bits, bytes, bytes_per_entity, seconds, and each metric
        as `test_mrr`; null where there is none.
        """
        return pl.DataFrame(
            [
                {
                    "stage": one.name,
                    "role": self.report.role_of(one),
                    "method": one.method,
                    "scorer": one.scorer,
                    "dim": one.dim,
                    "bits": one.bits,
                    "bytes": one.bytes,
                    "bytes_per_entity": one.bytes_per_entity,
                    "seconds": one.seconds,
                    **{f"{split}_{name}": value for split in SPLITS for name, value in one.metrics(split).items()},
                }
                for one in self.report.stages
            ],
            infer_schema_length=None,
        )

    def curves(self) -> pl.DataFrame:
        """One row per point of a curve: stage, step, name (such as `loss` or `valid/mrr`), value."""
        read = (read_curves(one.folder_in(self.folder) / "metrics.jsonl", one.name) for one in self.report.trained)
        points = [
            (curves.stage, step, name, value)
            for curves in read
            for name, series in curves.series.items()
            for step, value in series
            if name != "step"
        ]
        schema = {"stage": pl.String, "step": pl.Int64, "name": pl.String, "value": pl.Float64}
        return pl.DataFrame(points, schema=schema, orient="row")

    @cached_property
    def figures(self) -> dict[str, Drawing]:
        """Title -> chart of the report: shown by a notebook, written by `save`."""
        return drawings(self.report, self.folder)

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r}, stages: {', '.join(self.stages)})"

    def __str__(self) -> str:
        return markdown(self.report)

    def _repr_html_(self) -> str:
        lines = [("th", HEADER), *(("td", row) for row in rows(self.report))]
        body = "".join(
            "<tr>" + "".join(f"<{kind}>{html.escape(cell)}</{kind}>" for cell in row) + "</tr>" for kind, row in lines
        )
        return f"<table>{body}</table>"
