"""What the frozen part of a model gives, kept by sample: the suffix alone is computed from then on.

Its way: calling -> ways (a proved prefix) -> store and kept (the rows) -> shortcut (a data set's samples) -> stage_cache.
"""
