"""benchmarks/nested.py: the sixteen models are what the nested one is cropped to, trained as it is."""

import importlib.util
import sys
from unittest.mock import patch

import pytest

from distkgd.pipeline.config import parse_config
from tests.launches import ROOT


@pytest.mark.parametrize("data", ["codex-s", "wn18rr"])
def test_one_nested_model_stands_beside_all_its_sizes(data: str) -> None:
    spec = importlib.util.spec_from_file_location("nested", ROOT / "benchmarks/nested.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with patch.object(sys, "path", [str(ROOT / "benchmarks"), *sys.path]):
        spec.loader.exec_module(module)
    found = {
        name: parse_config({"data": data, "student": one}, name).student for name, one in module.students(data).items()
    }
    nested = found.pop("nested")
    sizes = {(dim, bits) for dim in nested.distill.dims for bits in nested.distill.bits}
    assert {(one.dim, one.bits) for one in found.values()} == sizes and len(found) == 16
    for name in ("epochs", "batch_size", "negatives", "optimizer", "relation_bits", "regulariser"):
        assert all(getattr(one, name) == getattr(nested, name) for one in found.values()), name
