"""`matvit extract`: a submodel as plain timm weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from matvit_app import services
from matvit_app.cli.output import JsonFlag, write_json, write_line


def extract(
    checkpoint: Annotated[str, typer.Argument(help="A bundled name, a checkpoint folder or a hub id.")],
    *,
    spec: Annotated[str, typer.Option(help="The submodel: S, M, L, XL, or a spec such as 6S.6XL.")],
    out: Annotated[Path, typer.Option(help="The .safetensors file to write; a .json file goes beside it.")],
    json: JsonFlag = False,
) -> None:
    """Write a submodel as plain, really smaller timm weights.

    The JSON file beside the weights says how to build the module with timm; where blocks differ in width,
    matvit.extracted.read_extracted builds it. Only the files of an earlier extraction are replaced.

    \b
    Example:
      matvit extract matvit-small --spec S --out small.safetensors
    """
    model = services.load_encoder(checkpoint)
    from matvit.extracted import write_extracted

    sidecar, config = write_extracted(model, spec, out=out)
    params = model.num_params(spec)
    result = {
        "spec": config.spec,
        "weights": str(out),
        "config": str(sidecar),
        "sha256": config.sha256,
        "bytes": out.stat().st_size,
        "params": params,
        "relative_flops": model.flops(spec) / model.flops(),
    }
    if json:
        write_json(result)
        return
    write_line(f"{out}: {config.spec} of {config.encoder}, {params / 1e6:.2f} M parameters")
    write_line(f"{sidecar}: how to build it with timm")
