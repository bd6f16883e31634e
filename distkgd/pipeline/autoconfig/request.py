"""What a user without a config file asks for."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from distkgd.data.reading.formats import AS_THEY_ARE, ENDINGS, How, expand
from distkgd.errors import ConfigError
from distkgd.kernels.quantiser import BITS
from distkgd.pipeline.config import RunConfig, load_config, load_tree, parse_config


@dataclass(frozen=True)
class Budget:
    """What a student may cost at most, and must keep at least; None: anything.

    max_mb: megabytes (10^6 bytes) that its export takes. max_ms: milliseconds of one top-10 query.
    min_retained: share of the teacher's valid MRR.
    """

    max_mb: float | None = None
    max_ms: float | None = None
    min_retained: float | None = None

    def __bool__(self) -> bool:
        return any(limit is not None for limit in (self.max_mb, self.max_ms, self.min_retained))

    def __str__(self) -> str:
        parts = [
            "" if self.max_mb is None else f"at most {self.max_mb:g} MB",
            "" if self.max_ms is None else f"at most {self.max_ms:g} ms per query",
            "" if self.min_retained is None else f"at least {100 * self.min_retained:g}% of the teacher's valid MRR",
        ]
        return ", ".join(filter(None, parts))


@dataclass(frozen=True)
class DistillRequest:
    """data: a file of triples, or whatever `load_graph` takes. to: the student's dim; bits: of its numbers. config: in
    place of the rules.

    seed: of the split. allow_unseen: held-out triples may hold entities that train lacks. how: of the file.
    """

    data: str
    to: int | None = None
    budget: Budget = Budget()
    config: Path | None = None
    overrides: Sequence[str] = ()
    seed: int = 0
    allow_unseen: bool = False
    how: How = AS_THEY_ARE
    bits: int = 32

    @property
    def file(self) -> Path | None:
        """The file that is to be split, None where there is nothing to split."""
        path = expand(self.data)
        return path if path.exists() and not path.is_dir() else None

    @property
    def copied(self) -> Path | None:
        """The folder that is to be read as `how` says and copied, None where nothing is said."""
        path = expand(self.data)
        return path if self.how != AS_THEY_ARE and path.is_dir() else None

    def machine(self) -> RunConfig:
        """A config that has the right device and threads: what is needed before there is a graph."""
        if self.config is not None:
            return load_config(self.config, self.overrides, self.data)
        tree = load_tree(None, self.overrides)
        return parse_config({key: tree[key] for key in ("device", "threads") if key in tree}, "the overrides")


def request_of(
    config: Path | None,
    overrides: Sequence[str],
    data: str | None,
    *,
    to: int | None = None,
    bits: int | None = None,
    budget: Budget = Budget(),
    seed: int | None = None,
    allow_unseen: bool = False,
    columns: str | None = None,
    literals: bool = False,
) -> DistillRequest | None:
    """What is asked for, or None where this is an ordinary run: of a config file, or the demo's.

    Raises ConfigError for what cannot be meant together.
    """
    sizes = to is not None or bool(budget)
    how = How(None if columns is None else tuple(one.strip().lower() for one in columns.split(",")), literals)
    about = to, budget, config, tuple(overrides), seed or 0, allow_unseen, how, bits or 32
    request = DistillRequest(data or "", *about)
    if bits is not None:
        _check_bits(bits, to)
    file = data is not None and request.file is not None
    if not file and data is not None and not expand(data).exists() and data.lower().endswith(ENDINGS):
        raise ConfigError(f"--data {data}: no such file; give one file of triples, a folder, or a public data set.")
    if not file and (seed is not None or allow_unseen):
        raise ConfigError("--split-seed and --allow-unseen say how one file of triples is split; --data names none.")
    copied = data is not None and request.copied is not None
    if how != AS_THEY_ARE and not (file or copied):
        raise ConfigError("--columns and --literals say how a file or folder of triples is read; --data names none.")
    if not sizes and not file and not copied:
        return None
    if config is not None and sizes:
        raise ConfigError(f"{config} says what is trained; drop --to and the budgets, or the config file.")
    if data is None:
        raise ConfigError(
            "--to and the budgets need your graph: --data my_triples.tsv, or a folder or public data set."
        )
    if config is None and not sizes:
        raise ConfigError(
            f"say how small the student of {data} shall be: --to 32 (numbers per entity), or a budget such as "
            "--max-mb 20 or --min-retained 0.95; or give a config file."
        )
    _check_sizes(to, budget)
    return request


def _check_bits(bits: int, to: int | None) -> None:
    if bits not in BITS:
        raise ConfigError(f"--bits {bits}: allowed are {', '.join(map(str, BITS))}, for each number of the student.")
    if to is None:
        raise ConfigError(
            "--bits are those of a student of so many numbers: add --to. A budget chooses its bits itself, a config "
            "has student.bits."
        )


def _check_sizes(to: int | None, budget: Budget) -> None:
    if to is not None and to < 1:
        raise ConfigError(f"--to {to}: allowed is a whole number of at least 1, the numbers per entity of the student.")
    for flag, value in (("--max-mb", budget.max_mb), ("--max-ms-per-query", budget.max_ms)):
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise ConfigError(f"{flag} {value:g}: allowed is a number above 0.")
    share = budget.min_retained
    if share is not None and not 0 < share <= 1:
        raise ConfigError(f"--min-retained {share:g}: allowed is a share above 0 and at most 1, such as 0.95.")
