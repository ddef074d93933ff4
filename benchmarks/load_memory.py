"""Memory and speed of `lb.convert` and `lb.models.load`: checkpoints of 2 GB, beside a plain copy of the files.

    python benchmarks/load_memory.py [--size BYTES] [--json out.json]

A checkpoint of random codes is made in a temporary folder, in each layout, and converted in a process of its own; and
one of a llama in half precision, of several shards, is loaded with `rules=lb.uniform(4, group=128)`. What is measured
there is *anonymous* memory: RssAnon in /proc, sampled every millisecond, less what it was before. That is what the
kernel cannot take back. Pages of mapped files, which it can, count in VmHWM, shown beside it. The programs that jax
compiles for a load stay in memory, some 300 MB for layers of any size: a llama of one block is loaded and freed first.

Asserted of a conversion: at most one layer as a dense float32 array, and as it is written; of a load: at most the
quantized model, and two layers as dense float32 arrays. What else is needed, among it what the C library keeps for the
next layer, has to fit in that.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from math import isqrt
from pathlib import Path
from typing import Any

import numpy as np

if __name__ == "__main__":  # as a script; as a module it has the repository's root already
    sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.harness import Row, main, row
from lowbit.io.gguf_blocks import BLOCKS
from lowbit.io.shards import INDEX
from lowbit.io.tensors import Array, arranged, as_bytes

SIZE = 2_000_000_000
N, K, GROUP = 14336, 4096, 128
"""Of a layer; a smaller checkpoint has fewer outputs, so that it has layers enough."""
FEWEST = 8
FIXED = 32 << 20
"""Bytes that XLA and Python take whatever the size of a layer."""
CHILD = """
import sys
import lowbit as lb
import jax
jax.numpy.zeros(1).block_until_ready()
lb.convert, lb.models.load
{first}
print("ready", flush=True)
sys.stdin.readline()
{work}
print("done", kept, flush=True)
sys.stdin.readline()
"""
CONVERT = "kept = lb.convert(sys.argv[1], sys.argv[2]) or 0"
COMPILE = """
import ctypes, gc
from flax import nnx
lb.models.load(sys.argv[2], lb.uniform(4, group=128), progress=False)
gc.collect()
ctypes.CDLL(None).malloc_trim(0)
"""
LOAD = """
model = lb.models.load(sys.argv[1], lb.uniform(4, group=128), progress=False)
kept = sum(array.nbytes for array in jax.block_until_ready(jax.tree.leaves(nnx.state(model))))
"""


def gguf(folder: Path, size: int) -> tuple[Path, int, int]:
    """A file of Q4_K layers, the weights of one and its bytes."""
    from gguf import GGMLQuantizationType, GGUFWriter

    block = BLOCKS["Q4_K"]
    width = K // block.weights * block.size
    n, count = _layers(size, width)
    blocks = np.random.default_rng(0).integers(0, 256, (n, K // block.weights, block.size)).astype(np.uint8)
    for byte in block.halves.values():
        blocks[..., byte + 1] &= 0x1F  # no NaN, no inf
    path, rows = folder / "model.gguf", blocks.reshape(n, width)
    writer = GGUFWriter(path, "llama")
    for i in range(count):
        writer.add_tensor_info(f"blk.{i}.ffn_up.weight", rows.shape, rows.dtype, rows.nbytes, GGMLQuantizationType.Q4_K)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _ in range(count):
        writer.write_tensor_data(rows)
    writer.close()
    return path, n * K, rows.nbytes


def gptq(folder: Path, size: int) -> tuple[Path, int, int]:
    """A folder of GPTQ layers of 4 bits, in one file, the weights of one and its bytes."""
    n, count = _layers(size, K // 2 + K // GROUP * 5 // 2)
    rng = np.random.default_rng(0)
    layer: dict[str, Array] = {
        "qweight": rng.integers(-1 << 31, 1 << 31, (K // 8, n)).astype(np.int32),
        "qzeros": np.full((K // GROUP, n // 8), 0x77777777, np.int32),
        "scales": rng.uniform(0.5, 1, (K // GROUP, n)).astype(np.float16),
    }
    tensors = {f"layers.{i}.up.{key}": array for i in range(count) for key, array in layer.items()}
    _write(folder / "model.safetensors", tensors)
    options = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False}
    (folder / "config.json").write_text(json.dumps({"quantization_config": options}))
    return folder, n * K, sum(a.nbytes for a in layer.values())


def llama(folder: Path, size: int) -> tuple[Path, int]:
    """A folder of a llama in float16 with a shard for each block, and the weights of its largest layer."""
    width = min(K, max(256, isqrt(size // 86) // 256 * 256))  # 26 width^2 bytes a block, 8 width^2 of the two tables
    blocks, hidden, kv = max(1, round((size - 8 * width**2) / (26 * width**2))), width * 7 // 2, width // 4
    config = {
        "model_type": "llama", "vocab_size": 2 * width, "hidden_size": width, "intermediate_size": hidden,
        "num_hidden_layers": blocks, "num_attention_heads": width // 64, "num_key_value_heads": kv // 64,
        "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "hidden_act": "silu",
    }  # fmt: skip
    rng, ones = np.random.default_rng(0), np.ones(width, np.float16)

    def matrix(n: int, k: int) -> Array:
        return (rng.standard_normal((n, k), np.float32) / k**0.5).astype(np.float16)

    block: dict[str, Array] = {f"self_attn.{n}_proj": matrix(width if n in "qo" else kv, width) for n in "qkvo"}
    block |= {f"mlp.{n}_proj": matrix(hidden, width) for n in ("gate", "up")} | {"mlp.down_proj": matrix(width, hidden)}
    block |= {"input_layernorm": ones, "post_attention_layernorm": ones}
    tables = {"model.embed_tokens": matrix(2 * width, width), "lm_head": matrix(2 * width, width), "model.norm": ones}
    shards = [tables] + [{f"model.layers.{i}.{name}": a for name, a in block.items()} for i in range(blocks)]
    index: dict[str, str] = {}
    for i, shard in enumerate(shards):
        tensors = {f"{name}.weight": array for name, array in shard.items()}
        _write(folder / f"model-{i}.safetensors", tensors)
        index |= dict.fromkeys(tensors, f"model-{i}.safetensors")
        if i == 1:  # so far it is a model of one block
            _describe(folder / "small", config | {"num_hidden_layers": 1}, index)
    _describe(folder, config, index)
    return folder, hidden * width


def _describe(folder: Path, config: dict[str, Any], index: dict[str, str]) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / INDEX).write_text(json.dumps({"weight_map": index}))
    for file in set(index.values()):
        if not (folder / file).exists():
            (folder / file).symlink_to(folder.parent / file)


def _write(path: Path, tensors: dict[str, Array]) -> None:
    head, starts = arranged({name: (a.dtype, a.shape) for name, a in tensors.items()}, {})
    with open(path, "wb") as file:
        file.write(head)
        for name in starts:
            file.write(as_bytes(tensors[name]))


def _layers(size: int, width: int) -> tuple[int, int]:
    """Outputs of a layer, and layers, for rows of so many bytes."""
    n = min(N, max(8, size // (FEWEST * width) // 8 * 8))
    return n, max(1, round(size / (n * width)))


LAYOUTS: dict[str, Callable[[Path, int], tuple[Path, int, int]]] = {"gguf": gguf, "gptq": gptq}


def _status(pid: int, field: str) -> int:
    """Bytes that /proc states of a process."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) << 10
    raise SystemExit(f"/proc/{pid}/status has no {field}: this benchmark runs on Linux")


