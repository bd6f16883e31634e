"""Compiles what the wrappers of the Triton kernels would launch, for a GPU that need not be there."""

from itertools import product
from typing import Any

import torch

NAMES = {
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
}


def launches_compiled(capability: int) -> dict[str, int]:
    """Kernel and options -> bytes of shared memory, of every launch of a training step at ordinary sizes."""
    from triton import compile as compiled
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime.jit import JITFunction

    found: dict[str, int] = {}

    def instead_of_running(self: Any, *args: Any, grid: Any, warmup: bool, **given: Any) -> None:
        names = [parameter.name for parameter in self.params]
        options = {key: value for key, value in given.items() if key not in names}
        values = dict(zip(names, args, strict=False)) | {key: given[key] for key in given if key in names}
        signature, constants, aligned = {}, {}, {}
        for at, parameter in enumerate(self.params):
            value = values[parameter.name]
            if parameter.is_constexpr or (isinstance(value, int) and value == 1):
                constants[parameter.name], signature[parameter.name] = value, "constexpr"
            elif isinstance(value, torch.Tensor):
                signature[parameter.name] = "*" + NAMES[value.dtype]
                aligned[(at,)] = [["tt.divisibility", 16]]
            else:
                whole = "i32" if abs(value) < 1 << 31 else "i64"
                signature[parameter.name] = "fp32" if isinstance(value, float) else whole
        source = ASTSource(self, signature, constants, aligned)
        made = compiled(source, target=GPUTarget("cuda", capability, 32), options=options)
        shown = [
            str(constants[name])
            for name in ("KIND", "RULE", "SORTED", "LEARNING", "BQ", "BN", "BK", "BE")
            if name in constants
        ]
        found[" ".join((self.__name__, *shown))] = made.metadata.shared

    kept, JITFunction.run = JITFunction.run, instead_of_running
    try:
        _launch()
    finally:
        JITFunction.run = kept
    return found


def _launch() -> None:
    from distkgd.kernels.pairs import KINDS
    from distkgd.kernels.triton import distances, draws, dualde, rows, scores

    index = torch.zeros(2, 64, dtype=torch.int64)
    # The two kinds that need the most registers; of one query and of many other kernels are launched.
    for kind, queries in product(KINDS[3:], (1, 16)):
        q = torch.zeros(2, queries, 512 * (2 if kind == "scaled_manhattan" else 1))
        table = torch.zeros(99, 512)
        distances.forward(kind, q, table, index, 64)
        distances.backward(kind, q, table, index, torch.zeros(2, queries, 64))
    table, listed = torch.zeros(99, 512), torch.zeros(rows.FEW + 1, dtype=torch.int64)
    for ids in (listed, listed[:9]):
        rows.add(table, ids, torch.zeros(len(ids), 512))
    rows.segments(listed, 99)
    rows.undirected(*rows.directions(table, 1e-6), table, table[:, 0], 1e-6)
    numbers = rows.StepNumbers(0.1, 1.0, 1e-8, (0.9, 0.999), 1)
    rows.update("adam", table, listed[:9], table[:9], {"mean": table, "square": table}, numbers)
    rows.update("rowwise_adagrad", table, None, table, {"sum": table[:, 0]}, numbers)
    draws.integers(1 << 50, (-1 << 50, 1 << 51, 3 << 50), 0, 5000, 0, 99, table.device)
    kinds: tuple[tuple[scores.Kind, int], ...] = (("logsumexp", 1), ("gap", 3), ("softplus", 1))
    for kind, number in kinds:
        found = scores.sums(kind, table, table)
        scores.pulls(kind, table, table, found, [table[:, 0].contiguous()] * number, (True, kind == "gap"))
    both = dualde.How(positive=False, learning=2, soft_weight=1.0, delta=1.0, evaluation=True, stop_opposite=False)
    pairs, four = [torch.zeros(99, 512)] * 6, torch.zeros(4)
    for how, fields in ((both, pairs), (both._replace(positive=True, learning=1), pairs[:2])):
        dualde.terms(how, four, four, fields)
        dualde.pulls(how, four, four, fields, torch.zeros(2 * how.learning, 99))
    unit, asked, shapes = dualde.shapes(table, table, table[:, 0].contiguous(), 1e-6)
    dualde.unshaped(table, table, shapes[0], shapes, [unit, asked, shapes[0], shapes[1]], 1e-6)
