# SPDX-License-Identifier: Apache-2.0
"""What a training step of one LSTM layer keeps for its backward pass, and what memory it asks for.

    python benchmarks/lstm_memory.py                # a table, and benchmarks/results/local/lstm-memory.json
    python benchmarks/lstm_memory.py --save NAME    # also benchmarks/results/NAME.json, to be committed

Three ways to run the same layer: llmkern, llmkern with ``recompute`` (the gates are computed again), and nn.LSTM. Of
each, after some steps of warming up:

saved        bytes of what autograd keeps, without parameters, input and state; oneDNN's workspace is counted
largest      the largest allocation in a step: by torch's allocator or, all taken together, by llmkern's cache of large
             blocks (memory that the cache has already is none)
kept         bytes of that cache that are idle between steps
fresh        bytes of pages that the system maps in a step, for whatever purpose: buffers that are kept cost none

The status is 1 where llmkern asks for more than 32 MB at once: such memory is mapped anew every time, which takes
longer than the arithmetic in it. torch 2.10 cannot use memory of the cache; there large gates are such a request.
"""

import argparse
import resource
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from llmkern import ops
from llmkern.benchmark import write_document
from llmkern.benchmark.machine import command, machine_facts, software_facts

RESULTS = Path(__file__).parent / "results"
LIMIT = 32 << 20
WARM_STEPS, STEPS = 3, 3
# T, B, H
SHAPES = [(35, 20, 650), (35, 20, 1150), (35, 64, 1150)]

Forward = Callable[[Tensor], Tensor]


def contenders(layer: nn.LSTM, state: Tensor) -> dict[str, Forward]:
    """The layer's output, by name."""
    weights = list(layer.parameters())
    return {
        "llmkern": lambda x: ops.lstm(x, state, state, *weights)[0],
        "llmkern, recompute": lambda x: ops.lstm(x, state, state, *weights, recompute=True)[0],
        "nn.LSTM": lambda x: layer(x, (state[None], state[None]))[0],
    }


def saved_sizes(forward: Forward, x: Tensor, others: Sequence[Tensor]) -> list[int]:
    """Bytes of every storage that is kept between the passes and is not of x or the others, which are there anyway."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (x, *others)}
    sizes: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # an output that its own graph kept would not be freed with it

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = forward(x)
    del output  # what was noted lived until here: no address was used twice
    return list(sizes.values())


def mapped_bytes() -> int:
    """What llmkern's cache of blocks, which torch's profiler does not see, has ever asked of the system."""
    return int(torch.ops.llmkern.memory_stats()[2])


def largest_allocation(step: Callable[[], Any]) -> int:
    before = mapped_bytes()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    events = recorded.profiler.kineto_results.events()
    served = [event.nbytes() for event in events if event.name() == "[memory]"]
    return max(*served, mapped_bytes() - before)


def fresh_bytes(step: Callable[[], Any]) -> int:
    """Of a step, by the process's page faults."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(STEPS):
        step()
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    return faults * resource.getpagesize() // STEPS


def measure(T: int, B: int, H: int) -> dict[str, Any]:
    layer, state = nn.LSTM(H, H), torch.zeros(B, H)
    x, grad = torch.randn(T, B, H, requires_grad=True), torch.randn(T, B, H)
    wanted = [x, *layer.parameters()]
    found = {}
    for name, forward in contenders(layer, state).items():
        ops.empty_cache()

        def step(forward: Forward = forward) -> Any:
            return torch.autograd.grad(forward(x), wanted, grad)

        for _ in range(WARM_STEPS):
            step()
        saved = saved_sizes(forward, x, [state, *layer.parameters()])
        found[name] = {
            "saved_bytes": sum(saved),
            "saved_per_output": round(sum(saved) / (grad.numel() * grad.element_size()), 2),
            "largest_allocation_bytes": largest_allocation(step),
            "kept_bytes": int(torch.ops.llmkern.memory_stats()[1]),
            "fresh_bytes": fresh_bytes(step),
        }
    return {"case": f"memory-H{H}-B{B}-T{T}", "contenders": found}


def is_within_limit(contender: dict[str, int]) -> bool:
    return contender["largest_allocation_bytes"] <= LIMIT


def table(results: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| case | | saved MB | of output | largest MB | kept MB | fresh MB |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for result in results:
        for name, c in result["contenders"].items():
            keys = ("saved_bytes", "largest_allocation_bytes", "kept_bytes", "fresh_bytes")
            saved, *others = (f"{c[key] / 1e6:.1f}" for key in keys)
            row = (result["case"], name, saved, f"{c['saved_per_output']:.1f}x", *others)
            lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description="Memory of an LSTM layer's training step.")
    parser.add_argument("--save", metavar="NAME", help="also write results/NAME.json")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    results = [measure(*shape) for shape in SHAPES]
    print(table(results))
    run = {"command": command(), "machine": machine_facts(), "software": software_facts()}
    run |= {"threads": torch.get_num_threads(), "results": results}
    names = ["local/lstm-memory", *([arguments.save] if arguments.save else [])]
    for name in names:
        write_document(RESULTS / f"{name}.json", run)
        print(f"results/{name}.json")
    ours = [c for r in results for n, c in r["contenders"].items() if n.startswith("llmkern")]
    return 0 if all(is_within_limit(c) for c in ours) else 1


if __name__ == "__main__":
    sys.exit(main())
