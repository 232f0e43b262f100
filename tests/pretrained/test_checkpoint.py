"""Checkpoint folders that are missing, cut, damaged or hostile: each is one error that names the file or the folder.

The folders are those of transformers' Mamba, read by `load_mamba`.
"""

import json
import struct
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from nondual.pretrained import load_mamba, load_mamba2

V, E = 53, 12


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


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.float8_e4m3fn, torch.complex64], ids=str)
def test_tensors_of_an_odd_dtype_are_named(folder, dtype):
    state = load_file(folder / "model.safetensors")
    state["backbone.norm_f.weight"] = torch.ones(E).to(dtype)
    save_file(state, folder / "model.safetensors")
    with pytest.raises(ValueError, match=rf"of another dtype than float16.*: norm_f\.weight {dtype}"):
        load_mamba(folder)


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
    start = time.process_time()
    try:
        load_mamba(folder)
        return False
    except (ValueError, FileNotFoundError) as error:
        assert str(folder) in str(error), error
        return True
    finally:
        assert time.process_time() - start < 30

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


def test_cut_at_every_byte_and_changed_at_random_a_checkpoint_is_read_or_refused(tmp_path, theirs):
    theirs(num_hidden_layers=1).save_pretrained(tmp_path, max_shard_size="4KB")
    assert (tmp_path / "model-00001-of-00003.safetensors").exists()
    done = subprocess.run([sys.executable, "-c", FUZZ, str(tmp_path)], capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-2000:]
    assert all(int(count) > 400 for count in done.stdout.split())
