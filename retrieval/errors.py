"""The index's branch of the error tree: every error names what is wrong, where, and how to mend it.

MatVitError
├── IndexFormatError        not an index, a damaged one, or one of a newer format
│   └── DamagedFileError    a file of it is missing, or is not what was written: reading it again would not help
├── IndexExistsError        an index cannot be created where something else already is
├── IndexLockedError        another process is writing to the index
├── EncoderMismatchError    an encoder of another embedding space than the index's
├── EmbeddingError          an encoder that gave something other than finite unit-length vectors
├── IngestError             pictures that cannot be found, or an index that cannot be written
│   └── DiskRefusalError    the disk refuses a write: what is not published yet would be refused again
└── SearchError             a search that cannot be carried out, such as k = 0

IndexWarning (a UserWarning): an index answers rightly, but not as it should.
"""

from __future__ import annotations

from matvit.errors import MatVitError


class IndexFormatError(MatVitError):
    """A folder that holds no index, a damaged one, or one of a newer format."""


class DamagedFileError(IndexFormatError):
    """A file of an index that is missing, or is not what was written; not one that merely cannot be read now."""


class IndexExistsError(MatVitError):
    """An index was to be created where a file, an index or other files already are."""


class IndexLockedError(MatVitError):
    """Another writer holds the index; `what` names its process id."""


class EncoderMismatchError(MatVitError):
    """An encoder whose embedding space is not the index's: the answers would be plausible nonsense."""


class EmbeddingError(MatVitError):
    """An encoder gave embeddings of a wrong shape, or not finite and of unit length."""


class IngestError(MatVitError):
    """Pictures that cannot be found, or an index that cannot be written."""


class DiskRefusalError(IngestError):
    """The disk refuses to write the index."""


class SearchError(MatVitError, ValueError):
    """A search that cannot be carried out as it was asked."""


class IndexWarning(UserWarning):
    """An index that is damaged where it does not change its answers, only their time; one sentence."""
