import json

import pytest

# The smallest file with a tensor, of no elements.
_HEADER = b'{"a": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}'
WEIGHTS = len(_HEADER).to_bytes(8, "little") + _HEADER


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_positions": 16}))
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    return folder
