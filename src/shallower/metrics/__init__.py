"""Importance of units; higher always means keep. One metric a file.

The framework supplies what the signature asks for: `before, after` (the stream around a unit or span) or `units,
losses` (the question that an adaptive metric asks of the whole model).
"""
