"""10,000 damaged files: each is refused with CheckpointError or gives exactly what was saved. None crashes or hangs."""

import copy
import faulthandler
import hashlib
import json
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flax import nnx

import lowbit as lb
from lowbit.array import QuantArray
from lowbit.io.header import DIGEST, KEY, pack
from lowbit.ir.parse import parse
from tests.models import arrays, assert_same, fast

Json = dict[str, Any]
SECONDS = 60  # for one file, which takes milliseconds


def model() -> nnx.Dict:
    """A quantized and a dense layer, and numbers of several widths."""
    up, down = nnx.Linear(16, 8, rngs=nnx.Rngs(0)), nnx.Linear(8, 16, rngs=nnx.Rngs(1), param_dtype="bfloat16")
    made = nnx.Dict(up=up, down=down, steps=nnx.Variable(np.arange(3)), on=nnx.Variable(np.array(True)))
    return lb.quantize(made, fast({"up": lb.bcq(2, group=8, offset=True)}))


# ---------------------------------------------------------------- bytes


def flipped(rng: random.Random, good: bytes) -> bytes:
    """Some bits, in the first bytes as often as anywhere."""
    out, reach = bytearray(good), rng.choice([9, 200, len(good)])
    for _ in range(rng.choice([1, 1, 2, 8])):
        out[rng.randrange(reach)] ^= 1 << rng.randrange(8)
    return bytes(out)


def cut(rng: random.Random, good: bytes) -> bytes:
    return good[: rng.choice([rng.randrange(24), rng.randrange(len(good))])]


def inserted(rng: random.Random, good: bytes) -> bytes:
    at = rng.randrange(len(good) + 1)
    return good[:at] + rng.randbytes(rng.choice([1, 8, 64, 4096])) + good[at:]


def moved(rng: random.Random, good: bytes) -> bytes:
    """A block lost, doubled, zeroed, or changed with another one."""
    size = rng.choice([1, 8, 64, 512])
    a, b = sorted(rng.randrange(len(good) - 2 * size) for _ in range(2))
    b += size
    block, other, middle = good[a : a + size], good[b : b + size], good[a + size : b]
    new = rng.choice(
        [middle + other, block + middle + other + other, bytes(size) + middle + other, other + middle + block]
    )
    return good[:a] + new + good[b + size :]


def stated_length(rng: random.Random, good: bytes) -> bytes:
    length = rng.choice([0, 1, len(good) - 8, len(good), 2**31, 2**63, 2**64 - 1, rng.randrange(2 * len(good))])
    return length.to_bytes(8, "little") + good[8:]


# ---------------------------------------------------------------- headers


def parts(good: bytes) -> tuple[Json, bytes]:
    """The header of the safetensors format, and the data."""
    start = 8 + int.from_bytes(good[:8], "little")
    return json.loads(good[8:start]), good[start:]


def joined(described: Any, data: bytes) -> bytes:
    packed = described if isinstance(described, bytes) else json.dumps(described).encode()
    return len(packed).to_bytes(8, "little") + packed + data


JUNK = [
    None, True, -1, 0, 1, 3, 2**63, 10**30, 0.5, float("nan"), "", "x", "F32", "BF16", "int4", "bcq",
    [], [[]], [1, 2], [2**40, 2**40], [0, 2**63], {}, {"a": {}},
]  # fmt: skip


