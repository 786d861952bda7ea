"""Layers of other frameworks, in and out; each framework is imported only by its own module."""
