"""Refuses the names of formats in the compiler: `lowbit/passes` and `lowbit/kernels` know expressions, never formats.

A pass that asks which format it has before it is a pass that the next format cannot use. So the name of a format may
not occur there at all: not as a file, an identifier or a part of one, nor in a string, a comment or a docstring.

The names are those that `lowbit/formats/*.py` register and `KNOWN`, which has those that are still to come.

    python tools/check_names.py [ROOT]
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

PLACES = ("lowbit/passes", "lowbit/kernels")
KNOWN = frozenset(
    "bcq uniform any_precision any_bcq codebook nested_fp flexor xor_sparse trit sherry mx mxfp4 nvfp4".split()
)


def registered(formats: Path) -> frozenset[str]:
    """The names that the files under `formats` register, `@register_format("name")`, and those files' own names."""
    call = re.compile(r"^(?:@|\w+ = )?(?:\w+\.)*register\w*\(\s*[\"'](\w+)[\"']", re.MULTILINE)
    found = {path.stem: call.findall(path.read_text("utf-8")) for path in formats.glob("*.py")}
    return frozenset(name for stem, names in found.items() if names for name in (stem, *names))


def spellings(word: str) -> set[str]:
    """`word` in snake case, its capitals taken as word starts and not: NestedFP is _nested_fp_, FleXOR is _flexor_."""
    split = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", word)
    forms = {form.lower().replace("-", "_") for form in (word, split)}
    forms |= {re.sub(r"\d+$", "", form).rstrip("_") for form in forms}
    return {f"_{form}_" for form in forms}


def offences(text: str, names: frozenset[str]) -> Iterator[tuple[int, str, str]]:
    """Each (line number, word, name) where a word of `text` spells a name."""
    for number, line in enumerate(text.splitlines(), 1):
        for word in re.findall(r"\w+(?:-\w+)*", line):
            forms = spellings(word)
            for name in sorted(names):
                if any(f"_{name}_" in form for form in forms):
                    yield number, word, name


def check(root: Path) -> list[str]:
    """One line for each place under `root` that names a format."""
    names = KNOWN | registered(root / "lowbit" / "formats")
    found = []
    for path in sorted(p for place in PLACES for p in (root / place).rglob("*.py")):
        here = path.relative_to(root).as_posix()
        found += [f"{here}: the file is named after the format {name}" for _, _, name in offences(path.stem, names)]
        text = path.read_text("utf-8")
        found += [f"{here}:{line}: '{word}' names the format {name}" for line, word, name in offences(text, names)]
    return found


def main() -> int:
    found = check(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
    print("\n".join(found) or "names: no format is named in " + " or ".join(PLACES))
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
