"""LoRA adapter sets on a trunk: PEFT's layers, with switches that leave ``requires_grad`` as declared.

PEFT's switches flip ``requires_grad``: an activated adapter becomes trainable, the others freeze, and disabling and
enabling again can select the wrong ones. ``Adapters`` restores the declared state after every switch.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterable
from pathlib import Path

import torch
from peft import LoraConfig, LoraModel, TaskType
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes
from transformers.pytorch_utils import Conv1D

from rlhfkernels.errors import CaseError
from rlhfkernels.seeding import seeded

# Linear layers with a forward of their own that computes the same. Falcon's rounds once more, before it adds the bias.
_LINEAR_TYPES = ("FalconLinear",)


class Adapters:
    """The adapter sets of one trunk.

    Args:
        model: its name, as the case has it.
        trunk: of the model; LoRA layers are injected in place.
        names: names of the adapter sets.
        rank: r.
        scaling: multiplier of the low-rank product, PEFT's ``lora_alpha / r``.
        targets: ``all-linear``, or module names joined by commas.
        dtype: dtype of the adapter weights. PEFT casts a layer's input to it.
        seed: seed of the A matrices. B starts at 0, so a fresh adapter changes no output.

    Raises:
        CaseError: a target is not a linear layer of the trunk.
    """

    def __init__(
        self,
        model: str,
        trunk: nn.Module,
        names: Iterable[str],
        *,
        rank: int,
        scaling: float,
        targets: str,
        dtype: torch.dtype,
        seed: int,
    ) -> None:
        self.names = tuple(names)
        self._trained: frozenset[str] = frozenset()
        self._active: str | None = None
        self._named_layers: list[tuple[str, LoraLayer]] = []
        if not self.names:  # the targets need not be of this trunk
            return
        self._config = LoraConfig(
            r=rank,
            lora_alpha=scaling * rank,  # PEFT divides it by r
            lora_dropout=0.0,
            target_modules=_target_names(model, trunk, targets),
            fan_in_fan_out=any(isinstance(module, Conv1D) for module in trunk.modules()),
            bias="none",
        )
        device = next(trunk.parameters()).device
        # The tuner injects the layers and is dropped. Its weights stay on the meta device, because PEFT would create
        # them in float32 first; a planner's fake mode is left for that, because PEFT cannot move fake tensors.
        try:
            with _disable_current_modes(), warnings.catch_warnings():
                # PEFT looks for the pattern of a fused weight among modules, warns, and then applies it.
                warnings.filterwarnings("ignore", r"The following (rank|alpha)_pattern keys did not match")
                tuner = LoraModel(trunk, self._config, self.names[0], low_cpu_mem_usage=True)
                for name in self.names[1:]:
                    tuner.peft_config[name] = self._config
                    tuner.inject_adapter(trunk, name, low_cpu_mem_usage=True)
        except ValueError as error:  # a part of a fused weight of experts
            problem = f"lora.target_modules is {targets!r}: PEFT cannot attach an adapter there ({error})"
            raise CaseError([problem]) from error
        self._named_layers = [(name, m) for name, m in trunk.named_modules() if isinstance(m, LoraLayer)]
        with seeded(device, seed):
            self._make_weights(device, dtype)
        self._active = self.names[-1]
        self.activate(None)

    def _make_weights(self, device: torch.device, dtype: torch.dtype) -> None:
        """Initial weights as in LoRA: A as in ``nn.Linear``, B zero."""
        for name in self.names:
            for _, layer in self._named_layers:
                for weights in (layer.lora_A, layer.lora_B):
                    shape = weights[name].weight.shape
                    weights[name].weight = nn.Parameter(torch.zeros(shape, device=device, dtype=dtype))
                nn.init.kaiming_uniform_(layer.lora_A[name].weight, a=math.sqrt(5))

    def parameters(self, name: str | None = None) -> list[nn.Parameter]:
        """The weights of adapter set ``name``, or of all sets: A, then B, layer by layer."""
        names = self.names if name is None else (name,)
        return [parameter for each in names for parameter in self.named_parameters(each).values()]

    def named_parameters(self, name: str) -> dict[str, nn.Parameter]:
        """The weights of adapter set ``name`` by the trunk's module and ``lora_A`` or ``lora_B``."""
        return {
            # Not its attribute: inside a pass, ZeRO-3 gathers every weight that is read, for the rest of the pass.
            f"{layer_name}.{kind}": next(weights[name].parameters())
            for layer_name, layer in self._named_layers
            for kind, weights in (("lora_A", layer.lora_A), ("lora_B", layer.lora_B))
            if name in weights
        }

    def train(self, names: Iterable[str]) -> None:
        """Declares the trained adapter sets, independent of which one is active."""
        self._trained = frozenset(names)
        self._restore()

    def activate(self, name: str | None) -> None:
        """Activates ``name`` alone; ``None`` deactivates every set."""
        if name == self._active:
            return
        for _, layer in self._named_layers:
            if name is None:
                layer.enable_adapters(False)
            else:
                layer.set_adapter([name])
                layer.enable_adapters(True)
        self._active = name
        self._restore()

    def _restore(self) -> None:
        for name in self.names:
            for parameter in self.parameters(name):
                parameter.requires_grad_(name in self._trained)

    def save(self, name: str, folder: Path, *, prefix: str | None, base_model: str) -> None:
        """Writes adapter set ``name`` as plain PEFT reads it.

        Args:
            name: the adapter set.
            folder: created where it does not exist.
            prefix: the trunk's attribute name inside the causal language model; ``None`` for an adapter of the bare
                trunk (``AutoModel``).
            base_model: value of ``base_model_name_or_path``.
        """
        folder.mkdir(parents=True, exist_ok=True)
        owner = "base_model.model." + (f"{prefix}." if prefix else "")
        state = {
            f"{owner}{key}.weight": parameter.detach().cpu().contiguous()
            for key, parameter in self.named_parameters(name).items()
        }
        save_file(state, folder / "adapter_model.safetensors")
        # PEFT has moved the targets that are fused experts to ``target_parameters``. It keeps both as sets.
        fields = self._config.to_dict().items()
        config = {key: sorted(value) if isinstance(value, set) else value for key, value in fields}
        config |= {
            "base_model_name_or_path": base_model,
            "task_type": TaskType.CAUSAL_LM.value if prefix else TaskType.FEATURE_EXTRACTION.value,
            "inference_mode": True,
        }
        text = json.dumps({key: value for key, value in config.items() if _is_json(value)}, indent=2)
        (folder / "adapter_config.json").write_text(text + "\n", encoding="utf-8")


def _is_json(value: object) -> bool:
    try:
        json.dumps(value)
    except TypeError:
        return False
    return True


def _is_linear(module: nn.Module) -> bool:
    """Returns whether ``module`` is a linear layer that PEFT's layer can wrap.

    A router of experts is one with a forward of its own, which returns more than a tensor.
    """
    if not isinstance(module, (nn.Linear, Conv1D)):
        return False
    kind = type(module)
    return kind.forward in (nn.Linear.forward, Conv1D.forward) or kind.__name__ in _LINEAR_TYPES


def _target_names(model: str, trunk: nn.Module, targets: str) -> list[str]:
    """Last components of the module names of the linear layers that get an adapter."""
    names = sorted({name.rsplit(".", 1)[-1] for name, module in trunk.named_modules() if _is_linear(module)})
    if targets == "all-linear":
        return names
    chosen = [target.strip() for target in targets.split(",")]
    wrong = [target for target in chosen if target not in names]
    if wrong:
        unknown = ", ".join(name or "an empty name" for name in wrong)
        problem = f"lora.target_modules has {unknown}: the linear layers of model {model!r} are {', '.join(names)}."
        raise CaseError([problem])
    return chosen
