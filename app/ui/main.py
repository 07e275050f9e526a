"""The page: a picture and an encoder in, what was found and what it cost out.

Streamlit runs this file as a script, anew at every click; `matvit app INDEX` names the index in MATVIT_INDEX.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import streamlit as st

from matvit import MatViT, MatVitError
from matvit.errors import ImageError, SpecError
from matvit.preprocess import ImageSource
from matvit.spec import Granularity, SubmodelSpec
from matvit_app import services
from matvit_app.ui.comparison import DEPTH, Comparison, compare
from matvit_app.ui.latency import STEPS, latency_chart
from matvit_app.ui.pictures import Tile, grid, thumbnail
from matvit_data import DemoPhoto, demo_folder, demo_photos
from retrieval import Retriever
from retrieval.manifest import read_pointer
from retrieval.types import Hit

EXAMPLES = (
    ("Umbrella", "caltech-101/umbrella/photo-1.webp"),
    ("Pineapple", "grocery-store/Pineapple/photo-1.webp"),
    ("Juice", "grocery-store/Juice-God-Morgon-Orange-Juice/photo-1.webp"),
    ("Banana", "grocery-store/Banana/photo-1.webp"),
    ("Panda", "caltech-101/panda/photo-1.webp"),
    ("Sunflower", "caltech-101/sunflower/photo-1.webp"),
    ("Starfish", "caltech-101/starfish/photo-1.webp"),
    ("Schooner", "caltech-101/schooner/photo-1.webp"),
    ("Pepper", "grocery-store/Pepper-Red-Bell-Pepper/photo-1.webp"),
    ("Lobster", "caltech-101/lobster/photo-1.webp"),
    ("Laptop", "caltech-101/laptop/photo-1.webp"),
    ("Shoes", "clothing-small/shoes/photo-1.webp"),
)
UPLOADS = ["jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif"]
UPLOADED = -1  # in place of an example's number

_STYLE = """<style>
.stMainBlockContainer { max-width: 1240px; padding-top: 3.2rem; padding-bottom: 3rem; }
[class*="st-key-example-"] button { padding: 0.1rem 0.2rem; min-height: 2rem; }
[class*="st-key-example-"] img { border-radius: 8px; }
.st-key-query img { border-radius: 10px; }
[class*="st-key-example-"] [data-testid="stElementToolbar"] { display: none; }
</style>"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """The picture that is searched with."""

    image: ImageSource
    name: str
    file: Path | None  # an example's: it must not find itself


# --- caches --------------------------------------------------------------------------------------


@st.cache_resource(show_spinner="Indexing the example photographs ...")
def _demo_index() -> Path:
    return services.demo_index()


@st.cache_resource(show_spinner="Opening the index ...", max_entries=2)
def _open(path: Path, generation: str) -> tuple[Retriever, MatViT]:  # noqa: ARG001 (a newer generation is opened anew)
    """The index and its encoder, warmed up, so that nobody's first search waits for the libraries."""
    retriever = Retriever.open(path)
    encoder = retriever.encoder
    assert isinstance(encoder, MatViT)  # the only elastic encoder that an index names
    retriever.search(demo_folder() / "images" / EXAMPLES[0][1], encoder="XL", k=1)
    return retriever, encoder


@st.cache_data(show_spinner=False)
def _demo_by_file() -> dict[Path, DemoPhoto]:
    return {photo.file: photo for photo in demo_photos()}


@st.cache_data(show_spinner=False, max_entries=2000)
def _thumbnail(path: Path, changed_ns: int) -> bytes:  # noqa: ARG001 (a changed file is read anew)
    return thumbnail(path)


def _thumbnail_of(path: Path) -> bytes | None:
    try:
        return _thumbnail(path, path.stat().st_mtime_ns)
    except (ImageError, OSError):
        return None


# --- what the person chooses ---------------------------------------------------------------------


