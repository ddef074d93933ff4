"""How sphinx makes these pages; `make docs` runs it."""

import dataclasses
import inspect
import os
import re
import sys
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx
from sphinx.util.inspect import stringify_signature

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
os.environ["JAX_PLATFORMS"] = "cpu"  # also for the kernels that run the cells: the same pages on every machine

import lowbit  # noqa: E402
from tools import api_pages  # noqa: E402

project = "lowbit"
version = release = lowbit.__version__
copyright = "the lowbit authors, Apache-2.0"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = f"lowbit {version}"
html_copy_source = False

nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_show_tb = True
nb_execution_timeout = 120
nb_merge_streams = True
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
maximum_signature_line_length = 100
napoleon_attr_annotations = False
napoleon_use_ivar = True

QUOTED = re.compile(r"(?ms)^ *>>> .*?(?=\n *\n|\Z)|`([^`]+)`(?=(\w)?)|([*|\\]|(?<=\w)_(?!\w))")


def as_rst(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Docstrings quote code in single backticks and mean every other sign as it stands; examples are left alone.

    A function without one, which is the one thing in its file, has that of the file: a pass states its identity there.
    """
    if what == "function" and not any(lines) and obj.__module__.endswith(f".{obj.__name__}"):
        lines[:] = inspect.getdoc(sys.modules[obj.__module__]).split("\n")

    def one(m: re.Match[str]) -> str:
        code, letter, sign = m.groups()
        return f"``{code}``" + r"\ " * bool(letter) if code else rf"\{sign}" if sign else m[0]

    lines[:] = QUOTED.sub(one, "\n".join(lines)).split("\n")
    if what == "data":
        lines.insert(0, "\\")  # napoleon takes what comes before a colon in the first line for a type


def as_written(app: Sphinx, what: str, name: str, obj: Any, *rest: Any) -> tuple[str, str | None] | None:
    """Annotations as the source has them, and for a class its fields or its own `__init__`, not its metaclass's."""
    if what in ("function", "method"):
        given = inspect.signature(obj)
        returned = given.return_annotation
        return _arguments(given), returned if isinstance(returned, str) else None
    if what != "class" or obj.__init__ is object.__init__:
        return None
    if dataclasses.is_dataclass(obj):
        return f"({', '.join(f'{f.name}: {f.type}{_default(f)}' for f in dataclasses.fields(obj))})", None
    return _arguments(inspect.signature(obj.__init__)) if "__init__" in vars(obj) else "", None


def _arguments(given: inspect.Signature) -> str:
    kept = [p for name, p in given.parameters.items() if name not in ("self", "cls")]
    return stringify_signature(given.replace(parameters=kept), show_return_annotation=False)


def _default(field: dataclasses.Field[Any]) -> str:
    made = field.default_factory is not dataclasses.MISSING
    return " = ..." if made else "" if field.default is dataclasses.MISSING else f" = {field.default!r}"


def setup(app: Sphinx) -> None:
    app.connect("autodoc-process-docstring", as_rst, priority=400)  # before napoleon, whose signs are rst
    app.connect("autodoc-process-signature", as_written)
    api_pages.write(HERE / "api")
