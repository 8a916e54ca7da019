"""A diffusers scheduler in the bundle's terms: what is understood of its configuration is listed, all else refused by name."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from saferedir.engines.errors import ExportError, RequestError
from saferedir.engines.manifest import SchedulerInfo
from saferedir.runtime.schedulers import make_schedule

#: diffusers' samplers that the runtime has.
SAMPLERS = {
    "DDIMScheduler": "ddim",
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler-ancestral",
    "DPMSolverMultistepScheduler": "dpm++-2m",
    "LCMScheduler": "lcm",
}
#: Those that it has not, and what is drawn with in their place: the nearest that follows the same noise levels.
REPLACED = {
    "DDPMScheduler": "ddim",
    "PNDMScheduler": "ddim",
    "DEISMultistepScheduler": "dpm++-2m",
    "DPMSolverSinglestepScheduler": "dpm++-2m",
    "UniPCMultistepScheduler": "dpm++-2m",
    "HeunDiscreteScheduler": "euler",
    "KDPM2DiscreteScheduler": "euler",
    "LMSDiscreteScheduler": "euler",
    "KDPM2AncestralDiscreteScheduler": "euler-ancestral",
}
MULTISTEP = "DPMSolverMultistepScheduler"
#: How that one is configured where it is the runtime's dpm++-2m; of every other way the nearest is drawn.
DPM_MULTISTEP = {
    "algorithm_type": "dpmsolver++", "solver_order": 2, "solver_type": "midpoint", "lower_order_final": True,
    "euler_at_final": False, "lambda_min_clipped": -math.inf, "use_lu_lambdas": False,
}  # fmt: skip
#: Reads these of its configuration although it does not declare them.
OF_MULTISTEP = ("sigma_min", "sigma_max")
#: Samplers whose noise levels may be spaced otherwise, and the keys that say so.
SPACED = ("euler", "dpm++-2m")
SPACINGS = {"use_karras_sigmas": "karras", "use_exponential_sigmas": "exponential"}


@dataclass(frozen=True)
class Rule:
    """Which values of a key are understood."""

    allows: Callable[[Any], bool]
    expected: str
    #: Why others are not.
    why: str = ""


def one_of(*values: Any, why: str = "") -> Rule:
    """These values, of these very types."""
    return Rule(
        lambda value: any(type(value) is type(known) and value == known for known in values),
        " or ".join(map(repr, values)),
        why,
    )


def number(low: float, high: float, *, whole: bool = False) -> Rule:
    """A number between these, both excluded."""
    kinds = (int,) if whole else (int, float)
    return Rule(
        lambda value: isinstance(value, kinds) and not isinstance(value, bool) and low < value < high,
        f"a {'whole ' if whole else ''}number above {low:g} and below {high:g}",
    )


def optional(rule: Rule) -> Rule:
    """The rule, or None."""
    return Rule(lambda value: value is None or rule.allows(value), f"{rule.expected}, or null")


FLAG = one_of(True, False)
CLIPPED = "the estimate of the picture is then changed in every step, which no linear step can do"
OWN_LEVELS = "its noise levels are not those of the timesteps that the model is told"
#: What has an influence on what is drawn, by the names of diffusers' configurations.
UNDERSTOOD: dict[str, Rule] = {
    "num_train_timesteps": number(1, 10_001, whole=True),
    "beta_start": number(0, 1),
    "beta_end": number(0, 1),
    "beta_schedule": one_of("linear", "scaled_linear", "squaredcos_cap_v2"),
    "trained_betas": one_of(None, why="betas are described by their schedule, start and end"),
    "prediction_type": one_of("epsilon", "v_prediction", why="the safety reads predictions of noise or velocity alone"),
    "timestep_spacing": one_of("leading", "trailing", "linspace"),
    "steps_offset": number(-1, 1_001, whole=True),
    "rescale_betas_zero_snr": FLAG,
    "set_alpha_to_one": FLAG,
    "clip_sample": one_of(False, why=CLIPPED),
    "thresholding": one_of(False, why=CLIPPED),
    "interpolation_type": one_of("linear", why=OWN_LEVELS),
    "timestep_type": one_of("discrete", why="the model is told the logarithm of the noise level and no timestep"),
    "final_sigmas_type": one_of("zero", "sigma_min"),
    "use_karras_sigmas": FLAG,
    "use_exponential_sigmas": FLAG,
    "use_beta_sigmas": one_of(False, why="noise levels spaced by a beta distribution are not known here"),
    "sigma_min": optional(number(0, 1e6)),
    "sigma_max": optional(number(0, 1e6)),
    "use_flow_sigmas": one_of(False, why=OWN_LEVELS),
    "use_dynamic_shifting": one_of(False, why=OWN_LEVELS),
    "shift_terminal": one_of(None, why=OWN_LEVELS),
    "variance_type": one_of(None, "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", why="the model's output "
                            "then holds a variance"),
    "original_inference_steps": number(0, 10_001, whole=True),
    "timestep_scaling": number(0, 1e6),
}  # fmt: skip
#: What a sampler that is replaced does differently. It is lost, and said to be.
OF_REPLACED = (
    "skip_prk_steps", "solver_order", "algorithm_type", "solver_type", "lower_order_final", "euler_at_final", "use_lu_lambdas",
    "lambda_min_clipped", "predict_x0", "disable_corrector", "solver_p",
)  # fmt: skip
#: What has no influence while what it belongs to is off.
WITHOUT_INFLUENCE = ("clip_sample_range", "dynamic_thresholding_ratio", "sample_max_value", "flow_shift", "time_shift_type")
#: What the bundle states of it, and what holds where a class does not say.
STATED = (
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "timestep_spacing", "steps_offset", "set_alpha_to_one",
    "original_inference_steps", "timestep_scaling", "rescale_betas_zero_snr",
    "sigma_min", "sigma_max", "final_sigmas_type",
)  # fmt: skip
DEFAULTS: dict[str, Any] = {"timestep_spacing": "leading", "steps_offset": 0, "set_alpha_to_one": True}
#: Numbers of steps that are tried before anything is exported.
TRIED = (1, 2, 4, 10, 25, 50)


def scheduler_info(scheduler: Any) -> SchedulerInfo:
    """The scheduler's configuration in the bundle's terms. A sampler that the runtime does not have is replaced by one that it
    has, as `in_place_of` states.

    Raises:
        ExportError: class, key or value are not understood, or no number of steps can be drawn.
    """
    name, config = type(scheduler).__name__, scheduler.config
    if name not in SAMPLERS and name not in REPLACED:
        raise ExportError(f"{name} is not known here; save the model with one of {', '.join((*SAMPLERS, *REPLACED))}")
    own = _own_keys(scheduler)
    for key, value in config.items():
        _check(name, key, value, own)
    if not config["beta_start"] <= config["beta_end"]:
        raise ExportError(
            f"{name} has beta_end {config['beta_end']} below beta_start {config['beta_start']}; expected rising betas"
        )
    spacings = [SPACINGS[key] for key in SPACINGS if key in own and config.get(key)]
    if len(spacings) > 1:
        raise ExportError(f"{name} has {' and '.join(SPACINGS)} both set; expected one of them")
    exact = name in SAMPLERS and (name != MULTISTEP or not _unlike_ours(config))
    kind = SAMPLERS.get(name) or REPLACED[name]
    # Keys of other samplers that a folder keeps are for those, not for one that stands in for this.
    used = [key for key in STATED if key in config and (key in own or exact) and UNDERSTOOD[key].allows(config[key])]
    info = SchedulerInfo(
        kind="-".join([kind, *(spacings if kind in SPACED else [])]),
        in_place_of="" if exact else name,
        **DEFAULTS | {key: config[key] for key in used},
    )
    _try(info, config["prediction_type"])
    return info


def replacement(scheduler: Any) -> str | None:
    """What to say where another sampler stands in for the scheduler's class, and what of its configuration is lost.

    Raises:
        ExportError: the configuration is not understood.
    """
    info = scheduler_info(scheduler)
    if not info.in_place_of:
        return None
    own, config = _own_keys(scheduler), scheduler.config
    lost = [key for key in OF_REPLACED if key in own and config[key] not in (None, [])]
    if info.in_place_of == MULTISTEP:
        lost = _unlike_ours(config)
    if REPLACED.get(info.in_place_of) not in (*SPACED, None):
        lost += [key for key in SPACINGS if key in own and config[key]]
    return f"drawn with {info.kind} in place of {info.in_place_of}" + (
        f", without its {', '.join(f'{key} {config[key]}' for key in lost)}" if lost else ""
    )


def _check(name: str, key: str, value: Any, own: Iterable[str]) -> None:
    """Raise `ExportError` where a key is not known to any sampler, or has a value for this one that is not understood."""
    if key.startswith("_") or key in OF_REPLACED or key in WITHOUT_INFLUENCE:
        return
    if key not in UNDERSTOOD:
        raise ExportError(
            f"{name} has a key {key!r} in its configuration, which is not known here; leave it out if it means nothing"
        )
    rule = UNDERSTOOD[key]
    if key in own and not rule.allows(value):
        text = f"{value!r:.60}"
        raise ExportError(
            f"{name} has {key} {text}, which is not known here; expected {rule.expected}{f' ({rule.why})' if rule.why else ''}"
            ": save the model with a scheduler that has it"
        )


def _own_keys(scheduler: Any) -> set[str]:
    """What the scheduler's class heeds of its configuration."""
    own = set(inspect.signature(type(scheduler).__init__).parameters)
    return own | set(OF_MULTISTEP) if type(scheduler).__name__ == MULTISTEP else own


def _unlike_ours(config: Mapping[str, Any]) -> list[str]:
    """In which keys a configuration of the multistep solver is not the runtime's."""
    return [key for key, value in DPM_MULTISTEP.items() if config.get(key, value) != value]


def _try(info: SchedulerInfo, prediction_type: str) -> None:
    """Raise `ExportError` where no schedule can be made of it."""
    reasons = []
    for steps in TRIED:
        try:
            make_schedule(info, prediction_type, steps)
            return
        except RequestError as error:
            reasons.append(error)
    raise ExportError(f"the scheduler's configuration cannot be drawn with: {reasons[0]}") from reasons[0]
