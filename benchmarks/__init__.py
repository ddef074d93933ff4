"""What is measured: each module prints a table and, with `--json FILE`, writes rows as `harness.row` describes them."""
