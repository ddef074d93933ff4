"""What is measured: each module prints a table and, with `--json FILE`, writes rows as `harness.row` describes them.

Those for GPUs, `gpu_*`, keep theirs as `gpu_results` describes, for `make gpu`.
"""
