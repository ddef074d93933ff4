"""The one error of reading a file."""


class CheckpointError(ValueError):
    """A file that cannot be trusted or understood: the message names the file, the layer or tensor, and what to do."""


AGAIN = "get the file again or restore a copy"
"""What to do about a damaged file."""
