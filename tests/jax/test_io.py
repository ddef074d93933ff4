"""Files: what is written comes back bit for bit, a save is whole or absent, and no damage passes unnoticed."""

import errno
import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from lowbit import io
from lowbit.array import QuantArray, dequantize
from lowbit.formats import Format, bcq, format, register_format, uniform
from lowbit.io.header import DIGEST, KEY, pack
from lowbit.io.tensors import DTYPES
from lowbit.ir import Gather, const, evaluate, param, params, text
from lowbit.ir.dtypes import is_float, numpy_dtype
from lowbit.ir.parse import MAX_CHARS, parse
from lowbit.quant_type import QuantType
from lowbit.testing.tolerance import assert_within, exact_and_bound

CheckpointError = io.CheckpointError


def random_array(shape, dtype, seed=0):
    """Every bit random: NaNs with payloads and -0.0 must come back too."""
    rng = np.random.default_rng(seed)
    if dtype == np.bool_:
        return rng.integers(0, 2, shape).astype(bool)
    if dtype.name in ("int2", "int4", "uint2", "uint4", "float4_e2m1fn"):  # a byte each, of which the low bits count
        return rng.integers(0, 4, shape).astype(np.uint8).astype(dtype)
    return np.frombuffer(rng.bytes(int(np.prod(shape)) * dtype.itemsize), dtype).reshape(shape)


def random_quantized(fmt, n=5, k=27, dtype="f32", splits=(), seed=0):
    rng = np.random.default_rng(seed)
    type_ = QuantType((("k", k), ("n", n)), dtype, fmt, splits)
    fields = {}
    for name, leaf in type_.fields.items():
        shape = tuple(leaf.dims.values())
        low, high = leaf.within or (0, 0)
        values = rng.standard_normal(shape) if is_float(leaf.dtype) else rng.integers(low, high, shape, endpoint=True)
        fields[name] = values.astype(numpy_dtype(leaf.dtype))
    return QuantArray.of(fields, type_)


def same_bits(a, b):
    """Equal in dtype, shape and every bit."""
    if isinstance(a, QuantArray):
        assert isinstance(b, QuantArray) and a.type == b.type and a.type.decode is b.type.decode
        return all(same_bits(a.fields[f], b.fields[f]) for f in a.type.fields)
    a, b = np.asarray(a), np.asarray(b)
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def same(a, b):
    return list(a) == list(b) and all(same_bits(a[name], b[name]) for name in a)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


@pytest.fixture
def entries():
    return {
        "bias": np.arange(7, dtype=np.float32),
        "up/kernel": random_quantized(bcq(2, group=8, offset=True)),
        "step": np.array(3, np.int64),
    }


@pytest.fixture
def saved(path, entries):
    io.write(path, entries, metadata={"trained": "no"})
    return path


@pytest.fixture
def a_format(monkeypatch):
    """register(name, version=1)(decode), undone after the test."""
    monkeypatch.setattr(format, "_DEFINITIONS", dict(format._DEFINITIONS))
    return register_format


def resign(path, change):
    """Rewrite a file with a changed header whose checksum is right: what a newer or a faulty writer would leave."""
    with safe_open(path, framework="np") as f:
        tensors = {name: f.get_tensor(name) for name in f.keys()}
        header = json.loads(f.metadata()[KEY])
    changed = change(header)
    header = header if changed is None else changed
    save_file(tensors, path, metadata=pack(header))


def leftovers(path):
    return [p.name for p in path.parent.iterdir() if p != path]


# ---------------------------------------------------------------- round trip


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_every_dtype_comes_back(path, dtype):
    arrays = {str(shape): random_array(shape, dtype) for shape in [(3, 5), (), (0, 4), (1,), (2, 1, 3)]}
    io.write(path, arrays)
    back = io.read(path)
    assert same(arrays, back)
    wide = dtype.name in ("int64", "uint64", "float64", "complex128")
    assert all(isinstance(a, np.ndarray if wide else jax.Array) for a in back.values())  # never narrowed


