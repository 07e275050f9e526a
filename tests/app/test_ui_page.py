"""The page's states, run by Streamlit's own test driver; no browser."""

from __future__ import annotations

import io
import itertools
import os
import re
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from matvit import MatViT
from matvit.model import AxesConfig
from matvit_app import services
from matvit_app.ui.examples import Example, evenly
from matvit_app.ui.pictures import Tile, figure, plain, shortened, telling_names
from matvit_data import demo_folder

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
    return "".join(part.proto.body for part in page.get("html") if "<figure" in part.proto.body)


def names_of(page: AppTest) -> list[str]:
    """What the query is called; other texts are not on the page."""
    return [text.value for text in page.text]


def offered_by(page: AppTest) -> list[str]:
    return [button.label for button in page.button if button.key.startswith("pick-")]


def picture(size: int = 40) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (size, size), "teal").save(out, "PNG")
    return out.getvalue()


def test_an_example_is_answered_with_hits_agreement_and_both_times(open_page, index):
    page = open_page(index)
    assert not page.error
    assert grid_of(page).count("<figure") == 7  # all pictures of the index but the query
    agreement, time, share = page.metric
    assert agreement.value == "7 of 7"
    assert time.value.endswith(" ms")
    assert "XL: " in time.label
    assert share.value != "100%"


def test_a_search_is_announced_while_it_runs(open_page, index, monkeypatch):
    announced = []
    monkeypatch.setattr("streamlit.spinner", lambda text: nullcontext(announced.append(text)))
    open_page(index)
    assert announced == ["Searching ..."]


def test_the_full_encoder_agrees_with_itself(open_page, index):
    page = open_page(index)
    page.selectbox(key="encoder").set_value("XL")
    run(page)
    assert [metric.value for metric in page.metric][::2] == ["7 of 7", "100%"]


def test_fewer_pictures_can_be_asked_for(open_page, index):
    page = open_page(index)
    page.slider(key="k").set_value(5)
    assert grid_of(run(page)).count("<figure") == 5


def test_pictures_of_the_opened_index_are_offered_and_none_finds_itself(open_page, index):
    page = open_page(index)
    assert offered_by(page) == [f"{folder}/{number}" for folder in ("cats", "dogs") for number in range(4)]
    assert names_of(page) == ["cats/0.png"]
    page.button(key="pick-5").click()
    run(page)
    assert names_of(page) == ["dogs/1.png"]
    assert "cats/1.png" in grid_of(page)
    assert "dogs/1.png" not in grid_of(page)


def test_a_hit_can_be_the_next_query(open_page, index):
    page = open_page(index)
    first = re.search(r'matvit-name">([^<]+)<', grid_of(page))[1]
    page.button(key="with-1").click()
    shown = grid_of(run(page))
    assert names_of(page) == [first]
    assert first not in shown
    assert shown.count("<figure") == 7


def test_picking_a_picture_puts_an_upload_aside(open_page, index):
    page = open_page(index)
    page.file_uploader(key="upload-0").set_value([("mine.png", picture(), "image/png")])
    run(page)
    page.button(key="pick-2").click()
    assert names_of(run(page)) == ["cats/2.png"]
    assert page.file_uploader[0].value in (None, [])  # nor is its name shown any longer


def test_the_demo_offers_its_own_choice(open_page, checkpoint, tmp_path):
    services.ingest([demo_folder() / "images"], path=tmp_path / "demo.index", checkpoint=str(checkpoint))
    page = open_page(tmp_path / "demo.index")
    assert offered_by(page)[:2] == ["Umbrella", "Pineapple"]
    assert len(offered_by(page)) == 12
    page.button(key="with-1").click()
    assert ".webp" not in names_of(run(page))[0]  # a photograph of the demo is called by its class


def test_without_a_measured_table_the_four_encoders_are_offered_with_their_cost_alone(open_page, index):
    page = open_page(index)
    labels = page.selectbox(key="encoder").options
    assert [label.split(" · ")[0] for label in labels] == ["S", "M", "L", "XL"]
    assert labels[-1] == "XL · 100%"
    assert not any("validated" in caption.value for caption in page.caption)


