# SPDX-License-Identifier: Apache-2.0
"""One line a case out of saved results: llmkern, the best of its peers, and how far from the machine's limit.

    python benchmarks/compare.py RESULTS.json [...]

"graph" is the time as a CUDA graph, which leaves the host out; there the best peer is the best graph.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

GRAPH = ", graph"
HEADER = ("case", "ms", "best peer", "speed-up", "graph ms", "speed-up", "of ceiling")


def rows(document: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    for result in document["results"]:
        contenders = result["contenders"]
        ours, graph = contenders["llmkern"], contenders.get("llmkern" + GRAPH)
        name, speedup = _best_peer(contenders, graph=False)
        _, graph_speedup = _best_peer(contenders, graph=True)
        best = ours if graph is None else graph
        yield (
            f"{result['family']} {result['case']}",
            f"{ours['median_ms']:.4f}",
            name,
            speedup,
            "" if graph is None else f"{graph['median_ms']:.4f}",
            graph_speedup,
            f"{best['of_ceiling']:.0%} of {result['bound']}",
        )


def _best_peer(contenders: dict[str, Any], graph: bool) -> tuple[str, str]:
    """The fastest peer, and how many times as fast llmkern is."""
    peers = {
        name: x
        for name, x in contenders.items()
        if "llmkern_speedup" in x and name.endswith(GRAPH) == graph
    }
    if not peers:
        return "", ""
    name = min(peers, key=lambda name: peers[name]["median_ms"])
    return name, f"{peers[name]['llmkern_speedup']:.2f}x"


def main(paths: list[str]) -> None:
    table = [HEADER]
    for path in paths:
        table += rows(json.loads(Path(path).read_text()))
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        print("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip())


if __name__ == "__main__":
    main(sys.argv[1:])
