"""What a removal cost and gained: a self-contained page, its figures, and tables for the terminal.

`page` and `figures` import matplotlib, `tables` imports rich; `data` and `wording` import neither.
"""

from shallower.reporting.data import ReportData, Side

__all__ = ["ReportData", "Side"]
