from __future__ import annotations

import pytest
import torch

from rlhfkernels import ModelError
from rlhfkernels.models.errors import forward_errors, loading_errors, running_errors


def test_an_error_of_a_forward_pass_is_one_sentence() -> None:
    with (
        pytest.raises(ModelError, match=r"^model 'm' cannot be run: Net raised TypeError \(no such argument\)\.$"),
        forward_errors("m", "Net"),
    ):
        raise TypeError("no such argument\nand more")


def test_an_error_in_a_step_is_one_sentence_for_a_users_model_alone() -> None:
    with (
        pytest.raises(ModelError, match=r"^model './mine' cannot be run: no such width \(TypeError\)\.$"),
        running_errors(("tiny", "./mine")),
    ):
        raise TypeError("no such width\nand more")
    with pytest.raises(TypeError), running_errors(("tiny",)):
        raise TypeError("no such width")


@pytest.mark.parametrize("error", [MemoryError("x"), torch.OutOfMemoryError("x"), KeyboardInterrupt()])
def test_out_of_memory_while_loading_says_nothing_against_the_model(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, loading_errors("m"):
        raise error
    assert caught.value is error
