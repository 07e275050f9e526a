"""What the commands and the page call: no printing, no streamlit; torch and faiss only where they are needed."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from matvit.durable import cache_folder
from matvit.errors import CheckpointError, DatasetError, ImageError
from matvit.progress import Progress, silent
from matvit.spec import Granularity

if TYPE_CHECKING:
    from matvit import MatViT
    from matvit.adapting import Adaptation
    from matvit.agreement import Agreement
    from matvit.converting import Conversion
    from matvit_app.demo import DemoTable
    from retrieval import Retriever
    from retrieval.types import (
        CompactReport,
        DuplicateGroup,
        Hits,
        IndexInfo,
        IngestReport,
        MetadataField,
        RepairReport,
        UpgradeReport,
    )

DEFAULT_CHECKPOINT = "matvit-small"
DEFAULT_INDEX = Path("photos.index")  # in the current folder, for `index` and `search` alike


def load_encoder(source: str, *, revision: str | None = None) -> MatViT:
    """The elastic encoder of a bundled name, a checkpoint folder or a hub id (there at its commit `revision`).

    Raises CheckpointError, or MissingExtraError without torch.
    """
    from matvit import MatViT

    return MatViT.from_pretrained(source, revision=revision)


# --- index and search ----------------------------------------------------------------------------


def ingest(
    images: Iterable[Path],
    *,
    path: Path,
    checkpoint: str | None = None,
    delete: bool = False,
    index_type: str | None = None,
    max_ram: int | None = None,
    progress: Progress = silent,
) -> IngestReport:
    """Adds pictures, and folders of them, to the index at `path`, which is made if it is not there.

    `checkpoint` None means the encoder that built the index, or the bundled one for a new index.
    `delete` forgets pictures whose files are gone. `index_type`, `max_ram`: how it is searched from now on, see
    `retrieval.Index.set_search`; None leaves it as it is.

    Raises MatVitError: no pictures at all, another encoder's index, a damaged one. An index without a
    picture is not made.
    """
    from retrieval.errors import IndexExistsError
    from retrieval.index import Index, build_index
    from retrieval.sources import find_files

    sources = find_files(images, delete=delete)  # before an encoder is loaded, which takes seconds
    encoder: MatViT | None
    if not is_index(path):
        encoder = load_encoder(checkpoint or DEFAULT_CHECKPOINT)
        try:
            index, report = build_index(sources, encoder=encoder, path=path, progress=progress)
        except IndexExistsError:
            if not is_index(path):  # or else another process has made it meanwhile, and may be writing to it
                raise
        else:
            if index_type is not None:
                index.set_search(index_type, max_ram=max_ram, progress=progress)
            return report
    encoder = None if checkpoint is None else load_encoder(checkpoint)
    return Index.open(path).ingest(
        sources, encoder=encoder, delete=delete, index_type=index_type, max_ram=max_ram, progress=progress
    )


def open_retriever(path: Path, *, checkpoint: str | None = None, pictures: Iterable[Path | int] = ()) -> Retriever:
    """What searches the index at `path`; `checkpoint` None means the one that built it.

    `pictures`: what it will be asked with, looked up before anything is loaded, which takes seconds.
    Raises MatVitError: a damaged index, an encoder of another space, a picture that is not there.
    """
    from retrieval import Retriever
    from retrieval.locations import os_reason, split_member, status_of

    for image in pictures:
        if isinstance(image, Path):
            place = location(image)
            if is_index(image):
                raise ImageError(what="is an index", where=place, fix=f"give it as --index {image}, and pictures")
            if image.is_dir():
                raise ImageError(what="is a folder, not a picture", where=place, fix="name pictures")
            try:
                status_of(split_member(place)[0])
            except OSError as error:
                raise ImageError(what=os_reason(error), where=place, fix="name pictures that are there") from error
    return Retriever.open(path, encoder=None if checkpoint is None else load_encoder(checkpoint))


def gone(paths: Iterable[Path]) -> set[Path]:
    """Those of the hits' paths at which there is no file of this computer now; stores and shards are not asked."""
    from retrieval.locations import is_virtual

    return {path for path in paths if not is_virtual(location(path)) and not path.exists()}


def location(path: Path) -> str:
    """See `retrieval.locations.location`."""
    from retrieval.locations import location as of

    return of(path)


