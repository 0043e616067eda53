import dataclasses

from rlhfbench.cases.settings import changed_options, setting_of
from rlhfkernels.config.options import Options


def test_the_chunk_that_older_records_hold_is_of_the_modern_setting():
    stated = dataclasses.asdict(Options.of({"engine.logprob_chunk_size": 128}))
    assert setting_of(stated) == "modern"
    assert changed_options(stated) == {}
    assert setting_of(dataclasses.asdict(Options.of({"engine.logprob_chunk_size": 64}))) == "custom"
