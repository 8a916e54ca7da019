"""A safety module: the network, its configuration, and the folder that holds both."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from saferedir_torch.config import SafetyConfig, SafetyConfigError
from saferedir_torch.detector import Detector
from saferedir_torch.redirector import Redirection, Redirector

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"


class SafetyModule(nn.Module):
    """Detector and redirector of N concepts in one network."""

    def __init__(self, config: SafetyConfig) -> None:
        super().__init__()
        self.config = config
        self.detector = Detector(config)
        self.redirector = Redirector(config)

    def score(self, latent: Tensor, timestep: Tensor, prompt: Tensor) -> tuple[Tensor, Tensor]:
        """latent [B, C, h, w], timestep [B], prompt in force [B, T, D] -> scores [B, N] in [0, 1], j [B, J]."""
        joint = self.detector.joint_feature(latent, timestep)
        return torch.sigmoid(self.detector.logits(joint, prompt)), joint

    def redirection(self, prompt: Tensor, joint: Tensor, active: Tensor) -> Redirection:
        """p0 [B, T, D], j [B, J], active [B, N] -> target, alpha and mask of every token."""
        context = self.detector.context(joint, prompt)
        features = self.redirector.prompt_features(prompt)
        return self.redirector.heads(prompt, features, joint, context, active)

    def save(self, folder: Path) -> None:
        """Write `config.json` and `model.safetensors` (fp16) to `folder`; the weights are renamed into place."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.half().contiguous() for name, tensor in self.state_dict().items()}
        partial = folder / f"{WEIGHTS_FILE}.partial"
        save_file(tensors, partial, metadata={"format": "pt"})
        self.config.save(folder / CONFIG_FILE)
        os.replace(partial, folder / WEIGHTS_FILE)

    @classmethod
    def load(cls, folder: Path) -> SafetyModule:
        """The module in `folder`, in fp32 and evaluation mode (its weights are rounded to fp16 on disk).

        Raises:
            SafetyConfigError: a file is missing or cut short, or the weights are of other shapes.
        """
        module = cls(SafetyConfig.load(folder / CONFIG_FILE))
        weights = folder / WEIGHTS_FILE
        try:
            module.load_state_dict({name: tensor.float() for name, tensor in load_file(weights).items()})
        except (OSError, SafetensorError, RuntimeError) as error:
            raise SafetyConfigError(f"{weights} does not hold the weights that {CONFIG_FILE} describes: {error}") from error
        return module.eval()


def parameters_sha256(module: nn.Module) -> str:
    """SHA-256 over a module's parameters, names and fp16-rounded values, in name order."""
    digest = hashlib.sha256()
    for name, parameter in sorted(module.named_parameters()):
        digest.update(name.encode())
        digest.update(parameter.detach().to("cpu", torch.float16).contiguous().numpy().tobytes())
    return digest.hexdigest()
