import pytest
import torch

from rlhfbench.measure.ledger import Ledger
from rlhfbench.measure.memory import OUTER_VIEWS, highest_views, memory_object, persistent_model_bytes
from rlhfkernels.errors import ModelError
from rlhfkernels.observer import PARTS


def test_the_persistent_model_is_the_highest_sum_of_model_parts_over_the_phases():
    none = dict.fromkeys(PARTS, 0)
    update = {**none, "base": 8, "gradients": 1, "activations": 100}
    optimize = {**none, "base": 8, "adapters": 1, "heads": 2, "gradients": 4, "optimizer": 16, "temporary": 1}
    assert persistent_model_bytes([update, optimize]) == 31


def test_the_highest_of_every_view():
    one = {"host_peak_bytes": 5, "workspace_bytes": 0}
    found = highest_views(one, {"host_peak_bytes": 3, "driver_peak_bytes": None, "workspace_bytes": None})
    assert found == {**dict.fromkeys(OUTER_VIEWS), "host_peak_bytes": 5, "workspace_bytes": 0}


def test_the_rest_is_the_allocators_peak_without_ledger_and_workspaces():
    with Ledger("cpu") as ledger, ledger.phase("think"):
        torch.ones(8, 8)
    views = dict.fromkeys(OUTER_VIEWS)
    total = memory_object(ledger, views)["total_bytes"]
    assert total == 8 * 8 * 4
    views |= {"allocator_peak_bytes": total + 100, "workspace_bytes": 30}
    assert memory_object(ledger, views)["views"]["allocator_rest_bytes"] == 70


def test_a_step_that_enters_no_phase_under_the_ledger_is_refused():
    with Ledger("cpu") as ledger:
        torch.ones(8, 8)
    with pytest.raises(ModelError, match=r"^no phase was entered while the memory was measured: run\(observer\)"):
        memory_object(ledger, dict.fromkeys(OUTER_VIEWS))