def test_jax_arrays_and_64_bits(path):
    x = jnp.linspace(-1, 1, 12, dtype=jnp.bfloat16).reshape(3, 4)
    with jax.enable_x64(True):
        y = jnp.arange(3, dtype=jnp.int64) << 40
        io.write(path, {"x": x, "y": y})
        back = io.read(path)
        assert isinstance(back["y"], jax.Array) and back["y"].dtype == np.int64
        assert same({"x": x, "y": y}, back)
    assert isinstance(io.read(path)["y"], np.ndarray)
    assert int(io.read(path)["y"][2]) == 2 << 40


def test_memory_order_and_byte_order(path):
    a = np.arange(24, dtype=np.float32).reshape(4, 6)
    b = a.astype(">f4")
    odd = {
        "fortran": np.asfortranarray(a),
        "strided": a[::2, ::-3],
        "transposed": a.T,
        "big": b,
        "broadcast": b[:, :1] + a,
    }
    io.write(path, odd)
    back = io.read(path)
    for name, value in odd.items():
        np.testing.assert_array_equal(back[name], value.astype("<f4"), strict=True)


@pytest.mark.parametrize(
    "fmt",
    [
        bcq(1),
        bcq(3, group=8),
        bcq(4, group=5, offset=True),
        bcq(2, group=128, scale_dtype="bfloat16"),
        bcq(8, group=1, scale_dtype="float16"),
        uniform(3),
        uniform(4, group=7, scale_dtype="bfloat16"),
    ],
    ids=str,
)
@pytest.mark.parametrize("size", [(1, 1), (5, 27), (3, 130)], ids=str)
def test_quantized_arrays_come_back(path, fmt, size):
    w = random_quantized(fmt, *size, dtype="bf16")
    io.write(path, {"w": w})
    assert same({"w": w}, io.read(path))
    entry = io.read_header(path)["entries"]["w"]
    assert entry["decode"] == text(w.type.decode)
    with safe_open(path, framework="np") as f:
        assert {*f.keys()} == {f"w/{field}" for field in w.type.fields}


@pytest.mark.parametrize("at", [1, 3])
def test_split_fields_come_back(path, at):
    w = random_quantized(bcq(3, group=9, scale_dtype="bfloat16"), splits=(("alpha", "p", at),))
    assert ("alpha_rest" in w.fields) == (at < 3)
    io.write(path, {"w": w})
    assert same({"w": w}, io.read(path))


def test_a_format_of_ones_own_comes_back(path, a_format):
    @a_format("table20")
    def table20(n, k, step=1):  # a table so long that the text has it as bytes
        table = const([step * i / 4 for i in range(20)], "f32", "c")
        return param("scale", "f32", n=n) * Gather(table, param("codes", "u8", (0, 19), n=n, k=k), "c")

    w = random_quantized(table20(step=2))
    assert "b64:" in text(w.type.decode)
    io.write(path, {"w": w})
    assert same({"w": w}, io.read(path))


NAMES = ["", " ", "a/b.c[0]", 'quote"\\', "new\nline", "nul\0", "été 重み 🙂", "lowbit", "../up", "%0 = param x"]


def test_any_name(path):
    entries = {name: np.full(2, i, np.int32) for i, name in enumerate(NAMES)}
    entries |= {f"{name}.w": random_quantized(uniform(2), seed=i) for i, name in enumerate(NAMES)}
    io.write(path, entries)
    assert same(entries, io.read(path))


def test_the_file_is_plain_safetensors_and_equal_models_give_equal_files(path):
    entries = {
        name: np.full(3, i, f"{k}{w}") for i, (name, k, w) in enumerate(zip("dcbaé", "iufiu", "12484", strict=True))
    }
    entries["w"] = random_quantized(uniform(3))
    io.write(path, entries)
    first = path.read_bytes()
    io.write(path, dict(entries))
    assert path.read_bytes() == first
    tensors = load_file(path)
    assert tensors.keys() == {*"dcbaé", "w/planes", "w/scale", "w/zero"}
    assert all(same_bits(entries[name], tensors[name]) for name in "dcbaé")
    described = json.loads(first[8 : data_start(path)])
    for name, tensor in tensors.items():
        assert (data_start(path) + described[name]["data_offsets"][0]) % tensor.itemsize == 0


