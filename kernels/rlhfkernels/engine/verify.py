"""The comparison of this project's forward passes, decoding and gradients with transformers' and PEFT's own.

Shapes: b = batch, t = positions, v = vocabulary.
"""

from __future__ import annotations

import dataclasses
import gc
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel

from rlhfkernels.config.case import Case
from rlhfkernels.config.options import Options
from rlhfkernels.engine.agreement import check_cache, decode, largest_error, tolerance, wide_log_softmax
from rlhfkernels.engine.engine import Engine
from rlhfkernels.errors import CaseError, ModelError
from rlhfkernels.models.configuration import max_positions, read_config
from rlhfkernels.models.errors import forward_errors
from rlhfkernels.models.loading import load_causal_lm
from rlhfkernels.seeding import seeded

Outcome = Literal["ok", "wrong", "refused"]

_MAX_LENGTH, _NUM_ROWS, _ROLE = 32, 3, "policy"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One comparison.

    Attributes:
        name: what was compared.
        outcome: ``ok``; ``wrong``, beyond the tolerance or failed; ``refused`` if no case may do it.
        error: the largest absolute error; ``None`` if there is nothing to compare.
        tolerance: the largest error that the dtype explains.
        note: why there is no error.
    """

    name: str
    outcome: Outcome
    error: float | None = None
    tolerance: float | None = None
    note: str | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class _Reference:
    """Results of transformers and PEFT.

    Attributes:
        whole: log-probabilities [b, t, v] of the rows.
        alone: log-probabilities [1, t − pads, v] of each row without its first tokens.
        adapted: log-probabilities [b, c] of the last tokens with the adapter.
        gradient: of their mean with respect to the adapter, all parameters in one vector.
    """

    whole: torch.Tensor
    alone: list[torch.Tensor]
    adapted: torch.Tensor
    gradient: torch.Tensor


def verify(model: str, *, dtype: str = "float32", device: str = "cpu", seed: int = 0) -> list[Check]:
    """Compares every trunk and backend that can run here with transformers' own model and PEFT's own adapters.

    Args:
        model: a preset, with random weights; a checkpoint folder, a .gguf file or a Hugging Face model id.
        dtype: of the weights.
        device: where the model runs.
        seed: of random weights, tokens and adapters.

    Raises:
        ModelError: the model cannot be loaded, is of a kind that is not supported, or needs more memory than there is.
        CaseError: ``dtype`` or ``device`` breaks a rule.
    """
    length = min(_MAX_LENGTH, max_positions(read_config(model)) or _MAX_LENGTH)
    completion_len = max(1, length // 3)
    case = Case(
        method="sft-lora",
        model=model,
        prompt_len=max(1, length - completion_len),
        completion_len=completion_len,
        batch_size=_NUM_ROWS,
        dtype=dtype,  # type: ignore[arg-type]
        device=device,
        seed=seed,
        options=Options.of({"engine.trunk": "plain", "engine.backend": "torch"}),
    )
    return list(_Verification(case).run())


class _Verification:
    def __init__(self, case: Case) -> None:
        self._case = case
        self._plain = self._engine()
        self._class_name = type(self._plain.models[_ROLE].trunk).__name__
        generator = torch.Generator().manual_seed(case.seed)
        shape = (case.batch_size, case.seq_len)
        self._tokens = torch.randint(self._plain.vocab_size, shape, generator=generator).to(case.device)
        # Row i has i sixths of its length as padding.
        self._pads = [row * case.seq_len // 6 for row in range(case.batch_size)]
        self._mask = torch.ones_like(self._tokens)
        for row, pads in enumerate(self._pads):
            self._mask[row, :pads] = 0

    def run(self) -> Iterator[Check]:
        """Makes every check; at most two models are in memory at one time."""
        plain = self._plain
        reference = self._make_reference()
        yield from self._of_engine("plain", plain, reference)
        adapted = self._adapted(plain)
        del self._plain, plain
        yield self._compared(
            "plain, checkpointed: adapter gradient", lambda: self._checkpointed_gradient(reference), of_gradient=True
        )
        fast = self._engine({"engine.trunk": "fast"})
        if fast.trunks[_ROLE].name != "fast":
            return
        yield from self._of_engine("fast", fast, reference)
        in_torch = self._adapted(fast)
        yield self._compared("fast against plain", lambda: [(in_torch, adapted)])
        for backend in ("native", "triton"):
            try:
                case = self._with({"engine.trunk": "fast", "engine.backend": backend})
            except CaseError:  # not for this device or dtype
                continue
            label = f"fast, {backend}"
            try:
                engine = self._engine_of(case)
            except CaseError as error:  # such as no compiler
                yield Check(name=label, outcome="refused", note=str(error))
                continue
            yield from self._of_engine(label, engine, reference)
            found = self._adapted(engine)
            yield self._compared(f"{label} against torch", lambda found=found: [(found, in_torch)])  # type: ignore[misc]
            del engine

    def _engine(self, options: dict[str, Any] | None = None) -> Engine:
        return self._engine_of(self._with(options or {}))

    def _with(self, options: dict[str, Any]) -> Case:
        return dataclasses.replace(self._case, options=self._case.options.replace(options))

    def _engine_of(self, case: Case) -> Engine:
        """Builds an engine whose adapter changes its base."""
        gc.collect()  # models are in reference cycles
        engine = Engine(case, check=False)
        with torch.no_grad(), seeded(engine.device, case.seed):
            for parameter in engine.parameters_of_role[_ROLE]:
                if not bool(parameter.any()):  # B starts at 0
                    parameter.normal_(std=0.02)
        return engine

    def _make_reference(self) -> _Reference:
        """Runs transformers' model, then the same with PEFT's adapter in it."""
        case, pads = self._case, self._pads
        model = load_causal_lm(case, case.model, seed=case.seed)
        with torch.no_grad(), forward_errors(case.model, type(model).__name__):
            whole = wide_log_softmax(model(input_ids=self._tokens, use_cache=False).logits)
            alone = [
                wide_log_softmax(model(input_ids=self._tokens[row : row + 1, num:], use_cache=False).logits)
                for row, num in enumerate(pads)
            ]
        with tempfile.TemporaryDirectory() as folder:
            self._plain.save(Path(folder))
            adapter = self._plain.method.roles[_ROLE].adapter
            adapted = _with_adapter(model, f"{folder}/{adapter}")
        logprobs = wide_log_softmax(adapted(input_ids=self._tokens, use_cache=False).logits)
        c = case.completion_len
        picked = logprobs[:, -c - 1 : -1].gather(-1, self._tokens[:, -c:, None]).squeeze(-1)
        picked.mean().backward()  # type: ignore[no-untyped-call]
        parameters = dict(adapted.named_parameters())
        prefix = f"base_model.model.{self._plain.models[_ROLE].prefix}"
        ours = self._plain.adapters[_ROLE].named_parameters(str(adapter))
        names = [f"{prefix}.{key}.default.weight" for key in ours]
        absent = [name for name in names if name not in parameters]
        if absent:
            raise ModelError(f"model {case.model!r} cannot be compared: PEFT has no adapter weight {absent[0]}.")
        gradient = _joined([parameters[name].grad for name in names], ours.values())
        return _Reference(whole, alone, picked.detach(), gradient)

    def _of_engine(self, label: str, engine: Engine, reference: _Reference) -> Iterator[Check]:
        """Checks full forward passes, decoding, padding and the gradient of one engine."""
        trunk, head = engine.trunks[_ROLE], engine.lm_head(_ROLE)
        tokens, mask, c = self._tokens, self._mask, self._case.completion_len

        @torch.no_grad()
        def whole() -> list[tuple[torch.Tensor, torch.Tensor]]:
            return [(wide_log_softmax(head(trunk.hidden(None, tokens, None))), reference.whole)]

        @torch.no_grad()
        def padded() -> list[tuple[torch.Tensor, torch.Tensor]]:
            found = wide_log_softmax(head(trunk.hidden(None, tokens, mask)))
            return [(found[row, pads:], reference.alone[row][0]) for row, pads in enumerate(self._pads)]

        @torch.no_grad()
        def decoded() -> list[tuple[torch.Tensor, torch.Tensor]]:
            found = wide_log_softmax(head(decode(trunk, tokens, None, num_decoded=c)))
            return [(found, reference.whole[:, -c - 1 :])]

        @torch.no_grad()
        def decoded_padded() -> list[tuple[torch.Tensor, torch.Tensor]]:
            found = wide_log_softmax(head(decode(trunk, tokens, mask, num_decoded=c)))
            return [(found[row], reference.alone[row][0, -c - 1 :]) for row in range(len(self._pads))]

        yield self._compared(f"{label}: log-probabilities", whole)
        yield self._compared(f"{label}: left-padded rows", padded)
        try:
            check_cache(self._case.model, engine.models[_ROLE], self._case.seq_len)
        except ModelError as error:
            yield Check(name=f"{label}: cached decoding", outcome="refused", note=str(error))
        else:
            yield self._compared(f"{label}: cached decoding", decoded)
            yield self._compared(f"{label}: cached decoding, left-padded rows", decoded_padded)
        yield self._compared(
            f"{label}: adapter log-probabilities", lambda: [(self._adapted(engine), reference.adapted)]
        )
        yield self._compared(
            f"{label}: adapter gradient", lambda: [(self._gradient(engine), reference.gradient)], of_gradient=True
        )

    def _checkpointed_gradient(self, reference: _Reference) -> list[tuple[torch.Tensor, torch.Tensor]]:
        engine = self._engine({"engine.gradient_checkpointing": True})
        return [(self._gradient(engine), reference.gradient)]

    def _logprobs(self, engine: Engine, *, train: bool) -> torch.Tensor:
        """Log-probabilities [b, c] of the last tokens with the adapter, as a training step takes them."""
        c = self._case.completion_len
        weights = engine.method.roles[_ROLE].weights
        start = self._case.prompt_len - 1
        hidden = engine.hidden(weights, self._tokens, None, start=start, train=train)
        return engine.logprobs(_ROLE, hidden, self._tokens[:, -c:])[0]

    @torch.no_grad()
    def _adapted(self, engine: Engine) -> torch.Tensor:
        return self._logprobs(engine, train=False)

    def _gradient(self, engine: Engine) -> torch.Tensor:
        parameters = engine.parameters_of_role[_ROLE]
        mean = self._logprobs(engine, train=True).mean()
        return _joined(torch.autograd.grad(mean, parameters, allow_unused=True), parameters)

    def _compared(
        self,
        name: str,
        compare: Callable[[], list[tuple[torch.Tensor, torch.Tensor]]],
        *,
        of_gradient: bool = False,
    ) -> Check:
        """Runs a comparison of (found, expected) pairs; a model whose forward pass fails is wrong.

        Raises:
            ModelError: the forward pass was out of memory.
        """
        try:
            with forward_errors(self._case.model, self._class_name):
                pairs = compare()
        except CaseError as problem:
            return Check(name=name, outcome="refused", note=str(problem))
        except ModelError as problem:
            if isinstance(problem.__cause__, torch.OutOfMemoryError):
                raise  # says nothing about the model's numbers
            return Check(name=name, outcome="wrong", note=str(problem))
        error = max((largest_error(*pair) for pair in pairs), key=lambda each: (each != each, each))  # NaN is largest
        limit = max(tolerance(expected, self._case.dtype, of_gradient=of_gradient) for _, expected in pairs)
        return Check(name=name, outcome="ok" if error <= limit else "wrong", error=error, tolerance=limit)


def _with_adapter(model: Any, folder: str) -> Any:
    """Loads an adapter set onto transformers' model, as PEFT does it, in the dtype in which it was saved."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT calls names that transformers deprecates, and looks for fused experts
        return PeftModel.from_pretrained(model, folder, is_trainable=True, autocast_adapter_dtype=False)


def _joined(gradients: Iterable[torch.Tensor | None], parameters: Iterable[torch.Tensor]) -> torch.Tensor:
    """Flattens gradients into one vector in float64; an absent one is 0, as of an expert that no token reaches."""
    pairs = zip(gradients, parameters, strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).detach().double().flatten() for g, p in pairs])
