"""The engine: the bases, adapters and heads of a method's roles, their forward passes, and generation.

Shapes: b = data rows, n = sequences, p = prompt length, c = completion length, t = p + c, d = hidden size.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from rlhfkernels.config.case import Case
from rlhfkernels.data.batch import Batch, PackedRow, empty_completions
from rlhfkernels.data.sources import Prompts
from rlhfkernels.engine.agreement import check_cache, check_causality, check_model, check_packing
from rlhfkernels.engine.backends import select_backend
from rlhfkernels.engine.fast.trunk import make_fast_trunk
from rlhfkernels.engine.generation import sample_completions
from rlhfkernels.engine.logprob_chunk import logprob_chunk_size
from rlhfkernels.engine.saving import write_weights
from rlhfkernels.engine.trunk import PlainTrunk, Trunk
from rlhfkernels.engine.weights import attach_adapters, base_parameters, declare_trained, load_bases, make_scalar_heads
from rlhfkernels.errors import CaseError, NumericalError
from rlhfkernels.methods.program import WeightSet
from rlhfkernels.models.adapters import Adapters
from rlhfkernels.models.configuration import rotary_limit
from rlhfkernels.models.heads import LmHead
from rlhfkernels.models.loading import LoadedModel
from rlhfkernels.observer import Observer
from rlhfkernels.ops.token_logprobs import token_logprobs
from rlhfkernels.parallel.strategies import BaseModule, Strategy
from rlhfkernels.parallel.table import STRATEGIES
from rlhfkernels.parallel.world import ALONE, World

T = TypeVar("T")
# By ``engine.trunk``.
_TRUNKS: dict[str, Callable[[Case, LoadedModel, Adapters], Trunk]] = {"plain": PlainTrunk, "fast": make_fast_trunk}


class Engine:
    """The models of a case, loaded once, and the quantities that its roles read from them.

    Args:
        case: the case to build.
        with_weights: load real weights. Without, weights are random and only configurations are read.
        check: refuse models that this engine would run wrongly.
        num_layers: build bases without weights with their first layers alone.
        world: the ranks that share the case.
        make_strategy: makes what divides the weights, in place of the case's; arguments as ``Strategy``.

    Raises:
        ModelError: the model cannot be loaded or is too short.
        CaseError: an option does not fit the model.
    """

    def __init__(
        self,
        case: Case,
        *,
        with_weights: bool = True,
        check: bool = True,
        num_layers: int | None = None,
        world: World = ALONE,
        make_strategy: Callable[..., Strategy] | None = None,
    ) -> None:
        self.case = case
        # Without weights only shapes matter: generation skips decode steps, and optimizers need not compute.
        self.with_weights = with_weights
        self.method = case.role_table
        self.device = torch.device(case.device)
        # Losses of given completions are of the model's own distribution: nothing was sampled from another.
        self.temperature = 1.0 if self.method.generate is None else case.options.rollout.temperature
        self.backend = select_backend(case.options.engine.backend, case.device, case.dtype)
        self.models = load_bases(case, self.method, with_weights=with_weights, num_layers=num_layers)
        self.logprob_chunk = logprob_chunk_size(case, self.vocab_size)
        self.adapters = attach_adapters(case, self.method, self.models)
        make_trunk = _TRUNKS[case.options.engine.trunk]
        self.trunks: dict[str, Trunk] = {
            base: make_trunk(case, model, self.adapters[base]) for base, model in self.models.items()
        }
        if check:
            self._check_models()
        self.scalar_heads = make_scalar_heads(case, self.method, self.models)
        self.strategy = self._divide(world, make_strategy)
        self.parameters_of_role = declare_trained(self.method, self.models, self.adapters, self.scalar_heads)
        self.strategy.declare_trained(
            self.parameters_of_role, {p.weights.key: p.roles for p in self.method.update_passes}
        )
        if case.options.parallel.moves_weights:
            for trunk in self.trunks.values():
                trunk.follow_weights()

    def _check_models(self) -> None:
        """Refuses models that this engine would run wrongly, before anything is measured."""
        generates = self.method.generate is not None
        for base, model in self.models.items():
            name = self.case.model_of(self.method.origins[base])
            if generates and model.lm_head is not None:
                check_cache(name, model, self.case.seq_len)
            if model.probe is not None:
                check_causality(name, model, self.trunks[base], self.case.dtype)
                check_model(name, model, self.trunks[base], self.case.dtype, generates=generates)

    def check_lengths(self, base: str) -> None:
        """Refuses rows of unlike lengths where the rotary embedding depends on the longest of a batch.

        Raises:
            CaseError: the case has such rows.
        """
        case, name = self.case, self.case.model_of(self.method.origins[base])
        limit = rotary_limit(self.models[base].trunk.config)
        if case.data_file is not None and limit is not None and case.seq_len > limit:
            raise CaseError(
                [
                    f"prompt_len + completion_len is {case.seq_len}: beyond {limit} tokens the rotary embedding of "
                    f"model {name!r} depends on the longest row of a batch, so with a data file it must be at most "
                    f"{limit}."
                ]
            )

    def check_packing(self, base: str) -> None:
        """Refuses a base that reads packed rows wrongly.

        Raises:
            CaseError: see ``rlhfkernels.engine.agreement.check_packing``.
        """
        case, name = self.case, self.case.model_of(self.method.origins[base])
        check = functools.partial(
            check_packing,
            name,
            self.trunks[base],
            case.dtype,
            device=case.device,
            max_length=case.seq_len,
            vocab_size=self.vocab_size,
        )
        self.strategy.read(base, check)

    @property
    def vocab_size(self) -> int:
        """Tokens of the vocabulary, which all bases share."""
        return self.models[self.method.bases[0]].vocab_size

    def _divide(self, world: World, make: Callable[..., Strategy] | None) -> Strategy:
        """The strategy of the case, or what ``make`` makes, with the weights of all bases divided by it.

        Without weights a step has other ranks only where a planner says so.
        """
        name = self.case.options.parallel.strategy if self.with_weights or world.size > 1 else None
        strategy = (make or STRATEGIES[name])(
            self.case.options, world, self.device, may_skip=any(model.has_experts for model in self.models.values())
        )
        strategy.divide({base: BaseModule(model.trunk, self._heads_of(base)) for base, model in self.models.items()})
        return strategy

    def _heads_of(self, base: str) -> list[nn.Module]:
        """The heads that read a base: the language-model head, where there is one, and scalar heads."""
        lm_head = self.models[base].lm_head
        scalar_heads = [head for role, head in self.scalar_heads.items() if self.method.roles[role].base == base]
        return [*scalar_heads] if lm_head is None else [lm_head, *scalar_heads]

    def base_parameters(self, base: str) -> list[nn.Parameter]:
        """The weights of a trunk, adapters excluded."""
        return base_parameters(self.models[base], self.adapters[base])

    def persistent_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(part, tensor) of every weight and buffer; a tied head comes after the base that owns its weight."""
        for base, model in self.models.items():
            yield from (("base", p) for p in self.base_parameters(base))
            yield from (("base", b) for b in model.trunk.buffers())
            yield from (("adapters", p) for p in self.adapters[base].parameters())
            if model.lm_head is not None:
                yield from (("heads", p) for p in model.lm_head.parameters())
        for head in self.scalar_heads.values():
            yield from (("heads", p) for p in head.parameters())

    def lm_head(self, role: str) -> LmHead:
        """The language-model head that ``role`` reads."""
        head = self.models[self.method.roles[role].base].lm_head
        assert head is not None, f"{role} reads no language-model head"
        return head

    def hidden(
        self,
        weights: WeightSet,
        tokens: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *,
        start: int = 0,
        train: bool = False,
    ) -> torch.Tensor:
        """The trunk's last hidden states [n, t − start, d] under a weight set; see ``Trunk.hidden``."""
        return self.trunks[weights.base].hidden(weights.adapter, tokens, attention_mask, start=start, train=train)

    def packed_hidden(self, weights: WeightSet, row: PackedRow, *, train: bool = False) -> torch.Tensor:
        """The trunk's last hidden states [k, d] of a packed row's read positions; see ``Trunk.packed``."""
        trunk = self.trunks[weights.base]
        return trunk.packed(weights.adapter, row.tokens, row.positions, row.segments, train=train)

    def logprobs(
        self, role: str, hidden: torch.Tensor, targets: torch.Tensor, *, entropy: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Log-probabilities [n, k] of the last ``k`` tokens under ``role``'s head, and entropies where asked for.

        Args:
            role: the role.
            hidden: [n, m, d], hidden states of the last ``m`` positions, m > k. Token t is predicted at position t − 1.
            targets: [n, k], the last ``k`` tokens.
            entropy: also return the entropies [n, k].
        """
        n, k = targets.shape
        states = hidden[:, -k - 1 : -1].reshape(n * k, -1)
        logprobs, entropies = self.flat_logprobs(role, states, targets.reshape(-1), entropy=entropy)
        return logprobs.view(n, k), None if entropies is None else entropies.view(n, k)

    def flat_logprobs(
        self, role: str, states: torch.Tensor, targets: torch.Tensor, *, entropy: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Log-probabilities [k] of ``targets``, [k] that the rows of ``states`` [k, d] predict; see ``logprobs``."""
        head = self.lm_head(role)
        return token_logprobs(
            states,
            head.weight,
            head.bias,
            targets,
            head.transform(self.temperature),
            chunk=self.logprob_chunk,
            entropy=entropy,
            backend=self.backend,
            grad_dtype=getattr(torch, self.case.options.optimizer.grad_accum_dtype or "float32"),
        )

    def values(self, role: str, hidden: torch.Tensor, batch: Batch) -> torch.Tensor:
        """The scalar head's values [n, c]; the value of completion token t is read at position t − 1."""
        c = batch.completions.shape[1]
        values: torch.Tensor = self.scalar_heads[role](hidden[:, -c - 1 : -1])
        return values

    def last_scalar(self, role: str, hidden: torch.Tensor, batch: Batch) -> torch.Tensor:
        """The scalar head's value [n] at the last real completion token."""
        start = batch.tokens.shape[1] - hidden.shape[1]
        last = batch.prompt_len - start + batch.mask.sum(1).long() - 1
        index = last[:, None, None].expand(-1, 1, hidden.shape[-1])
        scalars: torch.Tensor = self.scalar_heads[role](hidden.gather(1, index).squeeze(1))
        return scalars

    def read(self, weights: WeightSet, function: Callable[[], T]) -> T:
        """Calls ``function``, which reads a weight set without a graph, with its weights at hand."""
        return self.strategy.read(weights.base, function)

    def train(self, weights: WeightSet, function: Callable[[], torch.Tensor], *, is_last: bool) -> torch.Tensor:
        """Calls ``function``, whose scalar a backward follows; see ``Strategy.train``."""
        return self.strategy.train(weights.key, weights.base, function, is_last=is_last)

    @torch.no_grad()
    def generate(
        self, role: str, prompts: Prompts, generator: torch.Generator | None, observer: Observer, *, samples: int = 1
    ) -> Batch:
        """Samples completions from ``role``.

        Args:
            role: the role that samples.
            prompts: [b, p], padded on the left.
            generator: the random state of sampling.
            observer: told of the KV cache and the batch.
            samples: completions per prompt, side by side in the batch.

        Returns:
            A batch with its tokens, masks and the column ``old_logprobs`` [n, c]; see ``check_sampled``.
        """
        case, options = self.case, self.case.options.rollout
        tokens, mask = (
            part if samples == 1 or part is None else part.repeat_interleave(samples, 0) for part in prompts
        )
        assert tokens is not None
        batch = empty_completions(tokens, mask, case.completion_len, prompts.tokens.shape[0])
        observer.tag("rollout", batch.tensors())
        weights = self.method.roles[role].weights

        def decode() -> None:
            sample_completions(
                batch,
                self.trunks[weights.base].decoder(weights.adapter, batch.tokens.shape[1] - 1, observer),
                self.lm_head(role),
                generator,
                options,
                backend=self.backend,
                skips_steps=not self.with_weights,
                all_ended=self.strategy.all_ended,
            )

        self.strategy.generate(weights.base, decode)
        if options.stop_token_id is not None:
            batch["old_logprobs"].mul_(batch.mask)
        return batch

    def check_sampled(self, role: str, batch: Batch) -> None:
        """Checks the log-probabilities of a generation. It waits for the device, so it belongs behind the phase.

        Raises:
            NumericalError: a token was sampled from logits that are not finite.
        """
        if self.with_weights and not math.isfinite(float(batch["old_logprobs"].sum())):
            raise NumericalError(f"{role} sampled from logits that are not finite: every logit must be a number.")

    def release(self, base: str) -> None:
        """Frees the weights of a base that nothing reads any more."""
        del self.models[base], self.trunks[base], self.adapters[base]
        self.strategy.release(base)

    def save(self, folder: Path) -> None:
        """Writes every trained weight under ``folder``, and every adapter set and scalar head.

        An adapter set is a folder as plain PEFT reads it, a model whose own weights are trained one as transformers
        reads it, under the name of its base, and a scalar head the file ``ROLE_head.safetensors`` with ``weight``
        [1, d]. Where ranks share the weights, all of them call it and the first one writes.
        """
        with self.strategy.whole():
            if self.strategy.world.rank == 0:
                write_weights(folder, self.case, self.method, self.models, self.adapters, self.scalar_heads)
