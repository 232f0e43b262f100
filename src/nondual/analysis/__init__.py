"""Attention heads, measured: what a head looks at, what it adds, what a model does without it. And what waits for what.

    attention_layers   where a model's heads are: ours, and Llama, BERT and ALBERT
    interventions      record what heads give out; put something else in its place
    heads              maps and their profiles; what a head adds
    circuits           what a head reads and writes, from its parameters
    few_shot           prompts of examples, with right or wrong answers, and what a model answers
    task_vectors       the vector that examples leave at one layer, put into a prompt without examples
    critical_path      the longest chain of operations that wait for one another
    direct_paths       what a layer reads straight from each layer before it, one path cut at a time
    modality_gap       how far apart images and texts lie in one space, and whether a plane tells them apart
    rollout            how much of each input is in each output, by the weights of all layers
    flow               how much the weights of all layers let pass from each input to each output
    attention_distance how far a head looks across an image

An example. Which of MiniLM's 72 heads looks at the word before? And for this sentence, which head moves the model's
vectors most when its mean over the sentence stands in its place?

    >>> import torch
    >>> from nondual.analysis import all_heads, mean_values, profile
    >>> from nondual.analysis import record_heads, replace_heads, weights_of
    >>> from nondual.pretrained import minilm
    >>> encoder, text = minilm(), "The eyes see, the ears hear, and the mind knows both."
    >>> ids, model = torch.tensor([encoder.tokenizer.encode(text).ids]), encoder.model
    >>> before = profile(weights_of(model, ids))["previous"]  # (6, 12), a number for each head
    >>> divmod(int(before.argmax()), 12)  # layer and head, both from 0
    (0, 2)
    >>> with torch.no_grad(), record_heads(model) as record:
    ...     usual = model(ids)
    >>> moved = {}
    >>> for head in all_heads(model):
    ...     with torch.no_grad(), replace_heads(model, mean_values(record, [head])):
    ...         moved[head] = float((model(ids) - usual).norm())
    >>> max(moved, key=moved.get)
    (0, 2)

It is the same head. (MiniLM's weights are fetched once: `python -m nondual.pretrained minilm`.)
"""

from nondual.analysis.attention_distance import attention_distance, patch_distances
from nondual.analysis.attention_layers import AttentionLayer, all_heads, attention_layer, attention_layers
from nondual.analysis.circuits import antisymmetric_share, composition_score, ov_circuit, qk_circuit
from nondual.analysis.critical_path import is_arithmetic, longest_chain, products
from nondual.analysis.direct_paths import (
    DirectPaths,
    PathEffect,
    cut_paths,
    direct_paths,
    random_direction,
    stream_parts,
)
from nondual.analysis.few_shot import (
    Answers,
    Example,
    Prompts,
    ask,
    drawn_answers,
    examples,
    first_tokens,
    prompts,
    right_answers,
    shuffled_answers,
)
from nondual.analysis.flow import attention_flow
from nondual.analysis.heads import head_contributions, overlap, profile, weights_of
from nondual.analysis.interventions import (
    HeadRecord,
    mean_values,
    patch_heads,
    record_heads,
    replace_heads,
    resample_values,
)
from nondual.analysis.modality_gap import ModalityGap, close_gap, modality_gap, probe_modality
from nondual.analysis.rollout import attention_rollout
from nondual.analysis.task_vectors import scores_with, states_at

__all__ = [
    "Answers",
    "AttentionLayer",
    "DirectPaths",
    "Example",
    "HeadRecord",
    "ModalityGap",
    "PathEffect",
    "Prompts",
    "all_heads",
    "antisymmetric_share",
    "ask",
    "attention_distance",
    "attention_flow",
    "attention_layer",
    "attention_layers",
    "attention_rollout",
    "close_gap",
    "composition_score",
    "cut_paths",
    "direct_paths",
    "drawn_answers",
    "examples",
    "first_tokens",
    "head_contributions",
    "is_arithmetic",
    "longest_chain",
    "mean_values",
    "modality_gap",
    "ov_circuit",
    "overlap",
    "patch_distances",
    "patch_heads",
    "probe_modality",
    "products",
    "profile",
    "prompts",
    "qk_circuit",
    "random_direction",
    "record_heads",
    "replace_heads",
    "resample_values",
    "right_answers",
    "scores_with",
    "shuffled_answers",
    "states_at",
    "stream_parts",
    "weights_of",
]
