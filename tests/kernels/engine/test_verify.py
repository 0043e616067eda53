from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from rlhfkernels import Case, ModelError
from rlhfkernels.engine import backends
from rlhfkernels.engine.verify import Check, verify
from rlhfkernels.models import loading
from rlhfkernels.models.adapters import Adapters
from rlhfkernels.models.cache import PreallocatedLayer

PLAIN = [
    "plain: log-probabilities",
    "plain: left-padded rows",
    "plain: cached decoding",
    "plain: cached decoding, left-padded rows",
    "plain: adapter log-probabilities",
    "plain: adapter gradient",
    "plain, checkpointed: adapter gradient",
]


def by_outcome(checks: list[Check], outcome: str) -> list[str]:
    return [check.name for check in checks if check.outcome == outcome]


@pytest.mark.parametrize(
    "architecture",
    [
        *("gemma2", "gemma3_text", "gptj", "bloom", "mpt", "cohere", "hyperclovax", "granite", "mixtral", "phimoe"),
        *("deepseek_v3", "falcon"),
    ],
)
def test_architectures_of_the_plain_trunk_are_right(checkpoint: Callable[[str], str], architecture: str) -> None:
    checks = verify(checkpoint(architecture))
    assert by_outcome(checks, "ok") == PLAIN
    assert all(check.error <= check.tolerance < 0.1 for check in checks)
    assert len(checks) == len(PLAIN)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("architecture", ["stray-window llama", "mistral", "qwen2", "dynamic gpt_neox", "opt", "gpt2"])
def test_every_trunk_and_backend_is_right(checkpoint: Callable[[str], str], architecture: str) -> None:
    checks = verify(checkpoint(architecture))
    assert by_outcome(checks, "ok") == [
        *PLAIN,
        *(name.replace("plain", "fast") for name in PLAIN[:-1]),
        "fast against plain",
        *(name.replace("plain", "fast, native") for name in PLAIN[:-1]),
        "fast, native against torch",
    ]
    assert len(checks) == 21


def test_a_backend_that_cannot_run_here_is_named(
    checkpoint: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends.build, "unavailable_reason", lambda: "no cc is installed")
    checks = verify(checkpoint("gpt2"))
    assert by_outcome(checks, "refused") == ["fast, native"]
    assert [check.note for check in checks if check.note] == [
        "engine.backend is 'native': its C cannot be compiled here (no cc is installed)."
    ]


@pytest.mark.parametrize("architecture", ["opt", "wide-qwen2"])
def test_bfloat16_explains_its_own_rounding_and_no_wrong_scale(
    checkpoint: Callable[[str], str], monkeypatch: pytest.MonkeyPatch, architecture: str
) -> None:
    """The small models with the largest errors of a gradient, 0.086 and 0.046 of its range."""
    checks = verify(checkpoint(architecture), dtype="bfloat16")
    assert by_outcome(checks, "wrong") == []
    assert "fast: adapter gradient" in by_outcome(checks, "ok")
    monkeypatch.setattr(loading, "logit_scale", lambda config: 1.5)
    wrong = by_outcome(verify(checkpoint(architecture), dtype="bfloat16"), "wrong")
    assert {"plain: log-probabilities", "plain: adapter gradient", "fast: adapter gradient"} <= set(wrong)


@pytest.mark.parametrize("architecture", ["phi3", "longrope gpt_neox"])
def test_decoding_beyond_a_change_of_the_rotary_embedding_is_refused(
    checkpoint: Callable[[str], str], architecture: str
) -> None:
    checks = verify(checkpoint(architecture))
    assert by_outcome(checks, "refused") == ["plain: cached decoding"]
    assert by_outcome(checks, "wrong") == []
    (note,) = [check.note for check in checks if check.note]
    assert "the rotary embedding of model" in note


def test_a_wrong_head_is_found(checkpoint: Callable[[str], str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "logit_scale", lambda config: 0.5)
    checks = verify(checkpoint("cohere"))
    assert by_outcome(checks, "wrong") == PLAIN
    assert all(check.error > 10 * check.tolerance for check in checks)


def test_a_wrong_cache_is_found(checkpoint: Callable[[str], str], monkeypatch: pytest.MonkeyPatch) -> None:
    update = PreallocatedLayer.update

    def spoil(layer: PreallocatedLayer, key: torch.Tensor, value: torch.Tensor, *rest: object) -> object:
        return update(layer, key, value if key.shape[-2] > 1 else 1.1 * value, *rest)

    monkeypatch.setattr(PreallocatedLayer, "update", spoil)
    found = by_outcome(verify(checkpoint("gemma2")), "wrong")
    assert found == ["plain: cached decoding", "plain: cached decoding, left-padded rows"]


def test_padding_that_is_attended_to_is_found(
    checkpoint: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlhfkernels.engine.trunk.positions", lambda mask: None)
    found = by_outcome(verify(checkpoint("gpt2")), "wrong")
    assert found == ["plain: left-padded rows", "plain: cached decoding, left-padded rows"]


def test_a_wrong_adapter_is_found(checkpoint: Callable[[str], str], monkeypatch: pytest.MonkeyPatch) -> None:
    activate = Adapters.activate

    def scale(adapters: Adapters, name: str | None) -> None:
        activate(adapters, name)
        for _, layer in adapters._named_layers:
            layer.scaling = dict.fromkeys(layer.scaling, 1.5)

    monkeypatch.setattr(Adapters, "activate", scale)
    found = by_outcome(verify(checkpoint("gemma2")), "wrong")
    assert found == [name for name in PLAIN if "adapter" in name]


def test_a_forward_pass_that_fails_is_wrong(checkpoint: Callable[[str], str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise ValueError("no such states")

    monkeypatch.setattr(PreallocatedLayer, "update", fail)
    checks = verify(checkpoint("gemma2"))
    notes = [check.note for check in checks if check.outcome == "wrong"]
    assert len(notes) == 2
    assert all("cannot be run: Gemma2Model raised ValueError (no such states)." in note for note in notes)


def test_a_forward_pass_without_memory_is_not_wrong(
    checkpoint: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(PreallocatedLayer, "update", fail)
    with pytest.raises(ModelError, match=r"raised OutOfMemoryError \(CUDA out of memory\.\)"):
        verify(checkpoint("gemma2"))


def test_presets_have_random_weights_and_bfloat16_its_own_tolerance() -> None:
    checks = verify("tiny", dtype="bfloat16")
    assert by_outcome(checks, "ok") == [*PLAIN, *(n.replace("plain", "fast") for n in PLAIN[:-1]), "fast against plain"]
    assert max(check.error for check in checks) > 1e-3


@pytest.mark.parametrize("architecture", ["recurrent_gemma", "xlstm", "falcon_h1", "lfm2"])
def test_recurrent_states_are_refused(checkpoint: Callable[[str], str], architecture: str) -> None:
    with pytest.raises(ModelError, match=rf"keeps states beside keys and values \({architecture}\)"):
        verify(checkpoint(architecture))


def test_a_multimodal_model_is_refused(checkpoint: Callable[[str], str], make_case: Callable[..., Case]) -> None:
    with pytest.raises(ModelError, match=r"is multimodal \(gemma3\): it must read text alone\."):
        verify(checkpoint("gemma3"))
