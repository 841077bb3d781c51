# SPDX-License-Identifier: Apache-2.0
"""The recurrent language model: embedding, LSTM layers, softmax head.

The architecture is that of Zaremba, Sutskever and Vinyals, "Recurrent Neural Network Regularization" (2014): dropout on
the embedding's output, between the layers and on the last layer's output, never on the recurrent connections. Tying the
head to the embedding is Press and Wolf, "Using the Output Embedding to Improve Language Models" (2017).
"""

import math
from typing import Any

from torch import Tensor, nn

from llmkern import nn as llmkern_nn
from llmkern import ops
from llmkern.generation.loop import GenerationMixin
from llmkern.models.pretrained import PretrainedMixin

State = tuple[Tensor, Tensor]


class LanguageModel(GenerationMixin, PretrainedMixin, nn.Module):
    """Predicts the next token from all tokens before it.

    Args:
        vocab_size: V, the number of tokens.
        embedding_dim: D, the width of the embedding.
        hidden_size: H, the width of every LSTM layer.
        num_layers: number of LSTM layers.
        dropout: probability in [0, 1) of dropping an element between the layers, in training.
        tie_weights: use the embedding's table as the head's weight; needs embedding_dim == hidden_size.
        bias: whether the head has a bias.
        init_range: every parameter is drawn from U(-init_range, init_range); None keeps torch's defaults.

    Raises:
        ValueError: a size is not positive, dropout is out of range, or the tied sizes differ.

    Example:
        >>> model = LanguageModel(vocab_size=100, embedding_dim=16, hidden_size=16, tie_weights=True)
        >>> ids = torch.randint(100, (4, 9))
        >>> loss, state = model.loss(ids[:, :-1], ids[:, 1:])
        >>> model.generate(ids[:1, :3], max_new_tokens=5, seed=1).shape
        torch.Size([1, 8])
    """

    def __init__(
        self,
        vocab_size: int,
        embedding_dim: int = 256,
        hidden_size: int = 512,
        num_layers: int = 1,
        *,
        dropout: float = 0.0,
        tie_weights: bool = False,
        bias: bool = True,
        init_range: float | None = 0.1,
    ) -> None:
        super().__init__()
        sizes = {
            "vocab_size": vocab_size,
            "embedding_dim": embedding_dim,
            "hidden_size": hidden_size,
            "num_layers": num_layers,
        }
        flags = {"tie_weights": tie_weights, "bias": bias}
        _check_arguments(sizes, flags, dropout, init_range)
        self._config = {
            **sizes,
            "dropout": dropout,
            "tie_weights": tie_weights,
            "bias": bias,
            "init_range": init_range,
        }
        self.vocab_size = vocab_size
        self.embedding = llmkern_nn.Embedding(vocab_size, embedding_dim)
        self.lstm = llmkern_nn.LSTM(
            embedding_dim,
            hidden_size,
            num_layers,
            batch_first=True,
            # One layer has nothing between layers, and torch's constructor warns about it.
            dropout=dropout if num_layers > 1 else 0.0,
        )
        self.head = nn.Linear(hidden_size, vocab_size, bias=bias)
        self.dropout = nn.Dropout(dropout)
        self.reset_parameters()
        if tie_weights:
            self.head.weight = self.embedding.weight

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return dict(self._config)

    @property
    def num_parameters(self) -> int:
        """The number of trainable values; a tied table counts once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def reset_parameters(self) -> None:
        """Draws every parameter anew from U(-init_range, init_range); nothing to do when init_range is None."""
        init_range = self._config["init_range"]
        if init_range is not None:
            for parameter in self.parameters():
                nn.init.uniform_(parameter, -init_range, init_range)

    def initial_state(self, batch_size: int) -> State:
        """The state before the first token: zeros (h [L, B, H], c [L, B, H])."""
        weight = self.embedding.weight
        shape = (self.lstm.num_layers, batch_size, self.lstm.hidden_size)
        return weight.new_zeros(shape), weight.new_zeros(shape)

    def hidden_states(self, ids: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """What the head reads.

        Args:
            ids: [B, T], int64 or int32.
            state: as returned by the call that read the tokens before these; None at the beginning of a text.

        Returns:
            The last layer's output [B, T, H] (after dropout) and the state after the last token.
        """
        if ids.dim() != 2:
            raise ValueError(
                f"llmkern.LanguageModel: expected ids of shape [B, T], got {list(ids.shape)}"
            )
        output, state = self.lstm(self.dropout(self.embedding(ids)), state)
        return self.dropout(output), state

    def forward(self, ids: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """The logits of every next token.

        Args:
            ids: [B, T], int64 or int32.
            state: as returned by the call before, or None.

        Returns:
            Logits [B, T, V] and the state after the last token.
        """
        output, state = self.hidden_states(ids, state)
        return self.head(output), state

    def loss(
        self, ids: Tensor, targets: Tensor, state: State | None = None, *, reduction: str = "mean"
    ) -> tuple[Tensor, State]:
        """The cross entropy of the next tokens, in nats; the logits are never materialised.

        Args:
            ids: [B, T], the tokens read.
            targets: [B, T], the token after each of them; -100 is ignored.
            state: as returned by the call before, or None.
            reduction: "mean", "sum" or "none".

        Returns:
            The loss (a scalar, [B, T] for "none") and the state after the last token.
        """
        if targets.shape != ids.shape:
            raise ValueError(
                f"llmkern.LanguageModel: expected targets of the shape of ids = {list(ids.shape)}, "
                f"got {list(targets.shape)}"
            )
        output, state = self.hidden_states(ids, state)
        loss = ops.linear_cross_entropy(
            output, self.head.weight, targets, linear_bias=self.head.bias, reduction=reduction
        )
        return loss, state


def _check_arguments(
    sizes: dict[str, int], flags: dict[str, bool], dropout: float, init_range: float | None
) -> None:
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(
                f"llmkern.LanguageModel: expected {name} to be an int >= 1, got {size!r}"
            )
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise ValueError(f"llmkern.LanguageModel: expected {name} to be a bool, got {flag!r}")
    if not 0 <= dropout < 1:
        raise ValueError(f"llmkern.LanguageModel: expected dropout in [0, 1), got {dropout}")
    if init_range is not None and not 0 < init_range < math.inf:
        raise ValueError(
            f"llmkern.LanguageModel: expected a finite init_range > 0 or None, got {init_range}"
        )
    if flags["tie_weights"] and sizes["embedding_dim"] != sizes["hidden_size"]:
        raise ValueError(
            "llmkern.LanguageModel: expected embedding_dim == hidden_size for tie_weights=True, "
            f"got {sizes['embedding_dim']} and {sizes['hidden_size']}"
        )