def _choose_picture() -> Query | None:
    st.subheader("1 · Choose a picture")
    strip = st.container(horizontal=True, gap="small")
    chosen = st.session_state.setdefault("picture", 0)
    for number, (name, file) in enumerate(EXAMPLES):
        with strip.container(key=f"example-{number}", width=88, gap="small"):
            if image := _thumbnail_of(demo_folder() / "images" / file):
                st.image(image, width="stretch")
            st.button(
                name,
                key=f"pick-{number}",
                type="primary" if number == chosen else "secondary",
                width="stretch",
                on_click=_pick,
                args=(number,),
            )
    upload = st.file_uploader("Or search with your own picture", type=UPLOADS, key="upload", on_change=_uploaded)
    if chosen == UPLOADED and upload is not None:
        return _read_upload(upload.name, upload.getvalue())
    name, file = EXAMPLES[max(chosen, 0)]
    path = demo_folder() / "images" / file
    return Query(image=path, name=name, file=path)


def _pick(number: int) -> None:
    st.session_state["picture"] = number


def _uploaded() -> None:
    st.session_state["picture"] = 0 if st.session_state["upload"] is None else UPLOADED


def _read_upload(name: str, content: bytes) -> Query | None:
    try:
        thumbnail(content)
    except ImageError as error:
        st.error(f"{name}: {error.what}; {error.fix}")
        return None
    return Query(image=content, name=name, file=None)


def _choose_encoder(encoder: MatViT) -> tuple[SubmodelSpec | None, int]:
    st.subheader("2 · Choose an encoder")
    share = {name.value: encoder.flops(name.value) / encoder.flops() for name in Granularity}
    named = st.segmented_control(
        "Encoder, and its share of the full one's computing",
        list(share),
        default="S",
        format_func=lambda name: f"{name} · {share[name]:.0%}",
        key="encoder",
    )
    k = st.slider("Pictures to find", min_value=5, max_value=30, value=DEPTH, step=5, key="k")
    with st.expander("Advanced: any submodel"):
        typed = st.text_input(
            "Submodel spec",
            key="spec",
            placeholder="6S.6XL",
            help="Runs over the blocks, for example 6S.6XL; empty: the encoder chosen above.",
        )
        try:
            spec = encoder.shape.spec(typed.strip() or named or "S")
            encoder.extract(spec)  # a spec may be well formed and still be beyond this encoder
        except SpecError as error:
            st.error(str(error))
            return None, k
        if typed.strip():
            st.caption(f"{spec} searches: {encoder.flops(spec) / encoder.flops():.0%} of the full encoder's computing.")
    return spec, k


# --- what was found ------------------------------------------------------------------------------


def _show(comparison: Comparison, query: Query, *, share: float) -> None:
    picture, found = st.columns([1, 3.6], gap="medium")
    with picture, st.container(key="query"):
        st.subheader("Query")
        st.image(thumbnail(query.image), width=240)
        st.caption(query.name)
    with found:
        st.subheader("Found")
        _show_numbers(comparison, share=share)
        demo = _demo_by_file()
        st.html(
            grid(
                [
                    _tile(hit, demo.get(hit.path), rank=rank, strange=hit.id in comparison.strange)
                    for rank, hit in enumerate(comparison.hits, start=1)  # its own may count the query itself
                ]
            )
        )
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


def _tile(hit: Hit, photo: DemoPhoto | None, *, rank: int, strange: bool) -> Tile:
    if photo is None:
        name, title = f"{hit.path.parent.name}/{hit.path.name}", str(hit.path)
    else:
        name, title = photo.class_name.replace("-", " ").replace("_", " ").capitalize(), photo.caption
    return Tile(rank=rank, score=hit.score, name=name, title=title, image=_thumbnail_of(hit.path), strange=strange)


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
    st.set_page_config(page_title="MatViT Retrieval", page_icon=":material/image_search:", layout="wide")
    st.html(_STYLE)
    st.title("MatViT Retrieval")
    st.markdown("One index, built once by the full encoder; search it with a smaller one, and see what that saves.")
    try:
        named = os.environ.get("MATVIT_INDEX")
        path = Path(named) if named else _demo_index()
        retriever, encoder = _open(path, read_pointer(path).sha256)
        left, right = st.columns([1.75, 1], gap="large")
        with left:
            query = _choose_picture()
        with right:
            spec, k = _choose_encoder(encoder)
            st.caption(f"Index: {path.name}, {len(retriever):,} pictures")
        if query is None or spec is None:
            return
        st.divider()
        comparison = compare(retriever, query.image, encoder=spec, k=k, leave_out=query.file)
        _show(comparison, query, share=encoder.flops(spec) / encoder.flops())
    except MatVitError as error:
        st.error(str(error))


_page()
