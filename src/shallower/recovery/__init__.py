"""One recovery a file: a function that repairs a cut model, registered under the file's name.

It asks by name for what it needs: `student` (a PreTrainedModel already cut, in memory), `anatomy` (of the dense model),
`removed` (frozenset of units), `calibration` (a CalibrationSet), `held_out` (a function from a model to its perplexity
on text that nothing is fitted on, or None), `folder` (where it may keep what it resumes from, or None) and `seed`. It
returns the changed student.
"""
