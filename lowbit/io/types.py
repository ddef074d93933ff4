"""The type of a stored quantized array: the registry and the text in the file must tell the same story."""

from __future__ import annotations

import difflib
from typing import Any

from lowbit.formats.format import UnknownFormatError, definition
from lowbit.io.error import CheckpointError
from lowbit.ir.expr import Expr
from lowbit.ir.parse import ParseError, parse
from lowbit.ir.text import text
from lowbit.quant_type import QuantType, type_from_json

SHOWN_LINES, SHOWN_CHARS = 8, 160


def stored_type(where: str, entry: dict[str, Any]) -> QuantType:
    """The type of a quantized entry. `where` begins the messages: the file and the layer.

    Raises CheckpointError for a format that is not registered or has another version, and for a stored decode text
    that is not a term or not the registered format's.
    """
    data = entry["type"]
    try:
        _check_version(where, str(data["format"]), data["version"])
        type_ = type_from_json(data)
        decode = type_.decode
    except CheckpointError:
        raise
    except UnknownFormatError as err:
        raise CheckpointError(f"{where}: {err}") from err
    except Exception as err:  # a format's decode is anyone's code, called with options from a file
        what = f"no type can be made of {str(data)[:200]} ({err})"
        raise CheckpointError(f"{where}: {what}: upgrade lowbit, or save it again") from err
    try:
        stored = parse(entry["decode"])
    except ParseError as err:
        raise CheckpointError(f"{where}: its decode text cannot be read ({err}): save the model again") from err
    if stored is not decode:
        raise CheckpointError(
            f"{where}: the file decodes {type_.format} in another way than the format registered here; use the lowbit "
            f"or the module that the file was saved with, or quantize again. Stored (-) and registered (+):\n"
            f"{_difference(stored, decode)}"
        )
    return type_


def _check_version(where: str, name: str, stored: Any) -> None:
    known = definition(name).version
    if type(stored) is not int:
        raise CheckpointError(f"{where}: format {name!r} has the version {stored!r}, which is no number: save it again")
    if stored > known:
        raise CheckpointError(
            f"{where}: stored in version {stored} of format {name!r}, this library reads version {known}: upgrade "
            "lowbit, or the module that defines the format"
        )
    if stored < known:
        raise CheckpointError(
            f"{where}: stored in version {stored} of format {name!r}, this library reads version {known}: load it with "
            "the release that wrote it, or quantize again"
        )


def _difference(stored: Expr, registered: Expr) -> str:
    """The lines that differ, long tables by their digest."""
    a, b = (text(e, short=True).splitlines() for e in (stored, registered))
    lines = [d for d in list(difflib.unified_diff(a, b, lineterm="", n=0))[2:] if not d.startswith("@@")]
    shown = [line[:SHOWN_CHARS] for line in lines[:SHOWN_LINES]]
    return "\n".join(shown + ([f"and {len(lines) - SHOWN_LINES} more lines"] if len(lines) > SHOWN_LINES else []))
