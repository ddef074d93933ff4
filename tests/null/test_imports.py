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


def test_the_plugin_and_the_tolerances_do_not_import_jax():
    """pytest loads the plugin in every project of an environment that has lowbit."""
    code = (
        "import sys, lowbit.testing.plugin\n"
        "assert not [m for m in sys.modules if m.startswith('lowbit.') and 'testing' not in m]\n"
        "import lowbit.testing.tolerance\n"
        "heavy = sorted({'jax', 'jaxlib', 'flax', 'optax', 'hypothesis'} & set(sys.modules))\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
