"""Half precision: what is stored, what is computed in it, what stays in fp32, and how far the pictures lie apart."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from benchmarks.small_pipeline import save_small_pipeline, save_small_safety
from saferedir.engines import open_bundle
from saferedir.engines.errors import BackendError, RequestError
from saferedir.engines.plan_cache import PlanCache
from saferedir.export.bundle_export import BundleOptions
from saferedir.export.command import export_folder
from saferedir.export.half import halved
from saferedir.export.plan_builder import PlanOptions, build_plans
from saferedir.export.rounded import MAGNITUDES, load_rounded, rounded, tensor_types, watched
from saferedir.runtime import Pipeline
from saferedir.runtime.verify import verify_bundle
from saferedir_torch.models import load_pipeline

HALVES = ("fp16", pytest.param("bf16", marks=pytest.mark.slow))
PRODUCTS = ("Conv", "MatMul", "Gemm")
NORMS = ("InstanceNormalization", "GroupNormalization", "LayerNormalization")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("half")
    save_small_safety(save_small_pipeline(folder / "model", width=32, heads=2), folder / "safety")
    return folder


@cache
def exported(folder: Path, precision: str) -> Path:
    """The bundle in `precision`."""
    options = BundleOptions(name=precision, max_batch=4, precision=precision)
    return export_folder(folder / "model", folder / "safety", folder / precision, options, on_step=lambda *_: None)


@pytest.mark.slow
@pytest.mark.parametrize("precision", HALVES)
def test_the_model_computes_in_half_and_the_safety_in_fp32(folder: Path, precision: str) -> None:
    half = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}[precision]
    counted = {}
    for engine in ("plain_step", "step", "text_encoder", "vae_decoder"):
        path = exported(folder, precision) / f"{engine}.onnx"
        model = onnx.load(str(path), load_external_data=False)
        types = tensor_types(model)
        products = [node for node in model.graph.node if node.op_type in PRODUCTS]
        counted[engine] = [types[node.output[0]] for node in products if not node.name.startswith("safety/")]
        if engine == "step":
            counted["safety"] = [types[node.output[0]] for node in products if node.name.startswith("safety/")]
        assert half not in {types[tensor.name] for tensor in (*model.graph.input, *model.graph.output)}
        assert {types[node.output[0]] for node in model.graph.node if node.op_type in NORMS} <= {TensorProto.FLOAT}
    assert set(counted["plain_step"]) == set(counted["text_encoder"]) == set(counted["vae_decoder"]) == {half}
    assert set(counted["safety"]) == {TensorProto.FLOAT}
    assert counted["step"] == counted["plain_step"]


@pytest.mark.slow
@pytest.mark.parametrize("precision", HALVES)
def test_a_bundle_in_half_precision_is_verified_by_rounding(folder: Path, precision: str) -> None:
    report = verify_bundle(exported(folder, precision), folder / "model", folder / "safety", backend="rounded")
    assert report.passed
    assert report.pictures is not None
    assert 40 < report.pictures.psnr < float("inf")
    rows = {(row.engine, row.output): row for row in report.parity or []}
    assert rows["plain_step", "next_denoised"].worst > 1e-5


@pytest.mark.slow
def test_fp16_draws_on_the_cpu(folder: Path) -> None:
    bundle = exported(folder, "fp16")
    drawn = [
        np.asarray(Pipeline.from_bundle(bundle, backend=backend)("a church", num_inference_steps=4).images[0])
        for backend in ("ort-cpu", "rounded")
    ]
    assert np.abs(drawn[0].astype(int) - drawn[1]).max() <= 8


@pytest.mark.slow
def test_bf16_says_where_it_draws(folder: Path) -> None:
    with pytest.raises(BackendError, match="bf16"):
        Pipeline.from_bundle(exported(folder, "bf16"), backend="ort-cpu")("a church", num_inference_steps=4)


@pytest.mark.slow
@pytest.mark.parametrize("precision", HALVES)
def test_half_weights_are_in_their_own_type_outside_the_graphs(folder: Path, precision: str) -> None:
    stored = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}[precision]
    bundle = exported(folder, precision)
    graph = onnx.load(str(bundle / "plain_step.onnx"), load_external_data=False).graph
    outside = [tensor for tensor in graph.initializer if tensor.data_location == TensorProto.EXTERNAL]
    assert len(outside) > 10
    assert sum(tensor.data_type == stored for tensor in outside) > 0.9 * len(outside)
    parameters = sum(own.numel() for own in load_pipeline(folder / "model").unet.parameters())
    assert (bundle / "unet.safetensors").stat().st_size < 1.2 * 2 * parameters


@pytest.mark.slow
@pytest.mark.parametrize("precision", HALVES)
def test_plans_are_built_of_graphs_in_half(folder: Path, tmp_path: Path, precision: str) -> None:
    bundle = open_bundle(exported(folder, precision))
    plans = build_plans(bundle, PlanOptions(batch=(1, 1, 2)), PlanCache(tmp_path), ("text_encoder", "step", "vae_decoder"))
    assert [plan.built for plan in plans] == [True] * 3


def test_a_norm_is_typed_whose_weights_are_stored_in_another_type() -> None:
    group = helper.make_node("GroupNormalization", ["x", "scale", "bias"], ["y"], num_groups=2, name="norm")
    casts = [helper.make_node("Cast", [f"{name}.stored"], [name], to=TensorProto.FLOAT) for name in ("scale", "bias")]
    stored = [helper.make_tensor(f"{name}.stored", TensorProto.BFLOAT16, [4], [1.0] * 4) for name in ("scale", "bias")]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 4, 8, 8]) for name in ("x", "z")]
    graph = helper.make_graph([*casts, group, helper.make_node("Relu", ["y"], ["z"])], "g", ends[:1], ends[1:], stored)
    types = tensor_types(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)]))
    assert types["y"] == types["scale"] == TensorProto.FLOAT
    assert types["scale.stored"] == TensorProto.BFLOAT16


def test_an_unknown_precision_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"precision is 'fp8'; expected one of fp32, fp16, bf16"):
        BundleOptions(name="x", precision="fp8").check()


def test_islands_take_and_give_half_and_compute_in_fp32(folder: Path) -> None:
    pipeline = load_pipeline(folder / "model")
    nn.init.constant_(pipeline.unet.conv_norm_out.weight, 1 / 3)
    half = halved(pipeline, torch.float16, (nn.GroupNorm,))
    norms = [module for module in half.unet.modules() if isinstance(module, nn.GroupNorm)]
    assert norms
    assert torch.equal(half.unet.conv_norm_out.weight, pipeline.unet.conv_norm_out.weight)  # not rounded on the way
    assert {norm.weight.dtype for norm in norms} == {torch.float32}
    # Its mean square is beyond what fp16 holds.
    large = torch.randn(1, norms[0].num_channels, 4, 4).half() * 8000
    assert norms[0](large).dtype == torch.float16
    assert bool(norms[0](large).isfinite().all())
    assert {module.weight.dtype for module in half.unet.modules() if isinstance(module, nn.LayerNorm)} == {torch.float16}


def graph_of(*nodes: Any, weights: tuple[Any, ...] = ()) -> Any:
    """x [2] fp32 -> y [2] fp32."""
    given, result = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in "xy")
    return helper.make_model(
        helper.make_graph([*nodes], "g", [given], [result], [*weights]),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=10,
    )


def run(model: Any, x: list[float]) -> dict[str, Any]:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {"x": np.array(x, np.float32)}), strict=True))


def squared(half: int) -> Any:
    """x, cast to half, times two, squared."""
    two = helper.make_tensor("two", half, [], [2.0])
    return graph_of(
        helper.make_node("Cast", ["x"], ["h"], to=half),
        helper.make_node("Mul", ["h", "two"], ["d"], name="double"),
        helper.make_node("Mul", ["d", "d"], ["s"], name="square"),
        helper.make_node("Cast", ["s"], ["y"], to=TensorProto.FLOAT),
        weights=(two,),
    )


@pytest.mark.parametrize(("half", "dtype"), [(TensorProto.FLOAT16, torch.float16), (TensorProto.BFLOAT16, torch.bfloat16)])
def test_every_tensor_is_rounded_to_its_type(half: int, dtype: torch.dtype) -> None:
    given = [1.2345678, 300.0]
    expected = ((torch.tensor(given).to(dtype) * 2) ** 2).float()
    assert torch.equal(torch.from_numpy(run(rounded(squared(half)), given)["y"]), expected)
    assert bool(expected.isinf().any()) == (dtype == torch.float16)


def test_operators_that_are_exact_are_not_rounded() -> None:
    doubled = float(torch.tensor(1.2345678).half().float() * 2)
    exact = run(rounded(squared(TensorProto.FLOAT16), exact={"Mul"}), [1.2345678, 300.0])["y"]
    assert exact[0] == np.float32(doubled) ** 2
    assert np.isfinite(exact).all()


def test_magnitudes_are_those_before_rounding() -> None:
    model, names = watched(rounded(squared(TensorProto.FLOAT16)))
    largest = dict(zip(names, run(model, [1.0, -300.0])[MAGNITUDES], strict=True))
    assert largest == {"h": 300.0, "d": 600.0, "s": 360000.0}


def test_constants_in_half_are_widened() -> None:
    value = numpy_helper.from_array(np.array([0.5, 2.0], np.float16))
    model = graph_of(
        helper.make_node("Constant", [], ["c"], value=value),
        helper.make_node("Cast", ["x"], ["h"], to=TensorProto.FLOAT16),
        helper.make_node("Add", ["h", "c"], ["s"]),
        helper.make_node("Cast", ["s"], ["y"], to=TensorProto.FLOAT),
    )
    assert run(rounded(model), [1.0, 2.0])["y"].tolist() == [1.5, 4.0]


@pytest.mark.slow
def test_a_rounded_graph_keeps_its_weights_outside(folder: Path) -> None:
    model = load_rounded(open_bundle(exported(folder, "fp16")), "plain_step")
    assert any(tensor.data_location == TensorProto.EXTERNAL for tensor in model.graph.initializer)
