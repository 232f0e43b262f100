"""A checkpoint in a folder of this machine: config.json beside safetensors, so that reading it runs no code.

The tensors lie in model.safetensors, or in several files that model.safetensors.index.json names, as Hugging Face's
`save_pretrained` writes them. The files may be cut, damaged or hostile: whatever is wrong with one is an error that
names it.
"""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LARGEST_JSON = 2**26  # bytes


def existing_folder(folder: str | os.PathLike[str], function: str) -> Path:
    """The folder as a path, if there is one.

    Args:
        folder: as the user gave it; "~" stands for the home folder.
        function: what the user called, for the message.

    Raises:
        FileNotFoundError: there is none. For what looks like a name on the Hugging Face Hub it says how to download it.
        ValueError: it is a file.
        TypeError: it is neither a str nor a path.
    """
    if not isinstance(folder, str | os.PathLike) or not isinstance(os.fspath(folder), str):
        raise TypeError(f"folder must be a str or a path, got {type(folder).__name__}")
    name = os.fspath(folder)
    place = Path(os.path.expanduser(name))
    if place.is_dir():
        return place
    if place.exists():
        raise ValueError(f"folder must be a folder that holds config.json, got the file {place}")
    hub = ""
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        local = name.split("/")[1]
        hub = (
            f"; if it is a model on the Hugging Face Hub, download it first, one that has .safetensors files: "
            f"`hf download {name} --local-dir {local}` (pip install huggingface_hub), then {function}({local!r})"
        )
    raise FileNotFoundError(f"there is no folder {name}{hub}")


def read_json(file: Path) -> dict[str, Any]:
    """What a JSON file holds.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is cut, damaged, far too large, or holds no object.
    """
    if not file.exists():
        raise FileNotFoundError(f"there is no {file}")
    if not file.is_file() or file.stat().st_size > LARGEST_JSON:
        raise ValueError(f"{file} must be a JSON file of at most {LARGEST_JSON >> 20} MiB")
    try:
        found = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as why:  # no JSON, no Unicode, too many digits; nested too deep
        said = "it is nested too deep" if isinstance(why, RecursionError) else str(why).splitlines()[0]
        raise ValueError(f"{file} is no whole JSON file: {said:.200}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{file} must hold a JSON object, got a {type(found).__name__}")
    return found


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder, from one safetensors file or from several with an index.

    Raises:
        FileNotFoundError: a file is missing. Where there are only pickled weights, it says how to convert them.
        ValueError: a file is cut or damaged, an index names files elsewhere, or two files have the same tensor.
        ImportError: safetensors is not installed.
    """
    try:
        from safetensors.torch import load_file
    except ImportError:
        raise ImportError("safetensors is needed: pip install 'nondual[pretrained]'") from None
    index = folder / "model.safetensors.index.json"
    names = _shards(index) if index.exists() else ["model.safetensors"]
    if missing := [name for name in names if not (folder / name).exists()]:
        pickled = ""
        if found := sorted(folder.glob("*.bin")):
            pickled = (
                f" ({found[0].name} is a pickle, and is not read, for reading one can run code: convert it, by "
                "`safetensors.torch.save_file(torch.load(FILE, weights_only=True), 'model.safetensors')`)"
            )
        raise FileNotFoundError(f"there is no {', '.join(str(folder / name) for name in missing)}{pickled}")
    state: dict[str, Tensor] = {}
    for name in names:
        try:
            loaded = load_file(folder / name)
        except Exception as why:  # safetensors raises errors of its own for some faults, and Python's for others
            said = str(why).splitlines()[0] if str(why) else type(why).__name__
            raise ValueError(f"{folder / name} is no whole safetensors file: {said:.200}") from None
        if twice := sorted(state.keys() & loaded.keys()):
            raise ValueError(f"{twice[0]} is in {folder / name} and in another file of the model too")
        state |= loaded
    return state


def _shards(index: Path) -> list[str]:
    """The files that an index names, each in the index's own folder."""
    files = read_json(index).get("weight_map")
    if not isinstance(files, dict) or not files or not all(isinstance(name, str) for name in files.values()):
        raise ValueError(f"{index} must have a weight_map from names of tensors to names of files")
    for name in files.values():
        if not re.fullmatch(r"[^/\\:\0]+\.safetensors", name):
            raise ValueError(f"{index} must name .safetensors files of its own folder, got {name!r:.100}")
    return sorted(set(files.values()))


