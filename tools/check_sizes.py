"""Refuses files of 300 lines and functions of 40: what does not fit on a screen or two is two things.

Every line of a file counts. A function is measured from its `def` to its end without its docstring, because a docstring
with an example is wanted; a function inside another counts in both. The functions of `lowbit/kernels` may reach 150,
for a kernel's body is one loop nest.

    python tools/check_sizes.py [ROOT]
"""

import ast
import sys
from pathlib import Path

PLACES = ("lowbit", "tools")
FILE_LIMIT = 300
FUNCTION_LIMIT = 40
KERNEL_LIMIT = 150


def length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines from `def` to the end, less the docstring's."""
    first = function.body[0]
    docstring = 0
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
        docstring = (first.end_lineno or first.lineno) - first.lineno + 1
    return (function.end_lineno or function.lineno) - function.lineno + 1 - docstring


def check_file(text: str, here: str) -> list[str]:
    """One line for each thing in the file `here`, whose content is `text`, that is too long."""
    found = []
    lines = len(text.splitlines())
    if lines >= FILE_LIMIT:
        found.append(f"{here}: {lines} lines; a file stays under {FILE_LIMIT}")
    limit = KERNEL_LIMIT + 1 if here.startswith("lowbit/kernels/") else FUNCTION_LIMIT
    for node in ast.walk(ast.parse(text, here)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and length(node) >= limit:
            what = f"{here}:{node.lineno}: {node.name} has {length(node)} lines"
            found.append(f"{what}; a function here stays under {limit}")
    return found


def check(root: Path) -> list[str]:
    """One line for each file or function under `root` that is too long."""
    files = sorted(p for place in PLACES for p in (root / place).rglob("*.py"))
    return [line for p in files for line in check_file(p.read_text("utf-8"), p.relative_to(root).as_posix())]


def main() -> int:
    found = check(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
    print("\n".join(found) or f"sizes: files under {FILE_LIMIT} lines, functions under {FUNCTION_LIMIT}")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
