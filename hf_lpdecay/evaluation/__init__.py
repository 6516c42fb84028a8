"""What a model is worth."""

from .perplexity import perplexity


__all__ = ["perplexity"]
