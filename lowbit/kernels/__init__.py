"""GPU kernels: schedules with a hole for the decoder that a format's term asks for, and the layout they read."""
