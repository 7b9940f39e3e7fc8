"""Where a MODEL string becomes a loaded model: located, checked, converted if need be, identified by its weights."""
