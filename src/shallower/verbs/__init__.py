"""The library: each verb of the command line as a function, on a path or on a model in memory."""
