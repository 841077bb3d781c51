# SPDX-License-Identifier: Apache-2.0
"""The arrows between the rooms of the package point down, and no two modules need each other."""

import ast
from collections.abc import Iterator, Mapping

import pytest

from tests.conftest import ROOT

# From the bottom up; a room uses rooms of the floors below its own, and what is in itself.
FLOORS = (
    ("_files", "_info", "_native", "_optional"),
    ("ops", "text"),
    ("nn", "data", "optim"),
    ("generation",),
    ("models",),
    ("training",),
    ("tasks", "recipes"),
    ("benchmark", "checking", "onnx", "serving", "transformers"),
    ("cli",),
)
HEIGHT = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def modules() -> dict[str, str]:
    """The source of every module of the package by its name. The package itself, which Python imports before any of
    its modules, and how it is started, are no rooms.
    """
    found = {}
    for path in sorted((ROOT / "llmkern").rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        if name not in ("llmkern", "llmkern.__main__"):
            found[name] = path.read_text()
    return found


def imported_by(source: str, known: Mapping[str, str]) -> Iterator[str]:
    """Modules of the package that a source names, wherever in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in known else str(node.module) for name in inner]
        else:
            continue
        yield from (name for name in names if name in known)


@pytest.fixture(scope="module")
def arrows() -> dict[str, set[str]]:
    known = modules()
    return {name: set(imported_by(source, known)) for name, source in known.items()}


def upward(arrows: Mapping[str, set[str]]) -> list[str]:
    """Imports of rooms that are not below."""
    room = {name: name.split(".")[1] for name in {*arrows, *set().union(*arrows.values())}}
    return [
        f"{name} imports {other}"
        for name, others in sorted(arrows.items())
        for other in sorted(others)
        if room[name] != room[other] and HEIGHT[room[name]] <= HEIGHT[room[other]]
    ]


def circles(arrows: Mapping[str, set[str]]) -> list[set[str]]:
    """Modules that are reached from themselves, those of a circle together."""
    reached = {name: set(others) for name, others in arrows.items()}
    for middle in reached:
        for others in reached.values():
            if middle in others:
                others |= reached[middle]
    found: list[set[str]] = []
    for name in sorted(reached):
        circle = {other for other in reached[name] if name in reached.get(other, ())}
        if circle and circle not in found:
            found.append(circle)
    return found


def test_every_room_has_a_floor(arrows):
    unknown = {name.split(".")[1] for name in arrows} - HEIGHT.keys()
    assert not unknown, f"say in FLOORS above on which floor {sorted(unknown)} are"


def test_arrows_point_down(arrows):
    assert arrows["llmkern.nn.lstm"] >= {"llmkern.ops"}  # the walk sees imports
    assert upward(arrows) == []


def test_no_circle(arrows):
    assert circles(arrows) == []


def test_an_arrow_up_and_a_circle_are_seen():
    planted = {
        "llmkern.ops.a": {"llmkern.nn.b"},
        "llmkern.nn.b": {"llmkern.ops.c"},
        "llmkern.ops.c": {"llmkern.ops.a", "llmkern.text.d"},
        "llmkern.text.d": set(),
    }
    assert upward(planted) == [
        "llmkern.ops.a imports llmkern.nn.b",
        "llmkern.ops.c imports llmkern.text.d",
    ]
    assert circles(planted) == [{"llmkern.ops.a", "llmkern.nn.b", "llmkern.ops.c"}]
