"""Mamba and Mamba-2 checkpoints: transformers' models, randomly initialised and saved, against ours, read back."""

import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM

from nondual.pretrained import load_mamba, load_mamba2
from nondual.pretrained.mamba import from_mamba

B, N, V, E = 2, 11, 53, 12
VARIANTS = {
    "mamba": dict(),
    "mamba, its own widths": dict(expand=3, state_size=3, conv_kernel=2, time_step_rank=5, layer_norm_epsilon=0.1),
    "mamba, other biases": dict(use_bias=True, use_conv_bias=False, tie_word_embeddings=False),
    "mamba2": dict(),
    "mamba2, one group": dict(n_groups=1, chunk_size=4, use_bias=True, tie_word_embeddings=True),
    "mamba2, limited steps": dict(time_step_limit=(0.004, 0.03), chunk_size=3, layer_norm_epsilon=0.1),
    "mamba2, its own widths": dict(expand=3, num_heads=4, head_dim=9, n_groups=4, conv_kernel=2, use_conv_bias=False),
}


def theirs(variant="mamba", seed=0, **more):
    """transformers' model: random weights, none of them at a value that hides where it stands."""
    torch.manual_seed(seed)
    settings = dict(vocab_size=V, hidden_size=E, state_size=5, num_hidden_layers=2) | VARIANTS[variant] | more
    if variant.startswith("mamba2"):
        made = Mamba2ForCausalLM(Mamba2Config(**(dict(num_heads=6, head_dim=4, n_groups=2) | settings)))
    else:
        made = MambaForCausalLM(MambaConfig(**settings))
    with torch.no_grad():
        for name, p in made.named_parameters():
            if name.endswith(("norm.weight", "norm_f.weight", "D", "bias")) and "dt_" not in name:
                p.uniform_(0.5, 1.5)
            if name.endswith("out_proj.weight"):
                p *= 50  # or every token would be followed by itself,
            if name.endswith(("embeddings.weight", "lm_head.weight")):
                p /= p.norm(dim=1, keepdim=True)  # or by the longest
    made.generation_config.eos_token_id = None
    return made.eval()


def load(folder, **more):
    kind = json.loads((folder / "config.json").read_text())
    mamba2 = kind.get("model_type") == "mamba2" or (kind.get("ssm_cfg") or {}).get("layer") == "Mamba2"
    return (load_mamba2 if mamba2 else load_mamba)(folder, **more)


def tokens(length=N, batch=B):
    return torch.randint(V, (batch, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=["float32", "float64"]
)
def test_scores_and_every_gradient_are_transformers_own(variant, dtype, tolerance, tmp_path, in_float64):
    judge = theirs(variant)
    judge.save_pretrained(tmp_path)
    ours = load(tmp_path, dtype=dtype)
    if dtype == torch.float64:
        with in_float64:
            judged = judge.double()(tokens(), labels=tokens())
    else:
        judged = judge(tokens(), labels=tokens())
    scores, loss = ours(tokens()), ours.loss(tokens())
    assert scores.dtype == dtype and not ours.training
    torch.testing.assert_close(scores, judged.logits, atol=tolerance, rtol=0)
    torch.testing.assert_close(loss, judged.loss, atol=tolerance, rtol=0)
    judged.loss.backward(), loss.backward()
    expected = from_mamba({name: p.grad for name, p in judge.named_parameters()})
    found = {name: p.grad for name, p in ours.named_parameters()}
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], atol=tolerance, rtol=0, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_greedy_generation_is_transformers_own_token_by_token(variant, tmp_path):
    judge = theirs(variant)
    judge.save_pretrained(tmp_path)
    prompts = tokens(5, batch=16)
    # transformers limits the steps of Mamba-2 where it reads a prompt, but not where it decodes from its cache: that
    # variant's judge reads the whole text again for every token
    cached = "time_step_limit" not in VARIANTS[variant]
    judged = judge.generate(  # a mask, or it would take each 0 or 1 of the prompts for padding
        prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=24, do_sample=False, use_cache=cached
    )
    assert judged.shape == (16, 29) and len(judged[:, 5:].unique()) > 4  # so that there is something to get wrong
    assert torch.equal(load(tmp_path).generate(prompts, 24), judged)