def duplicates(path: Path, *, min_score: float | None, progress: Progress = silent) -> list[DuplicateGroup]:
    """See `retrieval.Retriever.duplicates`. Raises MatVitError: a damaged index."""
    return open_retriever(path).duplicates(min_score=min_score, progress=progress)


def group_json(group: DuplicateGroup) -> list[dict[str, Any]]:
    """The form that `matvit duplicates --json` prints for one group."""
    return [{**asdict(picture), "path": location(picture.path)} for picture in group]


def delete(paths: Iterable[Path | int], *, path: Path) -> tuple[int, int, int]:
    """See `retrieval.Index.delete`; gives how many were deleted, pictures among them, and pictures that are left.

    Raises MatVitError.
    """
    from retrieval import Index

    index = Index.open(path)
    before = index.info().items
    deleted, left = index.delete(paths), index.info().items
    return deleted, before - left, left


def compact(path: Path, *, progress: Progress = silent) -> CompactReport:
    """See `retrieval.Index.compact`. Raises MatVitError: a damaged index, a full disk, another writer."""
    from retrieval import Index

    return Index.open(path).compact(progress=progress)


def upgrade(path: Path, *, checkpoint: str, drop_missing: bool = False, progress: Progress = silent) -> UpgradeReport:
    """See `retrieval.Index.upgrade`. Raises MatVitError."""
    from retrieval import Index

    index = Index.open(path)
    return index.upgrade(load_encoder(checkpoint), drop_missing=drop_missing, progress=progress)


def repair(
    path: Path, *, checkpoint: str | None = None, drop_lost: bool = False, progress: Progress = silent
) -> RepairReport:
    """See `retrieval.Index.repair`. Raises MatVitError."""
    from retrieval import Index

    encoder = None if checkpoint is None else load_encoder(checkpoint)
    return Index.repair(path, encoder=encoder, drop_lost=drop_lost, progress=progress)


def ingest_json(report: IngestReport) -> dict[str, Any]:
    """The form that `matvit index --json` prints."""
    skipped = [{"path": location(file.path), "reason": file.reason} for file in report.skipped]
    return {
        "indexed": report.indexed,
        "unchanged": report.unchanged,
        "deleted": report.deleted,
        "gone": report.gone,
        "skipped": skipped,
        "images_per_second": report.images_per_second,
        "seconds": report.seconds,
    }


def hits_json(hits: Hits, *, encoder: str) -> dict[str, Any]:
    """The form that `matvit search --json` prints for one query; `encoder` is what was asked for."""
    found = [{**asdict(hit), "path": location(hit.path)} for hit in hits]
    return {
        "query": hits.query,
        "encoder": encoder,
        "spec": hits.spec,
        "runtime": hits.runtime,
        "latency_ms": asdict(hits.latency_ms),
        "hits": found,
    }


# --- what is this? -------------------------------------------------------------------------------


def is_index(path: Path) -> bool:
    """Whether `path` is an index, damaged or not."""
    from retrieval.manifest import is_index as looks_like_one

    return looks_like_one(path)


def index_types() -> tuple[str, ...]:
    """What `set_search` takes."""
    from retrieval.manifest import IndexType

    return ("auto", *get_args(IndexType))


def search_json(index: IndexInfo) -> dict[str, Any]:
    """How an index is searched, in the form that `matvit info` and `matvit index` print with --json."""
    return {
        "index_type": index.index_type,
        "index_reason": index.index_reason,
        "index_parameters": index.index_parameters,
        "recall_at_10": index.recall_at_10,
    }


def index_info(path: Path) -> IndexInfo:
    """What the index at `path` holds; its embeddings are not read. Raises IndexFormatError."""
    from retrieval import Index

    return Index.open(path).info()


def info_of(target: str) -> dict[str, Any]:
    """What a checkpoint or an index is, in the form that `matvit info --json` prints.

    Raises MatVitError when it is neither, damaged, or an index whose encoder is gone.
    """
    if not is_index(Path(target)):
        _checkpoint_at(target)
        return _encoder_info(load_encoder(target))
    index, fields = _read_index(target)
    if index.encoder_source is None:
        raise CheckpointError(
            what=f"the encoder '{index.encoder_name}' that built this index was never saved",
            where=target,
            fix="save it and index the pictures again",
        )
    encoder = _encoder_info(load_encoder(index.encoder_source, revision=index.encoder_revision))
    contents = _contents_json(target, index, fields)
    return contents | {name: value for name, value in encoder.items() if name not in contents}