def assign(model: nn.Module, state: dict[str, Tensor], folder: Path) -> None:
    """Make the tensors of a folder the model's own; a model on the meta device needs no memory before.

    Args:
        model: as config.json describes it.
        state: the folder's tensors, by the model's names.
        folder: where they come from, for the message.

    Raises:
        ValueError: tensors are missing, too many, or of the wrong shape or dtype.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    problems = {
        "missing": sorted(expected.keys() - state.keys()),
        "unexpected": sorted(state.keys() - expected.keys()),
        "of another shape": [
            f"{name} {tuple(state[name].shape)}, not {shape}"
            for name, shape in expected.items()
            if name in state and tuple(state[name].shape) != shape
        ],
        "of another dtype than float16, bfloat16, float32 and float64": [
            f"{name} {state[name].dtype}" for name in expected if name in state and state[name].dtype not in DTYPES
        ],
    }
    if found := "; ".join(f"{what}: {_first(names)}" for what, names in problems.items() if names):
        raise ValueError(f"the tensors of {folder} must be those that its config.json describes; {found}")
    model.load_state_dict(state, assign=True)


def check_dtype(dtype: object) -> None:
    """Refuse what weights cannot be loaded as; None stands for the dtypes of the files.

    Raises:
        TypeError: no torch.dtype.
        ValueError: one that is not in DTYPES.
    """
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype must be a torch.dtype, got {type(dtype).__name__}")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(map(str, DTYPES))}, got {dtype}")


def renamed_tensors(folder: Path, rename: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of a folder in our names.

    Args:
        folder: as in `read_tensors`.
        rename: what gives them our names; its errors get the folder's name.

    Raises:
        FileNotFoundError, ValueError, ImportError: as `read_tensors`, and a ValueError of rename.
    """
    state = read_tensors(folder)
    try:
        return rename(state)
    except ValueError as why:
        raise ValueError(f"{folder}: {why}") from None


def check_layers(
    n_layers: tuple[int, ...], state: dict[str, Tensor], folder: Path, setting: str = "num_hidden_layers"
) -> None:
    """Refuse more layers than a folder has tensors: making a model of very many could take hours.

    Args:
        n_layers: how many config.json asks for, in each part of the model.
        state: the folder's tensors.
        folder: where they come from, for the message.
        setting: what config.json calls it.

    Raises:
        ValueError: there are more.
    """
    if sum(n_layers) > len(state):
        asked = f"{setting} {'is' if len(n_layers) == 1 else 'are'} {sum(n_layers)}"
        raise ValueError(f"{asked} in {folder / 'config.json'}, and {folder} holds {len(state)} tensors in all")


def filled(make: Callable[[], Model], state: dict[str, Tensor], folder: Path, dtype: torch.dtype | None) -> Model:
    """The model that config.json describes, with the folder's tensors in it, in evaluation mode.

    Args:
        make: the model; it is called on the meta device, since the numbers are the file's.
        state: the folder's tensors, by the model's names.
        folder: where they come from, for the messages.
        dtype: of the weights; None for those of the file.

    Raises:
        ValueError: widths that no model can have, or what `assign` refuses.
    """
    try:
        with torch.device("meta"):
            model = make()
    except (ValueError, RuntimeError) as why:  # widths that do not divide, or too large for torch
        raise ValueError(f"{folder / 'config.json'} describes no model: {str(why).splitlines()[0]}") from None
    assign(model, state, folder)
    return (model if dtype is None else model.to(dtype)).eval()


def _first(names: list[str], count: int = 4) -> str:
    """The first of a list, which may have hundreds, and how many more there are."""
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")
