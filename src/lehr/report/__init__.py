"""Reading a plan or a run: pictures. It must not change anything, and needs no torch."""
