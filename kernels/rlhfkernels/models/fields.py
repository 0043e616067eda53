"""Names that architectures give the fields of their configurations. Imports no torch."""

from __future__ import annotations

# The longest sequence.
POSITION_FIELDS = ("max_position_embeddings", "n_positions", "max_sequence_length")
# Parts of the names of fields that make a forward pass in train mode random.
NOISE_FIELDS = ("dropout", "pdrop", "layerdrop", "jitter")
# Fields with such a name that the forward pass of eval mode reads too, by ``model_type``: PhiMoE's router leaves out
# the experts whose scores are further from the best than this.
EVAL_FIELDS = {"phimoe": ("router_jitter_noise",)}
# Fields that this package reads. An architecture that does not declare one keeps any value of it.
NUMBER_FIELDS = (
    "head_dim",
    "num_key_value_heads",
    "sliding_window",
    "final_logit_softcapping",
    "logits_scaling",
    "logit_scale",
)
# One of them is the number of experts of a layer.
EXPERT_FIELDS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
