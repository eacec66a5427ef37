"""A plan inside other people's trainers: a thin callback for each, in a file of its own.

Nothing of lehr imports this; each file imports the library that it is for, which is an extra of lehr's.
"""
