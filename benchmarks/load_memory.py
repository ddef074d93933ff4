"""Memory and speed of `lb.convert`: checkpoints of 2 GB, a layer at a time, beside a plain copy of the file.

    python benchmarks/load_memory.py [--size BYTES] [--json out.json]

A checkpoint of random codes is made in a temporary folder, in each layout, and converted in a process of its own. What
is measured there is *anonymous* memory: RssAnon in /proc, sampled every millisecond, less what it was before. That is
what the kernel cannot take back. Pages of mapped files, which it can, count in VmHWM, shown beside it.

Asserted: at most one layer as a dense float32 array, and as it is written. What else is needed, among it what the C
library keeps for the next layer, has to fit in that.
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
from pathlib import Path

import numpy as np

if __name__ == "__main__":  # as a script; as a module it has the repository's root already
    sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.harness import Row, main, row
from lowbit.io.gguf_blocks import BLOCKS
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
lb.convert
print("ready", flush=True)
sys.stdin.readline()
lb.convert(sys.argv[1], sys.argv[2])
print("done", flush=True)
sys.stdin.readline()
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
    head, starts = arranged({name: (a.dtype, a.shape) for name, a in tensors.items()}, {})
    with open(folder / "model.safetensors", "wb") as file:
        file.write(head)
        for name in starts:
            file.write(as_bytes(tensors[name]))
    options = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False}
    (folder / "config.json").write_text(json.dumps({"quantization_config": options}))
    return folder, n * K, sum(a.nbytes for a in layer.values())


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


def converted(source: Path, target: Path) -> tuple[int, int, float]:
    """Of a conversion in a process of its own: bytes of anonymous memory at most, all resident ones, and seconds."""
    command = [sys.executable, "-c", CHILD, str(source), str(target)]
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
        _expect(said, "done")
        resident = _status(child.pid, "VmHWM")
        child.stdin.write("end\n")
    return max(seen) - before, resident, seconds


def _expect(line: str, word: str) -> None:
    if line != f"{word}\n":
        raise SystemExit("the conversion failed: its error is above")


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
            anonymous, resident, seconds = converted(source, folder / "converted.safetensors")
            written = (folder / "converted.safetensors").stat().st_size * layer // stored
        limit = 4 * dense + written + FIXED
        yield row(f"{layout}_anonymous", anonymous, "bytes", "a dense layer", 4 * dense)
        yield row(f"{layout}_resident", resident, "bytes", "the file", stored)
        yield row(f"{layout}_time", seconds, "s", "a copy of the file", copy)
        yield row(f"{layout}_rate", stored / seconds, "bytes/s", "a copy of the file", stored / copy)
        if anonymous > limit:
            raise SystemExit(f"{layout}: {anonymous} bytes of anonymous memory, and one layer may take {limit}")


if __name__ == "__main__":
    main("Conversion of a checkpoint, a layer at a time", lambda size: list(measure(size)), size=SIZE)