@pytest.mark.parametrize("variant", ["mamba", "mamba2"])
@torch.no_grad()
def test_padded_on_the_left_it_is_transformers_with_a_mask(variant, tmp_path):
    judge = theirs(variant)
    judge.save_pretrained(tmp_path)
    mask, reset = torch.ones(B, N, dtype=torch.long), torch.zeros(B, N, dtype=torch.bool)
    mask[1, :4], reset[1, 4] = 0, True
    judged, scores = judge(tokens(), attention_mask=mask).logits, load(tmp_path)(tokens(), reset=reset)
    torch.testing.assert_close(scores[mask.bool()], judged[mask.bool()], atol=1e-5, rtol=0)


@pytest.mark.parametrize("variant", ["mamba", "mamba2"])
def test_a_model_in_several_files(variant, tmp_path):
    judge = theirs(variant)
    judge.save_pretrained(tmp_path, max_shard_size="4KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1 and not (tmp_path / "model.safetensors").exists()
    torch.testing.assert_close(load(tmp_path)(tokens()), judge(tokens()).logits, atol=1e-5, rtol=0)
    next(tmp_path.glob("model-00002*")).unlink()
    with pytest.raises(FileNotFoundError, match=r"there is no .*model-00002"):
        load(tmp_path)


@pytest.mark.parametrize("variant", ["mamba", "mamba2, one group"])
def test_the_released_codes_layout(variant, tmp_path):
    """Its names, its config.json, its vocabulary rounded up, and the tied scores stored twice."""
    judge = theirs(variant, vocab_size=56, **({"chunk_size": 256, "use_bias": False} if "2" in variant else {}))
    judge.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state["backbone.embedding.weight"] = state.pop("backbone.embeddings.weight")
    state["lm_head.weight"] = state["backbone.embedding.weight"].clone()
    save_file(state, tmp_path / "model.safetensors")
    mixer = {"d_state": 5, "d_conv": 4, "expand": 2}
    if "2" in variant:
        mixer |= {"layer": "Mamba2", "headdim": 4, "dt_limit": [0.0, float("inf")]}
    config = {"d_model": E, "n_layer": 2, "vocab_size": V, "ssm_cfg": mixer, "rms_norm": True, "attn_layer_idx": []}
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.testing.assert_close(load(tmp_path)(tokens()), judge(tokens()).logits, atol=1e-5, rtol=0)
    config["attn_layer_idx"] = [1]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"without attention .*attn_layer_idx \[1\]"):
        load(tmp_path)
    config = config | {"attn_layer_idx": [], "ssm_cfg": mixer | {"rmsnorm": False}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"ssm_cfg in .*config.json must hold .*, got rmsnorm too"):
        load(tmp_path)


def test_weights_keep_the_dtype_of_the_file_unless_told(tmp_path):
    theirs().bfloat16().save_pretrained(tmp_path)
    kept, widened = load(tmp_path), load(tmp_path, dtype=torch.float32)
    assert {p.dtype for p in kept.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in widened.parameters()} == {torch.float32}
    assert all(p.requires_grad and not p.is_meta for p in kept.parameters())
    assert kept(tokens()).dtype == torch.bfloat16
    assert torch.equal(kept.embeddings.weight.float(), widened.embeddings.weight)


def test_the_engine_can_be_named(tmp_path):
    for variant, engine in (("mamba", "reference"), ("mamba2", "chunked")):
        theirs(variant).save_pretrained(tmp_path)
        assert all(layer.mixer.impl == engine for layer in load(tmp_path, impl=engine).layers)


# --- what it refuses -----------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path) -> Path:
    theirs().save_pretrained(tmp_path)
    return tmp_path


