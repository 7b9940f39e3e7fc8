"""Importance of units; higher always means keep. One metric a file.

The framework supplies what the signature asks for: `before, after` (the stream around a unit or span), or `units` with
what an adaptive metric asks of the whole model: `losses` (the objective without each candidate) or `differences` (to
the dense model, with standard errors), and `rng`, seeded by the user.
"""
