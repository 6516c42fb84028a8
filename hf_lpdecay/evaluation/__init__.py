"""What a model is worth."""

from .harness import lm_eval_scores
from .perplexity import TextLoss, perplexity, text_loss


__all__ = ["TextLoss", "lm_eval_scores", "perplexity", "text_loss"]
