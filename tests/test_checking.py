# SPDX-License-Identifier: Apache-2.0
"""llmkern check and llmkern info: all well here, and a mismatch is shown and is an exit code."""

import json

import pytest
import torch
from typer.testing import CliRunner

import llmkern
from llmkern import checking, ops
from llmkern.cli import app
from tests.conftest import DETECTED, ISAS

ALL = {"float32", "float64", "bfloat16", "float16"}
DTYPES = {  # what README says of the CPU
    "dropout": ALL,
    "embedding": ALL,
    "lstm": ALL | {"int8"},
    "linear_cross_entropy": ALL,
    "linear_logits": ALL,
    "sample": ALL,
    "filter_logits": ALL,
    "beam_search_step": ALL,
    "speculative_verify": ALL,
    "multinomial": ALL,
}


def test_every_operator_agrees_with_its_reference():
    results = checking.check()
    assert all(result.ok for result in results), [r for r in results if not r.ok]
    assert {r.isa for r in results} == set(ISAS[: ISAS.index(DETECTED) + 1])
    others = {"BeamCandidates", "SampleOutput", "Verified"}  # results
    others |= {"lstm_cell", "lstm_pack", "raise_deferred_errors", "empty_cache"}
    assert {r.op for r in results} >= set(ops.__all__) - others
    covered = {op: {r.dtype for r in results if r.op == op} for op in DTYPES}
    assert covered == DTYPES


def test_check_leaves_the_instruction_set_as_it_was():
    before = torch.ops.llmkern.cpu_isa()
    checking.check()
    assert torch.ops.llmkern.cpu_isa() == before


def test_a_mismatch_is_shown_and_is_exit_code_one(monkeypatch):
    embedding = ops.embedding
    monkeypatch.setattr(ops, "embedding", lambda *a, **k: embedding(*a, **k) * 1.1)
    result = CliRunner().invoke(app, ["check"])
    assert result.exit_code == 1
    lines = result.output.splitlines()
    assert all("MISMATCH" in line for line in lines if "embedding" in line)
    assert all("ok" in line for line in lines if "cross_entropy" in line)


@pytest.mark.parametrize("args", [["info"], ["info", "--json"]])
def test_info(args):
    result = CliRunner().invoke(app, args)
    assert result.exit_code == 0
    assert llmkern.info()["torch"] in result.output
    if "--json" in args:
        assert json.loads(result.output) == llmkern.info()
