"""Tensors and nodes are read from ONNX files that the official package wrote, and broken files say what is wrong."""

import numpy as np
import pytest
import torch

from nondual.pretrained.onnx_file import read_onnx

onnx = pytest.importorskip("onnx")


@pytest.fixture(scope="module")
def made() -> tuple[bytes, dict[str, np.ndarray]]:
    """A small model, and its tensors."""
    generator = np.random.default_rng(0)
    arrays = {
        "matrix": generator.standard_normal((5, 7)).astype(np.float32),
        "half": generator.standard_normal(11).astype(np.float16),
        "long": generator.standard_normal((3, 200)).astype(np.float32),
    }
    tensors = [onnx.numpy_helper.from_array(array, name) for name, array in arrays.items()]
    tensors.append(onnx.numpy_helper.from_array(np.arange(3), "whole numbers"))
    nodes = [
        onnx.helper.make_node("MatMul", ["x", "matrix"], ["y"], name="/first/MatMul"),
        onnx.helper.make_node("Identity", ["y"], ["z"], name="/second"),
    ]
    values = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in "xz"]
    graph = onnx.helper.make_graph(nodes, "graph", values[:1], values[1:], tensors)
    return onnx.helper.make_model(graph).SerializeToString(), arrays


def test_tensors_and_nodes(made):
    data, arrays = made
    found = read_onnx(data)
    assert found.inputs == {"/first/MatMul": ["x", "matrix"], "/second": ["y"]}
    assert found.tensors.keys() == arrays.keys()  # and not the whole numbers
    for name, array in arrays.items():
        assert torch.equal(found.tensors[name], torch.from_numpy(array))
    found.tensors["matrix"].zero_()
    assert read_onnx(data).tensors["matrix"].any()


def test_broken_files(made):
    data, _ = made
    for bad in (b"\x07", data[: len(data) // 2], b"\x3a\xff", b"\x0b"):
        with pytest.raises(ValueError, match="this is no ONNX file"):
            read_onnx(bad)
    with pytest.raises(ValueError, match="there is no graph in it"):
        read_onnx(b"")
    tensor = onnx.TensorProto(dims=[3], data_type=1, name="t", raw_data=bytes(8))
    graph = onnx.GraphProto(initializer=[tensor])
    with pytest.raises(ValueError, match=r"the tensor t of shape \(3,\) has 8 bytes"):
        read_onnx(onnx.ModelProto(graph=graph).SerializeToString())
