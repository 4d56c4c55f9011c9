"""The one exception that means "the input is at fault, and here is the remedy"."""


class CatsparseError(ValueError):
    """Input that cannot be worked with; the message is one sentence naming the remedy."""
