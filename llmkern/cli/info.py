# SPDX-License-Identifier: Apache-2.0
"""llmkern info: what was built, what this machine has, what is in use."""

import json
from typing import Annotated

import typer

import llmkern


def info(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object, for scripts.")] = False,
) -> None:
    """Show versions, instruction sets, CUDA architectures and devices: the first thing a bug report needs.

    Example: llmkern info
    """
    facts = llmkern.info()
    if as_json:
        print(json.dumps(facts))
        return
    width = max(map(len, facts))
    for name, value in facts.items():
        text = ", ".join(value) if isinstance(value, list) else value
        print(f"{name:<{width}}  {'-' if text in ('', None) else text}")
