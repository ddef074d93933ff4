"""A GPU to compile for, described by a text: no GPU, driver or CUDA toolkit takes part, only wheels (extra `aot`)."""

import os
import re
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.experimental.mosaic.gpu  # writes the CUDA root that it finds into MOSAIC_GPU_CUDA_ROOT
from jax.experimental import topologies

# Before anything asks for a device: the CUDA plugin would look for a driver, find none and report it.
jax.config.update("jax_platforms", "cpu")

DEVICES = Path(__file__).parent
"""Where the texts are."""


def cuda_root(path: Path) -> Path:
    """`path` when it holds ptxas and nvdisasm; jax takes those of the wheels unless CUDA_ROOT is set."""
    missing = [tool for tool in ("ptxas", "nvdisasm") if not (path / "bin" / tool).exists()]
    if missing:
        raise FileNotFoundError(
            f"no {' and no '.join(missing)} in {path / 'bin'}: run `make aot`, which installs the extra that has them, "
            "with CUDA_ROOT unset"
        )
    return path


@cache
def assembler() -> str:
    """The version of ptxas, which every figure depends on."""
    ptxas = cuda_root(Path(os.environ["MOSAIC_GPU_CUDA_ROOT"])) / "bin" / "ptxas"
    said = subprocess.run([ptxas, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"\bV(\d+(?:\.\d+)+)", said)
    if not found:
        raise ValueError(f"{ptxas} --version says no version: {said!r}")
    return found[1]


@cache
def device(chip: str) -> jax.sharding.NamedSharding:
    """Everything on the one device of a compile-only topology."""
    described = (DEVICES / f"{chip}.txtpb").read_text("utf-8")
    topology = topologies.get_topology_desc(platform="cuda", target_config=described, topology="1x1x1")
    return jax.sharding.NamedSharding(topologies.make_mesh(topology, (1,), ("x",)), jax.sharding.PartitionSpec())


def compile_for(chip: str, function: Callable[..., Any], *avals: Any, dump: Path) -> None:
    """Compiles `function` of arguments like `avals`; its PTX, ptxas's log and SASS are all that `dump` then holds. A
    process compiles for one chip: Mosaic GPU keeps the first that it saw."""
    dump.mkdir(parents=True, exist_ok=True)
    for old in dump.iterdir():
        old.unlink()
    os.environ["MOSAIC_GPU_DUMP_TO"] = str(dump)  # read again at each compilation
    placed = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=device(chip)), avals)
    (default,) = device(chip).device_set
    with jax.default_device(default):  # Mosaic GPU asks it for its compute capability
        jax.jit(function).lower(*placed).compile()
    for log in dump.glob("*.mlir-passes.log"):  # megabytes, of jax's own passes
        log.unlink()