def change(folder, **settings):
    file = folder / "config.json"
    file.write_text(json.dumps({k: v for k, v in (json.loads(file.read_text()) | settings).items() if v != "gone"}))


def test_tensors_that_do_not_fit_are_named(folder):
    state = load_file(folder / "model.safetensors")
    lost = state.pop("backbone.layers.1.mixer.D")
    state["backbone.layers.1.mixer.E"] = lost
    state["backbone.norm_f.weight"] = torch.zeros(E + 1)
    save_file(state, folder / "model.safetensors")
    with pytest.raises(ValueError) as error:
        load_mamba(folder)
    for part in (
        "missing: layers.1.mixer.D;",
        "unexpected: layers.1.mixer.E;",
        "of another shape: norm_f.weight (13,), not (12,)",
    ):
        assert part in str(error.value)


def test_tied_scores_that_are_not(folder):
    state = load_file(folder / "model.safetensors")
    save_file(state | {"lm_head.weight": torch.zeros(V, E)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"lm_head.weight must be embeddings.weight .* tie_word_embeddings"):
        load_mamba(folder)


@pytest.mark.parametrize(
    "settings, says",
    [
        (dict(model_type="falcon_mamba"), r"model_type must be 'mamba' in .*, got 'falcon_mamba'"),
        (dict(model_type="gone"), r"model_type must be 'mamba' in .*, got None"),
        (dict(hidden_act="gelu"), r"hidden_act must be 'silu' in .*, got 'gelu'"),
        (dict(vocab_size="gone"), r"config.json must say vocab_size"),
        (dict(state_size=7), r"of another shape: layers.0.mixer.A_log \(24, 5\), not \(24, 7\)"),
        (dict(num_hidden_layers=1), r"unexpected: layers.1.mixer.A_log, layers.1.mixer.D"),
        (dict(tie_word_embeddings=False), r"missing: lm_head.weight"),
    ],
    ids=str,
)
def test_a_configuration_that_does_not_fit(folder, settings, says):
    change(folder, **settings)
    with pytest.raises(ValueError, match=says):
        load_mamba(folder)


def test_the_other_kind_is_refused(folder):
    with pytest.raises(ValueError, match=r"model_type must be 'mamba2' in .*, got 'mamba'"):
        load_mamba2(folder)


def test_files_that_are_not_there(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"there is no .*model.safetensors \(pytorch_model.bin is a pickle"):
        load_mamba(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"there is no .*config.json"):
        load_mamba(folder)


class Somewhere:
    """A path that is neither a str nor a pathlib.Path."""

    def __init__(self, path):
        self.path = str(path)

    def __fspath__(self):
        return self.path


def test_the_folder_may_be_any_kind_of_path(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    for given in (folder, str(folder), Somewhere(folder), f"~/{folder.name}"):
        assert load_mamba(given).vocabulary == V


@pytest.mark.parametrize("function", [load_mamba, load_mamba2])
def test_a_hub_s_name_says_how_to_get_the_folder(function, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    name = function.__name__
    with pytest.raises(FileNotFoundError) as error:
        function("state-spaces/mamba-130m")
    assert str(error.value) == (
        "there is no folder state-spaces/mamba-130m; if it is a model on the Hugging Face Hub, download it first, one "
        "that has .safetensors files: `hf download state-spaces/mamba-130m --local-dir mamba-130m` (pip install "
        f"huggingface_hub), then {name}('mamba-130m')"
    )
    for place in ("./a/b", "/a/b", "a", "a/b/c", "../a", tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match=r"^there is no folder [^;]*$"):
            function(place)
    (tmp_path / "state-spaces/mamba-130m").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"there is no state-spaces/mamba-130m/config\.json"):
        function("state-spaces/mamba-130m")


@pytest.mark.parametrize("given", [None, 3, b"bytes", ["a"]], ids=str)
def test_what_is_no_path_is_a_type_error(given):
    with pytest.raises(TypeError, match=f"folder must be a str or a path, got {type(given).__name__}"):
        load_mamba(given)


def test_a_file_where_a_folder_is_wanted(folder):
    with pytest.raises(
        ValueError, match=r"folder must be a folder that holds config\.json, got the file .*safetensors"
    ):
        load_mamba(folder / "model.safetensors")


def test_a_dtype_that_no_weights_have(folder):
    for dtype in (torch.int8, torch.complex64, torch.float8_e4m3fn):
        with pytest.raises(ValueError, match=f"dtype must be one of torch.float16, .*, got {dtype}"):
            load_mamba(folder, dtype=dtype)
    with pytest.raises(TypeError, match=r"dtype must be a torch\.dtype, got str"):
        load_mamba(folder, dtype="float32")


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.float8_e4m3fn, torch.complex64], ids=str)
def test_tensors_of_an_odd_dtype_are_named(folder, dtype):
    state = load_file(folder / "model.safetensors")
    state["backbone.norm_f.weight"] = torch.ones(E).to(dtype)
    save_file(state, folder / "model.safetensors")
    with pytest.raises(ValueError, match=rf"of another dtype than float16.*: norm_f\.weight {dtype}"):
        load_mamba(folder)


