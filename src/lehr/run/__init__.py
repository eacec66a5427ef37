"""The part of lehr that touches torch: reading a model, freezing it, stepping it."""
