"""What the commands and the page call, where a command line cannot reach: full disks and second processes."""

from __future__ import annotations

import errno
import os

import pytest

import retrieval.ingest
from matvit_app import services
from retrieval import IngestError
from retrieval.writer import GenerationWriter


@pytest.mark.parametrize("published", [0, 1])
def test_a_disk_that_fills_up_keeps_the_index_as_far_as_it_came(checkpoint, photos, tmp_path, monkeypatch, published):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fill_the_disk(writer, *arguments, **named):
        with monkeypatch.context() as patch:
            if writer.manifest.generation > published:
                patch.setattr(os, "fsync", full)
            publish(writer, *arguments, **named)

    publish = GenerationWriter.publish
    monkeypatch.setattr(retrieval.ingest, "BATCH", 2)
    monkeypatch.setattr(retrieval.ingest, "PUBLISH_ITEMS", 4)
    monkeypatch.setattr(GenerationWriter, "publish", fill_the_disk)
    with pytest.raises(IngestError, match="No space left on device"):
        services.ingest([photos], path=tmp_path / "i", checkpoint=str(checkpoint))
    assert (tmp_path / "i").exists() == (published > 0)
    if published:
        assert services.index_info(tmp_path / "i").items == 4
        assert services.verify(str(tmp_path / "i")).problems == ()
