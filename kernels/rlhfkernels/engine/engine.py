"""The engine: the bases, adapters and heads that a role table asks for, and the passes over them.

Shapes: b = batch, p = prompt length, c = completion length, t = p + c, d = hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from rlhfkernels.config.case import Case, vocabulary_problem
from rlhfkernels.data.rollout import Rollout
from rlhfkernels.engine.backends import select_backend
from rlhfkernels.engine.fast.trunk import make_fast_trunk
from rlhfkernels.engine.trunk import PlainTrunk, Trunk
from rlhfkernels.errors import CaseError
from rlhfkernels.methods.table import Origin, Pass, RoleName
from rlhfkernels.models.adapters import Adapters
from rlhfkernels.models.heads import LmHead, ScalarHead
from rlhfkernels.models.loading import LoadedModel, clone_module, load_model
from rlhfkernels.observer import Observer
from rlhfkernels.ops.sample import sample
from rlhfkernels.ops.token_logprobs import token_logprobs
from rlhfkernels.seeding import seeded

# Bases of one origin start from equal weights, bases of different origins do not.
_ORIGIN_SEED: dict[Origin, int] = {"policy": 0, "reward": 1}
_ADAPTER_SEED, _HEAD_SEED = 1000, 2000
# How a trunk is run, by ``Options.engine``.
_TRUNKS: dict[str, Callable[[Case, LoadedModel, Adapters], Trunk]] = {"plain": PlainTrunk, "fast": make_fast_trunk}


class Engine:
    """Everything that a case's role table names, loaded once, and how a role reads a batch.

    Args:
        case: what to build.
        with_weights: load real weights; without, every weight is random and only configurations are read.

    Raises:
        ModelError: the model cannot be loaded or is too short.
        CaseError: an option does not fit the model.
    """

    def __init__(self, case: Case, *, with_weights: bool = True) -> None:
        self.case = case
        # Without weights the tokens mean nothing and only shapes do: a long completion is not stepped through then, and
        # an optimizer need not compute.
        self.with_weights = with_weights
        self.method = case.role_table
        self.device = torch.device(case.device)
        self.kernels = select_backend(case.options.kernels, case.device, case.dtype)
        self.models = self._load_models(with_weights)
        self.adapters = {base: self._attach(base) for base in self.method.bases}
        make_trunk = _TRUNKS[case.options.engine]
        self.trunks: dict[str, Trunk] = {
            base: make_trunk(case, self.models[base], self.adapters[base]) for base in self.method.bases
        }
        self.scalar_heads = self._make_scalar_heads()
        self.parameters_of_role = self._declare_trained()

    def _load_models(self, with_weights: bool) -> dict[str, LoadedModel]:
        models: dict[str, LoadedModel] = {}
        first_of: dict[tuple[Origin, bool], LoadedModel] = {}
        for base in self.method.bases:
            origin = self.method.origins[base]
            key = (origin, "lm" in self.method.heads_of(base))
            if key not in first_of:
                seed = self.case.seed + _ORIGIN_SEED[origin]
                name = self.case.model_of(origin)
                first_of[key] = models[base] = load_model(
                    self.case, seed=seed, with_lm_head=key[1], with_weights=with_weights, name=name
                )
            else:
                models[base] = first_of[key].clone()
        self._check_vocabularies(models)
        return models

    def _check_vocabularies(self, models: dict[str, LoadedModel]) -> None:
        """Every base reads the tokens that the actor samples."""
        sizes = {self.case.model_of(self.method.origins[base]): model.vocab_size for base, model in models.items()}
        if len(set(sizes.values())) > 1:
            raise CaseError([vocabulary_problem(sizes)])

    def _attach(self, base: str) -> Adapters:
        case = self.case
        return Adapters(
            self.models[base].trunk,
            [adapter for owner, adapter in self.method.adapter_sets if owner == base],
            rank=case.lora_rank,
            scaling=case.options.lora_scaling,
            targets=case.options.lora_targets,
            dtype=getattr(torch, case.options.adapter_dtype or case.dtype),
            seed=case.seed + _ADAPTER_SEED,
        )

    def _make_scalar_heads(self) -> dict[RoleName, ScalarHead]:
        """A frozen reward head, and the critic's: the same where it is shared, else a copy with its own storage."""
        roles = self.method.roles
        model = self.models[roles["reward"].base]
        with seeded(self.device, self.case.seed + _HEAD_SEED):
            reward = ScalarHead(model.hidden_size, device=self.device, dtype=getattr(torch, self.case.dtype))
        reward.requires_grad_(False)
        shared = roles["critic"].head == roles["reward"].head
        return {"reward": reward, "critic": reward if shared else clone_module(reward)}

    def _declare_trained(self) -> dict[RoleName, list[nn.Parameter]]:
        """Which weights each role trains; a weight that two roles train belongs to the first."""
        for base, adapters in self.adapters.items():
            roles = [self.method.roles[name] for name in self.method.trained_roles]
            adapters.train([r.adapter for r in roles if r.base == base and r.adapter and "adapter" in r.trains])
        owned: dict[int, RoleName] = {}
        found: dict[RoleName, list[nn.Parameter]] = {}
        for name in self.method.trained_roles:
            candidates = self._trained_candidates(name)
            found[name] = [p for p in candidates if owned.setdefault(id(p), name) == name]
        for parameters in found.values():
            for parameter in parameters:
                parameter.requires_grad_(True)
        return found

    def _trained_candidates(self, name: RoleName) -> list[nn.Parameter]:
        role = self.method.roles[name]
        parameters: list[nn.Parameter] = []
        if "base" in role.trains:
            parameters += self.base_parameters(role.base)
        if "adapter" in role.trains and role.adapter is not None:
            parameters += self.adapters[role.base].parameters(role.adapter)
        if "head" in role.trains:
            head = self.models[role.base].lm_head if role.head == "lm" else self.scalar_heads[name]
            assert head is not None
            parameters += head.parameters()
        return list(dict.fromkeys(parameters))

    def base_parameters(self, base: str) -> list[nn.Parameter]:
        """The weights of a trunk without its adapters."""
        adapters = {id(p) for p in self.adapters[base].parameters()}
        return [p for p in self.models[base].trunk.parameters() if id(p) not in adapters]

    def persistent_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(part, tensor) of every weight and buffer; a tied head is yielded after the base that it is tied to."""
        for base, model in self.models.items():
            yield from (("base", p) for p in self.base_parameters(base))
            yield from (("base", b) for b in model.trunk.buffers())
            yield from (("adapters", p) for p in self.adapters[base].parameters())
            if model.lm_head is not None:
                yield from (("heads", p) for p in model.lm_head.parameters())
        for head in self.scalar_heads.values():
            yield from (("heads", p) for p in head.parameters())

    def lm_head(self, role: RoleName) -> LmHead:
        """The language-model head that ``role`` reads."""
        head = self.models[self.method.roles[role].base].lm_head
        assert head is not None, f"{role} reads no language-model head"
        return head

    def hidden(
        self,
        p: Pass,
        tokens: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *,
        start: int = 0,
        train: bool = False,
    ) -> torch.Tensor:
        """The trunk's last hidden states [b, t − start, d] under the pass's weight set; see ``Trunk.hidden``."""
        return self.trunks[p.base].hidden(p.adapter, tokens, attention_mask, start=start, train=train)

    def completion_logprobs(
        self, role: RoleName, hidden: torch.Tensor, rollout: Rollout, *, entropy: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Log-probabilities [b, c] of the completions under ``role``'s head, and entropies [b, c] where asked for.

        Token t's is read at position t − 1.
        """
        b, c = rollout.completions.shape
        states = self._before(hidden, rollout, c).reshape(b * c, -1)
        head = self.lm_head(role)
        logprobs, entropies = token_logprobs(
            states,
            head.weight,
            head.bias,
            rollout.completions.reshape(-1),
            head.transform(self.case.options.temperature),
            chunk=self.case.options.logprob_chunk,
            entropy=entropy,
            backend=self.kernels,
        )
        return logprobs.view(b, c), None if entropies is None else entropies.view(b, c)

    def completion_values(self, role: RoleName, hidden: torch.Tensor, rollout: Rollout) -> torch.Tensor:
        """The scalar head's values [b, c]; token t's is read at position t − 1."""
        values: torch.Tensor = self.scalar_heads[role](self._before(hidden, rollout, rollout.completions.shape[1]))
        return values

    def last_scalar(self, role: RoleName, hidden: torch.Tensor, rollout: Rollout) -> torch.Tensor:
        """The scalar head's value [b] at the last real completion token."""
        start = rollout.tokens.shape[1] - hidden.shape[1]
        last = rollout.prompt_len - start + rollout.mask.sum(1).long() - 1
        index = last[:, None, None].expand(-1, 1, hidden.shape[-1])
        scalars: torch.Tensor = self.scalar_heads[role](hidden.gather(1, index).squeeze(1))
        return scalars

    @staticmethod
    def _before(hidden: torch.Tensor, rollout: Rollout, c: int) -> torch.Tensor:
        """Of the states of all positions, or of the last of them, those that the completion's tokens are read at."""
        return hidden[:, -c - 1 : -1]

    @torch.no_grad()
    def generate(
        self,
        prompts: torch.Tensor,
        prompt_mask: torch.Tensor | None,
        generator: torch.Generator | None,
        observer: Observer,
    ) -> Rollout:
        """Samples a completion for every prompt from the actor.

        Args:
            prompts: [b, p], padded on the left.
            prompt_mask: [b, p] or ``None``.
            generator: the sampling's randomness.
            observer: told of the cache and the rollout.

        Returns:
            A rollout with its tokens, masks and log-probabilities.
        """
        case = self.case
        b, p = prompts.shape
        c = case.completion_len
        rollout = _empty_rollout(prompts, prompt_mask, c)
        observer.tag("rollout", rollout.tensors())
        role, head = self.method.roles["actor"], self.lm_head("actor")
        decoder = self.trunks[role.base].decoder(role.adapter, p + c - 1, observer)
        ended = torch.zeros(b, dtype=torch.bool, device=prompts.device) if case.options.stop_token is not None else None
        start = 0
        for t in range(p, p + c):
            # The prompt, the first step after it and the last tell all: no step between has a larger tensor.
            if not self.with_weights and p + 1 < t < p + c - 1 and decoder.can_skip:
                continue
            if t > max(p, start + 1):
                decoder.skip_to(t - 1)
                start = t - 1
            seen = None if rollout.attention_mask is None else rollout.attention_mask[:, :t]
            hidden = decoder.advance(rollout.tokens[:, start:t], seen)
            logits = head.decode_logits(hidden, backend=self.kernels)
            if case.options.temperature != 1.0:
                logits.div_(case.options.temperature)
            token, logprob = sample(logits, generator, backend=self.kernels)
            if ended is not None:
                token, ended, done = _stop(rollout, t, token, ended, case.options.stop_token)
                if done:
                    break
            rollout.tokens[:, t] = token
            rollout.logprobs[:, t - p] = logprob
            start = t
        if case.options.stop_token is not None:
            rollout.logprobs.mul_(rollout.mask)
        return rollout

    def save(self, folder: Path) -> None:
        """Writes every adapter set, as plain PEFT reads it, and every scalar head under ``folder``."""
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


def _empty_rollout(prompts: torch.Tensor, prompt_mask: torch.Tensor | None, c: int) -> Rollout:
    b, p = prompts.shape
    tokens = prompts.new_zeros(b, p + c)
    tokens[:, :p] = prompts
    attention_mask = None
    if prompt_mask is not None:
        attention_mask = prompt_mask.new_ones(b, p + c)
        attention_mask[:, :p] = prompt_mask
    wide = torch.float32
    return Rollout(
        tokens=tokens,
        attention_mask=attention_mask,
        mask=torch.ones(b, c, dtype=wide, device=prompts.device),
        logprobs=torch.zeros(b, c, dtype=wide, device=prompts.device),
        prompt_len=p,
    )


def _stop(
    rollout: Rollout, t: int, token: torch.Tensor, ended: torch.Tensor, stop_token: int | None
) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """Masks position ``t`` of the rows that ended before it; says whether every row has."""
    rollout.mask[:, t - rollout.prompt_len] = (~ended).float()
    if bool(ended.all()):
        rollout.mask[:, t - rollout.prompt_len :] = 0
        return token, ended, True
    token = torch.where(ended, torch.zeros_like(token), token)
    return token, ended | (token == stop_token), False
