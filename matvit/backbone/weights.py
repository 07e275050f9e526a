"""Weights from a file, for a timm model of their architecture."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from matvit.errors import BackboneError
from matvit.regular import check_regular

_Tensors = dict[str, Tensor]


def read_weights(path: Path, *, like: nn.Module) -> _Tensors:
    """A safetensors file's tensors (float32) under the names that `like`, a timm model, has; no classifier's.

    Names that are not timm's own, such as Meta's of DINOv2 and DINOv3, are translated where timm can.
    Raises BackboneError when the file cannot be read, or is not of this architecture.
    """
    try:
        check_regular(path)  # safetensors would wait for a pipe, and not be interrupted
        tensors = {name: tensor.float() for name, tensor in load_file(path).items()}
    except FileNotFoundError as error:
        raise BackboneError(what="no such file", where=str(path), fix="give one that is there") from error
    except (OSError, SafetensorError, TypeError, UnicodeError) as error:  # the latter: no file's name
        raise _unfit(path, f"cannot be read as safetensors ({error})") from error
    try:
        tensors = _without_classifier(_translated(tensors, like))
    except (RuntimeError, KeyError, ValueError, IndexError) as error:
        raise _unfit(path, f"does not fit the model ({str(error).strip().splitlines()[-1]})") from error
    expected = _without_classifier(like.state_dict())
    for name in sorted(expected.keys() | tensors.keys()):
        found, wanted = (tuple(side[name].shape) if name in side else "none" for side in (tensors, expected))
        if found != wanted:
            raise _unfit(path, f"does not fit the model ('{name}': {found} in the file, {wanted} in the model)")
        if name in tensors and not tensors[name].isfinite().all():
            raise _unfit(path, f"has NaN or infinite values in '{name}'")
    return tensors


def _translated(tensors: _Tensors, model: nn.Module) -> _Tensors:
    """What timm does to downloaded weights of this class of models; it has no public name for it."""
    translate: Callable[[_Tensors, nn.Module], _Tensors] | None = getattr(
        sys.modules[type(model).__module__], "checkpoint_filter_fn", None
    )
    if translate is None:
        return tensors
    with redirect_stdout(io.StringIO()):  # it prints
        return translate(tensors, model)


def _without_classifier(tensors: _Tensors) -> _Tensors:
    return {name: tensor for name, tensor in tensors.items() if not name.startswith("head.")}


def _unfit(path: Path, what: str) -> BackboneError:
    return BackboneError(what=what, where=str(path), fix="give a safetensors file of this very timm model")
