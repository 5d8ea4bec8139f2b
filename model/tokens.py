"""Language modelling: tokens come in as ids, and every step's scores are the probabilities of the token after it.

A frame is one id, float32 of shape (1,), as the protocol has it for the task "tokens". Ids are exact in float32 up to 2^24.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.layers import step_mask


class TokenFeatures(nn.Module):
    """A learnt vector for each of `vocabulary` tokens: ids (T, B, 1) -> (T, B, width). It remembers nothing.

    Raises `ValueError` where an id of a real step is not in the vocabulary. An exported graph cannot raise for one row of a batch: it takes
    the nearest id, and the first for NaN.
    """

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.vocabulary, self.width, self.state_width = vocabulary, width, 0
        self.embedding = nn.Embedding(vocabulary, width)

    def forward(self, frames: Tensor, lengths: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        if not (torch.compiler.is_compiling() or torch.compiler.is_exporting()):
            self._check(frames, lengths)
        ids = torch.where(torch.isnan(frames), 0.0, frames).clamp(0, self.vocabulary - 1).round().long()
        return self.embedding(ids[..., 0]), state

    def _check(self, frames: Tensor, lengths: Tensor) -> None:
        ids = frames[step_mask(lengths, len(frames))]
        wrong = ids[~((ids == ids.round()) & (ids >= 0) & (ids < self.vocabulary))]
        if len(wrong):
            raise ValueError(f"a token's id is a whole number from 0 to {self.vocabulary - 1}, got {wrong[0].item():g}")


def next_token_loss(logits: Tensor, frames: Tensor, lengths: Tensor) -> Tensor:
    """Cross-entropy, in nats a token, of each step's logits (B, T, vocabulary) against the id one step later in `frames` (B, T, 1).

    Every token but the first of its row counts the same. Divided by log 2 it is bits per token, and its exponential the perplexity.
    Raises `ValueError` when no row has two tokens.
    """
    real = step_mask(lengths - 1, frames.shape[1] - 1).T
    if not bool(real.any()):
        raise ValueError("no sequence has two tokens: there is nothing to predict")
    return nn.functional.cross_entropy(logits[:, :-1][real], frames[:, 1:, 0][real].long())
