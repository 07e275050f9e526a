"""The cross-test, with encoders whose answers are known."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from matvit.datasets import GroundTruth, LabelledImages, Pictures, data_folder, read_dataset
from matvit.errors import CheckpointError, DatasetError, SpecError
from matvit.evaluation import cross_test
from matvit.near_copies import NEAR_COPY_BITS, difference_hash
from matvit.preprocess import FloatArray, ImageSource, Preprocessing
from matvit.progress import ProgressEvent
from matvit.spec import EncoderShape, SubmodelSpec

PREPROCESSING = Preprocessing(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
SHAPE = EncoderShape(ffn_widths=(64, 64), num_heads=2, image_size=16, image_size_step=8)


@dataclass(frozen=True, kw_only=True)
class ColourEncoder:
    """Embeds the mean colour; S sees no blue. Counts the pictures it decodes and the largest batch."""

    spec: SubmodelSpec
    decoded: list[int]
    encoded: list[int]
    space_id: str = "colours"
    runtime: str = "numpy"
    embedding_dim: int = 3

    def preprocess(self, images: Sequence[ImageSource]) -> FloatArray:
        pixels = PREPROCESSING.batch(images, size=self.spec.image_size)
        self.decoded.extend([self.spec.image_size] * len(images))
        return pixels

    def encode(self, pixels: FloatArray) -> FloatArray:
        self.encoded.append(len(pixels))
        colour = pixels.mean(axis=(2, 3)) + 1.5
        if self.spec.widths[0] < 64:
            colour[:, 2] = 0
        return np.asarray(colour / np.linalg.norm(colour, axis=1, keepdims=True), dtype=np.float32)

    def embed(self, images: Sequence[ImageSource]) -> FloatArray:
        return self.encode(self.preprocess(images))


@dataclass(frozen=True, kw_only=True)
class ElasticColours:
    name: str = "colours"
    source: str | None = None
    space_id: str = "colours"
    weights_sha256: str | None = None
    embedding_dim: int = 3
    shape: EncoderShape = SHAPE
    decoded: list[int] = field(default_factory=list)
    encoded: list[int] = field(default_factory=list)

    def encoder(self, spec: str | SubmodelSpec | None = None) -> ColourEncoder:
        return ColourEncoder(spec=self.shape.spec(spec), decoded=self.decoded, encoded=self.encoded)


def picture(colour: tuple[int, int, int], seed: int) -> bytes:
    """A noisy picture of one colour; different seeds give unlike hashes."""
    noise = np.random.default_rng(seed).integers(-30, 30, (9, 9, 1))
    pixels = np.clip(np.array(colour) + noise.repeat(16, 0).repeat(16, 1), 0, 255)
    buffer = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


COLOURS = {"blue": (90, 60, 220), "green": (60, 220, 60), "red": (220, 60, 60), "violet": (90, 60, 110)}


def pictures(each: int, *, seed: int, names: Sequence[str] = tuple(COLOURS)) -> LabelledImages:
    labels = np.repeat(np.arange(len(names)), each)
    images = [picture(COLOURS[names[label]], seed + row) for row, label in enumerate(labels)]
    return labelled(images, labels.tolist(), names, name=f"colours {seed}")


def labelled(
    images: Sequence[ImageSource], labels: Sequence[int], names: Sequence[str], *, name: str
) -> LabelledImages:
    return LabelledImages(
        name=name,
        class_names=tuple(names),
        labels=np.array(labels, dtype=np.int64),
        images=images,
        origins=[f"{name} row {row}" for row in range(len(images))],
    )


@pytest.fixture
def encoder() -> ElasticColours:
    return ElasticColours()


def test_a_blinder_query_encoder_loses_recall_with_an_interval_around_the_loss(encoder: ElasticColours) -> None:
    result = cross_test(
        encoder, pictures(10, seed=0), pictures(10, seed=1000), query_specs=["S", "XL"], gallery_specs=["XL"]
    )
    full, small = result.matrix["XL"]["XL"], result.matrix["S"]["XL"]
    assert full["recall@1"] == full["agreement@10"] == 1.0
    assert (full.loss.value, full.loss.low, full.loss.high) == (0, 0, 0)
    assert small["recall@1"] < 0.9
    assert small["agreement@10"] < 1.0
    assert small.loss.value == pytest.approx(100 * (full["recall@1"] - small["recall@1"]))
    assert 0 < small.loss.low < small.loss.value < small.loss.high


def test_the_loss_is_measured_although_xl_was_not_asked_for(encoder: ElasticColours) -> None:
    result = cross_test(
        encoder, pictures(10, seed=0), pictures(10, seed=1000), query_specs=["S"], gallery_specs=["XL", "S"]
    )
    assert list(result.matrix) == ["S"]
    assert list(result.matrix["S"]) == ["XL", "S"]
    assert result.matrix["S"]["XL"].loss.value > 0


def test_differences_are_paired_and_taken_to_xl_in_the_first_gallery(encoder: ElasticColours) -> None:
    result = cross_test(
        encoder, pictures(10, seed=0), pictures(10, seed=1000), query_specs=["S", "XL"], gallery_specs=["XL", "S"]
    )
    assert result.reference == ("XL", "XL")
    best = result.matrix["XL"]["XL"]
    unchanged = {name: (one.value, one.low, one.high) for name, one in best.difference.items()}
    assert unchanged == dict.fromkeys(("recall@1", "recall@10", "map@100", "map@r"), (0, 0, 0))
    for row in result.matrix.values():
        for quality in row.values():
            for name, difference in quality.difference.items():
                assert difference.value == pytest.approx(100 * (quality[name] - best[name]))
                assert difference.low <= difference.value + 1e-9
                assert difference.value <= difference.high + 1e-9
    crossed = result.matrix["XL"]["S"]  # the same encoder searches, so nothing is lost in this gallery
    assert crossed.loss.value == 0 > crossed.difference["recall@1"].value


def test_every_mean_lies_in_its_interval(encoder: ElasticColours) -> None:
    result = cross_test(encoder, pictures(10, seed=0), None, query_specs=["S"], gallery_specs=["XL"])
    measures = result.matrix["S"]["XL"].measures
    assert all(one.low <= one.value <= one.high for one in measures.values())
    assert measures["recall@1"].low < measures["recall@1"].high


def test_what_the_truth_lists_decides_and_junk_is_passed_over(encoder: ElasticColours) -> None:
    red, blue = picture(COLOURS["red"], 1), picture(COLOURS["blue"], 2)
    queries = Pictures(name="asked", images=[red, red, red, blue], origins=["a", "b", "c", "d"])
    gallery = Pictures(
        name="found",
        images=[picture(COLOURS["red"], 1), b"broken", picture(COLOURS["red"], 3), picture(COLOURS["green"], 4)],
        origins=["0", "1", "2", "3"],
    )
    # The best match is right, junk, wrong; the last query has nothing to find, as picture 1 is unreadable.
    truth = GroundTruth(positives=((0,), (2,), (2,), (1,)), junk=((), (0,), (), ()))
    result = cross_test(encoder, queries, gallery, truth=truth, query_specs=["XL"], gallery_specs=["XL"])
    quality = result.matrix["XL"]["XL"]
    assert (quality.n_queries, result.without_match, result.near_copies) == (3, 1, 0)
    assert [skipped.path for skipped in result.skipped] == ["1"]
    assert quality["recall@1"] == pytest.approx(2 / 3)
    assert quality["map@100"] == pytest.approx((1 + 1 + 1 / 2) / 3)
    assert quality["map"] == pytest.approx((1 + 1 + (0 + 1 / 2) / 2) / 3)


def test_leave_one_out_never_finds_the_query_itself(encoder: ElasticColours) -> None:
    images = [picture(COLOURS["red"], 1), picture(COLOURS["red"], 1), picture(COLOURS["blue"], 2)]
    images.append(picture(COLOURS["green"], 3))  # blue and green: one picture each, so nothing to find
    result = cross_test(
        encoder,
        labelled(images, [2, 2, 0, 1], ["blue", "green", "red"], name="tiny"),
        None,
        query_specs=["XL"],
        gallery_specs=["XL"],
    )
    assert result.without_match == 2
    assert result.matrix["XL"]["XL"].n_queries == 2
    assert result.matrix["XL"]["XL"]["recall@1"] == 1.0
    assert result.matrix["XL"]["XL"]["map@100"] == 1.0
    assert result.near_copies == 0


def test_what_the_truth_lists_never_is_the_query_itself_in_leave_one_out(encoder: ElasticColours) -> None:
    red, green = COLOURS["red"], COLOURS["green"]
    everything = Pictures(
        name="all",
        images=[b"broken", picture(red, 1), picture(green, 2), picture(green, 3), picture(red, 4)],
        origins=list("abcde"),
    )
    truth = GroundTruth(positives=((), (1, 2), (2, 3), (3,), (0,)), junk=((), (), (), (), ()))
    result = cross_test(encoder, everything, None, truth=truth, query_specs=["XL"], gallery_specs=["XL"])
    quality = result.matrix["XL"]["XL"]
    assert (quality.n_queries, result.without_match) == (2, 2)
    assert quality["recall@1"] == 1 / 2  # red finds the other red, which is not listed; green the other green
    assert quality["map@100"] == pytest.approx((1 / 2 + 1) / 2)


def test_leave_one_out_without_a_second_picture_of_any_class_is_refused(encoder: ElasticColours) -> None:
    with pytest.raises(DatasetError, match="no other picture of their class"):
        cross_test(encoder, pictures(1, seed=0), None, query_specs=["XL"], gallery_specs=["XL"])


def test_classes_are_matched_by_name_not_by_number(encoder: ElasticColours) -> None:
    queries, gallery = (
        pictures(3, seed=0, names=["red", "violet"]),
        pictures(3, seed=50, names=["blue", "green", "red"]),
    )
    result = cross_test(encoder, queries, gallery, query_specs=["XL"], gallery_specs=["XL"])
    assert result.matrix["XL"]["XL"]["recall@1"] == 1.0
    assert result.matrix["XL"]["XL"].n_queries == 3
    assert result.without_match == 3  # violet is not in the gallery


def test_near_copies_of_gallery_pictures_are_left_out_and_counted(encoder: ElasticColours) -> None:
    gallery = pictures(4, seed=100)
    fresh = pictures(2, seed=0)
    queries = labelled(
        [*fresh.images, gallery.images[0], gallery.images[5]], [*fresh.labels, 0, 1], fresh.class_names, name="mixed"
    )
    dropped = cross_test(encoder, queries, gallery, query_specs=["XL"], gallery_specs=["XL"])
    kept = cross_test(encoder, queries, gallery, query_specs=["XL"], gallery_specs=["XL"], drop_near_copies=False)
    assert (dropped.near_copies, dropped.matrix["XL"]["XL"].n_queries) == (2, 8)
    assert (kept.near_copies, kept.matrix["XL"]["XL"].n_queries) == (0, 10)
    with pytest.raises(DatasetError, match="16 of 16 are near-copies"):
        cross_test(encoder, gallery, gallery, query_specs=["XL"], gallery_specs=["XL"])


def test_unreadable_pictures_are_skipped_and_listed_with_their_reason(encoder: ElasticColours, tmp_path: Path) -> None:
    good, gallery = pictures(2, seed=0), pictures(2, seed=50)
    queries = labelled(
        [b"no picture", *good.images, tmp_path / "gone.png"], [0, *good.labels, 1], good.class_names, name="mixed"
    )
    result = cross_test(encoder, queries, gallery, query_specs=["XL"], gallery_specs=["XL"], batch_size=3)
    assert [(skipped.path, skipped.reason) for skipped in result.skipped] == [
        ("mixed row 0", "not a picture in a supported format"),
        ("mixed row 9", "no such file"),
    ]
    assert result.matrix["XL"]["XL"].n_queries == 8
    assert result.matrix["XL"]["XL"]["recall@1"] == 1.0


def test_data_without_one_readable_picture_are_refused(encoder: ElasticColours) -> None:
    broken = labelled([b"", b"junk"], [0, 1], ["blue", "red"], name="broken")
    for queries, gallery in [(broken, pictures(2, seed=0)), (pictures(2, seed=0), broken), (broken, None)]:
        with pytest.raises(DatasetError, match="2 pictures are unreadable"):
            cross_test(encoder, queries, gallery, query_specs=["S"], gallery_specs=["XL"])


def test_each_picture_is_decoded_once_per_resolution_and_batches_are_bounded(encoder: ElasticColours) -> None:
    specs = ["S", "XL", "S-r8", "XL-r8"]
    cross_test(
        encoder, pictures(5, seed=0), pictures(5, seed=99), query_specs=specs, gallery_specs=["XL"], batch_size=8
    )
    assert sorted(encoder.decoded) == [8] * 20 + [16] * 40  # queries at two resolutions, the gallery at one
    assert max(encoder.encoded) == 8


def test_limit_spreads_the_queries_over_all_classes_and_keeps_the_gallery(encoder: ElasticColours) -> None:
    result = cross_test(encoder, pictures(10, seed=0), None, query_specs=["S", "XL"], gallery_specs=["XL"], limit=4)
    quality = result.matrix["XL"]["XL"]
    assert quality.n_queries == 4
    assert quality["recall@1"] == quality["map@100"] == 1.0  # all 9 others of each class are there to find
    assert sum(encoder.encoded) == 40 + 2 * 4  # what only searches is given the queries alone


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_that_leaves_no_query_is_refused(encoder: ElasticColours, limit: int) -> None:
    with pytest.raises(DatasetError, match=f"a limit of {limit} leaves no query"):
        cross_test(encoder, pictures(2, seed=0), None, query_specs=["XL"], gallery_specs=["XL"], limit=limit)


def test_json_has_the_documented_shape_and_progress_counts_pictures(encoder: ElasticColours) -> None:
    events: list[ProgressEvent] = []
    raw = cross_test(
        encoder,
        pictures(2, seed=0),
        pictures(3, seed=50),
        query_specs=["S"],
        gallery_specs=["S"],
        flops={"S": 10, "M": 20, "XL": 80},
        progress=events.append,
    ).to_json()
    assert set(raw) == {
        *("queries", "gallery", "matrix", "reference", "flops", "near_copies", "without_match", "skipped")
    }
    means = {"recall@1", "recall@10", "map@100", "map@r", "agreement@10"}
    assert set(raw["matrix"]["S"]["S"]) == means | {"n_queries", "intervals", "loss", "difference"}
    assert set(raw["matrix"]["S"]["S"]["intervals"]) == means
    assert set(raw["matrix"]["S"]["S"]["difference"]) == means - {"agreement@10"}
    assert raw["reference"] == {"query": "XL", "gallery": "S"}
    assert set(raw["matrix"]["S"]["S"]["loss"]) == {"points", "low", "high"}
    assert raw["flops"] == {"S": 10, "XL": 80}  # XL, of which they are a share, although not asked for
    assert (raw["queries"], raw["gallery"], raw["skipped"]) == ("colours 0", "colours 50", [])
    assert [(event.stage, event.done, event.total) for event in events] == [
        ("embed queries", 8, 8),
        ("embed gallery", 12, 12),
    ]


def test_a_spec_that_the_encoder_lacks_is_refused_before_anything_is_decoded(encoder: ElasticColours) -> None:
    with pytest.raises(SpecError):
        cross_test(encoder, pictures(2, seed=0), None, query_specs=["Q"], gallery_specs=["XL"])
    assert encoder.decoded == []


@pytest.mark.parametrize("value", [float("nan"), 0.0])
def test_what_is_no_embedding_is_told_with_its_submodel(
    encoder: ElasticColours, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    monkeypatch.setattr(ColourEncoder, "encode", lambda _, pixels: np.full((len(pixels), 3), value, np.float32))
    with pytest.raises(CheckpointError, match="submodel 'XL': gives embeddings that are not finite"):
        cross_test(encoder, pictures(2, seed=0), None, query_specs=["S"], gallery_specs=["XL"])


def test_the_difference_hash_survives_recompression_and_tells_pictures_apart() -> None:
    original = picture(COLOURS["red"], 7)
    buffer = io.BytesIO()
    Image.open(io.BytesIO(original)).resize((70, 70)).save(buffer, "JPEG", quality=60)
    bits = [difference_hash(image) for image in (original, buffer.getvalue(), picture(COLOURS["red"], 8))]
    assert (bits[0] != bits[1]).sum() <= NEAR_COPY_BITS < (bits[0] != bits[2]).sum()


def test_caltechs_unseen_classes_hold_24_near_copies(encoder: ElasticColours) -> None:
    try:
        folder = data_folder() / "caltech-101"
    except DatasetError as error:
        pytest.skip(str(error))
    pytest.importorskip("pyarrow", reason="pyarrow reads the data sets")
    queries = read_dataset(folder / "test", classes="50:101")
    gallery = read_dataset(folder / "train", classes="50:101")
    result = cross_test(encoder, queries, gallery, query_specs=["XL"], gallery_specs=["XL"])
    assert (len(queries), result.near_copies, result.matrix["XL"]["XL"].n_queries) == (1050, 24, 1026)
    assert result.skipped == ()
