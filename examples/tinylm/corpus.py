"""The two text domains of the tinylm example, and how they are split. Standard library only: runs on any Python.

Domain A is the source code of the running Python's standard library, domain B the prose of `pydoc`'s topics.
Whether a text is held out depends on its content alone, through one byte of its SHA-256, so a text that does not
change between Python versions does not change sides. The texts that reported numbers use are listed by hash in
``heldout.json``: those held out and byte-identical in every version named there.

Run ``python -m examples.tinylm.corpus`` to see how many of the listed texts your Python has.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import hashlib
import json
import lzma
import os
import pathlib
import sys
import sysconfig
from collections.abc import Iterable, Mapping

__all__ = ["Match", "held_out", "match_listed", "stdlib_files", "topics", "train_code", "tune_prose", "xz_bits"]

HELDOUT = pathlib.Path(__file__).with_name("heldout.json")

# Other people's packages, tests, byte code, and what is no prose or program: character tables (one code page is
# nearly the next, so a split by file would leak), domain B itself, and files that record this machine's build.
SKIP_DIRS = frozenset(
    "__pycache__ encodings ensurepip idle_test lib2to3 pydoc_data site-packages dist-packages test tests".split()
)
SKIP_PREFIXES = ("config-", "_sysconfigdata")

# Which byte of the digest decides, and below what it holds out. Bytes 0 and 22 leave the most text that CPython 3.11,
# 3.12 and 3.13 share on the held-out side; nothing of any model went into the choice.
HASH_BYTE = {"code": 0, "topics": 22}
THRESHOLD = {"code": 16, "topics": 64}


def digest(content: bytes) -> str:
    """The SHA-256 of `content` in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def held_out(content: bytes, domain: str = "code") -> bool:
    """True if a text is for evaluation only; a pure function of the content.

    Example:
        >>> held_out(b"print(1)") == held_out(b"print(1)")
        True
    """
    return hashlib.sha256(content).digest()[HASH_BYTE[domain]] < THRESHOLD[domain]


def library_path() -> pathlib.Path:
    """Where the running Python keeps its standard library."""
    return pathlib.Path(sysconfig.get_paths()["stdlib"])


def stdlib_files(lib: pathlib.Path | None = None) -> dict[str, bytes]:
    """The standard library's source, tests and tables left out: path below `lib` -> content, each content once.

    Args:
        lib: a ``lib/python3.x`` folder; None means the running Python's.

    Raises:
        FileNotFoundError: `lib` holds no Python source.
    """
    lib = library_path() if lib is None else lib
    files: dict[str, bytes] = {}
    seen: set[str] = set()
    for folder, subs, names in os.walk(lib):
        subs[:] = sorted(s for s in subs if s not in SKIP_DIRS and not s.startswith(SKIP_PREFIXES))
        for name in sorted(names):
            if not name.endswith(".py") or name.startswith(SKIP_PREFIXES):
                continue
            path = pathlib.Path(folder, name)
            content = path.read_bytes()
            if content and digest(content) not in seen:
                seen.add(digest(content))
                files[path.relative_to(lib).as_posix()] = content
    if not files:
        raise FileNotFoundError(f"no Python source under {lib}; give the folder that holds os.py")
    return files


def topics(lib: pathlib.Path | None = None) -> dict[str, bytes]:
    """The texts of ``pydoc_data.topics``: topic -> UTF-8 text, each text once.

    The module is read, not imported, so that another Python's can be read too.

    Raises:
        ValueError: the module has no literal ``topics`` dict.
    """
    path = (library_path() if lib is None else lib) / "pydoc_data" / "topics.py"
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "topics" for t in node.targets):
            texts = {name: text.encode() for name, text in ast.literal_eval(node.value).items()}
            return {name: text for text, name in {text: name for name, text in sorted(texts.items())}.items()}
    raise ValueError(f"{path} assigns no `topics` dict; this Python keeps its topics elsewhere")


@dataclasses.dataclass(frozen=True)
class Listed:
    """One held-out text: its name (path or topic), size in bytes and SHA-256."""

    name: str
    size: int
    sha256: str


def listed(domain: str) -> list[Listed]:
    """The committed held-out list of a domain, ``"code"`` or ``"topics"``."""
    return [Listed(**entry) for entry in json.loads(HELDOUT.read_text())[domain]]


@dataclasses.dataclass(frozen=True)
class Match:
    """The listed texts that this Python has unchanged, joined in the list's order, and how many that is."""

    text: bytes
    files: int
    of_files: int
    of_bytes: int

    def __str__(self) -> str:
        return f"matched {self.files} of {self.of_files} texts, {len(self.text):,} of {self.of_bytes:,} bytes"


