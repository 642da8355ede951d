"""Training: one run from its configuration to its run directory."""