def test_tied_scores_of_another_dtype(folder):
    state = load_file(folder / "model.safetensors")
    state["lm_head.weight"] = state["backbone.embeddings.weight"].half()
    save_file(state, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"lm_head.weight must be embeddings.weight where .*config.json says"):
        load_mamba(folder)


def test_two_tensors_of_one_meaning(folder):
    state = load_file(folder / "model.safetensors")
    save_file(state | {"norm_f.weight": torch.ones(E)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"two tensors for norm_f\.weight") as error:
        load_mamba(folder)
    assert str(error.value).startswith(f"{folder}: ")


def test_pickled_weights_are_refused_with_the_way_to_convert_them(folder):
    class Evil:
        def __reduce__(self):
            return (open, (str(folder / "was run"), "w"))

    (folder / "model.safetensors").unlink()
    torch.save({"w": Evil()}, folder / "pytorch_model.bin")
    with pytest.raises(
        FileNotFoundError, match=r"reading one can run code: convert it, .*torch\.load\(FILE, weights_only"
    ):
        load_mamba(folder)
    assert not (folder / "was run").exists()


@pytest.mark.parametrize(
    "index, says",
    [
        ({"weight_map": {"a": "../../etc/passwd"}}, r"must name \.safetensors files of its own folder, got '\.\./"),
        ({"weight_map": {"a": "/etc/x.safetensors"}}, r"files of its own folder, got '/etc/x"),
        ({"weight_map": {"a": "sub/x.safetensors"}}, "files of its own folder"),
        ({"weight_map": {"a": "..\\\\x.safetensors"}}, "files of its own folder"),
        ({"weight_map": {"a": "C:x.safetensors"}}, "files of its own folder"),
        ({"weight_map": {"a": "x\0.safetensors"}}, "files of its own folder"),
        ({"weight_map": {"a": "x.bin"}}, "files of its own folder, got 'x.bin'"),
        ({"weight_map": {"a": 3}}, "must have a weight_map from names of tensors to names of files"),
        ({"weight_map": ["x.safetensors"]}, "must have a weight_map"),
        ({"weight_map": {}}, "must have a weight_map"),
        ({}, "must have a weight_map"),
        ([], r"index\.json must hold a JSON object, got a list"),
        ({"weight_map": {"a": "gone.safetensors", "b": "lost.safetensors"}}, "there is no .*gone.*, .*lost"),
    ],
    ids=str,
)
def test_an_index_that_names_what_it_may_not(folder, index, says):
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises((ValueError, FileNotFoundError), match=says) as error:
        load_mamba(folder)
    assert "index.json" in str(error.value) or "there is no" in str(error.value)


def test_a_tensor_in_two_files(folder):
    state = load_file(folder / "model.safetensors")
    save_file({"backbone.norm_f.weight": torch.ones(E)}, folder / "more.safetensors")
    index = {"weight_map": dict.fromkeys(state, "model.safetensors") | {"x": "more.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(
        ValueError, match=r"norm_f\.weight is in .*more\.safetensors and in another file of the model too"
    ):
        load_mamba(folder)


BIG = 2**60


@pytest.mark.parametrize(
    "settings, says",
    [
        (dict(vocab_size="53"), "vocab_size must be an integer from 1 to 16777215 in .*config.json, got '53'"),
        (dict(vocab_size=True), "vocab_size must be an integer .*, got True"),
        (dict(hidden_size=-12), "hidden_size must be an integer .*, got -12"),
        (dict(hidden_size=BIG), "hidden_size must be an integer"),
        (dict(hidden_size=2**24 - 1), "describes no model|of another shape"),
        (dict(state_size=0), "state_size must be an integer"),
        (dict(state_size=None), "state_size must be an integer .*, got None"),
        (dict(conv_kernel=1.5), "conv_kernel must be an integer"),
        (dict(num_hidden_layers=10**7), "num_hidden_layers is 10000000 in .*, and .* holds .* tensors in all"),
        (dict(num_hidden_layers=0), "num_hidden_layers must be an integer from 1"),
        (dict(time_step_rank="some"), "time_step_rank must be an integer"),
        (dict(expand="2"), "expand must be a number above 0"),
        (dict(expand=float("inf")), "expand must be a number above 0"),
        (dict(expand=float("nan")), "expand must be a number above 0"),
        (dict(expand=1e-9), "describes no model"),
        (dict(use_bias="no"), "use_bias must be true or false in .*, got 'no'"),
        (dict(tie_word_embeddings=None), "tie_word_embeddings must be true or false"),
        (dict(layer_norm_epsilon="1e-5"), "layer_norm_epsilon must be a number, 0 or more, in"),
        (dict(layer_norm_epsilon=-1), "layer_norm_epsilon must be a number"),
        (dict(model_type=["mamba"]), "model_type must be 'mamba' in .*, got"),
        (dict(d_model=E), "vocab_size|n_layer must be an integer .*, got None"),
        (dict(d_model=E, n_layer=2, ssm_cfg=[1]), "ssm_cfg must be an object in .*config.json"),
        (dict(d_model=E, n_layer=2, ssm_cfg={"layer": ["Mamba1"]}), "must describe Mamba or Mamba-2 blocks"),
        (dict(d_model=E, n_layer=2, pad_vocab_size_multiple=0), "pad_vocab_size_multiple must be an integer from 1"),
    ],
    ids=str,
)
def test_a_setting_that_is_odd_or_hostile(folder, settings, says):
    change(folder, **settings)
    with pytest.raises(ValueError, match=says) as error:
        load_mamba(folder)
    assert str(folder) in str(error.value) and len(str(error.value)) < 2 * len(str(folder)) + 800


@pytest.mark.parametrize(
    "limit", [[0], [0, 1, 2], "0,1", [1, 0], [-1, 1], ["a", 1], [0, None], [0, 10**400], None], ids=str
)
def test_limits_of_the_steps_that_are_none(tmp_path, limit):
    theirs("mamba2").save_pretrained(tmp_path)
    change(tmp_path, time_step_limit=limit)
    with pytest.raises(ValueError, match=r"time_step_limit must be two numbers .* in .*config\.json"):
        load_mamba2(tmp_path)


def test_widths_of_mamba2_that_do_not_divide(tmp_path):
    theirs("mamba2").save_pretrained(tmp_path)
    change(tmp_path, head_dim=7)
    with pytest.raises(
        ValueError, match=r"config\.json describes no model: expand \* d_model must be a multiple of d_head"
    ):
        load_mamba2(tmp_path)


@pytest.mark.parametrize(
    "content, says",
    [
        (b"", "config.json is no whole JSON file"),
        (b'{"model_type": "mam', "config.json is no whole JSON file"),
        (b"\xff\xfe\x00", "config.json is no whole JSON file"),
        (b"[" * 100_000, "config.json is no whole JSON file: it is nested too deep"),
        (b'{"vocab_size": ' + b"9" * 10_000 + b"}", "config.json is no whole JSON file"),
        (b"3", "config.json must hold a JSON object, got a int"),
        (b" " * (2**26 + 1), "config.json must be a JSON file of at most 64 MiB"),
    ],
    ids=["empty", "cut", "no text", "deep", "long number", "a number", "huge"],
)
def test_a_configuration_that_is_no_json(folder, content, says):
    (folder / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=says):
        load_mamba(folder)


def header(text: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00",
        header(b"", 2**60),
        header(b"", 2**64 - 1),
        header(b"{", 10**9),
        header(b"not json"),
        header(b'{"a": {"dtype": "F32", "shape": [1152921504606846976], "data_offsets": [0, 4]}}') + bytes(4),
        header(b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}') + bytes(4),
        header(b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 1152921504606846976]}}') + bytes(4),
        header(b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}') + bytes(4),
        header(b'{"a": {"dtype": "X99", "shape": [1], "data_offsets": [0, 4]}}') + bytes(4),
        header(
            b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},'
            b'"b": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}'
        )
        + bytes(4),
        header(b"[" * 50_000),
        b"PK\x03\x04" + bytes(100),
    ],
    ids=range(14),
)
def test_hostile_safetensors_are_one_error_with_the_file_s_name(folder, content):
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError) as error:
        load_mamba(folder)
    assert str(error.value).startswith(f"{folder / 'model.safetensors'} is no whole safetensors file: ")
    assert len(str(error.value)) < len(str(folder)) + 300


