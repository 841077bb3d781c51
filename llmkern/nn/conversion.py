# SPDX-License-Identifier: Apache-2.0
"""Swapping the layers of an existing model for llmkern's, and back.

A layer changes its class and stays the object it is. A new object in its place would have to be found and replaced
wherever the old one is referred to (attributes, lists, closures of hooks, parallel wrappers), and to take over its
parameters, buffers, hooks and mode; an object that stays keeps them all, even where it is the model itself. torch's own
``nn.utils.parametrize`` changes classes in the same way. The classes differ in ``forward`` and in a few attributes,
which are read off a specimen of each rather than listed here.
"""

import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from llmkern.nn.embedding import Embedding
from llmkern.nn.lstm import LSTM
from llmkern.nn.lstm_cell import LSTMCell

Kind: TypeAlias = type[nn.Module]


class Converted(NamedTuple):
    """A layer that changed: its name in the model ("" for the model itself), its class before and after."""

    name: str
    type: Kind
    to: Kind


class Left(NamedTuple):
    """A layer that stayed as it was: its name in the model ("" for the model itself), its class, and why."""

    name: str
    type: Kind
    reason: str


@dataclass(frozen=True, repr=False)
class Report:
    """What :func:`convert` or :func:`revert` did; prints as a line for each layer.

    A layer that is used in several places is listed once, by its first name.
    """

    converted: tuple[Converted, ...]
    left: tuple[Left, ...]

    def __repr__(self) -> str:
        lines = [f"{len(self.converted)} converted, {len(self.left)} left"]
        lines += [
            f"  {_shown(name)}: {_title(before)} -> {_title(to)}"
            for name, before, to in self.converted
        ]
        lines += [
            f"  {_shown(name)}: {_title(kind)} left: {reason}" for name, kind, reason in self.left
        ]
        return "\n".join(lines)


def convert(model: nn.Module) -> Report:
    """Makes every ``torch.nn.LSTM``, ``LSTMCell`` and ``Embedding`` of a model one of llmkern's, in place.

    The layers stay the objects they are, and so do their parameters: optimizers, tied weights, hooks, names, buffers,
    mode, device and requires_grad are untouched, nothing is drawn from a random generator, and a state_dict of either
    kind of model loads into the other. The model itself may be such a layer. Call it once the model is initialised,
    before or after an optimizer is made; call it on a part, ``convert(model.encoder)``, to leave the rest.

    Left as they are, with the reason in the report: subclasses and layers whose ``forward`` was replaced, for they may
    compute something else; layers whose weights are computed (``parametrize``, ``weight_norm``, ``spectral_norm``,
    pruning), not initialised yet, quantised, or of a dtype or on a device without kernels; ``Embedding(sparse=True)``.

    A converted LSTM is no longer an instance of ``torch.nn.LSTM``, which ``torch.compile`` refuses to trace, but of
    ``torch.nn.RNNBase``: code that asks ``isinstance(x, nn.LSTM)`` after the conversion gets False. It is unknown to
    ``torch.jit.script``, ``torch.fx.symbolic_trace`` and torch's quantisation: :func:`revert` it for those.

    Args:
        model: any module. Layers that are not its submodules, in a plain list for instance, are not found.

    Returns:
        The layers that changed and the layers of these kinds that did not.

    Raises:
        TypeError: model is no module.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Embedding(100, 16), torch.nn.LSTM(16, 32))
        >>> llmkern.convert(model)
        2 converted, 0 left
          0: torch.nn.Embedding -> llmkern.nn.Embedding
          1: torch.nn.LSTM -> llmkern.nn.LSTM
    """
    _check_module("convert", model)
    return _change(model, _FAMILIES, _foreign)


def revert(model: nn.Module) -> Report:
    """Makes every llmkern ``LSTM``, ``LSTMCell`` and ``Embedding`` of a model one of ``torch.nn``, in place.

    Everything is kept as by :func:`convert`. Layers with an option that torch does not have are left. A model that
    calls its layers with arguments of llmkern alone, such as ``lengths``, does not run with those of torch.

    Args:
        model: any module.

    Returns:
        The layers that changed and the layers of these kinds that did not.

    Raises:
        TypeError: model is no module.

    Example:
        >>> layer = llmkern.nn.LSTM(16, 32)
        >>> llmkern.revert(layer).converted[0].to is type(layer) is torch.nn.LSTM
        True
    """
    _check_module("revert", model)
    return _change(model, [family.reversed() for family in _FAMILIES], lambda module: None)


