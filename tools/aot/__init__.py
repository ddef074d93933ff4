"""`make aot`: kernels compiled for an H100 on a machine without one, and what their machine code costs.

`target` compiles, `sass` reads what the compiler left, `model` says which part of the chip the code keeps how busy, and
`report` judges each kernel and writes the table of docs/kernels.md. Only `target` needs jax.
"""