def match_listed(domain: str, lib: pathlib.Path | None = None) -> Match:
    """The held-out text of a domain: the listed texts found, by hash, in this Python (or in `lib`).

    A listed text that this Python does not have is left out, never replaced; `Match` says how many were found.

    Raises:
        ValueError: not one listed text was found.
    """
    here = stdlib_files(lib) if domain == "code" else topics(lib)
    by_hash = {digest(content): content for content in here.values()}
    wanted = listed(domain)
    found = [by_hash[item.sha256] for item in wanted if item.sha256 in by_hash]
    if not found:
        raise ValueError(f"this Python has none of the {len(wanted)} held-out {domain} texts; use CPython 3.11 to 3.13")
    return Match(b"".join(found), len(found), len(wanted), sum(item.size for item in wanted))


def train_code(lib: pathlib.Path | None = None) -> dict[str, bytes]:
    """Domain A's training files: neither held out by hash, nor named like a listed file (a near copy of it)."""
    names = {item.name for item in listed("code")}
    return {n: c for n, c in stdlib_files(lib).items() if n not in names and not held_out(c, "code")}


def tune_prose(lib: pathlib.Path | None = None) -> bytes:
    """Domain B's text for fine-tuning: topics not held out, less every paragraph that a held-out topic has too.

    Topics quote each other (the chapter on compound statements contains the topic on ``if``), hence the paragraphs.
    """
    names = {item.name for item in listed("topics")}
    kept: list[bytes] = []
    barred: set[bytes] = set()
    for name, text in sorted(topics(lib).items()):
        if name in names or held_out(text, "topics"):
            barred.update(_paragraphs(text))
        else:
            kept.append(text)
    seen: set[bytes] = set()
    parts: list[bytes] = []
    for paragraph in (p for text in kept for p in _paragraphs(text)):
        if paragraph not in barred and paragraph not in seen:
            seen.add(paragraph)
            parts.append(paragraph)
    return b"\n\n".join(parts)


def _paragraphs(text: bytes) -> list[bytes]:
    return [p.strip(b"\n") for p in text.split(b"\n\n") if p.strip()]


def xz_bits(text: bytes) -> float:
    """Bits per byte of ``xz -9e``: the whole file, container included, as the command writes it."""
    packed = lzma.compress(text, format=lzma.FORMAT_XZ, check=lzma.CHECK_CRC64, preset=9 | lzma.PRESET_EXTREME)
    return 8 * len(packed) / len(text)


def write_listed(libs: Iterable[pathlib.Path]) -> None:
    """Writes ``heldout.json``: the running Python's held-out texts that every library in `libs` has unchanged."""
    libs = list(libs)
    versions = [sys.version.split()[0], *(lib.parent.parent.name for lib in libs)]
    record: dict[str, object] = {"trained_with": versions[0], "unchanged_in": versions}
    for domain in ("code", "topics"):
        read = stdlib_files if domain == "code" else topics
        others = [{digest(c) for c in read(lib).values()} for lib in libs]
        record[domain] = _list_common(read(), domain, others)
    HELDOUT.write_text(json.dumps(record, indent=1) + "\n")


def _list_common(texts: Mapping[str, bytes], domain: str, others: list[set[str]]) -> list[dict[str, object]]:
    return [
        {"name": name, "size": len(content), "sha256": digest(content)}
        for name, content in sorted(texts.items())
        if held_out(content, domain) and all(digest(content) in other for other in others)
    ]


def main() -> None:
    """Prints the sizes of both splits, or rewrites the held-out list."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--lib", type=pathlib.Path, help="another Python's lib/python3.x folder to read")
    parser.add_argument("--write", type=pathlib.Path, nargs="+", metavar="LIB", help="list texts unchanged here too")
    args = parser.parse_args()
    if args.write:
        write_listed(args.write)
    code = train_code(args.lib)
    print(f"Python {sys.version.split()[0]}, library {args.lib or 'of the running Python'}")
    print(f"A (code):  train {len(code)} files, {sum(map(len, code.values())):,} bytes; held out: ", end="")
    held = match_listed("code", args.lib)
    print(f"{held}; xz -9e {xz_bits(held.text):.4f} bits/byte")
    prose = match_listed("topics", args.lib)
    print(f"B (prose): tune {len(tune_prose(args.lib)):,} bytes; held out: {prose}; ", end="")
    print(f"xz -9e {xz_bits(prose.text):.4f} bits/byte")


if __name__ == "__main__":
    main()
