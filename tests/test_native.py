# SPDX-License-Identifier: Apache-2.0
"""The native library: which build of the kernels runs, what info() says, how loading fails, what the files need."""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import llmkern
from llmkern import _native, _reference
from tests.conftest import DETECTED, ISAS, ROOT

LIBRARY = Path(sys.modules["llmkern._C"].__file__)
REFERENCE = Path(_reference.__file__)


def python(code: str, folder: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )


# ---- which build of the kernels runs


@pytest.mark.parametrize("wanted", ISAS[: ISAS.index(DETECTED) + 1])
def test_environment_chooses_the_instruction_set(wanted):
    result = python("import llmkern; print(llmkern.info()['cpu_isa'])", LLMKERN_CPU=wanted)
    assert (result.stdout.strip(), result.stderr) == (wanted, "")


@pytest.mark.parametrize(
    "variable, value, text",
    [
        (
            "LLMKERN_CPU",
            "sse9",
            "llmkern.cpu: expected LLMKERN_CPU to be an instruction set that this machine has "
            f"({', '.join(ISAS[: ISAS.index(DETECTED) + 1])}), got 'sse9'",
        ),
        ("LLMKERN_CPU", "AVX2", "got 'AVX2'"),
        ("LLMKERN_CORES", "two", "expected LLMKERN_CORES to be a number above 0, got 'two'"),
        ("LLMKERN_CORES", "0", "expected LLMKERN_CORES to be a number above 0, got '0'"),
    ],
)
def test_wrong_environment_is_an_error_at_import(variable, value, text):
    result = python("import llmkern", **{variable: value})
    assert result.returncode == 1
    assert text in result.stderr.splitlines()[-1]
    assert result.stderr.splitlines()[-1].startswith("ImportError: ")


def test_choice_at_run_time(isa):
    assert torch.ops.llmkern.cpu_isa() == isa
    with pytest.raises(
        ValueError, match=r"llmkern\.cpu: expected name to be an instruction set .* got 'sse9'"
    ):
        torch.ops.llmkern.select_cpu_isa("sse9")
    assert torch.ops.llmkern.cpu_isa() == isa


def test_choice_beside_threads_at_work(isa):
    """It is refused while one is in an operator, and harmless between two of them."""
    layer = list(torch.nn.LSTM(24, 40).parameters())
    x, state = torch.randn(9, 3, 24, requires_grad=True), torch.zeros(3, 40)
    stop = threading.Event()

    def step() -> list[torch.Tensor]:
        output, *_ = llmkern.ops.lstm(x, state, state, *layer)
        return [output, *torch.autograd.grad(output.sum(), [x, *layer])]

    def work() -> int:
        steps = 0
        while not stop.is_set() or steps < 3:
            for got, want in zip(step(), expected, strict=True):
                torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
            steps += 1
        return steps

    expected = step()
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(work) for _ in range(2)]
        try:
            for name in [*ISAS[: ISAS.index(DETECTED) + 1]] * 100:
                try:
                    torch.ops.llmkern.select_cpu_isa(name)
                except RuntimeError as error:
                    assert "llmkern.cpu: expected no other thread in an operator while" in str(
                        error
                    )
        finally:
            stop.set()
        assert all(job.result() >= 3 for job in jobs)


def test_info():
    info = llmkern.info()
    assert json.loads(json.dumps(info)) == info
    assert info["llmkern"] == llmkern.__version__ and info["torch"] == torch.__version__
    assert info["torch_target_version"] == "2.10"
    assert info["cpu_isa_detected"] == DETECTED and info["cpu_isa"] in ISAS
    assert info["threads"] == torch.get_num_threads() and info["usable_cores"] >= 1
    assert bool(info["cuda_version"]) == bool(info["cuda_architectures"])
    assert len(info["gpus"]) == torch.cuda.device_count()


# ---- how loading fails


@pytest.mark.parametrize("version", ["2.9.1", "1.13.0+cu117"])
def test_old_torch_is_named(monkeypatch, version):
    monkeypatch.setattr(torch, "__version__", version)
    with pytest.raises(
        ImportError, match=rf"expected torch >= 2\.10, got {re.escape(version)}\. Run: pip"
    ):
        _native.load()


@pytest.mark.parametrize("version", ["2.10.0", "2.13.0+cpu", "2.15.0a0+git1234567", "3.0.0"])
def test_new_torch_is_accepted(monkeypatch, version):
    monkeypatch.setattr(torch, "__version__", version)
    _native.load()


