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
from safetensors.torch import save_file
from torch import nn

from rlhfkernels.config.case import Case, vocabulary_problem
from rlhfkernels.config.options import CPU_LOGPROB_CHUNK
from rlhfkernels.data.batch import Batch, PackedRow, empty_completions
from rlhfkernels.data.sources import Prompts
from rlhfkernels.engine.agreement import check_cache, check_model, check_packing
from rlhfkernels.engine.backends import select_backend
from rlhfkernels.engine.fast.trunk import make_fast_trunk
from rlhfkernels.engine.trunk import PlainTrunk, Trunk
from rlhfkernels.errors import CaseError, NumericalError
from rlhfkernels.methods.program import HEADS, Origin, Role, WeightSet
from rlhfkernels.models.adapters import Adapters
from rlhfkernels.models.heads import LmHead, ScalarHead
from rlhfkernels.models.loading import LoadedModel, clone_module, load_model
from rlhfkernels.models.saving import save_model
from rlhfkernels.observer import Observer
from rlhfkernels.ops.sample import sample
from rlhfkernels.ops.token_logprobs import token_logprobs
from rlhfkernels.parallel.strategies import BaseModule, Strategy
from rlhfkernels.parallel.table import STRATEGIES
from rlhfkernels.parallel.world import ALONE, World
from rlhfkernels.seeding import seeded

