"""Pictures on the device: what is cut out of them, and what cannot be read."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from matvit.datasets import read_dataset
from matvit.errors import DatasetError
from matvit.training import data as training_data
from matvit.training.batches import TrainingSet, _mosaic, draw_batch
from matvit.training.crops import colour_jitter, cut, random_crops
from matvit.training.data import to_device
from matvit.training.recipe import Augmentation

FULL = torch.tensor([[0.0, 0.0, 1.0, 1.0]])


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.randint(0, 256, (1, 3, 24, 24), generator=seeded(), dtype=torch.uint8)


@pytest.mark.parametrize("size", [12, 24, 48])
def test_the_full_box_is_a_plain_resize(pixels, size):
    resized = F.interpolate(pixels.float() / 255, size=(size, size), mode="bilinear", align_corners=False)
    torch.testing.assert_close(cut(pixels, FULL, size), resized, atol=1e-5, rtol=0)


def test_a_box_is_that_part_of_the_picture(pixels):
    exact = cut(pixels, torch.tensor([[0.5, 0.25, 0.5, 0.5]]), 12)
    torch.testing.assert_close(exact, pixels[..., 6:18, 12:24].float() / 255, atol=1e-5, rtol=0)


def test_a_negative_width_is_the_mirrored_crop(pixels):
    box, mirrored = torch.tensor([[0.2, 0.1, 0.5, 0.6]]), torch.tensor([[0.7, 0.1, -0.5, 0.6]])
    torch.testing.assert_close(cut(pixels, mirrored, 10), cut(pixels, box, 10).flip(-1), atol=1e-5, rtol=0)


@given(seed=st.integers(0, 2**16), aspect=st.floats(0.1, 10), low=st.floats(0.05, 1))
def test_crops_stay_inside_the_picture(seed, aspect, low):
    boxes = random_crops(torch.full((32,), aspect), Augmentation(scale=(low, 1.0)), seeded(seed))
    left, top, width, height = boxes.unbind(1)
    low_x, high_x = torch.minimum(left, left + width), torch.maximum(left, left + width)
    assert (low_x >= -1e-6).all()
    assert (high_x <= 1 + 1e-6).all()
    assert (top >= 0).all()
    assert (top + height <= 1 + 1e-6).all()
    assert (width != 0).all()


def test_about_half_of_the_crops_are_mirrored():
    width = random_crops(torch.ones(400), Augmentation(), seeded())[:, 2]
    assert 140 < (width < 0).sum() < 260


def test_colours_stay_in_range_and_zero_strength_changes_nothing():
    images = torch.rand(6, 3, 8, 8, generator=seeded())
    strong = colour_jitter(images, Augmentation(colour_jitter=1, grayscale=0.5), seeded())
    assert strong.min() >= 0
    assert strong.max() <= 1
    assert not torch.allclose(strong, images)
    plain = colour_jitter(images, Augmentation(colour_jitter=0, grayscale=0), seeded())
    torch.testing.assert_close(plain, images)


def test_pictures_that_cannot_be_read_are_skipped_counted_and_named(data):
    (data / "shapes" / "dark" / "2.png").write_bytes(b"no picture")
    events = []
    decoded, kept, skipped = to_device(
        read_dataset(data / "shapes"), resolution=8, device=torch.device("cpu"), progress=events.append
    )
    assert len(decoded) == len(kept) == len(decoded.pixels) == len(decoded.aspect) == 11
    assert [(one.path, one.reason) for one in skipped] == [
        (str(data / "shapes" / "dark" / "2.png"), "not a picture in a supported format")
    ]
    assert np.bincount(decoded.labels.numpy()).tolist() == [5, 6]
    assert str(data / "shapes" / "dark" / "2.png") not in kept.origins
    assert events[-1].note == "1 skipped"


class Copies(TorchDispatchMode):
    """Notes the largest tensor that torch makes."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and made.untyped_storage().data_ptr() not in {
            one.untyped_storage().data_ptr() for one in args if isinstance(one, torch.Tensor)
        }:
            self.largest = max(self.largest, made.nbytes)
        return made


