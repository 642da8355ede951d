"""How long work tells how far it is."""

from __future__ import annotations

from collections.abc import Callable

# progress(stage, done, total): what is being done, and how much of how much of it.
Progress = Callable[[str, int, int], None]
