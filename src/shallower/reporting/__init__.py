"""What a removal cost and gained: a self-contained page, its figures, and tables for the terminal.

`style` imports matplotlib, and with it all that draw; `tables` and `evaluation` import rich; `data`, `wording` and
`markup` import neither.
"""

from shallower.reporting.data import ReportData, Side

__all__ = ["ReportData", "Side"]
