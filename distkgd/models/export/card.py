"""The model card of an export: README.md, what the model is and how to load it. It names no other model."""

from pathlib import Path

from distkgd.common.text import fixed
from distkgd.models.export.source import Source
from distkgd.models.stage_result import read_result

MEASURES = ("mrr", "hits_at_1", "hits_at_3", "hits_at_10")


def write_card(source: Source, folder: Path) -> None:
    """Write README.md into `folder`."""
    config, scorer = source.config, source.scorer
    data = config.get("data", {})
    about = data if isinstance(data, dict) else {}
    biases = f" and {scorer.biases} bias" if scorer.biases else ""
    size = sum(table.size for table in source.tables)
    lines = [
        "---",
        "library_name: distkgd",
        "tags: [knowledge-graph, link-prediction, knowledge-graph-embedding]",
        "---",
        f"# {scorer.name}, {scorer.dim} numbers per entity",
        "",
        f"A knowledge-graph embedding: `{scorer}`{', reciprocal relations' if config['reciprocal'] else ''}.",
        "",
        f"- {int(config['num_entities']):,} entities of {scorer.dim} numbers{biases}, {int(config['num_relations']):,} "
        f"relations of {scorer.relation_size}; {size:,} bytes of {config.get('dtype', source.entity.tag)}",
    ]
    if about:
        lines.append(
            f"- data: {about.get('name')}, {about.get('num_train', 0):,} training triples, sha256 {about['sha256']}"
        )
    if "method" in config:
        lines.append(f"- trained by method `{config['method']}` of distkgd")
    if "crop_of" in config:
        lines.append(f"- the first {scorer.dim} of {config['crop_of']['dim']} numbers per entity; not ranked by itself")
    lines += [
        "",
        *_metrics(source),
        "```python",
        "import distkgd",
        'm = distkgd.load("the folder of this file")',
        "```",
        "",
    ]
    (folder / "README.md").write_text("\n".join(lines), encoding="utf-8")


def _metrics(source: Source) -> list[str]:
    # What the stage was found to be worth, where the model still lies in the folder of its stage.
    if source.folder.name != "model" or "crop_of" in source.config:
        return []
    row = read_result(source.folder.parent)
    if row is None:
        return []
    lines = [f"| split | {' | '.join(MEASURES)} |", "|---" * (1 + len(MEASURES)) + "|"]
    for split in ("valid", "test"):
        if found := row.metrics(split):
            figures = " | ".join(fixed(found[one], 4) for one in MEASURES)
            lines.append(f"| {split} | {figures} |")
    return [*lines, ""]
