"""The version: checked against CHANGELOG.md by a test."""

__version__ = "0.1.0"