def test_a_measured_table_adds_its_best_rows_and_says_where_recall_is_from(open_page, photos, checkpoint, tmp_path):
    encoder = MatViT.from_pretrained(checkpoint)
    encoder.open_axes(AxesConfig(keep_order=(0, 1), image_size_step=14))
    named = {"S": 0.5, "M": 0.6, "L": 0.7, "XL": 0.8, "XL-r14": 0.75}
    encoder.pareto = tuple(
        {
            "name": spec,
            "spec": spec,
            "flops": encoder.flops(spec),
            "params": encoder.num_params(spec),
            "relative_flops": encoder.flops(spec) / encoder.flops(),
            "quality": {"recall@1": recall},
        }
        for spec, recall in named.items()
    )
    encoder.save_pretrained(tmp_path / "measured")
    services.ingest([photos], path=tmp_path / "own.index", checkpoint=str(tmp_path / "measured"))
    page = open_page(tmp_path / "own.index")
    box = page.selectbox(key="encoder")
    assert [label.split(" · ")[::2] for label in box.options[-2:]] == [
        ["XL", "recall 80.0%"],
        ["XL-r14", "recall 75.0%"],
    ]
    assert any("not on this index" in caption.value for caption in page.caption)
    box.set_value("XL-r14")
    run(page)
    assert not page.error
    assert any("XL-r14" in metric.label for metric in page.metric)


def test_any_spec_may_be_typed(open_page, index):
    page = open_page(index)
    page.text_input(key="spec").set_value("1S.1XL")
    run(page)
    assert not page.error
    assert any("1S.1XL" in metric.label for metric in page.metric)


def test_a_submodel_is_cut_for_its_first_search_and_not_at_every_click(open_page, index, monkeypatch):
    page = open_page(index)
    monkeypatch.setattr(MatViT, "extract", None)
    page.slider(key="k").set_value(5)
    run(page)
    assert not page.error
    assert not page.exception


@pytest.mark.parametrize("typed", ["Q", "5S", "<b>", "S-h1"])
def test_a_wrong_spec_is_one_sentence(open_page, index, typed):
    page = open_page(index)
    page.text_input(key="spec").set_value(typed)
    run(page)
    assert [error.value.startswith("encoder spec: ") for error in page.error] == [True]
    assert not grid_of(page)


def test_an_uploaded_picture_is_searched_with(open_page, index):
    page = open_page(index)
    page.file_uploader(key="upload-0").set_value([("mine.png", picture(), "image/png")])
    run(page)
    assert names_of(page) == ["mine.png"]
    assert grid_of(page)


def test_a_bad_upload_is_one_sentence(open_page, index):
    page = open_page(index)
    page.file_uploader(key="upload-0").set_value([("notes.png", b"no picture", "image/png")])
    run(page)
    assert [error.value.startswith("notes.png: not a picture") for error in page.error] == [True]
    assert not grid_of(page)


def test_a_name_too_long_for_its_tile_is_whole_beside_the_picture():
    name = "holidays/2019/the long way along the coast, number 17.jpg"
    shown = figure(Tile(rank=1, score=0.5, name=name, title=name, image=b"RIFF", strange=False))
    assert f'<img alt="{name}"' in shown
    assert f">{shortened(name)}<" in shown


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


def test_the_encoders_are_those_of_the_checkpoint_that_is_named(
    open_page, index, checkpoint, other_checkpoint, tmp_path, monkeypatch
):
    adapted = MatViT.from_pretrained(checkpoint)
    adapted.name = "adapted"
    adapted.save_pretrained(tmp_path / "adapted")
    monkeypatch.setenv("MATVIT_CHECKPOINT", str(tmp_path / "adapted"))
    assert not open_page(index).error
    monkeypatch.setenv("MATVIT_CHECKPOINT", str(other_checkpoint))
    [error] = open_page(index).error
    assert "embedding space" in error.value


