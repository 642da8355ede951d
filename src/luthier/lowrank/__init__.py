"""Matrices at low rank and in few bits: decompositions, rounding in a metric, the choice between them."""
