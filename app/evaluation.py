"""`matvit eval`: the cross-test, Mix'n'Match against the uniform submodels, and the checkpoint's table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matvit import mixing
from matvit.datasets import portable
from matvit.errors import CheckpointError, SpecError
from matvit.evaluation import CrossTest, cross_test
from matvit.metrics import RECALL
from matvit.mixing import MixedPoint, MixedSpecs
from matvit.pareto import EncoderChoice, pareto_front
from matvit.progress import Progress, silent
from matvit.tasks import RetrievalTask

if TYPE_CHECKING:
    from matvit import MatViT

_BATCH = {"cpu": 64, "cuda": 256}  # pictures


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """A cross-test, and the mixed specs in it if there were any."""

    result: CrossTest
    mixed: MixedSpecs | None

    @property
    def gallery(self) -> str:
        """The first gallery's spec: what the plane and the table are about."""
        return self.result.reference[1]

    @property
    def recall(self) -> Mapping[str, float]:
        """recall@1 in the first gallery, by query spec."""
        return {query: row[self.gallery][RECALL] for query, row in self.result.matrix.items()}

    @property
    def points(self) -> list[MixedPoint]:
        """The mixed specs beside the line between the uniform ones; empty without mixed ones."""
        if self.mixed is None:
            return []
        return mixing.against_line(self.mixed, recall=self.recall, flops=self.result.flops)

    @property
    def named(self) -> list[str]:
        """The query specs that are not mixed."""
        mixed = set() if self.mixed is None else {str(spec) for spec in self.mixed.specs}
        return [query for query in self.result.matrix if query not in mixed]

    @property
    def front(self) -> list[str]:
        """The query specs that no other one beats in the first gallery, the cheapest first."""
        full = self.result.flops[self.result.reference[0]]
        choices = [
            EncoderChoice(spec=spec, relative_flops=self.result.flops[spec] / full, recall=recall)
            for spec, recall in self.recall.items()
        ]
        return [choice.spec for choice in pareto_front(choices)]

    def to_json(self) -> dict[str, Any]:
        """The form that `matvit eval --json` prints."""
        document = self.result.to_json() | {"pareto_front": self.front}
        if self.mixed is not None:
            document["mixed"] = mixing.summary(self.points, asked=self.mixed.asked)
        return document


def evaluate(
    model: MatViT,
    task: RetrievalTask,
    *,
    queries: Sequence[str],
    galleries: Sequence[str],
    keep_near_copies: bool = False,
    recall_at: Sequence[int] = (1, 10),
    limit: int | None = None,
    progress: Progress = silent,
) -> Evaluation:
    """The cross-test of `model`'s submodels, on its device; a query such as "mixed:200" stands for many.

    Raises SpecError for wrong specs, DatasetError when no query is left.
    """
    mixed = _mixed(model, queries)
    named = [query for query in queries if not mixing.is_mixed(query)]
    specs = [*map(model.shape.spec, named), *(() if mixed is None else (*mixed.uniform, *mixed.specs))]
    searched = [model.shape.spec(gallery) for gallery in galleries]
    if mixed is None:
        submodels: Any = model
    else:
        from matvit.shared_weights import SharedWeights

        submodels = SharedWeights(model=model)
    result = cross_test(
        submodels,
        task.queries,
        task.gallery,
        truth=task.truth,
        query_specs=specs,
        gallery_specs=searched,
        drop_near_copies=not keep_near_copies,
        recall_at=recall_at,
        limit=limit,
        batch_size=_BATCH.get(model.device.type, 64),
        flops={str(spec): model.flops(spec) for spec in (model.shape.spec(), *specs, *searched)},
        progress=progress,
    )
    return Evaluation(result=result, mixed=mixed)


def _mixed(model: MatViT, queries: Sequence[str]) -> MixedSpecs | None:
    asked = [query for query in queries if mixing.is_mixed(query)]
    if len(asked) > 1:
        raise SpecError(
            what=f"asks for mixed submodels {len(asked)} times", where=", ".join(asked), fix="ask once in one command"
        )
    return mixing.mixed_specs(model.shape, asked[0]) if asked else None


# --- the checkpoint's table ---------------------------------------------------------------------


def table_folder(source: str) -> Path:
    """The checkpoint folder whose table may be written. Raises CheckpointError for bundled names and hub ids."""
    from matvit.checkpoint import refuse_unwritable

    if not Path(source).is_dir():
        raise CheckpointError(
            what="is no folder of yours, whose table could be written",
            where=source,
            fix="copy the checkpoint into a folder and give that",
        )
    refuse_unwritable(Path(source) / "pareto.json")
    return Path(source)


def table_specs(model: MatViT, *, gallery: str) -> list[str]:
    """XL and the specs in the checkpoint's table: measured together, so that its rows can be compared, also with XL's.

    Raises SpecError unless `gallery`, the first one, is the full encoder's: rows say what a query finds there.
    """
    if not model.shape.spec(gallery).is_full:
        raise SpecError(
            what="the table says what is found in the full encoder's gallery",
            where=f"gallery '{gallery}'",
            fix="put XL first in --galleries, or leave --write-table out",
        )
    return [str(model.shape.spec(spec)) for spec in ("XL", *(row["spec"] for row in model.pareto))]


def write_table(model: MatViT, found: Evaluation, *, folder: Path) -> int:
    """Makes what was found the checkpoint's table (`pareto.json`), and gives the number of its rows.

    It holds every spec that was named, and the mixed ones on the Pareto front. What an earlier row of the same
    spec says besides cost and quality stays, and so does the rest of the folder. Raises CheckpointError when that
    cannot be written.
    """
    from matvit.checkpoint import save_table

    kept = [spec for spec in found.result.matrix if spec in {*found.named, *found.front}]
    earlier = {str(model.shape.spec(row["spec"])): row for row in model.pareto}
    rows = [_row(model, spec, found, earlier.get(spec, {})) for spec in sorted(kept, key=model.flops)]
    model.pareto = tuple(rows)
    save_table(model, folder)
    return len(rows)


def _row(model: MatViT, spec: str, found: Evaluation, earlier: Mapping[str, Any]) -> dict[str, Any]:
    from matvit.checkpoint import pareto_row

    quality = found.result.matrix[spec][found.gallery]
    row = pareto_row(model, spec, {name: round(mean.value, 5) for name, mean in quality.measures.items()})
    return {
        **earlier,
        **row,
        "name": earlier.get("name", spec),
        "measured": {
            "queries": portable(found.result.queries),
            "gallery": portable(found.result.gallery),
            "gallery_spec": found.gallery,
            "n_queries": quality.n_queries,
        },
    }
