"""Request of an evidence run, and the sizes of its parts. Imports no torch."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from rlhfbench.errors import RunFolderError, SweepError
from rlhfbench.files import write_atomically
from rlhfbench.measure.nvml import num_cuda_devices
from rlhfkernels.config.case import Case
from rlhfkernels.config.options import Options
from rlhfkernels.config.rules import shown

REQUEST_NAME = "request.json"
GIB = 2**30
PAPER_TOTAL_GIB = 71.1  # Hydra-PPO in Table 1 of Hydra-RLHF (arXiv:2309.00754)
# Of part 3. What matters most comes first: a part may be cut short.
PPO_METHODS = ("hydra", "joined-hydra", "lora", "dynamic-lora", "full")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """Sizes of the parts.

    Attributes:
        prompt_len: tokens of a prompt.
        completion_len: tokens of a completion.
        seq_lens: sequence lengths of Figure 2, a prompt and its completion of equal length.
        rank: rank of the adapters.
        dtype: dtype of everything but the first part, which takes bfloat16 and float32.
        verify_model: small model of the first part.
        op_rows: positions of full sequences in the second part.
        decode_batches: sequences that decode together.
        profile_len: tokens of the prompt and of the completion in the profiled step.
        batch_size: batch of every case; ``None`` is the largest that fits by plan.
        time_budget_s: seconds for timing the steps of a case, over all its blocks.
        blocks: blocks of each case of the PPO methods; several give its seconds an interval.
    """

    prompt_len: int
    completion_len: int
    seq_lens: tuple[int, ...]
    rank: int
    dtype: str
    verify_model: str
    op_rows: int
    decode_batches: tuple[int, ...]
    profile_len: int
    batch_size: int | None
    time_budget_s: float
    blocks: int = 1


# Table 1 and Figure 2 of Hydra-RLHF.
FULL = Sizes(
    prompt_len=400,
    completion_len=400,
    seq_lens=(256, 512, 1024, 2048),
    rank=128,
    dtype="bfloat16",
    verify_model="smollm2-135m",
    op_rows=3200,
    decode_batches=(1, 16, 64),
    profile_len=32,
    batch_size=None,
    time_budget_s=10.0,
)
# The same within 4 minutes on a laptop.
MINIATURE = Sizes(
    prompt_len=16,
    completion_len=16,
    seq_lens=(16, 64),
    rank=8,
    dtype="float32",
    verify_model="tiny",
    op_rows=64,
    decode_batches=(1, 4, 16),
    profile_len=8,
    batch_size=4,
    time_budget_s=0.2,
    blocks=4,
)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """An evidence run.

    Attributes:
        model: preset, checkpoint folder, .gguf file or Hugging Face model id of parts 3 to 7.
        device: ``cpu``, ``cuda`` or ``cuda:N``.
        sizes: of the parts.

    Raises:
        CaseError: a field breaks a rule of ``Case``.
    """

    model: str
    device: str
    sizes: Sizes

    def __post_init__(self) -> None:
        self.case("hydra")

    def case(self, method: str, *, seq_len: int | None = None, batch_size: int | None = None, **options: Any) -> Case:
        """Returns a case of this run.

        Args:
            method: its method.
            seq_len: prompt and completion together, half each; ``None`` takes the lengths of ``sizes``.
            batch_size: its batch; ``None`` is that of ``sizes``, or 1.
            **options: options by name, with two underscores for the dot.
        """
        sizes = self.sizes
        lens = (sizes.prompt_len, sizes.completion_len) if seq_len is None else (seq_len - seq_len // 2, seq_len // 2)
        values = {name.replace("__", "."): value for name, value in options.items()}
        return Case(
            method=method,
            model=self.model,
            prompt_len=lens[0],
            completion_len=lens[1],
            batch_size=batch_size or sizes.batch_size or 1,
            device=self.device,
            dtype=sizes.dtype,  # type: ignore[arg-type]
            options=Options.of({"lora.r": sizes.rank, **values}),
        )

    @classmethod
    def of(cls, model: str | None, device: str | None, blocks: int | None = None) -> Self:
        """Returns the request of a command: ``cuda`` where there is a device, and the sizes that fit the device.

        Args:
            model: of the request; ``None`` is the default of the device.
            device: of the request.
            blocks: of ``sizes``, where they are not the default.

        Raises:
            CaseError: a field breaks a rule of ``Case``.
        """
        if device is None:
            device = "cuda" if num_cuda_devices() else "cpu"
        on_cpu = device == "cpu"
        sizes = MINIATURE if on_cpu else FULL
        if blocks is not None:
            sizes = dataclasses.replace(sizes, blocks=blocks)
        if model is None:
            model = "tiny" if on_cpu else "llama-7b"
        return cls(model=model, device=device, sizes=sizes)

    def write(self, folder: Path) -> None:
        """Writes the request into ``folder``, or checks that the folder holds the same request.

        Raises:
            RunFolderError: the folder holds another request or other files, or cannot be written.
        """
        path = folder / REQUEST_NAME
        try:
            if path.is_file():
                if self.read(folder) != self:
                    raise RunFolderError(f"out '{folder}' holds the evidence of another request: name a new folder.")
                return
            if folder.is_dir() and any(folder.iterdir()):
                raise RunFolderError(f"out '{folder}' holds files of something else: name an empty or a new folder.")
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps(dataclasses.asdict(self), indent=2) + "\n")
        except OSError as error:
            raise RunFolderError(f"out '{folder}' cannot be written: {error.strerror}.") from error

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Returns the request in ``folder``.

        Raises:
            RunFolderError: there is none that can be read.
        """
        try:
            values = json.loads((folder / REQUEST_NAME).read_text(encoding="utf-8"))
            sizes: dict[str, Any] = {
                key: tuple(value) if isinstance(value, list) else value for key, value in values.pop("sizes").items()
            }
            return cls(**values, sizes=Sizes(**sizes))
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise RunFolderError(
                f"out '{folder}' holds a {REQUEST_NAME} that is not a request: name a new folder."
            ) from error


def parse_parts(text: str | None, known: Mapping[int, Any]) -> list[int]:
    """Returns the numbers of the parts in ``text``, joined by commas; all of ``known`` without a text.

    Raises:
        SweepError: some word is no number of a part.
    """
    if text is None:
        return list(known)
    words = [word.strip() for word in text.split(",")]
    numbers = {str(number): number for number in known}  # Python converts no word of thousands of digits
    wrong = [word for word in words if word.lstrip("0") not in numbers]
    if wrong:
        raise SweepError(
            f"--parts has {shown(word)}: it must be numbers from 1 to {len(known)}, joined by commas." for word in wrong
        )
    return list(dict.fromkeys(numbers[word.lstrip("0")] for word in words))