def test_a_hit_whose_file_has_gone_keeps_its_place(open_page, own):
    (own.photos / "cats" / "0.png").unlink()
    page = open_page(own.index)
    assert "cats/0" not in offered_by(page)  # nobody can search with it
    assert grid_of(page).count("<figure") == 7
    assert grid_of(page).count("not there") == 1
    assert [button.disabled for button in page.button if button.key.startswith("with-")].count(True) == 1


def test_a_file_that_has_changed_is_not_shown_as_the_picture_that_was_indexed(open_page, own):
    shutil.copy(own.photos / "dogs" / "3.png", own.photos / "cats" / "0.png")
    page = open_page(own.index)
    assert "cats/0" not in offered_by(page)
    assert grid_of(page).count("not there") == 1


def test_an_index_whose_pictures_were_moved_says_so(open_page, own):
    own.photos.rename(own.photos.with_name("elsewhere"))
    page = open_page(own.index)
    assert not offered_by(page)
    assert "not where they were indexed" in page.info[0].value


@pytest.mark.skipif(os.name == "nt", reason="file names are bytes on POSIX only")
def test_a_file_name_is_no_markup(open_page, own):
    odd = [b"<script>&.png", b"*_[a](b)$x$ :smile:.png", b"\xff.png", b"\x1b[31m.png"]
    for number, name in enumerate(odd):
        (own.photos / "cats" / f"{number}.png").rename(own.photos / "cats" / os.fsdecode(name))
    services.ingest([own.photos], path=own.index, delete=True)
    page = open_page(own.index)
    for number in range(4):
        page.button(key=f"pick-{number}").click()
        assert grid_of(run(page)).count("<figure") == 7
        assert "<script>" not in grid_of(page)


def test_a_newer_generation_is_shown_at_the_next_click(open_page, own):
    page = open_page(own.index)
    (own.photos / "new.png").write_bytes(picture())
    services.ingest([own.photos], path=own.index)
    assert grid_of(run(page)).count("<figure") == 8
    assert any(label.endswith("/new") for label in offered_by(page))


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


@given(st.integers(0, 60), st.integers(1, 15))
def test_a_sample_is_spread_evenly(size, count):
    paths = [Path(str(number)) for number in range(size)]
    sample = [int(path.name) for path in evenly(paths, count)]
    assert len(sample) == min(size, count)
    steps = {after - before for before, after in itertools.pairwise(sample)}
    assert not steps or (min(steps) >= 1 and max(steps) - min(steps) <= 1)


def test_names_have_as_much_of_their_paths_as_tells_them_apart():
    def names(*paths):
        return telling_names([Path(path) for path in paths])

    assert names() == []
    assert names("/p/a/1.jpg", "/p/b/2.jpg") == ["1.jpg", "2.jpg"]
    assert names("/p/a/1.jpg", "/p/b/1.jpg", "/p/b/2.jpg") == ["a/1.jpg", "b/1.jpg", "b/2.jpg"]
    assert names("/p/a/x/1.jpg", "/p/b/x/1.jpg") == ["a/x/1.jpg", "b/x/1.jpg"]
    assert names("/p/s.tar#1.jpg", "/p/s.tar#2.jpg") == ["s.tar#1.jpg", "s.tar#2.jpg"]


def test_of_a_long_name_both_ends_are_shown():
    name = "holidays-2019/in-italy/IMG_20190714_123456.jpg"
    assert shortened("cats/1.jpg") == "cats/1.jpg"
    assert shortened(name) == "holidays-2…G_20190714_123456.jpg"
    assert len(shortened(name)) == 32
    labels = [Example(id=0, path=Path(), name=name).label for name in ("Pineapple", "dress/photo-3", "pants/photo-3")]
    assert labels == ["Pineapple", "dre…hoto-3", "pan…hoto-3"]


def test_a_name_in_markdown_is_shown_letter_by_letter():
    assert plain("a_b *c* $d$ :e: [f](g)") == r"a\_b \*c\* \$d\$ \:e\: \[f\]\(g\)"