def contents_of(target: str) -> dict[str, Any]:
    """What an index holds: of `info_of`, what needs no encoder and no torch. Raises IndexFormatError."""
    return _contents_json(target, *_read_index(target))


def _read_index(target: str) -> tuple[IndexInfo, dict[str, MetadataField]]:
    from retrieval import Index
    from retrieval.files import index_folder
    from retrieval.manifest import read_current

    def read(_: object) -> tuple[IndexInfo, dict[str, MetadataField]]:
        opened = Index.open(target)
        return opened.info(), opened.fields()

    return read_current(index_folder(target), read)


def _contents_json(target: str, index: IndexInfo, fields: Mapping[str, MetadataField]) -> dict[str, Any]:
    return {
        "encoder": index.encoder_name,
        "embedding_dim": index.embedding_dim,
        "space_id": index.space_id,
        "path": target,
        "items": index.items,
        "generation": index.generation,
        **search_json(index),
        "bytes": index.bytes,
        "gallery": {"spec": index.encoder_spec, "resolution": index.encoder_resolution, "source": index.encoder_source},
        "metadata": {name: _field_json(field) for name, field in fields.items()},
        "skipped": len(index.skipped),
        "skipped_reasons": _reasons(index),
        "skipped_files": [{"path": location(file.path), "reason": file.reason} for file in index.skipped],
    }


def _field_json(field: MetadataField) -> dict[str, Any]:
    common = [{"value": value, "pictures": count} for value, count in field.common]
    return {"pictures": field.pictures, "values": field.values, "common": common, "range": field.range}


def _reasons(index: IndexInfo) -> dict[str, int]:
    """How many files were skipped for each reason, the most frequent first; what is in brackets is one file's own."""
    return dict(Counter(file.reason.partition(" (")[0] for file in index.skipped).most_common())


def _checkpoint_at(target: str) -> Path:
    """The folder of a checkpoint, where an index could have been named as well. Raises CheckpointError."""
    from matvit.checkpoint import NoSuchCheckpointError, locate

    folder = Path(target)
    if folder.exists() and not (folder / "config.json").is_file():
        raise CheckpointError(
            what="holds neither a checkpoint nor an index",
            where=target,
            fix="give a checkpoint (a folder with config.json, a bundled name, a hub id) or an index",
        )
    try:
        return locate(target)
    except CheckpointError as error:
        what = f"{error.what}, nor an index" if isinstance(error, NoSuchCheckpointError) else error.what
        raise CheckpointError(what=what, where=error.where, fix=f"check the path, or {error.fix}") from error


def _encoder_info(model: MatViT) -> dict[str, Any]:
    from matvit.checkpoint import pareto_row

    table = {row["spec"]: row for row in model.pareto}
    named = [str(spec) for spec in model.shape.granularities()]

    def described(spec: str) -> dict[str, Any]:
        row = table.get(spec, {})
        return pareto_row(model, spec, row.get("quality", {})) | {key: row[key] for key in row.keys() & {"measured"}}

    return {
        "encoder": model.name,
        "embedding_dim": model.embedding_dim,
        "space_id": model.space_id,
        "weights_sha256": model.weights_sha256,
        "submodels": [described(spec) for spec in (*named, *(spec for spec in table if spec not in named))],
        "axes": _axes(model),
    }


def _axes(model: MatViT) -> dict[str, Any]:
    """By axis that this encoder can be cut along: the full size, and what the cut may be."""
    shape = model.shape
    described = {
        "ffn": {"blocks": shape.num_blocks, "widths": list(shape.ffn_widths)},
        "heads": {"full": shape.num_heads},
        "depth": {"full": shape.num_blocks, "keep_order": list(shape.keep_order)},
        "resolution": {"native": shape.image_size, "step": shape.image_size_step},
    }
    return {name: described[name] for name in shape.axes}


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """What `verify` found; no problems means that every file is what was written."""

    kind: Literal["index", "checkpoint"]
    problems: tuple[str, ...]
    sampled: int = 0  # pictures of an index that were embedded once more
    unusable: int = 0  # pictures that were to be, but whose file is gone or has changed
    unsampled: str | None = None  # why none was, where no number was asked for


