"""The part of a model that gives the same for a sample through a stage: found, cut off, made faster, and proved.

Its way: tracing -> walking -> pureness -> cutting -> halving -> folding -> proof. Nothing here knows a data set or a run.
"""
