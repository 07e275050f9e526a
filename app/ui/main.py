"""The page: a picture and an encoder in, what was found and what it cost out.

Streamlit runs this file as a script, anew at every click; `matvit app INDEX --checkpoint CHECKPOINT` names these in
MATVIT_INDEX and MATVIT_CHECKPOINT.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import streamlit as st
from PIL import Image

from matvit import MatViT, MatVitError
from matvit.errors import ImageError, SpecError, on_a_line
from matvit.pareto import EncoderChoice
from matvit.preprocess import ImageSource
from matvit.spec import SubmodelSpec
from matvit_app import services
from matvit_app.pareto import bargain, encoder_choices
from matvit_app.ui.comparison import DEPTH, Comparison, compare
from matvit_app.ui.examples import Example, examples
from matvit_app.ui.latency import STEPS, latency_chart
from matvit_app.ui.pictures import STYLE, Tile, figure, labelled, plain, readable, telling_names, thumbnail
from matvit_data import DemoPhoto, demo_photos
from retrieval import Retriever
from retrieval.locations import location, read_picture, split_member, status_of
from retrieval.manifest import read_pointer
from retrieval.types import Hit

UPLOADS = ["jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif"]

# Streamlit's own hash of a path fails on bytes that are no text.
_PATHS: dict[str | type[Any], Callable[[Any], Any]] = {type(Path()): os.fsencode}

_STYLE = """<style>
.stMainBlockContainer { max-width: 1240px; padding-top: 3.2rem; padding-bottom: 3rem; }
.st-key-examples { display: grid; grid-template-columns: repeat(6, 1fr); gap: 14px; }
@media (max-width: 640px) { .st-key-examples { grid-template-columns: repeat(4, 1fr); gap: 10px; } }
[class*="st-key-example-"] button { padding: 0.1rem 0.2rem; min-height: 2rem; }
[class*="st-key-example-"] button p { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
[class*="st-key-example-"] img { border-radius: 8px; width: 100%; }
.st-key-query img { border-radius: 10px; width: 240px; max-width: 100%; }
.st-key-hits { display: grid; grid-template-columns: repeat(auto-fill, minmax(136px, 1fr)); gap: 14px; }
[class*="st-key-hit-"] button { padding: 0.1rem 0.2rem; min-height: 1.9rem; }
[class*="st-key-hit-"] button p { font-size: 0.8rem; }
</style>"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """The picture that is searched with."""

    image: ImageSource
    name: str
    file: Path | None  # a picture of the index: it must not find itself


# --- caches --------------------------------------------------------------------------------------


@st.cache_resource(show_spinner="Indexing the example photographs ...")
def _demo_index() -> Path:
    return services.demo_index()


@st.cache_resource(show_spinner="Opening the index ...", max_entries=2, hash_funcs=_PATHS)
def _open(path: Path, generation: str, checkpoint: str | None) -> tuple[Retriever, MatViT]:  # noqa: ARG001 (a newer generation is opened anew)
    """The index and its encoder, warmed up, so that nobody's first search waits for the libraries."""
    retriever = Retriever.open(path, encoder=None if checkpoint is None else services.load_encoder(checkpoint))
    encoder = retriever.encoder
    assert isinstance(encoder, MatViT)  # the only elastic encoder that an index names
    retriever.search(Image.new("RGB", (256, 256)), encoder="XL", k=1)
    return retriever, encoder


@st.cache_data(show_spinner=False, max_entries=2, hash_funcs=_PATHS)
def _examples(path: Path, generation: str, _retriever: Retriever) -> list[Example]:  # noqa: ARG001 (the cache's key)
    return examples(_retriever.paths())


@st.cache_data(show_spinner=False)
def _demo_by_file() -> dict[Path, DemoPhoto]:
    return {photo.file: photo for photo in demo_photos()}


@st.cache_data(show_spinner=False, max_entries=2000, hash_funcs=_PATHS)
def _thumbnail(path: Path, changed_ns: int, number: int, _retriever: Retriever) -> bytes:  # noqa: ARG001 (a changed file is read anew)
    return thumbnail(_retriever.read_picture(number))


def _thumbnail_of(found: Example | Hit, retriever: Retriever) -> bytes | None:
    """None where the picture that was indexed is not there."""
    try:
        file, _ = split_member(location(found.path))
        return _thumbnail(found.path, status_of(file).mtime_ns, found.id, retriever)
    except (MatVitError, OSError):
        return None


# --- what the person chooses ---------------------------------------------------------------------


def _choose_picture(offered: list[Example], retriever: Retriever) -> Query | None:
    st.subheader("1 · Choose a picture")
    # Files may have gone, or changed, since they were indexed.
    shown = [(example, image) for example in offered if (image := _thumbnail_of(example, retriever))]
    uploader = f"upload-{st.session_state.get('put_aside', 0)}"  # another one is empty
    upload = st.session_state.get(uploader)
    chosen: Path | None = st.session_state.get("picture")
    if chosen is None and upload is None and shown:
        chosen = shown[0][0].path
    strip = st.container(key="examples")
    for number, (example, image) in enumerate(shown):
        with strip.container(key=f"example-{number}", gap="xsmall"):
            st.html(labelled(image, example.name))
            st.button(
                plain(example.label),
                key=f"pick-{number}",
                type="primary" if example.path == chosen else "secondary",
                width="stretch",
                on_click=_pick,
                args=(example.path,),
            )
    if not shown:
        st.info("The pictures of this index are not where they were indexed. Search with a picture of your own.")
    st.file_uploader("Or search with your own picture", type=UPLOADS, key=uploader, on_change=_take_upload)
    if chosen is not None:
        return Query(image=_readable(chosen), name=_name(chosen), file=chosen)
    return None if upload is None else _read_upload(upload.name, upload.getvalue())


def _readable(path: Path) -> ImageSource:
    """What the encoder reads: a file by its path, a picture in a shard or a store as its bytes."""
    try:
        return path if path.is_file() else read_picture(path)
    except MatVitError:  # the search says so
        return path


def _pick(path: Path) -> None:
    """Search with a picture of the index, and put an uploaded one aside."""
    st.session_state["picture"] = path
    st.session_state["put_aside"] = st.session_state.get("put_aside", 0) + 1


def _take_upload() -> None:
    """Search with the uploaded picture, or the first one when that was taken away."""
    st.session_state["picture"] = None


def _name(path: Path) -> str:
    demo = _demo_by_file().get(path)
    return f"{path.parent.name}/{path.name}" if demo is None else _class_name(demo)


def _class_name(photo: DemoPhoto) -> str:
    return photo.class_name.replace("-", " ").replace("_", " ").capitalize()


def _read_upload(name: str, content: bytes) -> Query | None:
    try:
        thumbnail(content)
    except ImageError as error:
        st.error(readable(on_a_line(f"{name}: {error.what}; {error.fix}")))
        return None
    return Query(image=content, name=name, file=None)


def _choose_encoder(encoder: MatViT) -> tuple[SubmodelSpec | None, int]:
    st.subheader("2 · Choose an encoder")
    choices = {choice.spec: choice for choice in encoder_choices(encoder)}
    named = st.selectbox(
        "Encoder, and its share of XL's FLOPs",
        list(choices),
        index=bargain(list(choices.values())),
        format_func=lambda name: _label(choices[name]),
        key="encoder",
    )
    if any(choice.recall is not None for choice in choices.values()):
        st.caption("Recall: first hits of the right class when the encoder was validated, not on this index.")
    k = st.slider("Pictures to find", min_value=5, max_value=30, value=DEPTH, step=5, key="k")
    with st.expander("Advanced: any submodel"):
        typed = st.text_input(
            "Submodel spec",
            key="spec",
            placeholder="6S.6XL",
            help="Runs over the blocks, for example 6S.6XL, or further cuts of an encoder that has them, "
            "for example M-d10-r84; empty: the encoder chosen above.",
        )
        try:
            spec = encoder.shape.spec(typed.strip() or named)
        except SpecError as error:
            st.error(readable(str(error)))
            return None, k
        if typed.strip():
            st.caption(f"{spec} searches: {encoder.flops(spec) / encoder.flops():.0%} of the full encoder's computing.")
    return spec, k


def _label(choice: EncoderChoice) -> str:
    recall = "" if choice.recall is None else f" · recall {choice.recall:.1%}"
    return f"{choice.spec} · {choice.relative_flops:.0%}{recall}"


# --- what was found ------------------------------------------------------------------------------


def _show(comparison: Comparison, query: Query, retriever: Retriever, *, share: float) -> None:
    picture, found = st.columns([1, 3.6], gap="medium")
    with picture, st.container(key="query"):
        st.subheader("Query")
        st.html(labelled(thumbnail(query.image), query.name))
        st.text(readable(query.name))
    with found:
        st.subheader("Found")
        _show_numbers(comparison, share=share)
        demo = _demo_by_file()
        names = telling_names([hit.path for hit in comparison.hits])
        with st.container(key="hits"):
            ranks = range(1, len(names) + 1)  # a hit's own may count the query itself
            for rank, hit, name in zip(ranks, comparison.hits, names, strict=True):
                image = _thumbnail_of(hit, retriever)
                _show_hit(hit, name, image, demo.get(hit.path), rank=rank, strange=hit.id in comparison.strange)
        _show_latency(comparison)
        _show_credits([demo[hit.path] for hit in comparison.hits if hit.path in demo])


def _show_numbers(comparison: Comparison, *, share: float) -> None:
    answer, full = comparison.answer, comparison.full
    agreement, time, computing = st.columns(3)
    agreement.metric("Same as the full encoder", f"{comparison.same} of {comparison.depth}", border=True)
    time.metric(
        f"Time with {answer.spec} (XL: {full.latency_ms.total:.1f} ms)",
        f"{answer.latency_ms.total:.1f} ms",
        border=True,
    )
    computing.metric("Computing, share of XL", f"{share:.0%}", border=True)


def _show_hit(hit: Hit, name: str, image: bytes | None, photo: DemoPhoto | None, *, rank: int, strange: bool) -> None:
    tile = Tile(
        rank=rank,
        score=hit.score,
        name=name if photo is None else _class_name(photo),
        title=str(hit.path) if photo is None else photo.caption,
        image=image,
        strange=strange,
    )
    with st.container(key=f"hit-{rank}", gap=None):
        st.html(figure(tile))
        st.button(
            "Search with this",
            key=f"with-{rank}",
            type="tertiary",
            width="stretch",
            disabled=tile.image is None,
            on_click=_pick,
            args=(hit.path,),
        )


def _show_latency(comparison: Comparison) -> None:
    answer, full = comparison.answer, comparison.full
    st.subheader("Where the time goes")
    st.altair_chart(latency_chart([answer] if answer is full else [answer, full]), width="stretch")
    parts = " + ".join(f"{step} {getattr(answer.latency_ms, step):.1f}" for step in STEPS)
    st.caption(
        f"{answer.spec} on {answer.runtime}: {parts} = {answer.latency_ms.total:.1f} ms. Median of five searches, "
        f"measured just now on this machine after a warm-up."
    )


def _show_credits(photos: list[DemoPhoto]) -> None:
    if sources := sorted({f"{photo.credit} ({photo.licence})" for photo in photos}):
        st.caption("Photographs: " + "; ".join(sources))


def _page() -> None:
    # A ":material/" icon would be fetched from the internet.
    st.set_page_config(page_title="MatViT Retrieval", page_icon="🔍", layout="wide")
    st.html(_STYLE + STYLE)
    st.title("MatViT Retrieval")
    st.markdown("One index, built once by the full encoder; search it with a smaller one, and see what that saves.")
    try:
        named = os.environ.get("MATVIT_INDEX")
        path = Path(named) if named else _demo_index()
        generation = read_pointer(path).sha256
        retriever, encoder = _open(path, generation, os.environ.get("MATVIT_CHECKPOINT"))
        left, right = st.columns([1.75, 1], gap="large")
        with left:
            query = _choose_picture(_examples(path, generation, retriever), retriever)
        with right:
            spec, k = _choose_encoder(encoder)
            st.caption(f"Index: {plain(path.name)}, {len(retriever):,} pictures")
        if query is None or spec is None:
            return
        st.divider()
        with st.spinner("Searching ..."):
            comparison = compare(retriever, query.image, encoder=spec, k=k, leave_out=query.file)
        _show(comparison, query, retriever, share=encoder.flops(spec) / encoder.flops())
    except MatVitError as error:
        st.error(readable(str(error)))


_page()