def test_no_entries_and_metadata(path):
    io.write(path, {}, metadata={"note": "å\n", "": ""})
    assert io.read(path) == {}
    assert io.read_header(path)["metadata"] == {"note": "å\n", "": ""}


@pytest.mark.parametrize("fmt", [bcq(3, group=8, offset=True), uniform(4, group=16)], ids=str)
def test_the_text_in_the_file_decodes_its_tensors(path, fmt):
    """What a reader needs that has never heard of the format: the numpy oracle, and the plain tensors."""
    w = random_quantized(fmt)
    io.write(path, {"w": w})
    decode = parse(io.read_header(path)["entries"]["w"]["decode"])
    tensors = load_file(path)
    value = evaluate(decode, {name: tensors[f"w/{name}"] for name in params(decode)})
    names = [k for k, _ in w.type.dims]
    exact, bound = exact_and_bound(w.type.decode, w.fields)
    order = [list(decode.dims).index(k) for k in names]
    np.testing.assert_array_equal(value, exact)
    assert_within(dequantize(w), exact.transpose(order), bound.transpose(order))


def test_the_header_can_be_read_without_the_format(path, a_format, monkeypatch):
    @a_format("mine")
    def mine(n, k):
        return param("codes", "i8", n=n, k=k) * param("scale", "f32", n=n)

    io.write(path, {"w": random_quantized(mine())})
    monkeypatch.delitem(format._DEFINITIONS, "mine")
    header = io.read_header(path)
    assert header["version"] == 1
    assert header["entries"]["w"]["type"] == {
        "dims": [["k", 27], ["n", 5]], "dtype": "f32", "format": "mine", "version": 1, "options": {}, "splits": [],
    }  # fmt: skip
    assert header["tensors"]["w/codes"]["shape"] == [5, 27]
    with pytest.raises(CheckpointError) as err:
        io.read(path)
    assert re.search(
        r"model.safetensors: layer 'w': format 'mine' is not registered .*: import the module", str(err.value)
    )


def test_on_a_cpu_the_arrays_are_the_pages_of_the_file(path):
    io.write(path, {"x": np.arange(1024, dtype=np.float32), "wide": np.arange(8)})
    back = io.read(path)
    with open(path, "r+b") as file:  # what nobody should do to a loaded file shows that there is no other copy
        file.seek(-4096, os.SEEK_END)  # the widest are first, x is last
        file.write(np.array([7, 8], np.float32).tobytes())
    np.testing.assert_array_equal(back["x"][:3], np.array([7, 8, 2], np.float32))
    back["wide"][0] = 9
    assert (
        np.frombuffer(path.read_bytes(), np.int64, 1, data_start(path)) == 0
    )  # but writing to an array does not reach the file


@pytest.mark.parametrize("go", [lambda path: io.write(path, {"x": np.zeros(1024)}), os.remove], ids=["write", "remove"])
def test_a_file_that_goes_away_leaves_its_arrays(path, go):
    x = np.arange(1024, dtype=np.float32)
    io.write(path, {"x": x})
    back = io.read(path)
    go(path)
    np.testing.assert_array_equal(back["x"], x)


def test_a_donated_array_leaves_the_file(path):
    io.write(path, {"x": np.arange(1024, dtype=np.float32)})
    before = path.read_bytes()
    step = jax.jit(lambda x: x + 1, donate_argnums=0)
    np.testing.assert_array_equal(step(io.read(path)["x"]), np.arange(1, 1025, dtype=np.float32))
    assert path.read_bytes() == before


