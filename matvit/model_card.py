"""The README.md beside a checkpoint's weights, written from its Pareto table and training record."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matvit.model import MatViT

_HEADER = """---
{license}library_name: matvit-retrieval
pipeline_tag: image-feature-extraction
tags: [image-retrieval, matformer, timm]
---
"""
_TABLE = re.compile(rb"^## Submodels\s*$.*?(?=^##? |\Z)", re.MULTILINE | re.DOTALL)
_AFTER_TABLE = re.compile(rb"(?=^## Training\s*$)", re.MULTILINE)


def model_card(model: MatViT) -> str:
    """Markdown with the hub's front matter."""
    config = model.config
    lines = [
        f"{_HEADER.format(license=_license(model))}# {model.name}",
        "",
        f"An elastic image encoder: a ViT ({len(config.ffn_widths)} blocks, width {config.embed_dim}, "
        f"{config.patch_size} px patches, {config.image_size} px pictures) whose feed-forward layers are nested "
        "(MatFormer, arXiv 2310.07707). Every submodel embeds into the same space, so that small ones can query "
        "an index made with the full one.",
        "",
        "```python",
        "from matvit import MatViT",
        "",
        'encoder = MatViT.from_pretrained(".")  # this folder; elsewhere its path, or its id on the hub',
        'embeddings = encoder.encoder("S").embed(["picture.jpg"])  # (1, D), unit length',
        "```",
        "",
        *_pareto_table(model),
        *_provenance(model),
    ]
    return "\n".join(lines) + "\n"


def with_table(card: bytes, model: MatViT) -> bytes:
    """A card with `model`'s table as its section "Submodels"; what a person wrote into other sections stays.

    One that has neither of the headings that `model_card` gives it, "Submodels" and "Training", stays as it is.
    """
    table = "\n".join([*_pareto_table(model), ""]).encode(errors="backslashreplace")
    place = _TABLE if _TABLE.search(card) else _AFTER_TABLE
    return place.sub(lambda _: table, card, count=1)


def _license(model: MatViT) -> str:
    """Only whoever trained the weights can say it."""
    named = model.record.get("license")
    return f"license: {named}\n" if named else ""


def _pareto_table(model: MatViT) -> list[str]:
    if not model.pareto:
        return []
    quality = sorted({key for row in model.pareto for key in row.get("quality", {})})
    header = ["submodel", "FLOPs", "share", "parameters", *quality]
    rows = [
        [
            str(row["spec"]),
            f"{row['flops'] / 1e9:.2f} G",
            f"{row['relative_flops']:.2f}",
            f"{row['params'] / 1e6:.1f} M",
            *(f"{100 * row['quality'][key]:.1f}" if key in row.get("quality", {}) else "" for key in quality),
        ]
        for row in model.pareto
    ]
    table = [header, ["---"] * len(header), *rows]
    return ["## Submodels", "", *_measured(model), *("| " + " | ".join(cells) + " |" for cells in table), ""]


def _measured(model: MatViT) -> list[str]:
    """What the table's percents are of, where all its rows say the same."""
    measured, *others = (row.get("measured") for row in model.pareto)
    if not measured or any(other != measured for other in others):
        return []
    said = "Percent; {n_queries} queries of {queries} in {gallery}, embedded once by {gallery_spec}."
    return [said.format(**measured), ""]


def _provenance(model: MatViT) -> list[str]:
    credits_ = model.record.get("credits", [])
    notes = model.record.get("notes", [])
    lines = ["## Training", "", "The recipe, data, seed, code version and metrics are in `training.json`.", ""]
    lines += [f"- {note}" for note in notes]
    if credits_:
        lines += ["", "## Credits", "", *(f"- {credit}" for credit in credits_)]
    return lines