@pytest.mark.parametrize("damage", ["missing", "corrupt"])
def test_missing_or_damaged_library(tmp_path, damage):
    package = tmp_path / "llmkern"
    shutil.copytree(ROOT / "llmkern", package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    if damage == "corrupt":
        (package / LIBRARY.name).write_bytes(b"not a library" * 1000)
    # An editable install knows where the real library is and would lend it to the damaged copy.
    program = (
        "import sys; sys.meta_path = [f for f in sys.meta_path if 'ditable' not in repr(f)]; "
        "import llmkern"
    )
    result = python(program, folder=tmp_path)
    assert result.returncode == 1
    message = result.stderr[result.stderr.rindex("\nImportError") :]
    assert "llmkern: could not load the native library llmkern/_C.abi3.so." in message
    found = "No module named 'llmkern._C'" if damage == "missing" else LIBRARY.name
    assert re.search(
        rf"found: +torch {re.escape(torch.__version__)}; .*{re.escape(found)}", message
    )
    assert "expected:" in message and "run:      pip install" in message


# ---- what the files need


def test_every_binding_is_registered_as_an_operator():
    """LLMKERN_OPERATOR has a call run at work, and names the operator where memory runs out."""
    sources = {path.name: path.read_text() for path in (ROOT / "csrc" / "ops").glob("*.cpp")}
    assert any("LLMKERN_OPERATOR(" in source for source in sources.values())
    del sources["library.cpp"]  # no kernels there, and what changes the state of all threads
    assert [name for name, source in sources.items() if "TORCH_BOX(" in source] == []


def output_of(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("library", [LIBRARY, REFERENCE], ids=["_C", "_reference"])
def test_needs_no_particular_torch_and_no_libpython(library):
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", output_of("readelf", "-dW", library))
    assert any(name.startswith("libc.so") for name in needed)  # readelf was understood
    allowed = r"lib(c|m|dl|rt|pthread|stdc\+\+|gcc_s|c10|torch|torch_cpu)\.so[.\d]*|ld-linux.*"
    assert [name for name in needed if not re.fullmatch(allowed, name)] == []
    assert library is LIBRARY or not any("torch" in name or "c10" in name for name in needed)


def test_uses_the_stable_abi_alone():
    """C++ symbols of torch come and go with its version; those of the stable ABI are plain C."""
    symbols = output_of("nm", "-DC", "--undefined-only", LIBRARY)
    assert "aoti_torch_get_dtype" in symbols
    assert re.findall(r"(?:c10|at|torch|caffe2)::.+", symbols) == []


def test_exports_nothing_but_its_entry():
    symbols = output_of("nm", "-D", "--defined-only", LIBRARY).split("\n")
    strong = [line.split()[2] for line in symbols if re.search(r" [A-TX-Z] ", line)]
    strong = [s for s in strong if s not in ("__bss_start", "_edata", "_end")]  # the linker's own
    assert strong == ["PyInit__C"]


def instruction_sets_of(symbol: str) -> set[str]:
    """From the namespace in a mangled name: llmkern::cpu::avx2 is ...3cpu4avx2..."""
    return set(re.findall(r"3cpu\d(generic|avx2|avx512)", symbol))


@pytest.mark.skipif(platform.machine() != "x86_64", reason="one instruction set only")
def test_instruction_sets_share_no_code():
    """An inline function shared by two builds is merged by the linker: a machine without AVX-512 may get that copy.

    So a function of one build calls functions of that build, of another library, or of kernels/thread_memory.cpp,
    which is compiled once; and outside the AVX builds nothing touches a register that they bring.
    """
    once = re.compile(r"hold_thread_memory|release_thread_memory|fail_for_working_memory")
    function, here, seen, calls, wide = "", set(), set(), [], []
    for line in output_of("objdump", "-d", "--no-show-raw-insn", LIBRARY).splitlines():
        if header := re.fullmatch(r"[0-9a-f]+ <(.+)>:", line):
            function, here = header[1], instruction_sets_of(header[1])
            seen |= here
            assert len(here) <= 1, function
            continue
        if not here & {"avx2", "avx512"} and re.search(r"%[yz]mm", line):
            wide.append(function)
        target = re.search(r"\t(?:call|j[a-z]+) +[0-9a-f]+ <([^>+]+)", line)
        local = target and target[1] != function and not target[1].endswith("@plt")
        if here and local and instruction_sets_of(target[1]) != here and not once.search(target[1]):
            calls.append((function, target[1]))
    assert seen == {"generic", "avx2", "avx512"}
    assert (calls, wide) == ([], [])
