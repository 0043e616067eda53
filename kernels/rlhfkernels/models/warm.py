"""Does, when imported, what each process does once, for a process that many are forked from.

Of the 0.4 s that building a small model takes, 0.1 s were 870 regular expressions that transformers compiles at the
first adapter of a process, and pydantic with its validators of a case. A default run forks 120 processes.
"""

from __future__ import annotations

import peft.utils.transformers_weight_conversion  # noqa: F401 (PEFT imports it at the first adapter)
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from rlhfkernels.config.case import Case

Case(method="full", model="tiny", prompt_len=1, completion_len=1, batch_size=1)
get_checkpoint_conversion_mapping("llama")  # of any model: the mappings of all are made together
