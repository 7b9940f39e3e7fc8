"""Training of a cut model: the loop, what it minimises, how it survives a kill. It does not know the methods."""