PEAK = """
import sys
from lowbit import io
def kilobytes(what):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(what))
io.read(sys.argv[1])  # what is compiled and imported for any file
before = kilobytes("VmRSS")
entries = io.read(sys.argv[2])
print(kilobytes("VmHWM") - before)
"""


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="needs Linux, which says what a process held at most"
)
def test_reading_holds_nothing_but_the_arrays(path, tmp_path):
    def write(where, k):
        type_ = QuantType((("k", k), ("n", 4096)), "f32", bcq(2, group=128))
        fields = {name: np.zeros(tuple(f.dims.values()), numpy_dtype(f.dtype)) for name, f in type_.fields.items()}
        x = np.zeros((k // 8, 4096), np.float32)
        io.write(where, {"w": QuantArray.of(fields, type_), **dict.fromkeys("abc", x)})
        return x.nbytes

    write(tmp_path / "small", 128)
    tensor = write(path, 24 * 1024)  # as large as the planes: four of 48 MiB and the scales
    run = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path / "small"), str(path)], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    # Another copy of a tensor, of one at a time too, is 48 MiB more; half of one is for interpreter and compiler.
    assert int(run.stdout) * 1024 < path.stat().st_size + tensor // 2


# ---------------------------------------------------------------- what cannot be written


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ({"a": [1.0]}, TypeError, "'a' is a list; only numpy or jax arrays and QuantArrays can be stored"),
        ({"a": jax.ShapeDtypeStruct((2,), jnp.float32)}, TypeError, "'a' is a ShapeDtypeStruct; only"),
        ({"a": np.ma.ones(2)}, TypeError, "'a' is a MaskedArray; only"),
        ({"a": np.array([object()])}, TypeError, "'a' has dtype object; what can be stored is bool, "),
        ({"a": np.array(["s"])}, TypeError, "'a' has dtype <U1; what"),
        ({"a": np.ones(2, ml_dtypes.float6_e2m3fn)}, TypeError, "'a' has dtype float6_e2m3fn; what"),
        ({"a": np.zeros(2, "datetime64[s]")}, TypeError, "'a' has dtype datetime64"),
        ({3: np.ones(2)}, TypeError, "an entry's name must be a string, not 3"),
        ({"__metadata__": np.ones(2)}, ValueError, "safetensors keeps that name for itself"),
        ({"a\ud800": np.ones(2)}, ValueError, "cannot be named 'a\\\\ud800', it is not Unicode"),
    ],
)
def test_what_cannot_be_stored_is_named(saved, bad, error, message):
    before = saved.read_bytes()
    with pytest.raises(error, match=message):
        io.write(saved, bad)
    assert saved.read_bytes() == before and not leftovers(saved)


def test_random_keys_and_traced_arrays(path):
    with pytest.raises(TypeError, match=r"'k' holds random keys .*; store jax.random.key_data"):
        io.write(path, {"k": jax.random.key(0)})
    with pytest.raises(TypeError, match=r"'x' is traced: write files outside of jax.jit"):
        jax.jit(lambda x: io.write(path, {"x": x}))(jnp.ones(2))
    assert not leftovers(path)


def test_metadata_are_strings(path):
    with pytest.raises(TypeError, match="metadata must map strings to strings, not 'epochs' to 3"):
        io.write(path, {}, metadata={"epochs": 3})


@pytest.mark.parametrize("first", ["dense", "quantized"])
def test_names_that_collide(path, first):
    entries = {"w/alpha": np.ones(2, np.float32), "w": random_quantized(bcq(2))}
    order = entries if first == "dense" else dict(reversed(entries.items()))
    with pytest.raises(ValueError, match=r"entry 'w.*' is stored as the tensor 'w/alpha', as another one is: rename"):
        io.write(path, order)
    assert not leftovers(path)


def test_a_broken_quantized_array(path):
    w = random_quantized(bcq(2, group=8))
    longer = QuantArray({**w.fields, "alpha": w.fields["alpha"][:, :4]}, w.type)
    with pytest.raises(ValueError, match=r"'w' is not a valid QuantArray: bcq\(.*stores 'alpha' as f32\[p=2 n=5 g=4\]"):
        io.write(path, {"w": longer})
    abstract = jax.eval_shape(lambda: w)
    with pytest.raises(TypeError, match="'w/alpha' is a ShapeDtypeStruct"):
        io.write(path, {"w": abstract})


