"""Adaptive image retrieval: one index, any query cost."""