class _Family(NamedTuple):
    """A class, the one to make of it, the constructor's arguments, which both keep as attributes, and what may object.

    ``objection`` is asked last, with the arguments and one of the parameters.
    """

    source: Kind
    target: Kind
    arguments: tuple[str, ...]
    objection: Callable[[nn.Module, dict[str, Any], Tensor], str | None]

    def reversed(self) -> "_Family":
        return _Family(self.target, self.source, self.arguments, _option_without_counterpart)


def _lstm_objection(_: nn.Module, arguments: dict[str, Any], like: Tensor) -> str | None:
    sizes = {"input_size": 1, "hidden_size": 2, "num_layers": 1}
    sizes["proj_size"] = min(1, arguments["proj_size"])
    return _kernel_objection(LSTM, arguments | sizes, like, like.new_zeros(1, 1, 1))


def _cell_objection(_: nn.Module, arguments: dict[str, Any], like: Tensor) -> str | None:
    sizes = {"input_size": 1, "hidden_size": 1}
    return _kernel_objection(LSTMCell, arguments | sizes, like, like.new_zeros(1, 1))


def _embedding_objection(_: nn.Module, arguments: dict[str, Any], like: Tensor) -> str | None:
    if arguments["sparse"]:
        return "sparse=True, whose gradient is made by torch's own operator"
    sizes = {"num_embeddings": 1, "embedding_dim": 1, "padding_idx": None}
    ids = torch.zeros(1, dtype=torch.int64, device=like.device)
    return _kernel_objection(Embedding, arguments | sizes, like, ids)


def _kernel_objection(
    kind: Kind, arguments: dict[str, Any], like: Tensor, input: Tensor
) -> str | None:
    """What the kernels say to the dtype and the device: a layer of the smallest size is run."""
    try:
        layer = _specimen(kind, arguments | {"dtype": like.dtype}).to_empty(device=like.device)
        with torch.no_grad():
            layer.forward(input)
    except (TypeError, ValueError, RuntimeError) as error:
        return str(error).partition("\n")[0]
    return None


def _option_without_counterpart(module: nn.Module, _: dict[str, Any], like: Tensor) -> str | None:
    """An option of llmkern's own that is in use: they are the keyword-only ones, kept under their names."""
    for name, parameter in inspect.signature(type(module)).parameters.items():
        if parameter.kind is parameter.KEYWORD_ONLY:
            value = getattr(module, name)
            if value != parameter.default:
                return f"{name}={value} has no counterpart in torch.nn"
    return None


_FAMILIES = (
    _Family(
        nn.LSTM,
        LSTM,
        (
            *("input_size", "hidden_size", "num_layers", "bias"),
            *("batch_first", "dropout", "bidirectional", "proj_size"),
        ),
        _lstm_objection,
    ),
    _Family(nn.LSTMCell, LSTMCell, ("input_size", "hidden_size", "bias"), _cell_objection),
    _Family(
        nn.Embedding,
        Embedding,
        (
            *("num_embeddings", "embedding_dim", "padding_idx"),
            *("max_norm", "norm_type", "scale_grad_by_freq", "sparse"),
        ),
        _embedding_objection,
    ),
)


def _check_module(op: str, model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"llmkern.{op}: expected model to be a torch.nn.Module, got {type(model).__name__}"
        )


def _change(
    model: nn.Module,
    families: Iterable[_Family],
    foreign: Callable[[nn.Module], str | None],
) -> Report:
    converted, left = [], []
    for name, module in model.named_modules():
        family = next((f for f in families if _is_candidate(module, f)), None)
        reason = foreign(module) if family is None else next(_reasons(module, family), None)
        if reason is not None:
            left.append(Left(name, type(module), reason))
        elif family is not None:
            converted.append(Converted(name, family.source, family.target))
            _swap(module, family)
    return Report(tuple(converted), tuple(left))


def _is_candidate(module: nn.Module, family: _Family) -> bool:
    """Of the class or a subclass; but a layer of llmkern that is a subclass of torch's is converted already."""
    done = issubclass(family.target, family.source) and isinstance(module, family.target)
    return isinstance(module, family.source) and not done


