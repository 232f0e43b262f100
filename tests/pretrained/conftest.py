"""What several files of tests read: the real models, and small checkpoints of transformers' Mamba and Mamba-2.

encoder   MiniLM
smol      SmolLM2: model and tokenizer
theirs    theirs("mamba2", n_groups=1): transformers' model with random weights
folder    a folder with a checkpoint of transformers' Mamba
"""

from pathlib import Path

import pytest
import torch

from nondual.pretrained import minilm, smollm2


@pytest.fixture(scope="module")
def encoder():
    return minilm()


@pytest.fixture(scope="module")
def smol():
    return smollm2()


@pytest.fixture(scope="session")
def theirs():
    """A function: transformers' Mamba or Mamba-2, with random weights, each at a value of its own."""
    from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM

    def make(kind="mamba", seed=0, **more):
        torch.manual_seed(seed)
        settings = dict(vocab_size=53, hidden_size=12, state_size=5, num_hidden_layers=2) | more
        if kind == "mamba2":
            made = Mamba2ForCausalLM(Mamba2Config(**(dict(num_heads=6, head_dim=4, n_groups=2) | settings)))
        else:
            made = MambaForCausalLM(MambaConfig(**settings))
        with torch.no_grad():
            for name, p in made.named_parameters():
                # they begin at 1 or 0, where another's or a transposed one would not be noticed
                if name.endswith(("norm.weight", "norm_f.weight", "D", "bias")) and "dt_" not in name:
                    p.uniform_(0.5, 1.5)
                if name.endswith("out_proj.weight"):  # or every token would be followed by itself,
                    p *= 50
                if name.endswith(("embeddings.weight", "lm_head.weight")):  # or by the one with the longest vector
                    p /= p.norm(dim=1, keepdim=True)
        made.generation_config.eos_token_id = None
        return made.eval()

    return make


@pytest.fixture
def folder(tmp_path, theirs) -> Path:
    theirs().save_pretrained(tmp_path)
    return tmp_path