def test_decoded_pictures_are_held_once(data, monkeypatch):
    monkeypatch.setattr("matvit.training.data.usable_cores", lambda: 1)  # one picture in work
    (data / "shapes" / "dark" / "2.png").write_bytes(b"no picture")
    images = read_dataset(data / "shapes")
    tracemalloc.start()
    try:
        with Copies() as copies:
            decoded, _, _ = to_device(images, resolution=640, device=torch.device("cpu"), progress=lambda _: None)
        peak = tracemalloc.get_traced_memory()[1]  # numpy's
    finally:
        tracemalloc.stop()
    assert decoded.pixels.is_contiguous()
    assert peak < 1.5 * decoded.pixels.nbytes
    assert copies.largest < 0.1 * decoded.pixels.nbytes
    alone, _, _ = to_device(
        replace(images, images=images.images[-1:], labels=images.labels[-1:], origins=images.origins[-1:]),
        resolution=640,
        device=torch.device("cpu"),
        progress=lambda _: None,
    )
    assert torch.equal(decoded.pixels[-1], alone.pixels[0])


def test_a_set_without_one_readable_picture_is_refused(data):
    for picture in (data / "shapes").rglob("*.png"):
        picture.write_bytes(b"no picture")
    with pytest.raises(DatasetError, match="none of its 12 pictures can be read"):
        to_device(read_dataset(data / "shapes"), resolution=8, device=torch.device("cpu"), progress=print)


@pytest.mark.parametrize("changes", [{}, {"mixup_alpha": 0.4}, {"mosaic": 0.5}])
def test_a_batch_is_a_function_of_its_key_alone(data, changes):
    images, _, _ = to_device(
        read_dataset(data / "shapes"), resolution=16, device=torch.device("cpu"), progress=lambda _: None
    )

    def draw(*key: int):
        return draw_batch(
            [TrainingSet(images=images, batch=6)],
            augmentation=Augmentation(**changes),
            image_size=8,
            with_teacher=False,
            key=key,
        )

    first = draw(0, 1, 2)
    torch.rand(5)  # what else is drawn in the process does not matter
    again, other = draw(0, 1, 2), draw(0, 1, 3)
    assert torch.equal(first.images, again.images)
    assert torch.equal(first.targets[0], again.targets[0])
    assert not torch.equal(first.images, other.images)
    torch.testing.assert_close(first.targets[0].sum(dim=1), torch.ones(6))


@pytest.mark.parametrize("size", [24, 20])  # sides of 2 and 3 tiles, even and not
def test_a_mosaic_shows_other_pictures_of_the_batch_smaller(size):
    flat = torch.linspace(0, 1, 10).view(10, 1, 1, 1).expand(10, 3, size, size).clone()
    classes = torch.eye(10)
    for step in range(4):
        [pictures], [targets] = _mosaic([flat.clone()], [classes.clone()], 0.4, (0, 1, step))
        assert torch.equal(pictures[4:], flat[4:])
        assert torch.equal(targets[4:], classes[4:])
        for picture, target in zip(pictures[:4], targets[:4], strict=True):
            shown = torch.tensor([(picture[0] - value).abs().min() < 1e-3 for value in flat[:, 0, 0, 0]])
            assert torch.equal(shown, target > 0)
            assert int(shown.sum()) in (4, 9)
            torch.testing.assert_close(target.sum(), torch.tensor(1.0))


def test_large_photographs_are_decoded_smaller_by_each_process_on_its_share_of_the_cores(data, monkeypatch):
    Image.new("RGB", (1600, 1200)).save(data / "shapes" / "dark" / "0.jpg")
    decoded: list[int] = []
    pools: list[int] = []
    opened, pool = training_data.open_image, training_data.ThreadPoolExecutor

    def look(source, **how):
        image = opened(source, **how)
        decoded.append(max(image.size))
        return image

    monkeypatch.setattr(training_data, "open_image", look)
    monkeypatch.setattr(training_data, "usable_cores", lambda: 8)
    monkeypatch.setattr(training_data, "ThreadPoolExecutor", lambda size: pools.append(size) or pool(size))
    shapes, cpu = read_dataset(data / "shapes"), torch.device("cpu")
    to_device(shapes, resolution=100, device=cpu, processes=3, progress=lambda _: None)
    assert (max(decoded), pools) == (400, [2])


def test_pictures_without_room_in_memory_are_one_sentence(data):
    shapes = read_dataset(data / "shapes")
    with pytest.raises(DatasetError, match="its 12 pictures of 10000000 pixels a side do not fit into memory"):
        to_device(shapes, resolution=10**7, device=torch.device("cpu"), progress=lambda _: None)