def places(tree: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield (*at, key)
        yield from places(value, (*at, key))


def edited(rng: random.Random, tree: Json) -> Json:
    """One thing in a JSON tree changed: left out, of another value, a character other, a field more."""
    tree = copy.deepcopy(tree)
    *way, last = rng.choice(list(places(tree)))
    at: Any = tree
    for key in way:
        at = at[key]
    match rng.randrange(5):
        case 0:
            del at[last]
        case 1 if isinstance(at, dict):
            at[rng.choice(["rotation", "version", "kind", "a/b", ""])] = rng.choice(JUNK)
        case 2 if type(at[last]) is int:
            at[last] += rng.choice([-1, 1, 8, 2**32])
        case 3 if isinstance(at[last], str) and at[last]:
            i = rng.randrange(len(at[last]))
            at[last] = at[last][:i] + rng.choice(["", "9", "%", " ", "x=", "-1", "[", "\n"]) + at[last][i + 1 :]
        case _:
            at[last] = rng.choice(JUNK)
    return tree


def described(rng: random.Random, good: bytes) -> bytes:
    """The outer header: dtypes, shapes and offsets of tensors, our header and its checksum as strings."""
    header, data = parts(good)
    return joined(edited(rng, header), data)


def nested(rng: random.Random, good: bytes) -> bytes:
    """Brackets in brackets, where any value may stand."""
    deep, shut = rng.choice([("[", "]"), ('{"a":', "}")])
    depth = rng.choice([100, 10_000])
    value = deep * depth + "0" + shut * depth
    header, data = parts(good)
    if rng.random() < 0.5:
        return joined(f'{{"a": {value}}}'.encode(), data)
    packed = header["__metadata__"][KEY].replace('"options":{', f'"options":{{"a":{value},')
    header["__metadata__"] |= {KEY: packed, DIGEST: hashlib.sha256(packed.encode()).hexdigest()}
    return joined(header, data)


def resigned(rng: random.Random, good: bytes) -> bytes:
    """Our header with a right checksum: not damage, but what a faulty, a newer or a malicious writer would leave."""
    header, data = parts(good)
    header["__metadata__"] |= pack(edited(rng, json.loads(header["__metadata__"][KEY])))
    return joined(header, data)


MUTATIONS: list[Callable[[random.Random, bytes], bytes]] = [
    flipped, cut, inserted, moved, stated_length, described, nested, resigned,
]  # fmt: skip


@pytest.mark.parametrize(
    "numbers", [range(400), pytest.param(range(400, 10_000), marks=pytest.mark.slow)], ids=["some", "all"]
)
def test_damaged_files(tmp_path: Path, numbers: range) -> None:
    saved, abstract = model(), nnx.eval_shape(model)
    path = tmp_path / "model.safetensors"
    lb.save(saved, path)
    good, entries, want = path.read_bytes(), lb.io.read(path), arrays(saved)
    path = tmp_path / "damaged.safetensors"
    refused = dict.fromkeys(MUTATIONS, 0)
    for number in numbers:
        mutate = MUTATIONS[number % len(MUTATIONS)]
        path.write_bytes(mutate(random.Random(number), good))
        faulthandler.dump_traceback_later(SECONDS, exit=True, file=sys.__stderr__)
        try:
            refused[mutate] += check(path, entries, mutate is resigned)
            check_into(path, abstract, want)
        except BaseException as err:
            raise AssertionError(f"file {number}, {mutate.__name__}") from err
        finally:
            faulthandler.cancel_dump_traceback_later()
    each = len(numbers) // len(MUTATIONS)
    for mutate, count in refused.items():
        assert count > 0.7 * each, f"{mutate.__name__} changed nothing in most files: the test showed little"


def check(path: Path, entries: Any, may_retype: bool) -> bool:
    """True if `lb.io.read` refuses. Anything but CheckpointError or what was saved fails the test.

    A header with a right checksum may state another logical type of the same arrays.
    """
    try:
        back = lb.io.read(path)
    except lb.CheckpointError:
        return True
    assert back.keys() == entries.keys()
    for name, value in back.items():
        if isinstance(value, QuantArray):
            assert may_retype or value.type == entries[name].type
            assert parse(lb.io.read_header(path)["entries"][name]["decode"]) is value.type.decode
            assert_same(*({f: np.asarray(a) for f, a in q.fields.items()} for q in (value, entries[name])))
        else:
            assert_same({name: np.asarray(value)}, {name: np.asarray(entries[name])})
    return False


def check_into(path: Path, abstract: nnx.Module, want: dict[str, Any]) -> None:
    """A model to load into knows the types besides: the same or an error, whatever the header says."""
    try:
        back = lb.load(path, into=abstract)
    except lb.CheckpointError:
        return
    assert_same(arrays(back), want)
