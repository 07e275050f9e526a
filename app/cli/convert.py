"""`matvit convert`: a plain timm ViT becomes an elastic encoder, untrained."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from matvit_app import services
from matvit_app.cli.output import JsonFlag, say_left_out, write_json, write_line, write_table
from matvit_app.cli.progress import progress_bar

if TYPE_CHECKING:
    from matvit import MatViT
    from matvit.converting import Conversion


def convert(
    timm_model: Annotated[str, typer.Argument(help="A timm name, such as vit_small_patch14_dinov2.")],
    *,
    out: Annotated[Path, typer.Option(help="The folder of the new checkpoint; one that is there is replaced.")],
    weights: Annotated[
        Path | None, typer.Option(help="A .safetensors file of this model's weights.", show_default=False)
    ] = None,
    pretrained: Annotated[bool, typer.Option("--pretrained", help="timm's own weights, from the hub.")] = False,
    images: Annotated[
        list[Path] | None,
        typer.Option(
            help="A folder of pictures to order and measure on; repeatable.",
            show_default="the bundled photographs",
        ),
    ] = None,
    image_size: Annotated[
        int | None,
        typer.Option(min=1, max=4096, help="The native resolution in pixels.", show_default="the model's own"),
    ] = None,
    json: JsonFlag = False,
) -> None:
    """Make a plain timm ViT elastic, without training, and say how much each granularity loses.

    Hidden units are ordered by their importance on up to 400 pictures; XL computes what the timm model does.
    On every fifth picture, held back, the table shows how well each granularity's answers agree with XL's; near-copies
    of a picture, as of a burst, are left out.
    Train it (matvit train), or tune it to your pictures (matvit adapt), before small queries are of use.

    \b
    Examples:
      matvit convert vit_small_patch16_dinov3 --pretrained --out elastic/
      matvit convert vit_small_patch14_dinov2 --weights dinov2.safetensors --image-size 224 --out elastic/
    """
    if (weights is None) != pretrained:
        raise typer.BadParameter("give the weights: either --weights FILE or --pretrained")
    with progress_bar() as progress:
        model, result = services.convert(
            timm_model,
            weights=weights,
            pretrained=pretrained,
            images=images or (),
            image_size=image_size,
            out=out,
            progress=progress,
        )
    say_left_out(result.skipped, near_copies=result.near_copies)
    if json:
        write_json(
            {
                "checkpoint": str(out),
                "encoder": model.name,
                "space_id": model.space_id,
                "pictures": result.pictures,
                "held_back": result.held_back,
                "near_copies": result.near_copies,
                "submodels": list(model.pareto),
                "skipped": [asdict(picture) for picture in result.skipped],
            }
        )
        return
    _show(model, result)
    write_line(f"{out}: {model.name}, space {model.space_id:.8}")


def _show(model: MatViT, result: Conversion) -> None:
    write_table(
        ["query", "FLOPs of XL", "agreement@10", "centred cosine"],
        [
            [
                spec,
                *(
                    f"{100 * part:.1f}"
                    for part in (model.flops(spec) / model.flops(), found.agreement_at_10, found.cosine)
                ),
            ]
            for spec, found in result.agreement.items()
        ],
        title=f"{result.held_back} pictures that were held back, in XL's index of all pictures",
        caption=f"Percent, beside XL's own answers; units ordered on {result.pictures} pictures, nothing trained.",
    )
