# SPDX-License-Identifier: Apache-2.0
"""Writing text: one token a step, the state carried, the token chosen by llmkern.ops.sample.

A row's tokens depend on its own prompt, settings and seed alone. Prompts of different lengths are therefore read
without padding, each row samples with its own seed and position, and a linear head is applied by a product whose rows
do not depend on one another, as torch's do.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from llmkern import ops
from llmkern.generation.config import GenerationConfig
from llmkern.generation.constraints import Constraints
from llmkern.generation.streaming import Streamer
from llmkern.nn import snapshot_weights
from llmkern.text import Tokenizer
from llmkern.text.tokenizer import Unknown

Inputs = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]] | Tensor


@dataclass(frozen=True)
class GenerationOutput:
    """What generate(..., return_dict_in_generate=True) returns, a row for each text.

    Attributes:
        sequences: prompt and continuation, [rows, longest], filled up with pad_token_id.
        texts: the same as text; None for a model without a tokenizer.
        prompt_lengths: the number of tokens that are the prompt's.
        new_tokens: the ids written, a list for each row.
        finish_reasons: "eos", "stop" (a stop string) or "length".
        seeds: the seed of each row: with its prompt and settings it gives the row again.
    """

    sequences: Tensor
    texts: list[str] | None
    prompt_lengths: list[int]
    new_tokens: list[list[int]]
    finish_reasons: list[str]
    seeds: list[int]


@dataclass
class _Row:
    number: int
    prompt: list[int]
    seed: int
    output: list[int] = field(default_factory=list)
    finish_reason: str | None = None


class GenerationMixin:
    """generate() for a module with hidden_states, head, initial_state and vocab_size."""

    tokenizer: Tokenizer | None
    vocab_size: int
    training: bool

    def generate(
        self,
        inputs: Inputs,
        generation_config: GenerationConfig | None = None,
        *,
        streamer: Streamer | None = None,
        return_dict_in_generate: bool = False,
        **settings: Any,
    ) -> Any:
        """Continues prompts.

        Args:
            inputs: a text, a list of texts, a list of ids, a list of such lists (lengths may differ), or a
                tensor of ids [T] or [B, T].
            generation_config: the settings; default: GenerationConfig().
            streamer: gets the prompt [1, T] and then each new token [1]; for a single row.
            return_dict_in_generate: return a GenerationOutput.
            **settings: any field of GenerationConfig, over generation_config.

        Returns:
            Prompt and continuation: a str for a text, a list of str for a list of texts or
            num_return_sequences > 1, ids [B * num_return_sequences, longest] for ids.

        Raises:
            ValueError: a setting is out of range, a prompt is empty or has a character the model does not know, no
                token is left to choose from, or the model's logits are NaN.
            IndexError: a prompt's id is outside [0, V).

        Example:
            >>> model.generate("Once upon", max_new_tokens=40, temperature=0.8, top_p=0.95, seed=1)
        """
        config = replace(generation_config or GenerationConfig(), **settings)
        config.check_vocabulary(self.vocab_size)
        is_text, prompts = _read_inputs(inputs, self.tokenizer, config)
        prompts = [_checked_prompt(p, i, config, self) for i, p in enumerate(prompts)]
        seeds = _seeds(config, len(prompts))
        copies = config.num_return_sequences
        rows = [
            _Row(i * copies + j, prompt, (seed + j) % 2**63)
            for i, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))
            for j in range(copies)
        ]
        if streamer is not None and len(rows) != 1:
            raise ValueError(f"llmkern.generate: expected one row for a streamer, got {len(rows)}")
        was_training = self.training
        self.eval()  # type: ignore[attr-defined]
        try:
            # The weights are this loop's own until it ends.
            with torch.inference_mode(), snapshot_weights(self):  # type: ignore[arg-type]
                _write(self, rows, config, streamer)
        finally:
            self.train(was_training)  # type: ignore[attr-defined]
        output = _collect(rows, config, self.tokenizer)
        if return_dict_in_generate:
            return output
        if not is_text:
            return output.sequences
        assert output.texts is not None
        return output.texts[0] if isinstance(inputs, str) and len(rows) == 1 else output.texts


def _read_inputs(
    inputs: Inputs, tokenizer: Tokenizer | None, config: GenerationConfig
) -> tuple[bool, list[list[int]]]:
    """Whether the prompts are texts, and their ids."""
    if isinstance(inputs, Tensor):
        if inputs.dim() not in (1, 2) or inputs.is_floating_point():
            raise ValueError(
                f"llmkern.generate: expected ids of shape [T] or [B, T] and an integer dtype, "
                f"got {list(inputs.shape)} {inputs.dtype}"
            )
        inputs = inputs.tolist()
    items: list[Any] = [inputs] if isinstance(inputs, str) else list(inputs)
    if not items:
        raise ValueError("llmkern.generate: expected at least one prompt, got none")
    if isinstance(items[0], str):
        if tokenizer is None:
            raise ValueError(
                "llmkern.generate: expected ids, got a text: the model has no tokenizer; set model.tokenizer"
            )
        return True, [_encode(tokenizer, text, config.unknown) for text in items]
    if isinstance(items[0], int):
        items = [items]
    return False, [[int(token) for token in prompt] for prompt in items]


def _encode(tokenizer: Tokenizer, text: str, unknown: Unknown | None) -> list[int]:
    is_word = tokenizer.kind != "char"
    refuses = unknown == "error" or (
        unknown != "drop" and (tokenizer.unk_id is None or (unknown is None and not is_word))
    )
    found = next(tokenizer.unknown_tokens(text), None) if refuses else None
    if found:
        position, token = found
        name, code = ("words", "") if is_word else ("characters", f" (U+{ord(token):04X})")
        raise ValueError(
            f"llmkern.generate: expected a prompt of {name} that the model knows, got {token!r}{code} at position "
            f"{position}, not among the {tokenizer.vocab_size} it was trained on; unknown='drop' leaves it out"
        )
    return tokenizer.encode(text, unknown)


def _checked_prompt(prompt: list[int], row: int, config: GenerationConfig, model: Any) -> list[int]:
    if not prompt:
        start = config.bos_token_id
        if start is None and model.tokenizer is not None:
            start = model.tokenizer.start_id
        if start is None:
            raise ValueError(
                f"llmkern.generate: expected a prompt of at least one token, got none in row {row}; "
                "give bos_token_id"
            )
        return [start]
    for position, token in enumerate(prompt):
        if not 0 <= token < model.vocab_size:
            raise IndexError(
                f"llmkern.generate: expected ids in [0, V) = [0, {model.vocab_size}), "
                f"got {token} in row {row} at position {position}"
            )
    return prompt


def _seeds(config: GenerationConfig, prompts: int) -> list[int]:
    if config.seed is None:
        return torch.randint(2**62, (prompts,)).tolist()
    if isinstance(config.seed, int):
        return [config.seed] * prompts
    if len(config.seed) != prompts:
        raise ValueError(
            f"llmkern.generate: expected one seed or {prompts}, one for each prompt, got {len(config.seed)}"
        )
    return [int(seed) for seed in config.seed]


def _write(
    model: Any, rows: list[_Row], config: GenerationConfig, streamer: Streamer | None
) -> None:
    constraints = Constraints(config, model.tokenizer)
    if streamer is not None:
        streamer.put(torch.tensor([rows[0].prompt]))
    hidden, state = _read_prompts(model, [row.prompt for row in rows])
    active = rows
    while True:
        logits = _logits(model.head, hidden)
        constraints.mask_(logits, [(row.prompt, row.output) for row in active])
        tokens = _choose(logits, active, config)
        for row, token in zip(active, tokens.tolist(), strict=True):
            row.output.append(token)
            row.finish_reason = constraints.finish_reason(row.prompt, row.output)
        if streamer is not None:
            streamer.put(tokens.cpu())
        going_on = [i for i, row in enumerate(active) if row.finish_reason is None]
        if not going_on:
            break
        if len(going_on) < len(active):
            active = [active[i] for i in going_on]
            tokens, state = tokens[going_on], tuple(part[:, going_on] for part in state)
        output, state = model.hidden_states(tokens[:, None], state)
        hidden = output[:, -1]
    if streamer is not None:
        streamer.end()


def _logits(head: Any, hidden: Tensor) -> Tensor:
    """The head's logits [B, V] of hidden states [B, H], each row's its own."""
    if (
        type(head) is nn.Linear
        and hidden.is_cpu
        and not (head._forward_hooks or head._forward_pre_hooks)
    ):
        return ops.linear_logits(hidden, head.weight, head.bias)
    # One row at a time, each in fresh memory: torch's product rounds by the number of rows and their alignment.
    return torch.cat([head(row.clone()) for row in hidden.split(1)])


def _read_prompts(model: Any, prompts: list[list[int]]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Reads all prompts up to the shortest one's end, then the longer ones on, and so forth: no padding anywhere.

    Returns:
        The output at each prompt's last token [B, H] and the state after it.
    """
    state = model.initial_state(len(prompts))
    device = state[0].device
    last: list[Tensor] = [state[0]] * len(prompts)
    start = 0
    for end in sorted({len(prompt) for prompt in prompts}):
        rows = [i for i, prompt in enumerate(prompts) if len(prompt) >= end]
        ids = torch.tensor([prompts[i][start:end] for i in rows], device=device)
        output, after = model.hidden_states(ids, tuple(part[:, rows] for part in state))
        for part, new in zip(state, after, strict=True):
            part[:, rows] = new
        for i, row in zip(rows, output[:, -1], strict=True):
            last[i] = row
        start = end
    return torch.stack(last), state


