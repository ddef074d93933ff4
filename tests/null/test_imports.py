"""The IR and the algebra cost numpy only."""

from __future__ import annotations

import subprocess
import sys


def test_ir_and_passes_do_not_import_jax():
    code = (
        "import lowbit, lowbit.ir, lowbit.passes, sys\n"
        "heavy = sorted({'jax', 'jaxlib', 'flax', 'optax'} & set(sys.modules))\n"
        "assert not heavy, heavy\n"
        "assert not {'ir', 'passes'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
