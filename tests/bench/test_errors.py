import inspect

from rlhfbench import errors


def test_every_error_hangs_on_one_root_and_stands_in_the_tree():
    classes = [
        value for value in vars(errors).values() if inspect.isclass(value) and value.__module__ == errors.__name__
    ]
    assert all(issubclass(cls, errors.RlhfBenchError) for cls in classes)
    assert errors.__doc__ is not None
    for cls in classes:
        assert cls.__name__ in errors.__doc__


def test_a_sweep_error_says_each_problem_once_on_a_line_of_its_own():
    error = errors.SweepError(["a is 1.", "b is 2.", "a is 1."])
    assert error.problems == ("a is 1.", "b is 2.")
    assert str(error) == "a is 1.\nb is 2."
