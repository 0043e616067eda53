"""Short names of cases for progress and tables: what tells them apart, and nothing that all share."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable
from pathlib import PurePath
from typing import Any

from rlhfbench.cases.settings import changed_options, setting_of
from rlhfkernels.config.case import Case
from rlhfkernels.config.options import LoraOptions
from rlhfkernels.config.settings import SETTINGS

_FROM_SETTING = ("dtype", "lora.r")  # a setting may change them: then its name stands for them
_NAMED = ("model", "device", "dtype", "seed")
_DEFAULTS = {field.name: field.default for field in dataclasses.fields(Case) if field.name in _NAMED}


class Titles:
    """Names the cases of a sweep.

    A title has the method, lengths and batch size, and every other field that varies among the cases: setting, model,
    device, dtype, seed, LoRA rank and options. A field of another case is named too if it differs from what all share.
    Of the path of a model it has as many last parts as tell the models apart.
    """

    def __init__(self, cases: Iterable[Case] = (), *, is_alone: bool = False) -> None:
        """Takes the cases to be told apart.

        Args:
            cases: the cases; without any, titles stand alone.
            is_alone: titles stand alone: they name all but the defaults.
        """
        found = [_fields(case) for case in cases]
        models = {PurePath(fields["model"]) for fields in found}
        self._num_parts = next(n for n in itertools.count(1) if len({m.parts[-n:] for m in models}) == len(models))
        self._is_alone = is_alone or not found
        if self._is_alone:
            default: dict[str, Any] = {name: _DEFAULTS[name] for name in _NAMED if name != "model"}
            self._shared = default | {"setting": next(iter(SETTINGS))}
            self._hidden: tuple[str, ...] = ()
            return
        self._shared = {name: value for name, value in found[0].items() if all(f.get(name) == value for f in found)}
        by_setting = [{(f["setting"], f[name]) for f in found} for name in _FROM_SETTING]
        num_settings = len({f["setting"] for f in found})
        self._hidden = tuple(
            name
            for name, pairs in zip(_FROM_SETTING, by_setting, strict=True)
            if "setting" not in self._shared and len(pairs) == num_settings
        )

    def __call__(self, case: Case) -> str:
        """The title of ``case``: ``hydra tiny 32+32 x4 seed 1``."""
        differing = {
            name: value
            for name, value in _fields(case).items()
            if name not in self._hidden and (name not in self._shared or self._shared[name] != value)
        }
        if self._is_alone and case.options.lora.r == _usual_rank(differing.get("setting")):
            differing.pop("lora.r")
        setting, model = differing.pop("setting", ""), differing.pop("model", "")
        name = str(PurePath(*PurePath(model).parts[-self._num_parts :])) if model else ""
        words = [case.method, setting if setting in SETTINGS else "", name]
        words += [f"{case.prompt_len}+{case.completion_len}", f"x{case.batch_size}"]
        words += [_word(name, value) for name, value in differing.items()]
        return " ".join(word for word in words if word)

    @property
    def shared(self) -> str:
        """Model, device and dtype, as far as all cases share them: ``tiny · cpu · float32``. Empty without cases."""
        return " · ".join(str(self._shared[name]) for name in ("model", "device", "dtype") if name in self._shared)


def _fields(case: Case) -> dict[str, Any]:
    """Fields of ``case`` beside its method and sizes; options where they differ from the setting."""
    options = dataclasses.asdict(case.options)
    return {
        "setting": setting_of(options),
        **{name: getattr(case, name) for name in _NAMED},
        "lora.r": case.options.lora.r,
        **changed_options(options),
    }


def _usual_rank(setting: str | None) -> int:
    return int(SETTINGS.get(setting or "", {}).get("options", {}).get("lora.r", LoraOptions().r))


def _word(name: str, value: object) -> str:
    if name == "seed":
        return f"seed {value}"
    return f"{name}={value}" if "." in name else str(value)
