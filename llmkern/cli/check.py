# SPDX-License-Identifier: Apache-2.0
"""llmkern check: every operator against its scalar reference, on this machine."""

import typer
from rich.console import Console
from rich.table import Table

from llmkern import checking


def check() -> None:
    """Compare every operator with its float64 reference on every instruction set of this machine.

    Exits with 1 when one differs by more than its tolerance.

    Example: llmkern check
    """
    results = checking.check()
    table = Table("operator", "dtype", "instruction set", "error", "tolerance", "")
    for result in results:
        table.add_row(
            result.op,
            result.dtype,
            result.isa,
            f"{result.error:.1e}",
            f"{result.tolerance:.0e}" if result.tolerance else "equal",
            "ok" if result.ok else "MISMATCH",
        )
    Console().print(table)
    if not all(result.ok for result in results):
        raise typer.Exit(1)
