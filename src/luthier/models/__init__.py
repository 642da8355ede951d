"""Where a model comes from, and loading it within the memory of one copy."""
