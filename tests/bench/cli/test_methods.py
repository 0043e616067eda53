import dataclasses
import json
import re
import sys

import pytest

from rlhfkernels.config.options import Options
from rlhfkernels.methods.table import METHODS
from rlhfkernels.models.presets import PRESETS


def test_methods(call):
    code, out, _ = call("methods")
    assert code == 0
    assert "hydra (Hydra-PPO): bases loaded: 1, LoRA sets: 2" in out
    rows = {row["name"]: row for row in json.loads(call("methods", "--json")[1])}
    assert set(rows) == set(METHODS)
    assert (rows["lora"]["num_bases"], rows["lora"]["num_adapter_sets"]) == (4, 2)
    assert rows["hydra"]["roles"]["critic"] == {
        "base": "hydra",
        "adapter": "critic",
        "head": "value",
        "trains": ["adapter", "head"],
    }
    assert [phase["kind"] for phase in rows["hydra"]["phases"]][:2] == ["inference", "inference"]


def test_models(call):
    code, out, _ = call("models")
    assert code == 0
    assert all(name in out for name in PRESETS)
    rows = json.loads(call("models", "--json")[1])
    assert [row["name"] for row in rows] == list(PRESETS)


@pytest.mark.parametrize("chars", [40, 80])
@pytest.mark.parametrize("arguments", [("methods",), ("methods", "--options"), ("models",)])
def test_lists_are_no_wider_than_the_terminal(call, monkeypatch, arguments, chars):
    monkeypatch.setenv("COLUMNS", str(chars))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    out = re.sub(r"\x1b\[[0-9;]*m", "", call(*arguments)[1])
    assert max(map(len, out.splitlines())) <= chars
    assert "…" not in out


def test_methods_lists_the_options_by_group_with_default_rule_and_meaning(call):
    code, out, _ = call("methods", "--options")
    assert code == 0
    assert "  ppo.kl_coef=0.02  (a finite number of at least 0)\n      β of the per-token penalty" in out
    assert "  engine.gradient_checkpointing=false  (true or false)\n" in out
    assert [line for line in out.splitlines() if line and not line.startswith(" ")] == [
        group.name for group in dataclasses.fields(Options)
    ]
    rows = json.loads(call("methods", "--options", "--json")[1])
    assert {row["name"]: row["default"] for row in rows} == Options().flat()
    assert all(set(row) == {"name", "default", "rule", "meaning"} for row in rows)