def _foreign(module: nn.Module) -> str | None:
    """Why a layer that goes by the name of one of ours is not even of its class."""
    if isinstance(module, torch.jit.ScriptModule):
        is_layer = module.original_name in _LAYERS
        return "compiled by torch.jit" if is_layer else None
    kind = type(module)
    if kind.__name__ in _LAYERS and kind.__module__.startswith("torch.ao."):
        return "quantised, or prepared for it"
    return None


_LAYERS = frozenset(family.source.__name__ for family in _FAMILIES)


def _reasons(module: nn.Module, family: _Family) -> Iterator[str]:
    """What speaks against swapping the layer: no later check is made once one has said so."""
    if parametrize.is_parametrized(module):
        computed = ", ".join(module.parametrizations)  # type: ignore[arg-type]
        yield f"{computed} is computed by torch.nn.utils.parametrize; swap the layer before that"
    if type(module) is not family.source:
        yield _subclass_reason(type(module), family.source)
    if "forward" in vars(module):
        yield "its forward was replaced"
    if getattr(module, "qconfig", None) is not None:
        yield "prepared for quantisation"
    arguments = {name: getattr(module, name) for name in family.arguments}
    try:
        specimen = _specimen(family.target, arguments)
    except (TypeError, ValueError, AssertionError) as error:
        yield str(error)
        return
    names = [name for name, _ in specimen.named_parameters()]
    yield from _parameter_reasons(module, names)
    reason = family.objection(module, arguments, getattr(module, names[0]))
    if reason is not None:
        yield reason


def _subclass_reason(kind: Kind, source: Kind) -> str:
    bases = kind.__mro__[: kind.__mro__.index(source)]
    own = {name for base in bases for name, value in vars(base).items() if inspect.isroutine(value)}
    return f"a subclass of {_title(source)}" + (
        f" with its own {', '.join(sorted(own))}" if own else ""
    )


def _parameter_reasons(module: nn.Module, names: Iterable[str]) -> Iterator[str]:
    kinds = set()
    for name in names:
        parameter = module._parameters.get(name)
        if parameter is None:
            yield f"{name} is no parameter but computed{_by_whom(module, name)}"
        elif is_lazy(parameter):
            yield "not initialised yet; call it once before"
        elif type(parameter) is not nn.Parameter:
            yield f"{name} is a {_title(type(parameter))}"
        else:
            kinds.add((str(parameter.dtype).removeprefix("torch."), str(parameter.device)))
    if len(kinds) > 1:
        found = " and ".join(f"{dtype} on {device}" for dtype, device in sorted(kinds))
        yield f"its parameters are of several dtypes or devices: {found}"


def _by_whom(module: nn.Module, name: str) -> str:
    """The hook of ``weight_norm``, ``spectral_norm`` or ``prune`` that computes a weight before every call."""
    for hook in module._forward_pre_hooks.values():
        if name in (getattr(hook, "name", None), getattr(hook, "_tensor_name", None)):
            return f" by {_title(type(hook))}"
    return ""


def _specimen(kind: Kind, arguments: dict[str, Any]) -> nn.Module:
    """A layer whose parameters take no memory and draw nothing from a random generator."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # whoever made the original has seen them
        return kind(**arguments, device="meta")


def _swap(module: nn.Module, family: _Family) -> None:
    arguments = {name: getattr(module, name) for name in family.arguments}
    before = vars(_specimen(family.source, arguments))
    after = vars(_specimen(family.target, arguments))
    own = vars(module)
    for name in before.keys() - after.keys():
        own.pop(name, None)
    own.update({name: after[name] for name in after.keys() - before.keys()})
    module.__class__ = family.target  # type: ignore[assignment]
    if isinstance(module, nn.RNNBase):
        # On CUDA, torch's LSTM wants its weights side by side; ours leaves them where they are.
        module.flatten_parameters()


def _shown(name: str) -> str:
    return name or "the model itself"


def _title(kind: type) -> str:
    """The name that the class is used by: torch.nn.LSTM, not torch.nn.modules.rnn.LSTM."""
    for family in _FAMILIES:
        for package, public in (("torch.nn", family.source), ("llmkern.nn", family.target)):
            if kind is public:
                return f"{package}.{kind.__name__}"
    return f"{kind.__module__}.{kind.__qualname__}"