def test_options_that_json_does_not_keep(path, a_format):
    @a_format("shaped")
    def shaped(n, k, tile=(1, 2)):
        return param("codes", "i8", n=n, k=k) * param("scale", "f32", n=n)

    def tiled(tile):  # as its constructor would refuse to
        return random_quantized(Format("shaped", (("tile", tile),)))

    with pytest.raises(TypeError, match=r"option tile of format 'shaped' is \(3, 4\), a tuple"):
        shaped((3, 4))
    with pytest.raises(
        ValueError, match=r"'w' \(.*shaped\(.*\) would not be the same type when read back: use options"
    ):
        io.write(path, {"w": tiled((3, 4))})
    with pytest.raises(ValueError, match=r"'w' \(.*shaped\(.*\) could not be read back from a file: .*frozenset"):
        io.write(path, {"w": tiled(frozenset({3}))})
    assert not leftovers(path)


# ---------------------------------------------------------------- whole or absent


def test_a_link_stays_a_link_and_the_mode_follows_the_umask(tmp_path, entries):
    real, link = tmp_path / "real.safetensors", tmp_path / "link.safetensors"
    real.write_bytes(b"old")
    link.symlink_to(real)
    old = os.umask(0o027)
    try:
        io.write(link, entries)
    finally:
        os.umask(old)
    assert link.is_symlink() and same(entries, io.read(real))
    assert real.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("existing", [True, False])
def test_a_failing_save_leaves_the_old_file(path, entries, monkeypatch, call, error, existing):
    if existing:
        io.write(path, entries)
    before = path.read_bytes() if existing else None

    def fail(*_):
        raise error

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(type(error), match="cannot write '.*model.safetensors': No space left" if error.args else None):
        io.write(path, {"other": np.ones(3)})
    monkeypatch.undo()
    assert (path.read_bytes() if path.exists() else None) == before
    assert not leftovers(path)


