"""Tiny models of every supported family and conformance checks, for this project and for third-party methods."""
