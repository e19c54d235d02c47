"""scalerun: large-batch training that can be trusted."""

__version__ = "0.1.0"
