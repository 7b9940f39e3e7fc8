"""How much is read, and by which seed, where nobody says so. Torch-free, as `--help` shows it, too."""

from __future__ import annotations

SEQUENCES, LENGTH = 32, 128
"""Calibration sequences, or questions, that units are judged on, and the most tokens in each."""

BUILT_LENGTH = 512
"""Tokens in each sequence of `build_calibration`. Verbs take `LENGTH`: a search would take four times as long."""

REPAIR_SEQUENCES, REPAIR_LENGTH = 128, 256
"""What `recover` reads for a repair, and others at least: a matrix of 1,536 inputs wants many times as many tokens."""

TRAIN_SEQUENCES = 4096
"""What trainings read: they read on, and a million tokens are more than a processor trains on in an hour."""

WINDOW, WINDOWS = 1024, 12
"""Tokens in a window of held-out text, and how many windows of each text `prune` and `recover` measure."""

TASK_SEED = 1234
"""Decides which examples precede a question; the same as lm-eval's."""
