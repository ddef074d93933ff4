"""Writes the pages of the API reference, one a public module: what the modules export is what the pages hold.

A name is described once, in the module that a user imports it from: `lowbit.quantize` on the page of `lowbit`, although
`lowbit.nn` has it too. New names and new modules appear by themselves.

    python tools/api_pages.py FOLDER
"""

import ast
import importlib
import inspect
import pkgutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import lowbit

INTERNAL = frozenset({"lowbit.array", "lowbit.compat"})
"""Modules whose public names are those that `lowbit` has."""


def modules() -> list[str]:
    """The modules with a page: `lowbit`, what lies directly in it, and the modules that those have in `__all__`."""
    inner = {m.name for m in pkgutil.iter_modules(lowbit.__path__, "lowbit.")} - INTERNAL
    deeper = (getattr(m, n) for m in map(importlib.import_module, inner) for n in getattr(m, "__all__", ()))
    return ["lowbit", *sorted(inner | {m.__name__ for m in deeper if inspect.ismodule(m)})]


def exported(module: ModuleType) -> Iterator[tuple[str, str]]:
    """Each public name of a module in its order, and the module that defines it.

    Those in `__all__` if it has one; of another package what it imports `as` itself; of another module the functions
    and classes that it defines, and the data that has a docstring.
    """
    if hasattr(module, "__all__"):
        values = {name: getattr(module, name) for name in module.__all__}
        yield from ((n, v.__module__) for n, v in values.items() if not inspect.ismodule(v))
        return
    body = ast.parse(inspect.getsource(module)).body
    for at, node in enumerate(body):
        match node:
            case ast.ImportFrom(module=home, names=names) if home:
                yield from ((n.name, home) for n in names if n.asname == n.name)
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name) if not name.startswith("_"):
                yield name, module.__name__
            case ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name)):
                if not name.startswith("_") and _is_docstring(body[at + 1 : at + 2]):
                    yield name, module.__name__


def _is_docstring(after: list[ast.stmt]) -> bool:
    return bool(after) and isinstance(after[0], ast.Expr) and isinstance(getattr(after[0].value, "value", None), str)


def directive(module: str, name: str, home: str) -> str:
    value = getattr(importlib.import_module(module), name)
    if inspect.isclass(value):
        kind = "exception" if issubclass(value, BaseException) else "class"
        return f".. auto{kind}:: {module}.{name}\n   :members:\n"
    if inspect.isfunction(value):
        return f".. autofunction:: {module}.{name}\n"
    return f".. autodata:: {home}.{name}\n   :no-value:\n"  # its docstring is where it is defined


def pages() -> dict[str, str]:
    """The text of each page by its name, `index` among them."""
    described: dict[int, str] = {}
    out = {}
    for module in modules():
        found = importlib.import_module(module)
        parts = [f"{module}\n{'=' * len(module)}\n\n.. automodule:: {module}\n   :no-members:\n"]
        elsewhere = []
        for name, home in exported(found):
            value = getattr(found, name)
            if id(value) in described:
                elsewhere.append(f":py:obj:`{described[id(value)]}`")
            else:
                parts.append(directive(module, name, home))
                described[id(value)] = f"{module}.{name}"
        if elsewhere:
            parts.append(f"Here too, and described there: {', '.join(elsewhere)}.\n")
        out[module] = "\n".join(parts)
    listed = "\n".join(f"   {name}" for name in out)
    out["index"] = f"API reference\n=============\n\n.. toctree::\n   :maxdepth: 1\n\n{listed}\n"
    return out


def write(folder: Path) -> None:
    """The pages as files, those that changed; pages of modules that are gone are deleted."""
    folder.mkdir(exist_ok=True)
    texts = pages()
    for old in folder.glob("*.rst"):
        if old.stem not in texts:
            old.unlink()
    for name, text in texts.items():
        path = folder / f"{name}.rst"
        if not path.exists() or path.read_text("utf-8") != text:
            path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