def test_a_full_disk(saved, entries):
    before = saved.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))  # writes beyond 64 KiB fail, in this process only
    try:
        with pytest.raises(OSError, match=r"\[Errno 27\] cannot write '.*model.safetensors': File too large"):
            io.write(saved, {"big": np.ones(1 << 20)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert saved.read_bytes() == before and not leftovers(saved)


def test_data_and_folder_are_synced_around_the_rename(path, entries, monkeypatch):
    done, opened = [], {}
    real_open, real_sync, real_replace = os.open, os.fsync, os.replace

    def note_open(name, *args, **kwargs):
        fd = real_open(name, *args, **kwargs)
        opened[fd] = Path(name)
        return fd

    monkeypatch.setattr(os, "open", note_open)
    monkeypatch.setattr(os, "fsync", lambda fd: (done.append(("sync", opened[fd])), real_sync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append(("rename", Path(a))), real_replace(a, b)))
    io.write(path, entries)
    monkeypatch.undo()
    (_, aside), *rest = done
    assert aside.parent == path.parent and aside.suffix == ".tmp"
    assert rest == [("rename", aside), ("sync", path.parent)]


def test_paths_that_cannot_be_written(tmp_path, entries, monkeypatch):
    with pytest.raises(IsADirectoryError, match=f"cannot write '{tmp_path}': it is a folder; name a file in it"):
        io.write(tmp_path, entries)
    with pytest.raises(FileNotFoundError, match=r"cannot write '.*/no/w': there is no folder '.*/no'; make it first"):
        io.write(tmp_path / "no" / "w", entries)
    (tmp_path / "file").write_text("")
    with pytest.raises(FileNotFoundError, match=r"there is no folder '.*/file'"):
        io.write(tmp_path / "file" / "w", entries)
    with pytest.raises(OSError, match="cannot write '/dev/null': it is a device or a pipe, not a file; name a file"):
        io.write("/dev/null", entries)

    def refuse(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)  # a mode would not stop root
    with pytest.raises(PermissionError, match=r"cannot write '.*/w': Permission denied; choose a folder in which"):
        io.write(tmp_path / "w", entries)
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_paths_that_cannot_be_opened(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone.safetensors"):
        io.read(tmp_path / "gone.safetensors")
    with pytest.raises(IsADirectoryError, match=str(tmp_path)):
        io.read(tmp_path)


# ---------------------------------------------------------------- files of another kind or version


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty: get the file again or restore a copy"),
        (b"abc", r"is not a safetensors file \(3 bytes, beginning b'abc'\): name the file that lowbit saved"),
        (b"PK\x03\x04" + bytes(100), r"is not a safetensors file \(104 bytes, beginning b'PK"),
        ((90).to_bytes(8, "little") + b'{"a":', "is truncated or damaged: it has 13 bytes, and states a header of 90"),
        ((5).to_bytes(8, "little") + b'{"a":', "has a damaged header: get the file again"),
        ((2).to_bytes(8, "little") + b"{}????", "is damaged: it has 14 bytes, and its header describes 10"),
    ],
)
def test_no_safetensors(path, content, message):
    path.write_bytes(content)
    for reader in (io.read, io.read_header):
        with pytest.raises(CheckpointError, match=f"^{path} {message}"):
            reader(path)


def test_a_safetensors_file_of_someone_else(path):
    save_file({f"t{i}": np.ones(2) for i in range(5)}, path, metadata={"format": "np"})
    with pytest.raises(CheckpointError, match=r"lowbit did not write .*it holds 5 tensors: 't0', 't1', 't2', \.\.\.\)"):
        io.read(path)
    save_file({"t": np.ones(2)}, path)
    with pytest.raises(CheckpointError, match=r"it holds 1 tensors: 't'\): only what lowbit saved can be loaded"):
        io.read(path)


def test_a_newer_file(saved):
    resign(saved, lambda _: {"version": 2, "what": "only version 2 knows"})
    for reader in (io.read, io.read_header):
        with pytest.raises(CheckpointError) as err:
            reader(saved)
        want = f"{saved} was written by a newer lowbit: file version 2, this library reads up to 1; upgrade lowbit"
        assert str(err.value) == want


def set_at(*keys, to):
    def change(header):
        at = header
        for key in keys[:-1]:
            at = at[key]
        at[keys[-1]] = to

    return change


ENTRY = ("entries", "up/kernel")


@pytest.mark.parametrize(
    ("version", "advice"),
    [(2, "upgrade lowbit, or the module"), (0, "load it with the release that wrote it, or quantize again")],
)
def test_another_version_of_a_format(saved, version, advice):
    resign(saved, set_at(*ENTRY, "type", "version", to=version))
    want = f"layer 'up/kernel': stored in version {version} of format 'bcq', this library reads version 1: {advice}"
    with pytest.raises(CheckpointError, match=f"^{saved}: {want}"):
        io.read(saved)


def test_a_format_that_nobody_registered(saved):
    resign(saved, set_at(*ENTRY, "type", "format", to="qbc"))
    with pytest.raises(CheckpointError) as err:
        io.read(saved)
    assert str(err.value).startswith(f"{saved}: layer 'up/kernel': format 'qbc' is not registered (known: ")
    assert str(err.value).endswith("import the module that defines it")


def test_the_registered_format_decodes_otherwise(saved):
    old = io.read_header(saved)["entries"]["up/kernel"]["decode"]
    assert "const {2}" in old
    resign(saved, set_at(*ENTRY, "decode", to=old.replace("const {2}", "const {3}")))
    with pytest.raises(CheckpointError) as err:
        io.read(saved)
    message, *difference = str(err.value).splitlines()
    assert message.startswith(f"{saved}: layer 'up/kernel': the file decodes bcq(")
    assert "in another way than the format registered here; use the lowbit or the module" in message
    signs = [line[0] for line in difference]
    assert signs == ["-", "+"]
    assert "const {3}" in difference[0] and "const {2}" in difference[1]


def test_a_long_difference_is_cut(saved):
    whole = "\n".join(f"%{i} = param x{i} : f32[{'d' * 300}=1]" for i in range(40))
    joined = [f"%{40 + i} = %{39 + i if i else 0} + %{i + 1} : f32[{'d' * 300}=1]" for i in range(39)]
    resign(saved, set_at(*ENTRY, "decode", to="\n".join([whole, *joined])))
    with pytest.raises(CheckpointError, match=r"and \d+ more lines$") as err:
        io.read(saved)
    assert len(str(err.value)) < 2500


@pytest.mark.parametrize(
    ("decode", "why"),
    [
        ("", "line 1: expected"),
        ("%0 = import os : f32[k=1]", "line 1: 'import' is not an operation"),
        ("%0 = param x : f32[k=1]" + " " * MAX_CHARS, f"characters, at most {MAX_CHARS} are read"),
        ("\n".join(f"%{i} = param x : f32[k=1]" for i in range(5000)), "5000 lines, at most 4096 are read"),
    ],
    ids=["empty", "operation", "characters", "lines"],
)
def test_a_decode_text_that_is_none(saved, decode, why):
    resign(saved, set_at(*ENTRY, "decode", to=decode))
    with pytest.raises(CheckpointError, match=r"layer 'up/kernel': its decode text cannot be read \(.*" + why):
        io.read(saved)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda h: [], "the header is not one that lowbit writes"),
        (set_at("version", to="1"), "version '1'"),
        (set_at("version", to=0), "version 0"),
        (lambda h: h.pop("tensors") and None, "no 'tensors'"),
        (set_at("entries", "bias", to={"kind": "dense", "tensor": "step"}), "missing, unused or used twice: 'bias'"),
        (set_at("entries", "bias", "kind", to=["dense"]), "unhashable"),
        (set_at("tensors", "bias", "dtype", to="float31"), "tensor 'bias' has the unknown dtype 'float31'"),
        (set_at("tensors", "bias", "shape", to=[-1]), "tensor 'bias' is described as"),
        (
            set_at("tensors", "bias", "shape", to=[6]),
            r"tensor 'bias' of layer 'bias' is float32\[7\], but was saved as float32\[6\]",
        ),
        (set_at("tensors", "bias", "dtype", to="int32"), r"is float32\[7\], but was saved as int32\[7\]"),
        (set_at(*ENTRY, "type", "options", to={"bits": 9}), "layer 'up/kernel': no type can be made of .*bits must be"),
        (set_at(*ENTRY, "type", "dims", to=[["k", 27]]), "layer 'up/kernel': no type can be made of .*dims"),
        (set_at("metadata", to={"a": 1}), "metadata 'a' is 1"),
    ],
)
def test_a_faulty_writer(saved, change, why):
    resign(saved, change)
    with pytest.raises(CheckpointError, match=f"^{saved}: .*{why}"):
        io.read(saved)


