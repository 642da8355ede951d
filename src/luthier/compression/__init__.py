"""Smaller models: what matters least is found, kept at low rank and in few bits, and what that costs is measured."""