def verify(
    target: str, *, sample: int | None = 0, checkpoint: str | None = None, progress: Progress = silent
) -> Verification:
    """Checks every file of an index or a checkpoint against its hash, and `sample` pictures of an index again.

    `sample` None: a few, where the encoder that built it can be had. `checkpoint`: what embeds them instead of that.

    Raises CheckpointError when `target` is neither, IndexFormatError where an index cannot be read for another reason
    than damage.
    """
    if is_index(Path(target)):
        from retrieval.verify import verify_index

        encoder = None if checkpoint is None else load_encoder(checkpoint)
        report = verify_index(Path(target).absolute(), sample=sample, encoder=encoder, progress=progress)
        return Verification(
            kind="index",
            problems=report.problems,
            sampled=report.sampled,
            unusable=report.unusable,
            unsampled=report.unsampled,
        )
    folder = _checkpoint_at(target)
    from matvit.checkpoint import load

    try:
        load(folder)
    except CheckpointError as error:
        return Verification(kind="checkpoint", problems=(str(error),))
    return Verification(kind="checkpoint", problems=())


# --- training ----------------------------------------------------------------------


def train(
    recipe: str, *, out: Path, resume: bool, tensorboard: bool = False, progress: Progress = silent
) -> dict[str, Any]:
    """Carries out a recipe file or a packaged recipe; gives the form that `matvit train --json` prints.

    Raises RecipeError, DatasetError, or MissingExtraError without the packages that training needs.
    """
    from matvit.training.recipe import load_recipe

    loaded = load_recipe(recipe)  # before torch is imported: a misspelt recipe is told at once
    from matvit.training.loop import carry_out

    started = time.monotonic()
    trained = carry_out(loaded, out=out, resume=resume, tensorboard=tensorboard, progress=progress)
    model = trained.encoder
    return {
        "encoder": model.name,
        "checkpoint": model.source,
        "space_id": model.space_id,
        "weights_sha256": model.weights_sha256,
        "seconds": time.monotonic() - started,
        "already_complete": trained.already_complete,
        "metrics": model.record.get("metrics", {}),
    }


def convert(
    timm_model: str,
    *,
    weights: Path | None,
    pretrained: bool,
    images: Sequence[Path],
    image_size: int | None,
    out: Path,
    progress: Progress = silent,
) -> tuple[MatViT, Conversion]:
    """Makes the timm model elastic on the pictures below `images` (none: the bundled ones), and saves it at `out`.

    Raises MatVitError: an unknown or unfit model, weights that do not fit, too few pictures, an `out` that holds
    something else.
    """
    from matvit import checkpoint as checkpoints
    from matvit.converting import convert as run
    from matvit.model import MatViT
    from matvit_data import demo_folder

    checkpoints.refuse_to_replace(out)  # before the minutes are spent
    files = [file for folder in images or (demo_folder(),) for file in _pictures_below(folder)]
    model = MatViT.from_timm(timm_model, weights=weights, pretrained=pretrained, image_size=image_size)
    result = run(model, files, progress=progress)
    model.record = {"converted": {"from": model.name, "pictures": result.pictures, "held_back": result.held_back}}
    model.pareto = tuple(
        checkpoints.pareto_row(model, spec, {"agreement@10": found.agreement_at_10, "cosine": found.cosine})
        for spec, found in result.agreement.items()
    )
    model.save_pretrained(out)
    return model, result


def adapt(checkpoint: str, *, images: Path, out: Path, progress: Progress = silent) -> Adaptation:
    """Fits what S, M and L own to the pictures below `images`, and saves the encoder at `out` if that helped.

    Raises MatVitError: too few pictures, a missing checkpoint, an `out` that holds something else.
    """
    from matvit import checkpoint as checkpoints
    from matvit.adapting import adapt as run

    files = _pictures_below(images)
    model = load_encoder(checkpoint)
    checkpoints.refuse_to_replace(out)  # before the minutes are spent
    storage = checkpoints.read_config(checkpoints.locate(checkpoint)).weights.storage
    result = run(model, files, labels=[str(Path(file).parent) for file in files], progress=progress)
    if result.kept:
        model.pareto = tuple(_without_stale_quality(model, row, result.kept) for row in model.pareto)
        model.record = {**model.record, "adapted": adaptation_json(result, out=None)}
        model.save_pretrained(out, storage=storage)
    return result


