"""Operators: for each, a plain reference that defines the answer, and an equal form that is fast."""
