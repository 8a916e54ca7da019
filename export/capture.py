"""What keeps an engine from being captured in a CUDA graph by ONNX Runtime.

Capture ends where a node is not the CUDA provider's: ONNX Runtime then copies its tensors to the host and back. So it does with
arithmetic on shapes, which it leaves on the host; a shape may only be handed on as it is. Which kernels the provider has is
taken from ONNX Runtime's list, docs/OperatorKernels.md at commit 001d12d, and of GlobalAveragePool from its pull request 27733;
how a kernel is matched with a node from core/framework/kernel_registry.cc: one without a last version serves its own operator
version only. So a newer operator set is not a better one: that list has ReduceMax and ReduceMin of version 18, and none of
version 20.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto

from saferedir.export.attention import is_attention
from saferedir.export.rounded import tensor_types
from saferedir.runtime.installation import import_onnxruntime

FLOAT, HALF, BF16 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16
INT32, INT64, BOOL = TensorProto.INT32, TensorProto.INT64, TensorProto.BOOL
FLOATS, ALL_FLOATS, BOOLS = frozenset((FLOAT, HALF)), frozenset((FLOAT, HALF, BF16)), frozenset((BOOL,))
NUMBERS = frozenset((FLOAT, HALF, BF16, INT32, INT64))
ORDERED = frozenset((FLOAT, HALF, INT32, INT64))
ANY = NUMBERS | BOOLS

CONTROL_FLOW = frozenset(("If", "Loop", "Scan", "SequenceMap"))
#: Operators whose results have shapes that depend on data.
DATA_SHAPED = frozenset(("Compress", "NonZero", "StringSplit", "TopK", "Unique", "NonMaxSuppression"))
#: Operators that give shapes, which lie on the host.
SHAPES = frozenset(("Shape", "Size"))
#: Operators that take a shape from the host, as their second input.
SHAPED = frozenset(("Expand", "Reshape"))


@dataclass(frozen=True)
class Kernel:
    """A kernel of the CUDA provider: versions of the operator, and types of what it computes on."""

    first: int
    #: None: `first` alone.
    last: int | None
    types: frozenset[int]

    def serves(self, version: int, kind: int) -> bool:
        """Whether it is taken for a node of that operator version and type."""
        last = self.first if self.last is None else self.last
        return self.first <= version <= last and kind in self.types


#: Those that graphs of Stable Diffusion and safety use, in the operator versions of sets 18 to 22.
KERNELS: dict[str, tuple[Kernel, ...]] = {
    **{name: (Kernel(13, None, ALL_FLOATS),) for name in ("Erf", "Exp", "Gemm", "MatMul")},
    **{name: (Kernel(13, None, ALL_FLOATS),) for name in ("Sigmoid", "Softmax", "Sqrt", "Tanh")},
    **{name: (Kernel(14, None, NUMBERS),) for name in ("Add", "Div", "Mul", "Sub")},
    **{name: (Kernel(13, None, ANY),) for name in ("Concat", "Expand", "Gather", "Slice")},
    **{name: (Kernel(13, 20, ANY), Kernel(21, 22, ANY)) for name in ("Squeeze", "Transpose", "Unsqueeze")},
    **{name: (Kernel(18, None, frozenset((FLOAT, HALF, INT32))),) for name in ("ReduceL1", "ReduceL2", "ReduceMean")},
    **{name: (Kernel(18, None, ORDERED),) for name in ("ReduceMax", "ReduceMin")},
    **{name: (Kernel(7, None, FLOATS),) for name in ("Cos", "Sin")},
    **{name: (Kernel(7, None, BOOLS),) for name in ("And", "Or")},
    **{name: (Kernel(16, None, ORDERED),) for name in ("GreaterOrEqual", "LessOrEqual")},
    **{name: (Kernel(13, None, ORDERED),) for name in ("Greater", "Less")},
    "Abs": (Kernel(13, None, NUMBERS),),
    "Cast": (Kernel(13, 18, ANY), Kernel(19, 20, ANY), Kernel(21, 22, ANY)),
    "Clip": (Kernel(13, None, frozenset((FLOAT, HALF, INT64))),),
    "Conv": (Kernel(11, 21, FLOATS), Kernel(22, None, ALL_FLOATS)),
    "Equal": (Kernel(13, None, ORDERED | BOOLS),),
    "Gelu": (Kernel(20, None, ALL_FLOATS),),
    "GlobalAveragePool": (Kernel(1, None, FLOATS),),
    "Identity": (Kernel(14, 18, ANY), Kernel(19, None, ANY)),
    "InstanceNormalization": (Kernel(6, None, FLOATS),),
    "IsInf": (Kernel(10, 19, frozenset((FLOAT,))), Kernel(20, None, ALL_FLOATS)),
    "IsNaN": (Kernel(13, 19, ALL_FLOATS), Kernel(20, None, ALL_FLOATS)),
    "LayerNormalization": (Kernel(17, None, ALL_FLOATS),),
    "Not": (Kernel(1, None, BOOLS),),
    "Pow": (Kernel(15, None, NUMBERS),),
    "ReduceLogSumExp": (Kernel(18, None, FLOATS),),
    "ReduceSum": (Kernel(13, None, NUMBERS),),
    "Relu": (Kernel(14, None, ALL_FLOATS),),
    "Reshape": (Kernel(14, 18, ANY), Kernel(19, 20, ANY), Kernel(21, 22, ANY)),
    "Resize": (Kernel(18, None, frozenset((FLOAT, HALF, INT32))), Kernel(19, None, frozenset((FLOAT, HALF, INT32)))),
    "Softplus": (Kernel(1, None, FLOATS),),
    "Split": (Kernel(18, None, ANY),),
    "Where": (Kernel(16, None, NUMBERS),),
}  # fmt: skip


@dataclass(frozen=True)
class Obstacle:
    """A node that ends capture, and why."""

    node: str
    operator: str
    reason: str


def capture_obstacles(path: Path) -> list[Obstacle]:
    """What would end capture of the graph in `path`, with its batch dynamic as it is in a bundle; empty: nothing.

    The graph is looked at as ONNX Runtime's provider-independent optimisations leave it.
    """
    model = _optimised(path)
    types = tensor_types(model)
    version = {own.domain: own.version for own in model.opset_import}.get("", 0)
    host = _on_the_host(model)
    reasons = ((node, _reason(node, types, version, host)) for node in model.graph.node)
    return [Obstacle(node.name, node.op_type, reason) for node, reason in reasons if reason]


def _on_the_host(model: Any) -> set[str]:
    """Names of shapes, and of what is computed from them."""
    host: set[str] = set()
    for node in model.graph.node:
        if node.op_type in SHAPES or (node.op_type not in SHAPED and host.intersection(node.input)):
            host.update(node.output)
    return host


def _reason(node: Any, types: dict[str, int], opset: int, host: set[str]) -> str | None:
    if node.op_type in CONTROL_FLOW:
        return "control flow"
    if node.op_type in DATA_SHAPED:
        return "the shape of its result depends on data"
    if node.op_type in SHAPES:
        return None
    if host.intersection(node.input[:1] if node.op_type in SHAPED else node.input):
        return "computes with a shape, on the host"
    if is_attention(node) and types[node.input[0]] in FLOATS:
        return None
    if node.domain not in ("", "ai.onnx"):
        return f"of the domain {node.domain}, which is not in the list"
    if node.op_type == "Constant":
        return None
    operator = onnx.defs.get_schema(node.op_type, opset, "").since_version
    kind = types[node.input[1 if node.op_type == "Where" else 0]]
    if any(kernel.serves(operator, kind) for kernel in KERNELS.get(node.op_type, ())):
        return None
    return f"no CUDA kernel for version {operator} and {TensorProto.DataType.Name(kind).lower()}"


def _optimised(path: Path) -> Any:
    onnxruntime = import_onnxruntime()
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory() as folder:
        optimised = Path(folder) / "optimised.onnx"
        options.optimized_model_filepath = str(optimised)
        onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        return onnx.load(str(optimised), load_external_data=False)
