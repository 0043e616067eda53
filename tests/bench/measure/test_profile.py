import gzip
import json

import torch

from rlhfbench.measure.profile import PhaseProfiler


def test_a_phase_has_one_trace_of_its_first_stretch(tmp_path):
    x = torch.ones(4, 4)
    profiler = PhaseProfiler(tmp_path / "traces", "abc")
    for _ in range(2):
        with profiler.phase("generate"):
            x.exp()
        with profiler.phase("score"), profiler.phase("inner"):
            x.sin()
    assert profiler.paths == [tmp_path / "traces" / f"abc-{name}.json.gz" for name in ("generate", "score", "inner")]
    assert sorted(profiler.paths) == sorted((tmp_path / "traces").iterdir())
    names = [
        {event.get("name") for event in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]}
        for path in profiler.paths
    ]
    assert ["aten::exp" in found for found in names] == [True, False, False]
    assert ["aten::sin" in found for found in names] == [False, True, True]
