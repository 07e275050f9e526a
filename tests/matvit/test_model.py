"""The nested forward: the full spec is the timm model, small specs compute less, identity follows the weights."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from matvit import BackboneError, MatViT, SpecError
from matvit.model import AxesConfig
from matvit.preprocess import Preprocessing


def test_full_spec_is_the_timm_model(vit: VisionTransformer, model: MatViT, images: Tensor) -> None:
    torch.testing.assert_close(model(images), F.normalize(vit(images), dim=-1), rtol=0, atol=1e-5)
    double = copy.deepcopy(vit).double()
    torch.testing.assert_close(
        MatViT.from_timm(double)(images.double()), F.normalize(double(images.double()), dim=-1), rtol=0, atol=1e-12
    )


def test_an_encoder_shows_in_one_line_what_it_is(tiny: MatViT) -> None:
    axes = ", ".join(tiny.shape.axes)
    assert repr(tiny) == f"<MatViT {tiny.name}: 32 numbers a picture, 4 blocks, 32 px, cut along {axes}>"


def test_embeddings_have_unit_length_and_one_width(model: MatViT, images: Tensor) -> None:
    for spec in model.shape.granularities():
        embeddings = model(images, spec)
        assert embeddings.shape == (3, model.embedding_dim)
        torch.testing.assert_close(embeddings.norm(dim=-1), torch.ones(3))


def test_small_specs_execute_fewer_operations(tiny: MatViT, images: Tensor) -> None:
    executed = {}
    for spec in ("S", "M", "L", "XL"):
        with FlopCounterMode(display=False) as counter:
            tiny(images, spec)
        executed[spec] = counter.get_total_flops()
    tokens, dim, width = 3 * 17, 32, 128
    assert executed["XL"] - executed["S"] == 2 * 4 * 2 * tokens * dim * (width - width // 8)  # slices, not masks
    assert list(executed.values()) == sorted(executed.values())


def test_training_one_spec_reaches_its_slices_only(tiny: MatViT, images: Tensor) -> None:
    tiny(images, "S")[:, 0].sum().backward()
    grad = tiny.vit.blocks[0].mlp.fc1.weight.grad
    assert grad is not None
    assert grad[:16].abs().sum() > 0
    assert grad[16:].abs().sum() == 0


def test_from_timm_leaves_the_users_module_alone(images: Tensor) -> None:
    vit = timm.create_model("test_vit", img_size=32, num_classes=10).train()
    before = copy.deepcopy(vit.state_dict())
    model = MatViT.from_timm(vit, image_size=48)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert vit.training
    assert vit.head.out_features == 10
    assert vit.patch_embed.img_size == (32, 32)
    assert not any(module._forward_hooks for module in vit.modules())
    torch.testing.assert_close(vit.state_dict(), before, rtol=0, atol=0)


def test_from_timm_resamples_the_position_table_as_timm_does(vit: VisionTransformer) -> None:
    pictures = torch.randn(2, 3, 48, 48)
    resized = copy.deepcopy(vit)
    resized.set_input_size(img_size=(48, 48))
    model = MatViT.from_timm(vit, image_size=48)
    assert model.shape.image_size == 48
    torch.testing.assert_close(model(pictures), F.normalize(resized(pictures), dim=-1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("image_size", [0, -8, 33])
def test_a_resolution_that_is_no_multiple_of_the_patch_is_refused(
    plain_vit: VisionTransformer, image_size: int
) -> None:
    with pytest.raises(BackboneError, match="use a multiple of 8"):
        MatViT.from_timm(plain_vit, image_size=image_size)


def test_preprocessing_comes_from_timm() -> None:
    clip = MatViT.from_timm("vit_base_patch16_clip_224", image_size=32)
    assert clip.preprocessing.mean == timm.data.OPENAI_CLIP_MEAN
    assert clip.name == "vit_base_patch16_clip_224"


def test_wrapping_a_module_with_a_classifier_is_refused() -> None:
    vit = timm.create_model("test_vit", img_size=32, num_classes=10)
    with pytest.raises(BackboneError, match="from_timm"):
        MatViT(vit, preprocessing=Preprocessing(mean=(0, 0, 0), std=(1, 1, 1)))


def test_axes_that_were_not_opened_are_refused(tiny: MatViT) -> None:
    for spec in ("S-d3", "S-r16", "S-h2"):
        with pytest.raises(SpecError, match="cannot be"):
            tiny.extract(spec)


def test_resolutions_that_cut_patches_in_two_are_refused(tiny: MatViT) -> None:
    with pytest.raises(SpecError, match="use a multiple of 8"):
        tiny.open_axes(AxesConfig(image_size_step=12))


def test_pictures_of_another_resolution_than_the_specs_are_refused(model: MatViT) -> None:
    with pytest.raises(SpecError, match="takes pictures of 16 px"):
        model(torch.zeros(1, 3, 32, 32), "S-r16")


@pytest.mark.parametrize(
    ("images", "found"),
    [
        (torch.zeros(3, 32, 32), r"a tensor of shape \(3, 32, 32\)"),
        (torch.zeros(1, 1, 32, 32), r"a tensor of shape \(1, 1, 32, 32\)"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), "one of torch.uint8"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.float64), "one of torch.float64"),
        ("cat.jpg", "a str"),
    ],
)
def test_what_is_no_batch_of_pictures_is_one_sentence(model: MatViT, images: Any, found: str) -> None:
    with pytest.raises(SpecError, match=rf"\(B, 3, 32, 32\) of torch.float32, not {found}; make it with"):
        model(images)


def test_autocast_takes_pictures_of_another_precision(model: MatViT) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(torch.zeros(1, 3, 32, 32, dtype=torch.bfloat16)).shape[0] == 1


def test_opening_axes_keeps_the_embedding_space(tiny: MatViT, images: Tensor) -> None:
    space, before = tiny.space_id, tiny(images)
    tiny.open_axes(AxesConfig(keep_order=(0, 1, 2, 3), image_size_step=8))
    assert tiny.space_id == space
    torch.testing.assert_close(tiny(images), before, rtol=0, atol=0)


def test_encoder_embeds_pictures_as_the_model_does(tiny: MatViT) -> None:
    pictures = [Image.new("RGB", (40, 30), colour) for colour in ("red", "blue")]
    tiny.open_axes(AxesConfig(heads=True, keep_order=(0, 1, 2, 3), image_size_step=8))
    for spec in ("S", "XL", "M-h2-d3-r16"):
        encoder = tiny.encoder(spec)
        assert (encoder.spec, encoder.space_id) == (tiny.shape.spec(spec), tiny.space_id)
        assert (encoder.runtime, encoder.embedding_dim) == ("torch-cpu", 32)
        embeddings = encoder.embed(pictures)
        assert embeddings.dtype == np.float32
        expected = tiny(torch.from_numpy(encoder.preprocess(pictures)), spec).detach().numpy()
        np.testing.assert_allclose(embeddings, expected, atol=1e-5)
    assert tiny.encoder("S").embed([]).shape == (0, 32)


def test_encoder_of_a_half_precision_model_gives_float32(tiny: MatViT) -> None:
    exact = tiny.encoder("S").encode(np.ones((1, 3, 32, 32), np.float32))
    half = tiny.bfloat16().encoder("S").encode(np.ones((1, 3, 32, 32), np.float32))
    assert half.dtype == np.float32
    assert float((exact @ half.T).item()) > 0.99


def test_encoder_keeps_its_weights_when_the_model_trains_on(tiny: MatViT) -> None:
    encoder = tiny.encoder("S")
    pixels = np.ones((1, 3, 32, 32), np.float32)
    before = encoder.encode(pixels)
    with torch.no_grad():
        for parameter in tiny.parameters():
            parameter.add_(0.1)
    np.testing.assert_array_equal(encoder.encode(pixels), before)
    assert encoder.space_id != tiny.space_id


def _one_step(model: MatViT, *, fused: bool = False) -> None:
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=fused)
    model(torch.ones(1, 3, 32, 32))[:, 0].sum().backward()
    optimiser.step()


def _one_fused_step(model: MatViT) -> None:
    _one_step(model, fused=True)


def _one_bit(model: MatViT) -> None:
    with torch.no_grad():
        model.vit.norm.weight.view(torch.int32)[0] ^= 1


def _new_tensor(model: MatViT) -> None:
    model.vit.norm.bias = torch.nn.Parameter(model.vit.norm.bias.detach() + 1)


@pytest.mark.parametrize("change", [_one_step, _one_fused_step, _one_bit, _new_tensor])
def test_space_id_follows_the_weights_in_memory(tiny: MatViT, change: Callable[[MatViT], None]) -> None:
    before = tiny.space_id
    assert tiny.space_id == before
    change(tiny)
    assert tiny.space_id != before


def test_space_id_follows_the_preprocessing(tiny: MatViT) -> None:
    before = tiny.space_id
    tiny.preprocessing = Preprocessing(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    assert tiny.space_id != before


def test_space_id_is_of_the_values_whatever_their_precision_and_grad_mode(tiny: MatViT) -> None:
    """Exact casts keep it; rounding casts do not."""
    before = tiny.space_id
    assert copy.deepcopy(tiny).double().space_id == before
    assert copy.deepcopy(tiny).bfloat16().space_id != before
    with torch.inference_mode():
        assert copy.deepcopy(tiny).space_id == before
    assert tiny.requires_grad_(False).space_id == before


def test_arguments_after_the_first_are_keyword_only() -> None:
    for method in (MatViT.from_timm, MatViT.from_pretrained, MatViT.__init__):
        kinds = [p.kind for name, p in inspect.signature(method).parameters.items() if name != "self"]
        assert set(kinds[1:]) == {inspect.Parameter.KEYWORD_ONLY}
