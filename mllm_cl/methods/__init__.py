"""The catalogue of methods: name -> where its class is. Third-party methods are given as `module:Class`."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Sequence
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from mllm_cl.errors import MethodError, suggest
from mllm_cl.methods.base import AdapterPolicy, Context, Method, MethodState, RouteBatch, TrainBatch
from mllm_cl.recipe import MethodSpec

METHODS: dict[str, str] = {
    "finetune": "mllm_cl.methods.finetune:Finetune",
    "joint": "mllm_cl.methods.joint:Joint",
    "single": "mllm_cl.methods.single:Single",
    "attention_only": "mllm_cl.methods.attention_only:AttentionOnly",
    "gate_up_only": "mllm_cl.methods.gate_up_only:GateUpOnly",
    "bottom_frozen": "mllm_cl.methods.bottom_frozen:BottomFrozen",
    "token_weights": "mllm_cl.methods.token_weights:TokenWeights",
    "replay": "mllm_cl.methods.replay:Replay",
    "generic_mix": "mllm_cl.methods.generic_mix:GenericMix",
    "derpp": "mllm_cl.methods.derpp:DerPlusPlus",
    "agem": "mllm_cl.methods.agem:AGem",
    "gem": "mllm_cl.methods.gem:Gem",
    "lwf": "mllm_cl.methods.lwf:LwF",
    "ewc": "mllm_cl.methods.ewc:EWC",
    "online_ewc": "mllm_cl.methods.online_ewc:OnlineEWC",
    "si": "mllm_cl.methods.si:SI",
    "mas": "mllm_cl.methods.mas:MAS",
    "model_mix": "mllm_cl.methods.model_mix:ModelMix",
    "task_arithmetic": "mllm_cl.methods.task_arithmetic:TaskArithmetic",
    "ties": "mllm_cl.methods.ties:Ties",
    "dare": "mllm_cl.methods.dare:Dare",
    "magmax": "mllm_cl.methods.magmax:MagMax",
    "tsv": "mllm_cl.methods.tsv:TaskSingularVectors",
    "opcm": "mllm_cl.methods.opcm:Opcm",
    "iso": "mllm_cl.methods.iso:Iso",
    "star": "mllm_cl.methods.star:Star",
    "knots": "mllm_cl.methods.knots:Knots",
    "slao": "mllm_cl.methods.slao:Slao",
    "model_tailor": "mllm_cl.methods.model_tailor:ModelTailor",
    "o_lora": "mllm_cl.methods.o_lora:OLora",
    "n_lora": "mllm_cl.methods.n_lora:NLora",
    "clora": "mllm_cl.methods.clora:CLora",
    "reglora": "mllm_cl.methods.reglora:RegLora",
    "inflora": "mllm_cl.methods.inflora:InfLora",
    "keeplora": "mllm_cl.methods.keeplora:KeepLora",
    "osf": "mllm_cl.methods.osf:Osf",
    "mica": "mllm_cl.methods.mica:MiCA",
    "lora_null": "mllm_cl.methods.lora_null:LoraNull",
    "corda": "mllm_cl.methods.corda:CorDA",
    "ema": "mllm_cl.methods.ema:EMA",
    "spectral_consolidation": "mllm_cl.methods.spectral_consolidation:SpectralConsolidation",
    "inquiry_regularization": "mllm_cl.methods.inquiry_regularization:InquiryRegularization",
    "task_adapters": "mllm_cl.methods.task_adapters:TaskAdapters",
    "disco": "mllm_cl.methods.disco:Disco",
    "hide": "mllm_cl.methods.hide:HiDe",
    "shared_specific": "mllm_cl.methods.shared_specific:SharedSpecific",
    "mr_lora": "mllm_cl.methods.mr_lora:MRLoRA",
    "moelora": "mllm_cl.methods.moelora:MoELoRA",
    "clmoe": "mllm_cl.methods.clmoe:CLMoE",
    "smolora": "mllm_cl.methods.smolora:SMoLoRA",
    "sd_lora": "mllm_cl.methods.sd_lora:SDLoRA",
    "branchlora": "mllm_cl.methods.branchlora:BranchLoRA",
    "progressive_prompts": "mllm_cl.methods.progressive_prompts:ProgressivePrompts",
    "l2p": "mllm_cl.methods.l2p:L2P",
    "modal_prompt": "mllm_cl.methods.modal_prompt:ModalPrompt",
}


def method_class(name: str) -> type[Method]:
    """Returns the class of a catalogue name or of `module:Class`.

    Raises:
        MethodError: there is no such method.
    """
    place = METHODS.get(name, name)
    module_name, separator, class_name = place.partition(":")
    if not separator:
        raise MethodError(f"methods: {name!r} does not exist.", expected=suggest(name, METHODS))
    try:
        found = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError) as error:
        raise MethodError(f"methods: {name!r} cannot be imported ({error}).", expected="module:Class") from error
    if not (isinstance(found, type) and issubclass(found, Method)):
        raise MethodError(f"methods: {name!r} is not a method.", expected="a subclass of mllm_cl.methods.Method")
    return found


def build_method(spec: MethodSpec) -> Method:
    """Builds a method from its entry in the recipe; options are checked against the annotations of its constructor.

    Raises:
        MethodError: the method does not exist, or an option is unknown or of the wrong type.
    """
    found = method_class(spec.name)
    parameters = {
        name: parameter for name, parameter in inspect.signature(found.__init__).parameters.items() if name != "self"
    }
    hints = get_type_hints(found.__init__, include_extras=True)
    options: dict[str, Any] = {}
    for name, value in spec.options.items():
        if name not in parameters or parameters[name].kind is not inspect.Parameter.KEYWORD_ONLY:
            known = [key for key, p in parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY]
            raise MethodError(
                f"methods.{spec.name}.{name}: unknown option.",
                expected=suggest(name, known) if known else "no options",
            )
        try:
            options[name] = TypeAdapter(hints[name]).validate_python(value)
        except ValidationError as error:
            problem = error.errors()[0]["msg"]
            raise MethodError(
                f"methods.{spec.name}.{name}: {value!r} is not usable ({problem}).",
                fix=f"see `mllm-cl methods {spec.name}`.",
            ) from error
    return found(**options)


def adapter_policy(methods: Sequence[Method], wanted: AdapterPolicy | None = None) -> AdapterPolicy:
    """Returns the adapter policy that all methods can live with; `one` when none of them cares.

    Raises:
        MethodError: two methods need different ones, or the recipe asks for another.
    """
    policy, owner = wanted, "model.adapters"
    for method in methods:
        if method.adapters is None:
            continue
        if policy is not None and policy != method.adapters:
            raise MethodError(
                f"{method.name} needs adapters: {method.adapters}, {owner} needs {policy}; they cannot be combined.",
                expected="methods with the same adapter policy (see `mllm-cl methods`)",
                fix=f"remove {method.name} or {owner}.",
            )
        policy, owner = method.adapters, method.name
    return policy or "one"


__all__ = [
    "METHODS",
    "Context",
    "Method",
    "MethodState",
    "RouteBatch",
    "TrainBatch",
    "adapter_policy",
    "build_method",
    "method_class",
]
