"""Prints the XLA flags under which a program compiles soonest, for tests that run thousands of programs once.

Late passes cost more time than they save there, and so does the emitter of fused loops, which jax 0.12 has no way
around. XLA ends a process that names a flag it does not know, so that each is tried in a process of its own.
"""

import os
import subprocess
import sys

FLAGS = (
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_use_fusion_emitters=false",
)
TRY = "import jax; jax.config.update('jax_platforms', 'cpu'); jax.devices()"


def known(flag: str) -> bool:
    environment = {**os.environ, "XLA_FLAGS": flag}
    return not subprocess.run([sys.executable, "-c", TRY], env=environment, capture_output=True).returncode


if __name__ == "__main__":
    print(*filter(known, FLAGS))