def adaptation_json(result: Adaptation, *, out: Path | None) -> dict[str, Any]:
    """The form that `matvit adapt --json` prints; without `out` and paths, that of a checkpoint's record."""

    def of(measured: Agreement) -> dict[str, float]:
        found = {"cosine": measured.cosine, "first": measured.first, "agreement@10": measured.agreement_at_10}
        return found if measured.recall is None else found | {"recall@1": measured.recall}

    described: dict[str, Any] = {
        "pictures": result.pictures,
        "near_copies": result.near_copies,
        "kept": list(result.kept),
        "before": {name: of(gain.before) for name, gain in result.gains.items()},
        "after": {name: of(gain.after) for name, gain in result.gains.items()},
        "interval": {name: [gain.low, gain.high] for name, gain in result.gains.items()},  # of agreement@10's gain
    }
    if out is None:
        return described
    skipped = [asdict(picture) for picture in result.skipped]
    return {"checkpoint": str(out) if result.kept else None, **described, "skipped": skipped}


def _pictures_below(folder: Path) -> list[str]:
    from matvit.datasets import PICTURE_SUFFIXES
    from matvit.walk import walk_files

    def refuse(error: OSError) -> None:
        raise DatasetError(
            what=f"cannot be read ({error.strerror})", where=str(folder), fix="give a folder of pictures"
        )

    if folder.is_file():
        return [os.fspath(folder)]
    return [path for path in walk_files(folder, on_error=refuse) if Path(path).suffix.lower() in PICTURE_SUFFIXES]


def _without_stale_quality(model: MatViT, row: dict[str, Any], changed: Sequence[str]) -> dict[str, Any]:
    """What was measured of a submodel holds no longer once its last block computes something else.

    `changed` are granularities: they own other deltas there than before.
    """
    spec, last = model.shape.spec(row["spec"]), model.shape.num_blocks - 1
    if (
        last not in spec.kept_blocks
        or Granularity.named(spec.widths[last], model.shape.ffn_widths[last]) not in changed
    ):
        return row
    return {**{name: value for name, value in row.items() if name != "measured"}, "quality": {}}


# --- the demo ------------------------------------------------------------------------------------


def demo_index(*, progress: Progress = silent) -> Path:
    """The index of the bundled photographs by the bundled encoder: made once, then reused while it is whole.

    Raises MatVitError when the checkpoint is missing or damaged.
    """
    return _demo_index(load_encoder(DEFAULT_CHECKPOINT), progress)


def run_demo(*, progress: Progress = silent) -> tuple[Path, DemoTable]:
    """The demo's index, and its table measured here and now: see `matvit_app.demo.demo_table`."""
    from matvit_app.demo import demo_table
    from matvit_data import demo_photos
    from retrieval import Retriever

    encoder = load_encoder(DEFAULT_CHECKPOINT)
    path = _demo_index(encoder, progress)
    return path, demo_table(Retriever.open(path, encoder=encoder), encoder, demo_photos(), progress=progress)


def _demo_index(encoder: MatViT, progress: Progress) -> Path:
    from matvit_data import demo_folder
    from retrieval import EncoderMismatchError, Index, IndexFormatError, IndexLockedError
    from retrieval.files import writing

    photos = demo_folder() / "images"
    # The folder counts too: two installations that share a cache must not find each other's pictures.
    installation = hashlib.sha256(os.fsencode(photos)).hexdigest()
    path = cache_folder() / f"demo-{encoder.space_id:.8}-{installation:.8}.index"
    with writing(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=".demo-", dir=path.parent))
    try:
        if path.exists():
            try:
                Index.open(path).ingest(photos, encoder=encoder, delete=True, progress=progress)
            except IndexLockedError:
                pass  # it is whole, and another demo brings it up to date
            except (IndexFormatError, EncoderMismatchError):
                with suppress(FileNotFoundError):  # another demo was faster
                    path.rename(aside / "damaged")
        if not path.exists():
            # Built aside and renamed: two demos may do the work twice, but neither meets half an index.
            Index.build(photos, encoder=encoder, path=aside / "new", progress=progress)
            try:
                (aside / "new").rename(path)
            except OSError:
                if not is_index(path):  # or else another demo was faster
                    raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return path
