"""The card of an export: README.md, what the model is and what its numbers mean. It names no other model."""

import inspect
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from distkgd.common.metrics import Metrics
from distkgd.common.text import fixed
from distkgd.models.export.source import Source
from distkgd.models.model_folder import FORMAT, PACKED, SPARSE
from distkgd.models.stage_result import read_result
from distkgd.scorers import Scorer

MEASURES = {"mrr": "MRR", "hits_at_1": "Hits@1", "hits_at_3": "Hits@3", "hits_at_10": "Hits@10"}
TAGS = ["knowledge-graph", "link-prediction", "knowledge-graph-embedding"]
PARAGRAPH = re.compile(r"^(?:Formula|Real numbers): .*?(?=\n[A-Z][\w ]*: |\n\n|\Z)", re.MULTILINE | re.DOTALL)
LOAD = """```python
import distkgd

m = distkgd.load("the folder of this file")
```"""


def write_card(source: Source, folder: Path, config: Mapping[str, Any], how_read: str) -> None:
    """Write README.md into `folder`, an export whose config.json says `config`; how_read: what its format is.

    Its head is what Hugging Face reads of a model's card.
    """
    scorer, metrics = source.scorer, _metrics(source, config)
    size = sum((folder / file).stat().st_size for files in config["files"].values() for file in files)
    title = f"{scorer.name}, {scorer.dim} numbers per entity"
    lines = [
        "---",
        yaml.safe_dump(_head(config, title, metrics, size), sort_keys=False, allow_unicode=True).rstrip(),
        "---",
        f"# {title}",
        "",
        f"A knowledge-graph embedding: `{scorer}`{', reciprocal relations' if config['reciprocal'] else ''}.",
        "",
        *_facts(source, config, size),
        "",
    ]
    if metrics:
        lines += ["Ranked before it was exported:", ""]
        lines += [f"| split | {' | '.join(MEASURES)} |", "|---" * (1 + len(MEASURES)) + "|"]
        lines += [f"| {split} | {' | '.join(fixed(found[one], 4) for one in MEASURES)} |" for split, found in metrics]
        lines += [""]
    lines += ["## Scores and rows", "", *_paragraphs(formula_of(scorer)), *_rows(source)]
    lines += ["## Files", "", how_read.strip(), ""]
    if config["format"] in (FORMAT, PACKED, SPARSE):
        lines += [LOAD, ""]
    (folder / "README.md").write_text("\n".join(lines), encoding="utf-8")


def formula_of(scorer: Scorer) -> list[str]:
    """What the docstrings of a scorer's class say of its formula and of the order of its numbers."""
    found: list[str] = []
    for kind in type(scorer).__mro__[: type(scorer).__mro__.index(Scorer)]:
        text = inspect.cleandoc(kind.__doc__ or "")
        if paragraphs := PARAGRAPH.findall(text):
            return [*found, *paragraphs]
        found += [f"{kind.__name__}: {text}"] if text else []
    return found


def _head(config: Mapping[str, Any], title: str, metrics: Iterable[tuple[str, Metrics]], size: int) -> dict[str, Any]:
    """The card's metadata, as `huggingface_hub.ModelCardData` has them."""
    data = config.get("data")
    name = str(data.get("name")) if isinstance(data, Mapping) else "unknown"
    results = [
        {
            "task": {"type": "graph-ml", "name": "Link prediction"},
            "dataset": {"type": name, "name": name, "split": split},
            "metrics": [
                {"type": key, "name": said, "value": round(value, 4)}
                for key, said in MEASURES.items()
                if (value := found[key]) is not None
            ],
        }
        for split, found in metrics
    ]
    head = {"library_name": "distkgd", "tags": TAGS, "pipeline_tag": "graph-ml", "bytes": size}
    return head | ({"metrics": [*MEASURES], "model-index": [{"name": title, "results": results}]} if results else {})


def _facts(source: Source, config: Mapping[str, Any], size: int) -> list[str]:
    scorer, data = source.scorer, config.get("data")
    biases = f" and {scorer.biases} bias" if scorer.biases else ""
    facts = [
        f"- {int(config['num_entities']):,} entities of {scorer.dim} numbers{biases}, {int(config['num_relations']):,} "
        f"relations of {scorer.relation_size}; {size:,} bytes; computed in {config.get('dtype', source.entity.tag)}",
        *(f"- {text}" for text in config.get("widened", ())),
    ]
    for table, how in config.get("packed", {}).items():
        facts.append(f"- {table}: {how['bits']} bits a number, biases in bfloat16")
    if isinstance(data, Mapping):
        facts.append(
            f"- data: {data.get('name')}, {data.get('num_train', 0):,} training triples, sha256 {data['sha256']}"
        )
    if "method" in config:
        facts.append(f"- trained by method `{config['method']}` of distkgd")
    if "crop_of" in config:
        facts.append(f"- the first {scorer.dim} of {config['crop_of']['dim']} numbers per entity; not ranked by itself")
    return facts


def _rows(source: Source) -> list[str]:
    """How rows are ordered, and what they are rows of."""
    config, shapes = source.config, [table.shape for table in source.tables]
    inverse = (
        f" Relation r + {config['num_relations']} is the inverse of r: the heads of (?, r, t) are the tails of "
        f"(t, r + {config['num_relations']}, ?)."
        if config["reciprocal"]
        else ""
    )
    return [
        f"As distkgd has them, entities are {list(shapes[0])} and relations {list(shapes[1])}: row i belongs to the "
        f"name beside i in `entities.tsv` and `relations.tsv`.{inverse}",
        "",
    ]


def _paragraphs(texts: Iterable[str]) -> list[str]:
    return [line for text in texts for line in (text, "")]


def _metrics(source: Source, config: Mapping[str, Any]) -> list[tuple[str, Metrics]]:
    # What the stage was found to be worth, split by split, where the model still lies in the folder of its stage and
    # the export has its rows: not those of a crop, nor rounded ones.
    rounded = config.get("packed", source.config.get("packed")) != source.config.get("packed")
    if source.folder.name != "model" or "crop_of" in source.config or rounded:
        return []
    row = read_result(source.folder.parent)
    return [] if row is None else [(split, found) for split in ("valid", "test") if (found := row.metrics(split))]
