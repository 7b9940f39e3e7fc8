"""Grids of models × calibration × objective × search × ratio, and the statistics that say which of them matters."""
