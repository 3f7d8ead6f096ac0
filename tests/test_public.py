"""The public face: names, docstrings, speed of the import, and the floors of the house."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import lean3d
from lean3d.data.readers import Reader

ROOT = Path(__file__).parents[1]


def test_public_names_are_pinned():
    assert sorted(lean3d.__all__) == [
        "Lean3dError",
        "Prediction",
        "VideoPrediction",
        "__version__",
        "create_model",
        "list_models",
        "load_model",
    ]
    for name in lean3d.__all__:
        assert getattr(lean3d, name) is not None
        assert name in dir(lean3d)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'create_modle'"):
        _ = lean3d.create_modle  # type: ignore[attr-defined]


def test_importing_lean3d_does_not_load_torch():
    code = "import sys, lean3d, lean3d.cli; print([m for m in ('torch', 'av', 'matplotlib') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_room_imports_only_from_the_floors_below():
    from importlinter.cli import lint_imports

    assert lint_imports(str(ROOT / "pyproject.toml"), no_cache=True) == 0


def test_the_version_is_the_packages():
    from importlib.metadata import version

    assert version("lean3d") == lean3d.__version__


def _modules() -> list[str]:
    found = pkgutil.walk_packages(lean3d.__path__, "lean3d.")
    return ["lean3d", *(module.name for module in found if module.name not in ("lean3d.__main__", "lean3d._native"))]


def _bare(module: ModuleType) -> Iterator[str]:
    """Public classes, functions and methods of a module that nothing explains."""
    for name, value in vars(module).items():
        if name.startswith("_") or getattr(value, "__module__", None) != module.__name__:
            continue
        if (inspect.isclass(value) or inspect.isfunction(value)) and not (value.__doc__ or "").strip():
            yield name
        if inspect.isclass(value):
            yield from (f"{name}.{key}" for key in _own_methods(value) if not _explained(value, key))


def _own_methods(cls: type) -> Iterator[str]:
    for key, member in vars(cls).items():
        plain = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
        if not key.startswith("_") and inspect.isfunction(plain):
            yield key


def _explained(cls: type, key: str) -> bool:
    """By its own docstring, by the class's, or by the class or protocol that asks for it."""
    bases = cls.__mro__[1:-1]
    asked = any(key in vars(base) for base in bases) or (cls.__name__.endswith("Reader") and hasattr(Reader, key))
    listed = f"\n        {key}: " in f"\n{cls.__doc__}"
    return bool(getattr(cls, key).__doc__) or asked or listed


@pytest.mark.parametrize("name", _modules())
def test_everything_public_has_a_docstring(name: str):
    module = importlib.import_module(name)
    empty = module.__file__ is not None and not Path(module.__file__).read_text(encoding="utf-8").strip()
    assert (module.__doc__ or "").strip() or empty
    assert list(_bare(module)) == []


def test_the_docstring_test_sees_what_is_bare():
    module = ModuleType("made")
    source = """
class Kept:
    "Doc."
    def said(self): "Doc."
    def bare(self): ...
class Child(Kept):
    "Doc."
    def bare(self): ...
def alone(): ...
def _hidden(): ...
"""
    exec(source, vars(module))
    assert list(_bare(module)) == ["Kept.bare", "alone"]
