"""What users import: exactly `__all__`, without torch until an encoder is asked for."""

from __future__ import annotations

import importlib
import inspect
import pickle
import subprocess
import sys
import textwrap
from types import ModuleType

import pytest

import matvit
from matvit import MatVitError, errors


def _run(code: str) -> str:
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False, timeout=120
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def test_all_is_what_is_importable() -> None:
    importable = {name: getattr(matvit, name) for name in matvit.__all__}
    assert all(inspect.isclass(value) for value in importable.values())
    assert list(matvit.__all__) == sorted(matvit.__all__)
    public = {
        name
        for name, value in vars(matvit).items()
        if not name.startswith("_")
        and not isinstance(value, ModuleType)
        and name not in {"TYPE_CHECKING", "annotations"}
    }
    assert public <= set(matvit.__all__)


def test_every_error_class_is_exported_and_documented() -> None:
    defined = {name for name, value in vars(errors).items() if inspect.isclass(value) and issubclass(value, Exception)}
    assert defined <= set(matvit.__all__)
    assert all(name in (errors.__doc__ or "") for name in defined)


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="no attribute 'MatVit'"):
        _ = matvit.MatVit


@pytest.mark.parametrize("name", [name for name in matvit.__all__ if name.endswith("Error")])
def test_errors_read_as_one_sentence_and_survive_pickling(name: str) -> None:
    """Worker processes pickle what they raise."""
    error = getattr(matvit, name)(what="is broken", where="file.txt", fix="mend it")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert isinstance(again, MatVitError)
    assert (str(again), again.what, again.where, again.fix) == (
        "file.txt: is broken; mend it",
        "is broken",
        "file.txt",
        "mend it",
    )


@pytest.mark.parametrize("package", ["matvit", "retrieval"])
def test_importing_does_not_import_torch(package: str) -> None:
    heavy = _run(f"import {package}, sys; print({{'torch', 'timm', 'torchvision'}} & set(sys.modules))")
    assert heavy == "set()"


def test_an_index_is_opened_without_faiss_which_searching_alone_needs():
    loaded = "import sys; print('faiss' in sys.modules)"
    assert _run(f"import retrieval; from retrieval import Index; {loaded}") == "False"
    assert _run(f"from retrieval import Retriever; {loaded}") == "True"


def test_without_torch_the_install_line_is_named() -> None:
    told = _run(
        """
        import sys

        class Blocker:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] in {"torch", "timm", "torchvision"}:
                    raise ModuleNotFoundError(f"No module named '{name}'", name=name.partition(".")[0])

        sys.meta_path.insert(0, Blocker())
        import matvit
        from matvit import EncoderShape, MissingExtraError

        assert str(EncoderShape(ffn_widths=(64, 64), num_heads=2, image_size=32).spec("S")) == "S"
        try:
            from matvit import MatViT
        except MissingExtraError as error:
            assert isinstance(error, ImportError)
            print(error)
        """
    )
    assert told.endswith('run: pip install "matvit-retrieval[torch]"')
    assert "\n" not in told


def test_a_real_import_failure_is_not_mistaken_for_a_missing_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matvit.cost", None)
    monkeypatch.delitem(sys.modules, "matvit.model", raising=False)
    monkeypatch.delattr(matvit, "cost", raising=False)
    with pytest.raises(ImportError) as caught:
        matvit.__getattr__("MatViT")
    assert not isinstance(caught.value, MatVitError)


def test_public_methods_are_documented() -> None:
    encoder = importlib.import_module("matvit.model").MatViT
    own = {name for name in vars(encoder) if not name.startswith("_")}
    assert [name for name in own if not (getattr(encoder, name).__doc__ or "").strip()] == []
