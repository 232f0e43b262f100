"""Attention heads, measured: what a head looks at, what it adds, and what a model does without it."""

from nondual.analysis.attention_layers import AttentionLayer, all_heads, attention_layer, attention_layers
from nondual.analysis.heads import (
    composition_score,
    head_contributions,
    ov_circuit,
    overlap,
    profile,
    qk_circuit,
    weights_of,
)
from nondual.analysis.interventions import (
    HeadRecord,
    mean_values,
    patch_heads,
    record_heads,
    replace_heads,
    resample_values,
)

__all__ = [
    "AttentionLayer",
    "HeadRecord",
    "all_heads",
    "attention_layer",
    "attention_layers",
    "composition_score",
    "head_contributions",
    "mean_values",
    "ov_circuit",
    "overlap",
    "patch_heads",
    "profile",
    "qk_circuit",
    "record_heads",
    "replace_heads",
    "resample_values",
    "weights_of",
]