NEWER = ", which this library does not know: upgrade lowbit to the release that wrote it"


@pytest.mark.parametrize(
    ("where", "what"),
    [
        ((), "the header has 'rotation'"),
        (("entries", "bias"), "entry 'bias' has 'rotation'"),
        (ENTRY, "entry 'up/kernel' has 'rotation'"),
        ((*ENTRY, "type"), "the type of entry 'up/kernel' has 'rotation'"),
        (("tensors", "bias"), "tensor 'bias' has 'rotation'"),
    ],
)
def test_a_field_that_is_unknown(saved, where, what):
    resign(saved, set_at(*where, "rotation", to="hadamard"))
    for reader in (io.read, io.read_header):
        with pytest.raises(CheckpointError) as err:
            reader(saved)
        assert str(err.value) == f"{saved}: {what}{NEWER}"


def test_a_kind_of_entry_that_is_unknown(saved):
    resign(saved, set_at("entries", "bias", "kind", to="sparse"))
    with pytest.raises(CheckpointError) as err:
        io.read(saved)
    assert str(err.value) == f"{saved}: the kind of entry 'bias' has 'sparse'{NEWER}"


def test_an_option_and_a_stored_field_that_are_unknown(saved):
    good = saved.read_bytes()
    options = io.read_header(saved)["entries"]["up/kernel"]["type"]["options"]
    resign(saved, set_at(*ENTRY, "type", "options", to=options | {"rotation": 1}))
    with pytest.raises(
        CheckpointError, match=r"'up/kernel': no type can be made of .*'rotation'.*: upgrade lowbit, or"
    ):
        io.read(saved)
    saved.write_bytes(good)
    resign(saved, lambda h: h["entries"]["up/kernel"]["tensors"].update(rotation=h["entries"].pop("bias")["tensor"]))
    with pytest.raises(
        CheckpointError, match=r"layer 'up/kernel' is not what its type says \(.*but the fields are .*'rot"
    ):
        io.read(saved)


