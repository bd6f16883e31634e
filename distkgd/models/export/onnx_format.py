"""An ONNX graph that answers questions: head [Q], relation [Q] and k [1], all int64, to the k best tails.

Outputs: score [Q, k] in float32 and tail [Q, k], best first. With reciprocal relations, `relation` r + num_relations
asks for the heads of the tails given as `head`.
"""

import logging
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distkgd.common.optional_imports import need
from distkgd.errors import ModelError, UnsupportedError
from distkgd.models.export.source import Source
from distkgd.scorers import Scorer

EXAMPLES = 4  # questions that are asked of a written graph


class Tails(nn.Module):
    """The graph in torch. entities: [num_entities, entity_size], relations: [rows, relation_size], float32."""

    def __init__(self, scorer: Scorer, entities: Tensor, relations: Tensor) -> None:
        super().__init__()
        self.scorer = scorer
        self.entities, self.relations = (nn.Parameter(table, requires_grad=False) for table in (entities, relations))

    def scores(self, head: Tensor, relation: Tensor) -> Tensor:
        """[Q, num_entities] of all tails."""
        h, r = F.embedding(head, self.entities), F.embedding(relation, self.relations)
        if self.scorer.candidate_form == "coordinates":  # else compiled loops would score
            return self.scorer.score(h.unsqueeze(1), r.unsqueeze(1), self.entities.unsqueeze(0))
        return self.scorer.score_candidates(self.scorer.tail_query(h, r), self.entities)

    def forward(self, head: Tensor, relation: Tensor) -> tuple[Tensor, Tensor]:
        """([Q, 1] scores, [Q, 1] int64 tails); the number of answers becomes an input of the graph."""
        values, tails = self.scores(head, relation).topk(1)
        return values, tails


def write_onnx(source: Source, folder: Path) -> dict[str, Any]:
    """Write model.onnx, its tables in float32; beyond 2 GB of them beside it, in model.onnx.data.

    The tables are in memory meanwhile. Raises UnsupportedError without onnx and for hyperbolic scorers, and ModelError
    where onnxruntime, if it is installed, answers otherwise than torch.
    """
    if source.scorer.candidate_form == "hyperbolic":
        why = "it computes in float64, for which onnxruntime has neither softplus nor artanh"
        raise UnsupportedError(f"{source.scorer.name} has no ONNX graph: {why}. Use --format safetensors.")
    onnx = need("onnx", "--format onnx")
    need("onnxscript", "--format onnx")
    tables = [torch.cat([block.float() for block in table.blocks()]) for table in source.tables]
    model = Tails(source.scorer, *tables).eval()
    ids = torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)  # one tensor would be one input
    batch = torch.export.Dim("questions")
    shapes = {"head": {0: batch}, "relation": {0: batch}}
    outputs = ["score", "tail"]
    loud = logging.getLogger("torch.onnx")
    level = loud.level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter's own libraries
        loud.setLevel(logging.ERROR)
        try:
            program = torch.onnx.export(
                model,
                ids,
                dynamo=True,
                output_names=outputs,
                dynamic_shapes=shapes,
                verbose=False,
                optimize=False,  # it would keep a transposed copy of the table
            )
        finally:
            loud.setLevel(level)
    assert program is not None
    _ask_for_k(program.model)
    program.save(str(folder / "model.onnx"))
    onnx.checker.check_model(str(folder / "model.onnx"))
    _check(folder / "model.onnx", model)
    return {"format": "distkgd-onnx/1", "files": {"model": sorted(path.name for path in folder.glob("model.onnx*"))}}


def _ask_for_k(model: Any) -> None:
    """Make the number of answers, which an export of torch fixes, an input of the graph."""
    ir = need("onnx_ir", "--format onnx")
    (top,) = [node for node in model.graph if node.op_type == "TopK"]
    k = ir.val("k", ir.DataType.INT64, [1])
    top.replace_input_with(1, k)
    model.graph.inputs.append(k)
    for output in model.graph.outputs:
        output.shape = ir.Shape(["questions", "k"])


def _check(path: Path, model: Tails) -> None:
    """ModelError unless onnxruntime, where it is installed, answers as torch does."""
    try:
        runtime = need("onnxruntime", "a check")
    except UnsupportedError:
        return
    generator = torch.Generator().manual_seed(0)
    head, relation = (
        torch.randint(len(t), (EXAMPLES,), generator=generator) for t in (model.entities, model.relations)
    )
    k = min(10, len(model.entities))
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    asked = {"head": head.numpy(), "relation": relation.numpy(), "k": torch.tensor([k]).numpy()}
    values, tails = (torch.from_numpy(found) for found in session.run(["score", "tail"], asked))
    scores = model.scores(head, relation)
    for found in (values, scores.gather(1, tails)):
        torch_best = scores.topk(k).values
        if not torch.allclose(found, torch_best, rtol=1e-4, atol=1e-4):
            apart = float((found - torch_best).abs().max())
            raise ModelError(
                f"onnxruntime's scores of {model.scorer} differ from torch's by {apart:.2g}; not exported."
            )
