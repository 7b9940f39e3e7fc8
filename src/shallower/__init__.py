"""shallower: find the blocks and sublayers a language model can do without, cut them out, and prove what it cost."""
