import pytest

import rlhfbench


def test_the_public_names():
    assert sorted(rlhfbench.__all__) == [
        "ForkServerError",
        "Ledger",
        "RecordsError",
        "RlhfBenchError",
        "RunFolderError",
        "RunOptions",
        "Sweep",
        "SweepError",
        "__version__",
        "plan",
        "read_records",
        "records_frame",
        "run_sweep",
    ]
    assert all(getattr(rlhfbench, name) is not None for name in rlhfbench.__all__)
    with pytest.raises(AttributeError, match="no attribute 'absent'"):
        rlhfbench.absent  # noqa: B018
