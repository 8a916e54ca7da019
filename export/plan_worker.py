"""Builds one plan in a process of its own: polygraphy chooses TensorRT or TensorRT-RTX once, at import.

`python -m saferedir.export.plan_worker JOB` reads a job from a JSON file and writes the plan and, beside the job, what it
read back from the network. Messages of the builder go to the standard streams.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any


def main(job_file: Path) -> None:
    job = json.loads(job_file.read_text())
    from polygraphy.backend.trt import EngineBytesFromNetwork, NetworkFromOnnxPath, PostprocessConfig, Profile
    from polygraphy.logger import G_LOGGER

    G_LOGGER.module_severity = {"": G_LOGGER.ERROR}
    portable = job["builder"] == "tensorrt-rtx"
    if portable:
        import tensorrt_rtx as trt
        from polygraphy.backend.tensorrt_rtx import CreateConfigRTX as CreateConfig
    else:
        import tensorrt as trt
        from polygraphy.backend.trt import CreateConfig

    started = time.monotonic()
    profile = Profile()
    for tensor in job["inputs"]:
        profile.add(tensor["name"], *tensor["shapes"])
    options = dict(job["options"])
    if portable and job["compute_capabilities"]:
        options["compute_capabilities"] = [tuple(map(int, text.split("."))) for text in job["compute_capabilities"]]

    timing = None if portable else str(job["timing_cache"])
    if not portable:
        options["load_timing_cache"] = timing
    if (level := options.get("hardware_compatibility_level")) is not None:
        options["hardware_compatibility_level"] = getattr(trt.HardwareCompatibilityLevel, level)

    def without_timing(_: Any, __: Any, config: Any) -> None:
        if portable:  # timing would ask for a GPU
            config.set_flag(trt.BuilderFlag.DISABLE_TIMING_CACHE)

    parsed = NetworkFromOnnxPath(job["onnx"], strongly_typed=True)()
    _, network, _ = parsed
    config = PostprocessConfig(CreateConfig(profiles=[profile], **options), without_timing)
    plan = EngineBytesFromNetwork(lambda: parsed, config, save_timing_cache=timing)()
    Path(job["plan"]).write_bytes(bytes(plan))
    tensors = [
        {
            "name": tensor.name,
            "input": tensor.is_network_input,
            "dtype": trt.nptype(tensor.dtype).__name__.rstrip("_"),
            "shape": [size if size >= 0 else None for size in tensor.shape],
        }
        for tensor in [
            *(network.get_input(index) for index in range(network.num_inputs)),
            *(network.get_output(index) for index in range(network.num_outputs)),
        ]
    ]
    result = {
        "version": trt.__version__,
        "layers": network.num_layers,
        "tensors": tensors,
        "profiles": {tensor["name"]: tensor["shapes"] for tensor in job["inputs"]},
        "seconds": round(time.monotonic() - started, 2),
    }
    job_file.with_suffix(".result").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