FUZZ = """
import json, pathlib, random, resource, sys, time
import torch
from nondual.pretrained import load_mamba

torch.set_num_threads(1)
folder = pathlib.Path(sys.argv[1])
load_mamba(folder)
if sys.platform == "linux":
    now = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + 2**30, now + 2**30))  # a GiB more than there is now

def load():
    start = time.perf_counter()
    try:
        load_mamba(folder)
        return False
    except (ValueError, FileNotFoundError) as error:
        assert str(folder) in str(error), error
        return True
    finally:
        assert time.perf_counter() - start < 30

draw, refused = random.Random(0), []
for name in ("config.json", "model-00001-of-00003.safetensors", "model.safetensors.index.json"):
    file = folder / name
    whole = file.read_bytes()
    weights = name.endswith("safetensors")
    kept = int.from_bytes(whole[:8], "little") + 8 if weights else len(whole)  # text; behind it numbers, all alike
    count = 0
    for end in [*range(kept), *range(kept, len(whole), 97)]:
        file.write_bytes(whole[:end])
        cut = load()
        assert cut or whole[end:].isspace(), (name, end)
        count += cut
    for _ in range(200):
        data = bytearray(whole)
        for _ in range(draw.randint(1, 3)):
            likely = draw.choice(b'0123456789{}[]",:-eE.') if draw.random() < 0.7 else draw.randrange(256)
            data[draw.randrange(kept)] = likely
        file.write_bytes(data)
        count += load()
    file.write_bytes(whole)
    refused.append(count)
load_mamba(folder)
print(*refused)
"""


def test_cut_at_every_byte_and_changed_at_random_a_checkpoint_is_read_or_refused(tmp_path):
    theirs(num_hidden_layers=1).save_pretrained(tmp_path, max_shard_size="4KB")
    assert (tmp_path / "model-00001-of-00003.safetensors").exists()
    done = subprocess.run([sys.executable, "-c", FUZZ, str(tmp_path)], capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-2000:]
    assert all(int(count) > 400 for count in done.stdout.split())