T = TypeVar("T")
# Bases of one origin start from equal weights, bases of different origins do not.
_ORIGIN_SEED: dict[Origin, int] = {"policy": 0, "reward": 1}
_ADAPTER_SEED, _HEAD_SEED = 1000, 2000
# Float32 logits of a chunk on an accelerator, and the largest chunk.
_LOGITS_BYTES, _MAX_LOGPROB_CHUNK = 2**28, 1024
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
        self.backend = select_backend(case.options.engine.backend, case.device, case.dtype)
        self.models = self._load_models(with_weights, num_layers)
        self.logprob_chunk = logprob_chunk_size(case, self.vocab_size)
        self.adapters = {base: self._attach(base) for base in self.method.bases}
        make_trunk = _TRUNKS[case.options.engine.trunk]
        self.trunks: dict[str, Trunk] = {
            base: make_trunk(case, self.models[base], self.adapters[base]) for base in self.method.bases
        }
        if check:
            self._check_models()
        self.scalar_heads = self._make_scalar_heads()
        self.strategy = self._divide(world, make_strategy)
        self.parameters_of_role = self._declare_trained()
        self.strategy.declare_trained(
            self.parameters_of_role, {pass_key(p.weights): p.roles for p in self.method.update_passes}
        )
        if case.options.parallel.moves_weights:
            for trunk in self.trunks.values():
                trunk.follow_weights()

    def _load_models(self, with_weights: bool, num_layers: int | None) -> dict[str, LoadedModel]:
        models: dict[str, LoadedModel] = {}
        first_of: dict[tuple[Origin, bool], LoadedModel] = {}
        for base in self.method.bases:
            origin = self.method.origins[base]
            key = (origin, "lm" in self.method.heads_of(base))
            if key not in first_of:
                seed = self.case.seed + _ORIGIN_SEED[origin]
                name = self.case.model_of(origin)
                first_of[key] = models[base] = load_model(
                    self.case,
                    seed=seed,
                    with_lm_head=key[1],
                    with_weights=with_weights,
                    name=name,
                    num_layers=num_layers,
                )
            else:
                models[base] = first_of[key].clone()
        self._check_vocabularies(models)
        return models

    def _check_vocabularies(self, models: dict[str, LoadedModel]) -> None:
        """All bases read the same tokens."""
        sizes = {self.case.model_of(self.method.origins[base]): model.vocab_size for base, model in models.items()}
        if len(set(sizes.values())) > 1:
            raise CaseError([vocabulary_problem(sizes)])

    def _check_models(self) -> None:
        """Refuses models that this engine would run wrongly, before anything is measured."""
        generates = self.method.generate is not None
        for base, model in self.models.items():
            name = self.case.model_of(self.method.origins[base])
            if generates and model.lm_head is not None:
                check_cache(name, model, self.case.seq_len)
            if model.probe is not None:
                check_model(name, model, self.trunks[base], self.case.dtype, generates=generates)

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

    def _attach(self, base: str) -> Adapters:
        case = self.case
        return Adapters(
            self.models[base].trunk,
            [adapter for owner, adapter in self.method.adapter_sets if owner == base],
            rank=case.options.lora.r,
            scaling=case.options.lora.scaling,
            targets=case.options.lora.target_modules,
            dtype=getattr(torch, case.options.lora.dtype or case.dtype),
            seed=case.seed + _ADAPTER_SEED,
        )

    def _make_scalar_heads(self) -> dict[str, ScalarHead]:
        """The scalar head of each role that reads one; roles that name one head share it."""
        made: dict[str, ScalarHead] = {}
        for role in self.method.roles.values():
            if HEADS[role.head].outputs == "scalar":
                self._make_scalar_head(role.head, self.models[role.base].hidden_size, made)
        for head in made.values():
            head.requires_grad_(False)
        return {name: made[role.head] for name, role in self.method.roles.items() if role.head in made}

    def _make_scalar_head(self, name: str, hidden_size: int, made: dict[str, ScalarHead]) -> ScalarHead:
        """The head called ``name``: a copy with its own storage of the head that it starts from, or a new one."""
        if name not in made:
            original = HEADS[name].copy_of
            if original is not None:
                made[name] = clone_module(self._make_scalar_head(original, hidden_size, made))
            else:
                with seeded(self.device, self.case.seed + _HEAD_SEED):
                    made[name] = ScalarHead(hidden_size, device=self.device, dtype=getattr(torch, self.case.dtype))
        return made[name]

    def _divide(self, world: World, make: Callable[..., Strategy] | None) -> Strategy:
        """The strategy of the case, or what ``make`` makes, with the weights of all bases divided by it.

        Without weights a step has other ranks only where a planner says so.
        """
        name = self.case.options.parallel.strategy if self.with_weights or world.size > 1 else None
        strategy = (make or STRATEGIES[name])(
            self.case.options, world, self.device, may_skip=any(model.has_experts for model in self.models.values())
        )
        heads = {
            base: [self.scalar_heads[name] for name in self.scalar_heads if self.method.roles[name].base == base]
            for base in self.models
        }
        strategy.divide(
            {
                base: BaseModule(model.trunk, [*([] if model.lm_head is None else [model.lm_head]), *heads[base]])
                for base, model in self.models.items()
            }
        )
        return strategy

    def _declare_trained(self) -> dict[str, list[nn.Parameter]]:
        """The trained weights of each role; a weight that two roles train belongs to the first."""
        for base, adapters in self.adapters.items():
            roles = [self.method.roles[name] for name in self.method.trained_roles]
            adapters.train([r.adapter for r in roles if r.base == base and r.adapter and "adapter" in r.trains])
        owned: dict[int, str] = {}
        found: dict[str, list[nn.Parameter]] = {}
        for name in self.method.trained_roles:
            candidates = self._trained_candidates(name)
            found[name] = [p for p in candidates if owned.setdefault(id(p), name) == name]
        for parameters in found.values():
            for parameter in parameters:
                parameter.requires_grad_(True)
        return found

    def _trained_candidates(self, name: str) -> list[nn.Parameter]:
        role = self.method.roles[name]
        parameters: list[nn.Parameter] = []
        if "base" in role.trains:
            parameters += self.base_parameters(role.base)
        if "adapter" in role.trains and role.adapter is not None:
            parameters += self.adapters[role.base].parameters(role.adapter)
        if "head" in role.trains:
            head = self.scalar_heads[name] if name in self.scalar_heads else self.models[role.base].lm_head
            assert head is not None
            parameters += head.parameters()
        return list(dict.fromkeys(parameters))

    def base_parameters(self, base: str) -> list[nn.Parameter]:
        """The weights of a trunk, adapters excluded."""
        adapters = {id(p) for p in self.adapters[base].parameters()}
        return [p for p in self.models[base].trunk.parameters() if id(p) not in adapters]

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
            head.transform(self.case.options.rollout.temperature),
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
        return self.strategy.train(pass_key(weights), weights.base, function, is_last=is_last)

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
        self.strategy.generate(self.method.roles[role].base, lambda: self._decode(role, batch, generator, observer))
        if options.stop_token_id is not None:
            batch["old_logprobs"].mul_(batch.mask)
        return batch

    def _decode(self, role: str, batch: Batch, generator: torch.Generator | None, observer: Observer) -> None:
        """Samples the completions of ``batch``, one position at a time."""
        options, tokens = self.case.options.rollout, batch.tokens[:, : batch.prompt_len]
        n, p, c = batch.num_sequences, batch.prompt_len, self.case.completion_len
        weights, head = self.method.roles[role].weights, self.lm_head(role)
        decoder = self.trunks[weights.base].decoder(weights.adapter, p + c - 1, observer)
        ended = torch.zeros(n, dtype=torch.bool, device=tokens.device) if options.stop_token_id is not None else None
        check_every = _tokens_between_looks(self.device)
        start = 0
        for t in range(p, p + c):
            # Without weights only shapes matter: the prompt, the first step after it and the last step have the
            # largest tensors, so the steps between are skipped.
            if not self.with_weights and p + 1 < t < p + c - 1 and decoder.can_skip:
                continue
            if t > max(p, start + 1):
                decoder.skip_to(t - 1)
                start = t - 1
            seen = None if batch.attention_mask is None else batch.attention_mask[:, :t]
            hidden = decoder.advance(batch.tokens[:, start:t], seen)
            logits = head.decode_logits(hidden, backend=self.backend)
            if options.temperature != 1.0:
                logits.div_(options.temperature)
            token, logprob = sample(logits, generator, backend=self.backend)
            if ended is not None:
                if t > p and (t - p) % check_every == 0 and self.strategy.all_ended(bool(ended.all())):
                    batch.mask[:, t - p :] = 0
                    break
                token, ended = _stop(batch, t, token, ended, options.stop_token_id)
            batch.tokens[:, t] = token
            batch["old_logprobs"][:, t - p] = logprob
            start = t

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
                self._write(folder)

    def _write(self, folder: Path) -> None:
        for base in self._trained_bases():
            save_model(self.models[base], self.case.model_of(self.method.origins[base]), folder / base)
        for base, adapters in self.adapters.items():
            model = self.models[base]
            for name in adapters.names:
                prefix = model.prefix if model.lm_head is not None else None
                adapters.save(
                    name, folder / name, prefix=prefix, base_model=self.case.model_of(self.method.origins[base])
                )
        for role, head in self.scalar_heads.items():
            folder.mkdir(parents=True, exist_ok=True)
            save_file({"weight": head.weight.detach().cpu().contiguous()}, folder / f"{role}_head.safetensors")

    def _trained_bases(self) -> list[str]:
        """The bases of which a weight of the trunk or of the language-model head is trained."""
        roles = (self.method.roles[name] for name in self.method.trained_roles)
        return list(dict.fromkeys(role.base for role in roles if "base" in role.trains or _trains_lm_head(role)))


