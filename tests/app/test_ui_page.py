"""The page's states, run by Streamlit's own test driver; no browser."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import pytest
from PIL import Image

from matvit_app import services

pytest.importorskip("streamlit")
from streamlit.testing.v1 import AppTest

MAIN = Path(services.__file__).parent / "ui" / "main.py"


@pytest.fixture
def open_page(monkeypatch):
    def open_page(index: Path) -> AppTest:
        monkeypatch.setenv("MATVIT_INDEX", str(index))
        return run(AppTest.from_file(str(MAIN), default_timeout=60))

    return open_page


def run(page: AppTest) -> AppTest:
    page.run()
    assert not page.exception  # never a traceback
    return page


def grid_of(page: AppTest) -> str:
    return next((part.proto.body for part in page.get("html") if "<figure" in part.proto.body), "")


def picture(size: int = 40) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (size, size), "teal").save(out, "PNG")
    return out.getvalue()


def test_an_example_is_answered_with_hits_agreement_and_both_times(open_page, index):
    page = open_page(index)
    assert not page.error
    assert grid_of(page).count("<figure") == 8  # all pictures of the index
    agreement, time, share = page.metric
    assert agreement.value == "8 of 8"
    assert time.value.endswith(" ms")
    assert "XL: " in time.label
    assert share.value != "100%"


def test_the_full_encoder_agrees_with_itself(open_page, index):
    page = open_page(index)
    page.button_group(key="encoder").set_value("XL")
    run(page)
    assert [metric.value for metric in page.metric][::2] == ["8 of 8", "100%"]


def test_fewer_pictures_can_be_asked_for(open_page, index):
    page = open_page(index)
    page.slider(key="k").set_value(5)
    assert grid_of(run(page)).count("<figure") == 5


def test_another_example_can_be_picked(open_page, index):
    page = open_page(index)
    page.button(key="pick-4").click()
    assert "Panda" in [caption.value for caption in run(page).caption]


def test_any_spec_may_be_typed(open_page, index):
    page = open_page(index)
    page.text_input(key="spec").set_value("1S.1XL")
    run(page)
    assert not page.error
    assert any("1S.1XL" in metric.label for metric in page.metric)


@pytest.mark.parametrize("typed", ["Q", "5S", "<b>", "S-h1"])
def test_a_wrong_spec_is_one_sentence(open_page, index, typed):
    page = open_page(index)
    page.text_input(key="spec").set_value(typed)
    run(page)
    assert [error.value.startswith("encoder spec: ") for error in page.error] == [True]
    assert not grid_of(page)


def test_an_uploaded_picture_is_searched_with(open_page, index):
    page = open_page(index)
    page.file_uploader(key="upload").set_value([("mine.png", picture(), "image/png")])
    run(page)
    assert "mine.png" in [caption.value for caption in page.caption]
    assert grid_of(page)


def test_a_bad_upload_is_one_sentence(open_page, index):
    page = open_page(index)
    page.file_uploader(key="upload").set_value([("notes.png", b"no picture", "image/png")])
    run(page)
    assert [error.value.startswith("notes.png: not a picture") for error in page.error] == [True]
    assert not grid_of(page)


def test_a_missing_index_is_one_sentence(open_page, tmp_path):
    page = open_page(tmp_path / "none.index")
    assert len(page.error) == 1
    assert "none.index" in page.error[0].value


def test_an_index_whose_encoder_was_replaced_is_refused(open_page, own, other_checkpoint):
    shutil.rmtree(own.checkpoint)
    shutil.copytree(other_checkpoint, own.checkpoint)
    page = open_page(own.index)
    assert len(page.error) == 1
    assert "embedding space" in page.error[0].value


def test_a_hit_whose_file_has_gone_keeps_its_place(open_page, own):
    (own.photos / "cats" / "0.png").unlink()
    page = open_page(own.index)
    assert grid_of(page).count("<figure") == 8
    assert grid_of(page).count("not there") == 1


def test_a_file_name_is_no_markup(open_page, own):
    odd = own.photos / "cats" / "<script>&.png"
    (own.photos / "cats" / "0.png").rename(odd)
    services.ingest([own.photos], path=own.index, delete=True)
    shown = grid_of(open_page(own.index))
    assert "&lt;script&gt;&amp;.png" in shown
    assert "<script>" not in shown


def test_a_newer_generation_is_shown_at_the_next_click(open_page, own):
    page = open_page(own.index)
    (own.photos / "new.png").write_bytes(picture())
    services.ingest([own.photos], path=own.index)
    assert grid_of(run(page)).count("<figure") == 9


class Own:
    """An index, its pictures and its checkpoint that a test may change."""

    def __init__(self, folder: Path, photos: Path, checkpoint: Path) -> None:
        self.photos, self.checkpoint, self.index = folder / "photos", folder / "checkpoint", folder / "own.index"
        shutil.copytree(photos, self.photos)
        shutil.copytree(checkpoint, self.checkpoint)
        services.ingest([self.photos], path=self.index, checkpoint=str(self.checkpoint))


@pytest.fixture
def own(tmp_path, photos, checkpoint):
    return Own(tmp_path, photos, checkpoint)
