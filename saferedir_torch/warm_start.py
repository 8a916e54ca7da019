"""A network that starts from another's weights, as far as the two are alike."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn


def start_from(module: nn.Module, state: Mapping[str, Tensor]) -> list[str]:
    """Take over the tensors of `state` that are there by name and shape; returns the names of those that stay as they were."""
    own = module.state_dict()
    fitting = {name: tensor for name, tensor in state.items() if name in own and own[name].shape == tensor.shape}
    module.load_state_dict(fitting, strict=False)
    return sorted(set(own) - set(fitting))