def watched(work: str, *paths: Path, first: str = "") -> tuple[int, int, int, float]:
    """Of work in a process of its own: bytes of arrays it keeps, of anonymous memory at most, all resident ones, and
    seconds."""
    command = [sys.executable, "-c", CHILD.format(work=work, first=first), *map(str, paths)]
    root = Path(__file__).parents[1]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root) as child:
        assert child.stdin is not None and child.stdout is not None
        _expect(child.stdout.readline(), "ready")
        before = _status(child.pid, "RssAnon")
        seen, done = [before], threading.Event()

        def watch() -> None:
            while not done.wait(0.001):
                seen.append(_status(child.pid, "RssAnon"))

        watcher = threading.Thread(target=watch)
        start = time.perf_counter()
        child.stdin.write("go\n")
        child.stdin.flush()
        watcher.start()
        said = child.stdout.readline()
        seconds = time.perf_counter() - start
        done.set()
        watcher.join()
        kept = _expect(said, "done")
        resident = _status(child.pid, "VmHWM")
        child.stdin.write("end\n")
    return kept, max(seen) - before, resident, seconds


def _expect(line: str, word: str) -> int:
    """The number that follows a word."""
    said, _, number = line.strip().partition(" ")
    if said != word:
        raise SystemExit("the process failed: its error is above")
    return int(number or 0)


def measure(size: int = SIZE) -> Iterator[Row]:
    for layout, make in LAYOUTS.items():
        with tempfile.TemporaryDirectory() as made:
            folder = Path(made)
            source, dense, layer = make(folder, size)
            file = source if source.is_file() else source / "model.safetensors"
            start = time.perf_counter()
            shutil.copyfile(file, folder / "copy")
            copy, stored = time.perf_counter() - start, file.stat().st_size
            (folder / "copy").unlink()
            _, anonymous, resident, seconds = watched(CONVERT, source, folder / "converted.safetensors")
            written = (folder / "converted.safetensors").stat().st_size * layer // stored
        limit = 4 * dense + written + FIXED
        yield row(f"{layout}_anonymous", anonymous, "bytes", "a dense layer", 4 * dense)
        yield row(f"{layout}_resident", resident, "bytes", "the file", stored)
        yield row(f"{layout}_time", seconds, "s", "a copy of the file", copy)
        yield row(f"{layout}_rate", stored / seconds, "bytes/s", "a copy of the file", stored / copy)
        if anonymous > limit:
            raise SystemExit(f"{layout}: {anonymous} bytes of anonymous memory, and one layer may take {limit}")
    yield from loading(size)


def loading(size: int) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as made:
        source, dense = llama(Path(made), size)
        files = sorted(source.glob("*.safetensors"))
        start = time.perf_counter()
        for file in files:
            shutil.copyfile(file, Path(made) / "copy")
        copy, stored = time.perf_counter() - start, sum(file.stat().st_size for file in files)
        kept, anonymous, resident, seconds = watched(LOAD, source, source / "small", first=COMPILE)
    yield row("load_anonymous", anonymous, "bytes", "the quantized model", kept)
    yield row("load_beside_the_model", anonymous - kept, "bytes", "two dense layers", 8 * dense)
    yield row("load_resident", resident, "bytes", "the files", stored)
    yield row("load_time", seconds, "s", "a copy of the files", copy)
    yield row("load_rate", stored / seconds, "bytes/s", "a copy of the files", stored / copy)
    if anonymous > kept + 8 * dense + FIXED:
        may = f"beside the model's {kept} two layers may take {8 * dense + FIXED}"
        raise SystemExit(f"load: {anonymous} bytes of anonymous memory, and {may}")


if __name__ == "__main__":
    main("Conversion and loading of a checkpoint, a layer at a time", lambda size: list(measure(size)), size=SIZE)
