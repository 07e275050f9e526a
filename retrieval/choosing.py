"""Which submodel searches, when a search names what it may cost or must find instead of an encoder.

What each submodel finds was measured for the checkpoint's table; how long it takes is measured on this machine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count

from matvit.encoder import ElasticEncoder
from matvit.pareto import EncoderChoice, measured_choices, pareto_front
from matvit.progress import Progress, ProgressEvent
from retrieval.arguments import is_number
from retrieval.encoders import EncoderCache
from retrieval.errors import SearchError
from retrieval.latency import latency_ms

AUTO = "auto"
_KEPT = 64  # choices: a caller may give another limit every time
_AUTO_RECALL = 0.98  # the share of XL's recall that "auto" keeps where no limit is given


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What encoding a query may cost, and must find; None: no limit."""

    max_latency_ms: float | None = None  # of one picture on this machine, preprocessing and encoding
    min_recall: float | None = None  # recall@1 as a share of XL's, both in the checkpoint's table

    def __post_init__(self) -> None:
        time, share = self.max_latency_ms, self.min_recall
        if time is not None and (not is_number(time) or not time > 0):  # also refuses NaN
            raise _refused(f"max_latency_ms is {time!r}", fix="give a time above 0 ms")
        if share is not None and (not is_number(share) or not 0 <= share <= 1):
            raise _refused(f"min_recall is {share!r}", fix="give a share of XL's recall, from 0 to 1")

    def __bool__(self) -> bool:
        return self.max_latency_ms is not None or self.min_recall is not None


class Chooser:
    """Chooses among the submodels of one encoder, the same for the same limits. Safe from any thread."""

    def __init__(self, elastic: ElasticEncoder, submodels: EncoderCache) -> None:
        self._elastic, self._submodels = elastic, submodels
        self._chosen: dict[Limits, str] = {}  # reading the table takes longer than a small search

    def spec(self, limits: Limits, progress: Progress) -> str:
        """The submodel for these limits. Raises SearchError when there is none."""
        chosen = self._chosen.get(limits)
        if chosen is None:
            if len(self._chosen) >= _KEPT:
                self._chosen.clear()
            chosen = self._chosen[limits] = self._choose(limits, progress)
        return chosen

    def _choose(self, limits: Limits, progress: Progress) -> str:
        choices = measured_choices(self._elastic)
        if not choices:
            raise _refused(
                f"the checkpoint '{self._elastic.name}' does not tell its submodels' recall",
                fix="name an encoder, or measure them with: matvit eval DATASET --write-table",
            )
        full = choices.get(str(self._elastic.shape.spec()))
        if full is None:
            raise _refused(
                f"the table of the checkpoint '{self._elastic.name}' does not tell XL's recall",
                fix="name an encoder, or measure the table again: matvit eval DATASET --write-table",
            )
        front = pareto_front(list(choices.values()))
        timed = count(1)

        def measuring(spec: str) -> None:
            progress(ProgressEvent(stage="time", done=next(timed), total=None, unit="submodels", note=spec))

        def latency(spec: str) -> float:
            return latency_ms(self._submodels.get(spec), elastic=self._elastic, measuring=measuring)

        return choose(front, limits, full=full, latency=latency)


def choose(
    front: Sequence[EncoderChoice], limits: Limits, *, full: EncoderChoice, latency: Callable[[str], float]
) -> str:
    """The cheapest of `front` that finds enough; with a limit of time, the one that finds most within it. Pure.

    `front`: none beats another, the cheapest first. `latency`: milliseconds of a spec, asked for no more than needed.
    Raises SearchError when nothing is within the limits; it names the nearest.
    """
    least = limits.min_recall
    if least is None:
        least = _AUTO_RECALL if limits.max_latency_ms is None else 0.0
    shares = {choice.spec: (choice.recall or 0.0) / (full.recall or 1.0) for choice in front}
    enough = [choice.spec for choice in front if shares[choice.spec] >= least - 1e-9]  # 0.72 / 0.8 is 0.9
    if not enough:
        best = front[-1].spec
        raise _refused(
            f"no submodel has {least:.1%} of XL's recall", fix=f"ask for less: {best} has {shares[best]:.1%}"
        )
    if limits.max_latency_ms is None:
        return enough[0]
    times: dict[str, float] = {}
    for spec in reversed(enough):
        times[spec] = latency(spec)
        if times[spec] <= limits.max_latency_ms:
            return spec
    quickest = min(times, key=times.__getitem__)
    asked = f" with {least:.1%} of XL's recall" if limits.min_recall is not None else ""
    raise _refused(
        f"no submodel{asked} takes {limits.max_latency_ms:g} ms or less here",
        fix=f"allow more: {quickest} takes {times[quickest]:.1f} ms",
    )


def _refused(what: str, *, fix: str) -> SearchError:
    return SearchError(what=what, where="search", fix=fix)
