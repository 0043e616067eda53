from __future__ import annotations

import subprocess
import sys

import rlhfkernels


def test_every_public_name_is_there() -> None:
    for name in rlhfkernels.__all__:
        assert getattr(rlhfkernels, name) is not None
    assert set(rlhfkernels._LAZY) < set(rlhfkernels.__all__)


def test_the_names_that_define_cases_import_no_torch() -> None:
    code = "import sys, rlhfkernels; rlhfkernels.METHODS, rlhfkernels.Case; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_bare_folder_called_kernels_misleads_transformers_not() -> None:
    code = (
        "import kernels, transformers.utils.import_utils as u; "
        "assert kernels.__file__ is None; "
        "from transformers import LlamaConfig, LlamaModel; "
        "LlamaModel(LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1))"
    )
    root = __file__.rsplit("/tests/", 1)[0]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
