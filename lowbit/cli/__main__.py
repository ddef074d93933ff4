"""`python -m lowbit.cli`, where the command `lowbit` is not on the path."""

from lowbit.cli.main import main

main()
