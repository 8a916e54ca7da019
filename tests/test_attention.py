"""Attention as one node: a kernel where the runtime has one, ordinary operators where it has not, the same numbers in both."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from saferedir.export.attention import OPERATOR, attention_nodes, has_attention, inlined
from saferedir.export.capture import capture_obstacles
from saferedir.export.engine_graph import Graph
from saferedir.export.onnx_export import BF16_OPSET, OPSET, to_onnx

HEADS, WIDTH = 4, 8


class Attending(nn.Module):
    """[B, 6, 32] and [B, 5, 32] -> [B, 6, 32]."""

    def __init__(self, dtype: torch.dtype = torch.float32, **options: Any) -> None:
        super().__init__()
        self.dtype, self.options = dtype, options

    def forward(self, query: Tensor, key: Tensor) -> Tensor:
        apart = [
            tensor.to(self.dtype).reshape(*tensor.shape[:2], HEADS, WIDTH).transpose(1, 2) for tensor in (query, key, key.sin())
        ]
        attended = functional.scaled_dot_product_attention(*apart, **self.options)
        return attended.transpose(1, 2).flatten(2).float() * 2


def traced(dtype: torch.dtype = torch.float32, opset: int = OPSET, **options: Any) -> tuple[Any, dict[str, Tensor]]:
    torch.manual_seed(0)
    inputs = {"query": torch.randn(2, 6, HEADS * WIDTH), "key": torch.randn(2, 5, HEADS * WIDTH)}
    return to_onnx("attending", {"attending": Graph(Attending(dtype, **options), inputs, ("attended",))}, opset=opset), inputs


def operators(model: Any, folder: Path) -> list[str]:
    """Types of the nodes that ONNX Runtime runs."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return [node.op_type for node in onnx.load(str(folder / "optimised.onnx")).graph.node]


def run(model: Any, inputs: dict[str, Tensor]) -> Any:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})[0]


@pytest.mark.parametrize("scale", [None, 0.7])
def test_kernel_and_operators_give_what_pytorch_gives(tmp_path: Path, scale: float | None) -> None:
    model, inputs = traced(scale=scale)
    expected = Attending(scale=scale)(**inputs).numpy()
    onnx.checker.check_model(model, full_check=True)
    assert OPERATOR in operators(model, tmp_path)
    plain = inlined(model)
    assert OPERATOR not in operators(plain, tmp_path)
    assert not has_attention(plain)
    for one in (model, plain):
        assert np.abs(run(one, inputs) - expected).max() < 1e-5


def test_it_is_captured(tmp_path: Path) -> None:
    model, _ = traced()
    onnx.save(model, str(tmp_path / "attending.onnx"))
    assert capture_obstacles(tmp_path / "attending.onnx") == []


@pytest.mark.parametrize(
    ("dtype", "opset", "kind"),
    [(torch.float16, OPSET, onnx.TensorProto.FLOAT16), (torch.bfloat16, BF16_OPSET, onnx.TensorProto.BFLOAT16)],
)
def test_in_half_its_definition_is_in_half(dtype: torch.dtype, opset: int, kind: int) -> None:
    model, _ = traced(dtype, opset)
    assert has_attention(model)
    onnx.checker.check_model(model, full_check=True)
    inferred = onnx.shape_inference.infer_shapes(inlined(model)).graph
    products = {node.output[0] for node in inferred.node if node.op_type == "MatMul"}
    assert [value.type.tensor_type.elem_type for value in inferred.value_info if value.name in products] == [kind] * 2


def test_a_mask_is_not_dropped() -> None:
    mask = torch.tensor([[True, True, True, False, False]]).expand(6, 5)
    model, inputs = traced(attn_mask=mask)
    assert not has_attention(model)
    assert np.abs(run(model, inputs) - Attending(attn_mask=mask)(**inputs).numpy()).max() < 1e-5


def test_pytorch_is_left_as_it_was() -> None:
    before = functional.scaled_dot_product_attention
    with pytest.raises(RuntimeError), attention_nodes():
        assert functional.scaled_dot_product_attention is not before
        raise RuntimeError
    assert functional.scaled_dot_product_attention is before


def test_tensorrt_reads_it(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    model, _ = traced()
    onnx.save(model, str(tmp_path / "attending.onnx"))
    code = f"""
import tensorrt_rtx as trt
logger = trt.Logger(trt.Logger.ERROR)
network = trt.Builder(logger).create_network()
parser = trt.OnnxParser(network, logger)
assert parser.parse_from_file({str(tmp_path / "attending.onnx")!r}), parser.get_error(0)
kinds = {{network.get_layer(index).type for index in range(network.num_layers)}}
assert trt.LayerType.ATTENTION_INPUT in kinds or trt.LayerType.MATRIX_MULTIPLY in kinds, kinds
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env={**os.environ})
    assert done.returncode == 0, done.stderr
