"""What every module of networks raises."""


class ModelError(ValueError):
    """The network cannot be built as asked."""