def pass_key(weights: WeightSet) -> str:
    """The name of the differentiated pass over a weight set: there is one at most."""
    return weights.base if weights.adapter is None else f"{weights.base}.{weights.adapter}"


def _trains_lm_head(role: Role) -> bool:
    return "head" in role.trains and HEADS[role.head].outputs == "vocabulary"


def logprob_chunk_size(case: Case, vocab_size: int) -> int:
    """Returns ``engine.logprob_chunk_size`` of ``case``, or that of its device.

    128 positions bound the head's matmul on an H100 by memory: each chunk reads the whole head, and a position is worth
    128 multiply-adds for every weight read, where the H100 needs about 300. Not yet measured on a GPU.

    Args:
        case: the case; its device decides.
        vocab_size: columns of the logits.
    """
    asked = case.options.engine.logprob_chunk_size
    if asked is not None:
        return asked
    if case.device == "cpu":
        return CPU_LOGPROB_CHUNK
    return min(_MAX_LOGPROB_CHUNK, max(CPU_LOGPROB_CHUNK, _LOGITS_BYTES // (4 * vocab_size)))


def _tokens_between_looks(device: torch.device) -> int:
    """Returns after how many tokens a generation looks whether all sequences have ended.

    A look waits for the device, which the CPU has done anyway. Steps that come too many compute masked tokens.
    """
    return 1 if device.type == "cpu" else 16


def _stop(
    batch: Batch, t: int, token: torch.Tensor, ended: torch.Tensor, stop_token: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Masks position ``t`` of the sequences that ended before it, whose token becomes 0."""
    batch.mask[:, t - batch.prompt_len] = (~ended).float()
    token = torch.where(ended, torch.zeros_like(token), token)
    return token, ended | (token == stop_token)