def _choose(logits: Tensor, rows: list[_Row], config: GenerationConfig) -> Tensor:
    device = logits.device
    penalties: dict[str, Any] = {}
    if config.needs_history:
        penalties = {
            "repetition_penalty": config.repetition_penalty,
            "presence_penalty": config.presence_penalty,
            "frequency_penalty": config.frequency_penalty,
            "prompt_ids": [row.prompt for row in rows],
            "output_ids": [row.output for row in rows],
        }
    drawn = ops.sample(
        logits,
        temperature=config.temperature if config.do_sample else 0.0,
        top_k=config.top_k,
        top_p=config.top_p,
        min_p=config.min_p,
        typical_p=config.typical_p,
        seed=torch.tensor([row.seed for row in rows], device=device),
        position=torch.tensor([len(row.prompt) + len(row.output) for row in rows], device=device),
        return_logprob=False,
        **penalties,
    )
    for row, valid in enumerate(drawn.valid.tolist()):
        if not valid:
            broken = bool(logits[row].isnan().any())
            why = "NaN logits: the model is broken" if broken else "all of them forbidden"
            raise ValueError(
                f"llmkern.generate: expected a token with a probability in row {rows[row].number} after "
                f"{len(rows[row].output)} new tokens, got {why}"
            )
    return drawn.token


def _padded(rows: list[list[int]], fill: int) -> Tensor:
    longest = max(len(row) for row in rows)
    return torch.tensor([row + [fill] * (longest - len(row)) for row in rows], dtype=torch.int64)


def _collect(
    rows: list[_Row], config: GenerationConfig, tokenizer: Tokenizer | None
) -> GenerationOutput:
    pad = config.pad_token_id
    if pad is None and tokenizer is not None:
        pad = tokenizer.pad_id
    whole = [row.prompt + row.output for row in rows]
    return GenerationOutput(
        sequences=_padded(whole, -1 if pad is None else pad),
        texts=None if tokenizer is None else [tokenizer.decode(ids) for ids in whole],
        prompt_lengths=[len(row.prompt) for row in rows],
        new_tokens=[row.output for row in rows],
        finish_reasons=[str(row.finish_reason) for row in rows],
        seeds=[row.seed for row in rows],
    )
