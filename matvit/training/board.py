"""The numbers of log.jsonl for TensorBoard: `tensorboard --logdir RUNS`."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matvit.errors import MissingExtraError


def summary_writer() -> Any:
    """torch's SummaryWriter class. Raises MissingExtraError without TensorBoard."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise MissingExtraError.for_extra("tensorboard", purpose="--tensorboard") from error
    return SummaryWriter


class Board:
    """One run in `folder`, its steps counted over all stages; what was written beyond `step` is taken back."""

    def __init__(self, folder: Path, *, step: int) -> None:
        if step == 0:
            shutil.rmtree(folder, ignore_errors=True)
        self._writer = summary_writer()(folder, purge_step=step + 1)

    def write(self, row: Mapping[str, Any], *, step: int) -> None:
        """The row's loss, learning rate and speed, readable at once."""
        for name in ("loss", "learning_rate", "images_per_second", "mfu"):
            if row[name] is not None:
                self._writer.add_scalar(name, row[name], step)
        self._writer.flush()

    def close(self) -> None:
        """Ends the writer's thread."""
        self._writer.close()
