# SPDX-License-Identifier: Apache-2.0
"""llmkern generate: a model writes on from a prompt."""

import secrets
import sys
from pathlib import Path
from typing import Annotated

import typer

from llmkern.cli.corpus import checked_device
from llmkern.cli.terminal import as_text
from llmkern.models import GenerationConfig, LanguageModel, TextStreamer
from llmkern.text import Tokenizer
from llmkern.text.tokenizer import UNKNOWN


def generate(
    run: Annotated[Path, typer.Argument(help="The folder of a trained model.")],
    prompt: Annotated[str, typer.Option(help="The beginning of the text.")] = "",
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to write at most.")] = 100,
    min_new_tokens: Annotated[int, typer.Option(help="Tokens to write at least.")] = 0,
    temperature: Annotated[
        float, typer.Option(help="Below 1 is safer, above 1 wilder; 0 takes the likeliest token.")
    ] = 1.0,
    top_k: Annotated[int, typer.Option(help="Draw from the k likeliest tokens; 0 is off.")] = 0,
    top_p: Annotated[
        float, typer.Option(help="Draw from the likeliest tokens that make up this much; 1 is off.")
    ] = 1.0,
    min_p: Annotated[
        float, typer.Option(help="Drop tokens below this fraction of the likeliest; 0 is off.")
    ] = 0.0,
    typical_p: Annotated[float, typer.Option(help="Locally typical sampling; 1 is off.")] = 1.0,
    repetition_penalty: Annotated[
        float, typer.Option(help="Above 1 makes tokens that occurred less likely.")
    ] = 1.0,
    presence_penalty: Annotated[
        float, typer.Option(help="Taken from the logit of a token that was written.")
    ] = 0.0,
    frequency_penalty: Annotated[
        float, typer.Option(help="Likewise, for each time it was written.")
    ] = 0.0,
    no_repeat_ngram_size: Annotated[
        int, typer.Option(help="No sequence of so many tokens occurs twice; 0 is off.")
    ] = 0,
    num_return_sequences: Annotated[int, typer.Option(help="Texts to write.")] = 1,
    stop: Annotated[
        list[str] | None, typer.Option(help="End after this text; may be given again.")
    ] = None,
    unknown: Annotated[
        str | None,
        typer.Option(
            help="What becomes of unknown characters or words of the prompt; default: characters are refused, words "
            "replaced by <unk>.",
            metavar="|".join(UNKNOWN),
        ),
    ] = None,
    allow_unk: Annotated[
        bool, typer.Option("--allow-unk", help="Let the model write its unknown-word token.")
    ] = False,
    seed: Annotated[
        int | None,
        typer.Option(help="The same seed writes the same text; default: drawn and printed."),
    ] = None,
    device: Annotated[
        str, typer.Option(help="Where to compute: cpu, cuda, cuda:1, auto.")
    ] = "auto",
) -> None:
    """Continue a prompt, token by token.

    Example: llmkern generate run --prompt 今天天气非常好 --max-new-tokens 60 --temperature 0.8 --seed 1
    """
    is_drawn = seed is None and temperature > 0
    seed = secrets.randbelow(2**31) if seed is None else seed
    prompt, stop = as_text(prompt), [as_text(text) for text in stop or ()]
    model = LanguageModel.from_pretrained(run, checked_device(device))
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise ValueError(f"expected a tokenizer.json in {run}, found none")
    if unknown is None:
        _warn_about_unknown_words(tokenizer, prompt)
    never = [tokenizer.pad_id, None if allow_unk else tokenizer.unk_id]
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        min_new_tokens=min_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        typical_p=typical_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        no_repeat_ngram_size=no_repeat_ngram_size,
        num_return_sequences=num_return_sequences,
        stop_strings=stop,
        unknown=unknown,  # type: ignore[arg-type]
        suppress_tokens=[token for token in never if token is not None],
        seed=seed,
    )
    if num_return_sequences == 1:
        model.generate(prompt, config, streamer=TextStreamer(tokenizer))
        print()
    else:
        for number, text in enumerate(model.generate(prompt, config), 1):
            print(f"--- {number}\n{text}")
    if is_drawn:
        print(f"llmkern: seed {seed}", file=sys.stderr)


def _warn_about_unknown_words(tokenizer: Tokenizer, prompt: str) -> None:
    if tokenizer.kind == "char" or tokenizer.unk_id is None:
        return  # refused, with its position
    unknown = [token for _, token in tokenizer.unknown_tokens(prompt)]
    if unknown:
        print(
            f"llmkern: the model does not know {', '.join(unknown)} and reads <unk> instead",
            file=sys.stderr,
        )
