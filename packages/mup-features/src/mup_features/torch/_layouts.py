"""What the axes of a torch module's parameters mean, and how torch initialises them.

Linear layers store (out, in), convolutions (out, in / groups, kernel), transposed convolutions (in, out /
groups, kernel), Hugging Face's Conv1D (in, out). The default of linear and convolution layers is uniform in
+-1/sqrt(fan), for the bias too; attention uses Xavier's law, recurrent layers 1/sqrt(hidden size).
"""

from dataclasses import dataclass
from math import prod, sqrt

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from mup_features.roles import Layout

__all__ = ["ParameterInfo", "clean_name", "parameter_infos", "unwrapped"]

_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, _NormBase)


@dataclass(frozen=True)
class ParameterInfo:
    """Layout of a parameter, its module, and the size of its entries under torch's default initialisation.

    Attributes:
        layout: which axes are fan-in and fan-out.
        module: the module that holds it.
        default_rms: root mean square entry under the default, None where no default depends on a fan.
        uniform: whether the default is uniform, so that no entry exceeds sqrt(3) default_rms.
    """

    layout: Layout
    module: nn.Module
    default_rms: float | None = None
    uniform: bool = True

    @property
    def scalable(self) -> bool:
        """Whether a multiplier in front of the module is one in front of this parameter alone."""
        known = self.layout.owner in ("linear", "conv", "embedding")
        return known if self.layout.scalable is None else self.layout.scalable


def unwrapped(model: nn.Module) -> nn.Module:
    """The user's module inside DistributedDataParallel, DataParallel and torch.compile."""
    while True:
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def clean_name(name: str) -> str:
    """A parameter's name without the prefixes of wrappers inside the model (compile, checkpoint, FSDP1)."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def parameter_infos(model: nn.Module, base: nn.Module | None = None) -> dict[str, ParameterInfo]:
    """Name -> what is known of the parameter; a shared parameter appears under each of its names.

    Args:
        model: the model, already unwrapped.
        base: the model at base width, which tells whether the groups of transposed convolutions grow.

    Raises:
        ValueError: for a lazy parameter, which has no shape yet.
    """
    base_modules = {} if base is None else {clean_name(k): v for k, v in base.named_modules()}
    infos = {}
    for path, module in model.named_modules(remove_duplicate=False):
        prefix = clean_name(f"{path}." if path else "")
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if isinstance(parameter, nn.UninitializedParameter):
                raise ValueError(
                    f"parameter {prefix + name!r} is lazy: run one batch through the model first"
                )
            partner = base_modules.get(prefix.removesuffix("."))
            infos[prefix + name] = _info(module, prefix, name, parameter, partner)
    return infos


def _info(
    module: nn.Module, prefix: str, name: str, parameter: Tensor, base: nn.Module | None
) -> ParameterInfo:
    shape = tuple(parameter.shape)
    if name == "bias" and isinstance(module, (nn.Linear, _ConvNd)) and "weight" in module._parameters:
        weight = _info(module, prefix, "weight", module.weight, base)
        layout = Layout("vector", fan_out=(0,), default_of=f"{prefix}weight")
        return ParameterInfo(layout, module, weight.default_rms)
    if name == "weight":
        layout = _weight(module, shape, base)
        if layout is not None:
            return _with_default(layout, module, shape)
    if isinstance(module, nn.MultiheadAttention) and name.endswith("proj_weight"):
        layout = Layout("linear", (1,), (0,), default_fan=((0,), (1,)), scalable=False)
        return ParameterInfo(layout, module, sqrt(2.0 / sum(shape)))
    if isinstance(module, nn.MultiheadAttention) and name in ("bias_k", "bias_v"):
        layout = Layout("vector", fan_out=(2,), default_fan=((2,),))
        return ParameterInfo(layout, module, 1.0 / sqrt(shape[2]), uniform=False)
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        return _recurrent(module, name, shape)
    if len(shape) <= 1 or isinstance(module, _NORMS):
        return ParameterInfo(Layout("vector", fan_out=tuple(range(len(shape)))), module)
    return ParameterInfo(Layout("free", out_in=True), module)


def _weight(module: nn.Module, shape: tuple[int, ...], base: nn.Module | None) -> Layout | None:
    if isinstance(module, nn.Linear):
        return Layout("linear", fan_in=(1,), fan_out=(0,), default_fan=((1,),))
    if isinstance(module, _ConvTransposeNd):
        fan = ((1, *range(2, len(shape))),)
        if _one_input_per_group(module, base):
            return Layout("conv", fan_out=(0, 1), default_fan=fan)
        return Layout("conv", fan_in=(0,), fan_out=(1,), default_fan=fan)
    if isinstance(module, _ConvNd):
        return Layout("conv", fan_in=(1,), fan_out=(0,), default_fan=(tuple(range(1, len(shape))),))
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return Layout("embedding", fan_out=(1,))
    if any(k.__name__ == "Conv1D" and k.__module__.startswith("transformers.") for k in type(module).__mro__):
        return Layout("linear", fan_in=(0,), fan_out=(1,), default_fan=((0,),))
    return None


def _with_default(layout: Layout, module: nn.Module, shape: tuple[int, ...]) -> ParameterInfo:
    if not isinstance(module, (nn.Linear, _ConvNd)):
        return ParameterInfo(layout, module)
    fan = prod(shape[axis] for axis in layout.default_fan[0])
    return ParameterInfo(layout, module, 1.0 / sqrt(3.0 * fan) if fan else None)


def _one_input_per_group(module: _ConvTransposeNd, base: nn.Module | None) -> bool:
    """Whether a transposed convolution's true fan-in, the inputs of one group, stays as the width grows."""
    if module.groups == module.in_channels:
        return module.groups > 1
    if not isinstance(base, _ConvTransposeNd) or base.groups == module.groups:
        return False
    return module.in_channels * base.groups == base.in_channels * module.groups


def _recurrent(module: nn.Module, name: str, shape: tuple[int, ...]) -> ParameterInfo:
    """Everything is uniform in +-1/sqrt(hidden size); gates are stacked along the first axis."""
    hidden = module.hidden_size
    rms = 1.0 / sqrt(3.0 * hidden) if isinstance(hidden, int) else None
    axis = 1 if name.startswith("weight_hr") else 0
    if len(shape) == 1:
        return ParameterInfo(Layout("vector", fan_out=(0,), default_fan=((0,),)), module, rms)
    return ParameterInfo(Layout("linear", (1,), (0,), ((axis,),), scalable=False), module, rms)
