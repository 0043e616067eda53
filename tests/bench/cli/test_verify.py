import dataclasses
import json
import math

import pytest
import torch

from rlhfbench.cli import main as cli
from rlhfkernels.engine import verify as engine
from rlhfkernels.engine.verify import Check

RIGHT = Check(name="plain: log-probabilities", outcome="ok", error=1e-6, tolerance=3e-4)
REFUSED = Check(name="plain: cached decoding", outcome="refused", note="there is no cache.")
WRONG = Check(name="fast: adapter gradient", outcome="wrong", error=0.25, tolerance=3e-4)


@pytest.fixture
def fake(monkeypatch):
    """Replaces the comparison by given checks; returns the calls."""
    calls = []

    def put(*checks):
        monkeypatch.setattr(engine, "verify", lambda model, **chosen: calls.append((model, chosen)) or list(checks))
        return calls

    return put


@pytest.mark.parametrize(("checks", "code"), [([RIGHT, REFUSED], 0), ([RIGHT, WRONG], 1)])
def test_the_exit_code_is_the_answer(fake, capsys, checks, code):
    fake(*checks)
    assert cli.invoke(["verify", "--model", "tiny"]) == code


def test_the_table_has_a_row_a_check_and_every_note_below(fake, capsys):
    fake(RIGHT, REFUSED, REFUSED, WRONG)
    cli.invoke(["verify", "--model", "tiny"])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[2] == ["plain:", "log-probabilities", "1.0e-06", "3.0e-04", "ok"]
    assert rows[3] == rows[4] == ["plain:", "cached", "decoding", "refused"]
    assert rows[5] == ["fast:", "adapter", "gradient", "2.5e-01", "3.0e-04", "wrong"]
    assert rows[6:] == [["there", "is", "no", "cache."]]


def test_json_has_every_field(fake, capsys):
    calls = fake(RIGHT)
    assert cli.invoke(["verify", "--model", "tiny", "--dtype", "bfloat16", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [
        {"name": RIGHT.name, "outcome": "ok", "error": 1e-6, "tolerance": 3e-4, "note": None}
    ]
    assert calls == [("tiny", {"dtype": "bfloat16"})]


@pytest.mark.parametrize("error", [math.nan, math.inf])
def test_json_has_null_for_an_error_that_is_no_number(fake, capsys, error):
    fake(dataclasses.replace(WRONG, error=error))
    assert cli.invoke(["verify", "--model", "tiny", "--json"]) == 1
    (check,) = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert (check["outcome"], check["error"]) == ("wrong", None)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((), "Missing option '--model'."),
        (("--model", "tniy"), "model 'tniy' is unknown: did you mean 'tiny'"),
        (("--model", "tiny", "--dtype", "float8"), "dtype 'float8' is unknown"),
        (("--model", "tiny", "--device", "tpu"), "device 'tpu' is unknown"),
    ],
)
def test_a_wrong_command_is_one_sentence(fake, capsys, arguments, sentence):
    assert fake(RIGHT) == []
    assert cli.invoke(["verify", *arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith(sentence)
    assert err.count("\n") == 1
    assert fake(RIGHT) == []


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), MemoryError()], ids=repr)
def test_a_model_that_is_too_large_is_one_sentence(monkeypatch, capsys, error):
    def fail(model, **chosen):
        raise error

    monkeypatch.setattr(engine, "verify", fail)
    assert cli.invoke(["verify", "--model", "tiny"]) == 2
    assert capsys.readouterr().err == (
        "model 'tiny' is too large for device 'cpu': its memory must hold two copies of the model.\n"
    )


def test_a_model_is_compared_with_transformers(capsys, checkpoint):
    assert cli.invoke(["verify", "--model", checkpoint("bloom"), "--json"]) == 0
    checks = json.loads(capsys.readouterr().out)
    assert [check["outcome"] for check in checks] == ["ok"] * 7