def test_metadata_of_other_tools(saved, entries):
    tensors, packed = load_file(saved), pack(io.read_header(saved))
    save_file(tensors, saved, metadata=packed | {"format": "pt"})
    assert same(entries, io.read(saved))
    save_file(tensors, saved, metadata=packed | {"lowbit.signature": "..."})
    with pytest.raises(CheckpointError, match=f"^{saved}: the metadata has 'lowbit.signature'{NEWER}$"):
        io.read(saved)


def test_fields_under_each_others_names(path):
    """Right tensors, right checksums, but alpha stored as beta would be: the type says what each one is."""
    io.write(path, {"w": random_quantized(bcq(1, offset=True))})
    resign(path, set_at("entries", "w", "tensors", to={"alpha": "w/beta", "beta": "w/alpha", "planes": "w/planes"}))
    with pytest.raises(CheckpointError, match=r"layer 'w' is not what its type says \(.*'alpha'"):
        io.read(path)


def test_64_bit_fields_need_x64(path, a_format):
    @a_format("exact")
    def exact(n, k):
        return param("codes", "i8", n=n, k=k) * param("scale", "f64", n=n)

    with jax.enable_x64(True):
        w = random_quantized(exact())
        io.write(path, {"w": w})
        assert same({"w": w}, io.read(path))
    with pytest.raises(
        CheckpointError, match="'w/scale' of layer 'w' is float64, which jax narrows: set jax_enable_x64"
    ):
        io.read(path)


# ---------------------------------------------------------------- damage


def data_start(path):
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


def flip(path, at, mask=1):
    content = bytearray(path.read_bytes())
    content[at] ^= mask
    path.write_bytes(content)


def test_a_flipped_bit_in_the_data_names_the_tensor(saved):
    with safe_open(saved, framework="np") as f:
        names = set(f.keys())
    good, said = saved.read_bytes(), set()
    for at in range(data_start(saved), len(good), 3):
        flip(saved, at, 1 << at % 8)
        with pytest.raises(CheckpointError) as err:
            io.read(saved)
        found = re.match(
            rf"{saved}: tensor '(.+)' of layer '(.+)' is damaged, the sha256 of its bytes is ", str(err.value)
        )
        assert found and found[1].startswith(found[2])
        assert str(err.value).endswith("when it was saved: get the file again or restore a copy")
        said.add(found[1])
        saved.write_bytes(good)
    assert said == names


def test_a_flipped_bit_in_the_header(saved):
    content = saved.read_bytes()
    flip(saved, content.index(b"param alpha"))
    with pytest.raises(
        CheckpointError, match=rf"^{saved}: the header is damaged, its sha256 is .* the file states \w+\.\.\.:"
    ):
        io.read_header(saved)
    saved.write_bytes(content.replace(DIGEST.encode(), DIGEST.encode()[:-1] + b"7"))
    with pytest.raises(CheckpointError, match=r"the header is damaged, .* the file states none"):
        io.read(saved)


def test_a_truncated_file(saved):
    content = saved.read_bytes()
    saved.write_bytes(content[:-1])
    size = len(content)
    with pytest.raises(
        CheckpointError, match=f"^{saved} is truncated: it has {size - 1} bytes, and its header describes {size}"
    ):
        io.read(saved)
    saved.write_bytes(content[:100])
    with pytest.raises(
        CheckpointError, match=f"^{saved} is truncated or damaged: it has 100 bytes, and states a header of"
    ):
        io.read(saved)
    saved.write_bytes(content + b"\0")
    with pytest.raises(CheckpointError, match=f"is damaged: it has {size + 1} bytes, and its header describes {size}"):
        io.read(saved)
