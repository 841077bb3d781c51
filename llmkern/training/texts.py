# SPDX-License-Identifier: Apache-2.0
"""The texts a trainer is given: checked before the first step, and known again when a run is resumed."""

import hashlib
from typing import Any

from torch import Tensor, nn

from llmkern.text import contiguous_lanes

# Lanes of a training batch where the user names none: at most so many, and so few that an epoch has so many steps.
_MOST_LANES, _STEPS_OF_AN_EPOCH = 32, 20
_HASHED_AT_ONCE = 1 << 20


def default_batch_size(tokens: int, bptt: int) -> int:
    """How many lanes a training text is cut into unless the user says: fewer where it is short.

    A text of 800 tokens in 32 lanes has one step an epoch, on lanes of 25 tokens: that trains nothing.
    """
    return max(1, min(_MOST_LANES, tokens // (bptt * _STEPS_OF_AN_EPOCH)))


def default_eval_batch_size(tokens: int, bptt: int, batch_size: int) -> int:
    """Likewise for a text to score: every lane begins without context, so it should last a window at least."""
    return max(1, min(batch_size, tokens // bptt))


def checked_lanes(name: str, ids: Tensor, option: str, batch_size: int, model: nn.Module) -> Tensor:
    """The text as lanes [B, N // B].

    Args:
        name: what an error calls the text.
        ids: int64 or int32 [N].
        option: what an error calls the batch size.
        batch_size: B.
        model: whose ``vocab_size``, if it has one, the ids must fit.

    Raises:
        TypeError: the text is no int64 or int32 tensor.
        ValueError: it has fewer than 2 * B tokens or an id the model does not know.
    """
    if isinstance(ids, Tensor) and ids.numel() < 2 * batch_size:
        lower = f"lower {option} or " if batch_size > 1 else ""
        raise ValueError(
            f"llmkern.Trainer: expected {name} of at least 2 * {option} = {2 * batch_size} tokens, "
            f"got {ids.numel()}; {lower}give a longer text"
        )
    lanes = contiguous_lanes(ids, batch_size)
    vocab_size = getattr(model, "vocab_size", None)
    if vocab_size is not None:
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= vocab_size:
            raise ValueError(
                f"llmkern.Trainer: expected {name} in [0, V) = [0, {vocab_size}), got {low if low < 0 else high}: "
                "the tokenizer does not fit the model"
            )
    return lanes


def fingerprint(ids: Tensor) -> dict[str, Any]:
    """Length and SHA-256 of a text's ids: a run goes on with the text it began with."""
    digest = hashlib.sha256()
    for part in ids.detach().cpu().split(_HASHED_AT_ONCE):
        digest.update(part.long().contiguous().numpy().data)  # the same for int32 and int64
    return {"length": ids.numel(), "sha256": digest.hexdigest()}
