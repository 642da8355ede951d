"""What a person should know of how a run goes: told while it goes on, and kept for its report."""

from __future__ import annotations

from luthier.training.events import Listener
from luthier.training.rundir import RunDir


class Notes:
    """Sentences that go to the run's listener and into its notes.json, each once."""

    def __init__(self, run: RunDir, listener: Listener):
        self._run = run
        self._listener = listener
        self._told: set[str] = set()

    def add(self, text: str) -> None:
        """Tell and keep `text`, unless that was done. Raises CheckpointError if the disk refuses."""
        if text in self._told:
            return
        self._told.add(text)
        self._listener.note(text)
        self._run.add_note(text)
