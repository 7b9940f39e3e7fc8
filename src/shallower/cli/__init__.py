"""The command line: one file a verb. Nothing here imports torch, numpy or rich before a verb runs."""
