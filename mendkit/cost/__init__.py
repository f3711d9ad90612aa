"""Memory before a run, speed after it."""
