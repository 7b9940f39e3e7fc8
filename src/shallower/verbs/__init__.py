"""The library: verbs of the command line as functions, on a path or on a model in memory.

`inspect`, `score`, `search`, `prune`, `recover`, `evaluate` with `ratio_curve`, `bench`, `study`, `report`, `corpus`
and `demo` each have a module of their name. The other modules serve these.
"""
