# SPDX-License-Identifier: Apache-2.0
"""llmkern bench: how fast the kernels are on this machine, beside torch's."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import Progress

from llmkern.benchmark import (
    Case,
    Protocol,
    cross_entropy,
    document,
    embedding,
    lstm,
    measure,
    measure_ceilings,
    measure_cuda_ceilings,
    sampling,
    table,
    training,
    write_document,
)

CASES: dict[str, tuple[Case, ...]] = {
    "embedding": embedding.QUICK,
    "lstm": lstm.QUICK,
    "cross_entropy": cross_entropy.QUICK,
    "sampling": sampling.QUICK,
    "training": training.QUICK,
}
Family = Enum("Family", {name: name for name in CASES}, type=str)  # type: ignore[misc]


class Device(str, Enum):
    """Where to measure."""

    cpu = "cpu"
    cuda = "cuda"


def bench(
    families: Annotated[
        list[Family] | None, typer.Argument(help="What to measure; default: everything.")
    ] = None,
    seconds: Annotated[
        float, typer.Option(help="Time for each case, at least five rounds.", min=0.0)
    ] = 1.0,
    device: Annotated[Device, typer.Option(help="Where to measure.")] = Device.cpu,
    threads: Annotated[
        int | None, typer.Option(help="Number of threads; default: torch's.", min=1)
    ] = None,
    json: Annotated[
        Path | None, typer.Option(help="Also write all figures and the machine's facts here.")
    ] = None,
) -> None:
    """Time llmkern and torch side by side, results verified first.

    A few cases of each family. A source checkout has many more: pytest benchmarks.

    Example: llmkern bench lstm sampling --threads 2 --json figures.json
    """
    if threads is not None:
        torch.set_num_threads(threads)
    if device is Device.cuda and not torch.cuda.is_available():
        raise ValueError("llmkern.bench: expected a GPU for --device cuda, torch finds none")
    torch.manual_seed(0)
    wanted = list(CASES) if not families else [family.value for family in families]
    cases = [case for family in wanted for case in CASES[family]]
    protocol, results = Protocol(seconds=seconds), []
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("measuring the machine", total=len(cases) + 1)
        ceilings = measure_cuda_ceilings() if device is Device.cuda else measure_ceilings()
        for case in cases:
            progress.update(task, advance=1, description=f"{case.family} {case.name}")
            results.append(measure(case, protocol, device=device.value))
    print(table(results, ceilings))
    if json is not None:
        write_document(json, document(results, ceilings, protocol))
