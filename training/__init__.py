"""Training a memory: settings, rows, the loop, validation and checkpoints of both trainers."""
