"""What several files of tests read: the real models, small checkpoints of transformers' Mamba and Mamba-2, and Whisper.

encoder   MiniLM
smol      SmolLM2: model and tokenizer
recogniser  Whisper tiny.en
judge_of  judge_of(model, frames): transformers' Whisper with the weights of a SpeechTransformer
theirs    theirs("mamba2", n_groups=1): transformers' model with random weights
two_towers  two_towers("siglip", text={"hidden_act": "gelu"}): transformers' CLIP or SigLIP with random weights
folder    a folder with a checkpoint of transformers' Mamba
"""

from pathlib import Path

import pytest
import torch

from nondual.pretrained import minilm, smollm2, whisper


@pytest.fixture(scope="module")
def encoder():
    return minilm()


@pytest.fixture(scope="module")
def smol():
    return smollm2()


@pytest.fixture(scope="session")
def recogniser():
    return whisper()


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


@pytest.fixture(scope="session")
def judge_of():
    """A function: transformers' Whisper, with the weights of a SpeechTransformer of ours."""
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    inside = {
        ".mixer.": ".self_attn.",
        ".cross.": ".encoder_attn.",
        ".feed_forward.linear1.": ".fc1.",
        ".feed_forward.linear2.": ".fc2.",
        ".norm1.": ".self_attn_layer_norm.",
    }
    norms = {"encoder": {".norm2.": ".final_layer_norm."}}
    norms["decoder"] = {".norm2.": ".encoder_attn_layer_norm.", ".norm3.": ".final_layer_norm."}
    outside = {"token": "decoder.embed_tokens", "position.table": "decoder.embed_positions"}
    outside |= {name: f"encoder.{name}" for name in ("conv1", "conv2")}
    outside |= {f"{half}.norm": f"{half}.layer_norm" for half in ("encoder", "decoder")}

    def renamed(name):
        half, _, rest = name.partition(".")
        if rest.startswith("layers."):
            for ours, theirs in (inside | norms[half]).items():
                name = name.replace(ours, theirs)
            return f"model.{name}"
        module, _, kind = name.rpartition(".")
        return f"model.{outside[module]}.{kind}"

    def make(model, frames):
        layers, heads = len(model.encoder.layers), model.encoder.layers[0].mixer.n_heads
        vocabulary, width = model.token.weight.shape
        config = WhisperConfig(
            vocab_size=vocabulary,
            num_mel_bins=model.conv1.in_channels,
            d_model=width,
            encoder_layers=layers,
            decoder_layers=layers,
            encoder_attention_heads=heads,
            decoder_attention_heads=heads,
            encoder_ffn_dim=model.encoder.layers[0].feed_forward.linear1.out_features,
            decoder_ffn_dim=model.encoder.layers[0].feed_forward.linear1.out_features,
            max_source_positions=frames // 2,
            max_target_positions=model.position.longest,
            **{f"{name}_token_id": 0 for name in ("pad", "bos", "eos", "decoder_start")},
        )
        config._attn_implementation = "eager"  # the one that returns weights
        judge = WhisperForConditionalGeneration(config)
        state = {renamed(name): tensor for name, tensor in model.state_dict().items()}
        for name in [name for name in state if name.endswith("k_proj.bias")]:
            assert not state.pop(name).any()  # Whisper's keys have none
        missing, unexpected = judge.load_state_dict(state, strict=False)
        assert not unexpected and set(missing) == {"model.encoder.embed_positions.weight", "proj_out.weight"}
        return judge.eval()  # the positions of the encoder are those that transformers computes; the scores are tied

    return make


@pytest.fixture(scope="session")
def two_towers():
    """A function: transformers' CLIP or SigLIP, with random weights, each at a value of its own."""
    from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel

    def make(kind="clip", seed=0, text=None, vision=None, **more):
        torch.manual_seed(seed)
        shared = {"bos_token_id": 50, "eos_token_id": 52, "pad_token_id": 1}
        texts = {"vocab_size": 53, "max_position_embeddings": 13, "hidden_size": 24, "num_attention_heads": 4}
        texts |= {"intermediate_size": 29, "num_hidden_layers": 3} | shared | (text or {})
        images = {"image_size": 12, "patch_size": 4, "hidden_size": 20, "num_attention_heads": 5}
        images |= {"intermediate_size": 31, "num_hidden_layers": 2} | (vision or {})
        if kind == "clip":
            config = CLIPConfig(text_config=texts, vision_config=images, **({"projection_dim": 17} | more))
            made = CLIPModel(config)
        else:
            texts = {"projection_size": images["hidden_size"]} | texts
            made = SiglipModel(SiglipConfig(text_config=texts, vision_config=images, **more))
        with torch.no_grad():
            for name, p in made.named_parameters():
                p.uniform_(0.5, 1.5) if "norm" in name or "logit" in name else p.normal_(std=0.3)
        return made.eval()

    return make


@pytest.fixture
def folder(tmp_path, theirs) -> Path:
    theirs().save_pretrained(tmp_path)
    return tmp_path
