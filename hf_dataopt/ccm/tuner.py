"""Conditional LoRA: a low-rank update that acts where a compression token stands, and nowhere else (chapter 7).

The story: `CCMModel` injects LoRA layers as PEFT does, hands each a variant that multiplies its update by the mask of
compression tokens, adds trained embeddings for them, and hooks the decoder, so that every forward knows where they stand.
Ids from the vocabulary's size on mean compression tokens; neither the tokenizer nor the embedding table grows.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraModel
from torch import nn

from .._compat import (
    adapts_tokens,
    checkpointing,
    decoder_of,
    is_quantised,
    loaded,
    lora_classes,
    named_arguments,
    peft_tables,
    set_checkpointing,
    text_config,
)
from ..routing.attach import attach, cache_in, detach, tokens_in
from ..routing.dispatch import CURRENT
from .attention import Call, build_layout, current_call, rows_of, skip_positions
from .cache import MemoryCache
from .config import CCMConfig, CCMPeftType, check_alone
from .proof import check_layers, prove
from .rotation import Rotation
from .stream_layout import build_stream_layout, is_stream

EMBEDDINGS = "lora_comp_embeddings"
LoraLayer: Any
LoraVariant: Any
LoraLayer, LoraVariant = lora_classes()
USER = "ccm"  # of `routing.attach`


class CCMLinearVariant(LoraVariant):
    """x' = W x + m * (alpha / r) B A x with m = 1 on compression tokens (Eq. 7.4, Figure 7.4)."""

    @staticmethod
    def init(module: Any, adapter_name: str, **kwargs: Any) -> None:
        """Nothing to prepare."""

    @staticmethod
    def forward(module: Any, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Add the masked update; without compression tokens in the call, return `result` itself."""
        call = current_call()
        if call is None or call.comp is None or call.rows is None:
            return result
        if x.shape[:-1].numel() != call.comp.numel():
            raise ValueError(
                f"this layer got {tuple(x.shape)} for {tuple(call.comp.shape)} tokens (routed experts?): a conditional LoRA "
                "cannot tell which are compression tokens; leave the layer out of target_modules"
            )
        rows = call.rows.to(x.device)  # m is 1 there: the update costs nothing on other tokens
        dropped = module.lora_dropout[active_adapter](x.flatten(0, -2)[rows])
        update = module.lora_B[active_adapter](module.lora_A[active_adapter](dropped)) * module.scaling[active_adapter]
        flat = result.flatten(0, -2)
        return flat.index_add(0, rows, update.to(flat.dtype)).view_as(result)


class CCMModel(LoraModel):
    """The tuner behind `get_peft_model(model, CCMConfig(...))`.

    Overrides of methods that PEFT keeps to itself, since it has no other place to stand in: settings before injection
    (`_prepare_adapter_config`), one layer of it (`_create_and_replace`), which weights are the adapter's when it is saved and
    read (`_get_adapter_state_dict`, `_remap_adapter_state_dict_for_load`), and what must be refused where PEFT would do it
    (`_check_merge_allowed`, `_enable_peft_forward_hooks`).

    Raises:
        ValueError: a layer type whose PEFT class ignores variants, or merging.

    Source: section 7.3.1, "Conditional adapter".
    """

    def __init__(self, model: Any, peft_config: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        new = peft_config if isinstance(peft_config, dict) else {adapter_name: peft_config}
        # before peft writes the new settings over those that the model has
        check_alone(model, adapter_name, {**getattr(model, "peft_config", {}), **new})
        super().__init__(model, peft_config, adapter_name, *args, **kwargs)

    def _prepare_adapter_config(self, peft_config: Any, model_config: Any) -> Any:
        check_layers(self.model)
        size = self.model.get_input_embeddings().weight.shape[0]
        if peft_config.comp_token_ids is None:
            peft_config.comp_token_ids = list(range(size, size + peft_config.num_comp_tokens))
        if peft_config.comp_token_ids[0] < size:
            raise ValueError(
                f"this adapter was trained on {peft_config.comp_token_ids[0]} token embeddings and takes the ids after them "
                f"for compression tokens, but the model has {size}; load it on the original base model"
            )
        return super()._prepare_adapter_config(peft_config, model_config)

    def _create_and_replace(  # type: ignore[override]
        self, lora_config: Any, adapter_name: str, target: Any, target_name: str, parent: Any, *args: Any, **kwargs: Any
    ) -> None:
        super()._create_and_replace(lora_config, adapter_name, target, target_name, parent, *args, **kwargs)
        layer = getattr(parent, target_name)
        if not adapts_tokens(layer, adapter_name):
            raise ValueError(
                f"cannot adapt {target_name} ({type(layer).__name__}) on some tokens only; use linear layers, plain ones or "
                "those of bitsandbytes, GPTQ, HQQ or torchao"
            )
        if lora_config.conditional:
            layer.lora_variant[adapter_name] = CCMLinearVariant()

    def inject_adapter(self, model: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """As PEFT, with embeddings for the adapter's compression tokens; for first and added adapters."""
        check_alone(model, adapter_name, self.peft_config)
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except BaseException:
            if len(self.peft_config) == 1:  # layers before the refused one have been replaced
                super().unload()
            raise
        config: Any = self.peft_config[adapter_name]
        embedding = model.get_input_embeddings()
        if not hasattr(embedding, EMBEDDINGS):
            setattr(embedding, EMBEDDINGS, nn.ParameterDict())
        with loaded(embedding):
            start = _first_rows(embedding.weight.detach(), config) * float(getattr(embedding, "embed_scale", 1.0))
        getattr(embedding, EMBEDDINGS)[adapter_name] = nn.Parameter(start, requires_grad=not config.inference_mode)
        self._hook(model, embedding)

    def _hook(self, model: Any, embedding: Any) -> None:
        if hasattr(model, "_hf_dataopt_ccm"):
            return
        attach(model, USER, drop_counted_positions)
        reader = _Reader(self.peft_config)
        decoder: Any = decoder_of(model)
        if decoder.config is not model.config:  # a multimodal model embeds before it calls its decoder
            decoder = model
        handles = [
            model.register_forward_pre_hook(reader.prove, with_kwargs=True),
            decoder.register_forward_pre_hook(reader.enter, with_kwargs=True),
            decoder.register_forward_hook(reader.leave, with_kwargs=True, always_call=True),
            embedding.register_forward_hook(reader.embed),
        ]
        model._hf_dataopt_ccm = handles

    def _embeddings(self) -> Any:
        return getattr(
            self.model.get_input_embeddings(), EMBEDDINGS, {}
        )  # set_adapter comes before the first ones are made

    @classmethod
    def _get_adapter_state_dict(
        cls, model: Any, config: Any, adapter_name: str, state_dict: dict[str, Any], unwanted_adapter_names: list[str]
    ) -> dict[str, Any]:
        found = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        ending = f"{EMBEDDINGS}.{adapter_name}"
        return found | {key: value for key, value in state_dict.items() if key.endswith(ending)}

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: Any, config: Any, adapter_name: str, state_dict: dict[str, Any]
    ) -> dict[str, Any]:
        found = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        return {f"{key}.{adapter_name}" if key.endswith(EMBEDDINGS) else key: value for key, value in found.items()}

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """As PEFT, embeddings included; one adapter at a time, since its compression tokens stand for one memory."""
        names = [adapter_name] if isinstance(adapter_name, str) else adapter_name
        if len(names) != 1:
            raise ValueError(f"one conditional LoRA can be active at a time, got {names}; set one of them")
        super().set_adapter(adapter_name, inference_mode=inference_mode)
        for name, rows in self._embeddings().items():
            rows.requires_grad_(name in names and not inference_mode)

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Refused: adapters have compression tokens of their own."""
        raise ValueError("conditional LoRAs cannot be combined: each was trained with its own compression tokens")

    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("adapter_names") is not None:
            raise ValueError("a batch cannot mix conditional LoRAs; call set_adapter(...) and run a batch per adapter")
        return super()._enable_peft_forward_hooks(*args, **kwargs)

    def delete_adapter(self, adapter_name: str) -> None:
        """As PEFT, embeddings included."""
        super().delete_adapter(adapter_name)
        self._embeddings().pop(adapter_name)

    def _check_merge_allowed(self) -> None:
        raise ValueError(
            "a conditional LoRA cannot be merged: the weights would change for every token, not for compression tokens only; "
            "keep the adapter, or `unload()` it"
        )

    def unload(self) -> Any:
        """The base model without adapter, hooks and compression tokens."""
        for handle in self.model.__dict__.pop("_hf_dataopt_ccm", []):
            handle.remove()
        for module in self.model.modules():
            recompute = checkpointing(module)
            if isinstance(recompute, _Recompute):
                set_checkpointing(module, recompute.plain)
        detach(self.model, USER, drop_counted_positions)
        delattr(self.model.get_input_embeddings(), EMBEDDINGS)
        return super().unload()


def _first_rows(table: torch.Tensor, config: CCMConfig) -> torch.Tensor:
    """Embeddings (num_comp_tokens, width) float32 that compression tokens start from."""
    n, ids = config.num_comp_tokens, config.comp_init_token_ids
    if ids is None:  # row -k-1 starts at the mean of vocabulary rows k, k + n, ... as in the reference code
        return torch.stack([table[n - 1 - k :: n].float().mean(0) for k in range(n)])
    if not all(0 <= token < table.shape[0] for token in ids):
        raise ValueError(f"comp_init_token_ids must be in [0, {table.shape[0] - 1}], got {ids}")
    return table[[ids[k % len(ids)] for k in range(n)]].float()


class _Reader:
    """Hooks of one model: where compression tokens stand, what they see, and their embeddings.

    Holds settings only, no model: a copied model takes a copied reader along.
    """

    def __init__(self, configs: dict[str, Any]) -> None:
        self._configs = configs  # the dict that PEFT keeps and changes
        self._proven: dict[str, CCMConfig] = {}

    def prove(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the first parallel forward of a model: see that its memory is what it is trained to be."""
        found = self.active(module)
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if found is None or self._proven.get(found[0]) is found[1] or distributed or torch.compiler.is_compiling():
            return
        # on a CPU a forward in evaluation has bitsandbytes pack 4-bit weights in a way that passes no gradient ever after
        if module.training and is_quantised(module):
            return
        ids, first = tokens_in(args, kwargs), (found[1].comp_token_ids or [0])[0]
        if ids is None or ids.is_floating_point() or not bool((ids >= first).any()):
            return
        from .memory import CompressedContextMemory  # peft's import brings this file in while that one is on its way

        prove(module, found[1], CompressedContextMemory)
        self._proven[found[0]] = found[1]

    def active(self, decoder: Any) -> tuple[str, CCMConfig] | None:
        """Name and settings of the adapter at work, None while adapters are disabled."""
        layer = next((module for module in decoder.modules() if isinstance(module, LoraLayer)), None)
        if layer is None or layer.disable_adapters or not layer.active_adapters:
            return None
        name = layer.active_adapters[0]
        config = self._configs.get(name)
        return (name, config) if isinstance(config, CCMConfig) else None

    def enter(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before the decoder: find the compression tokens, replace their ids, and say what attention has to know."""
        if CURRENT.get() is not None:  # whatever an interrupted call left in this thread
            CURRENT.set(None)
        args, kwargs = named_arguments(module, args, kwargs)
        found = self.active(module)
        cache = cache_in(args, kwargs)
        memory = cache if isinstance(cache, MemoryCache) else None
        ids = kwargs.get("input_ids", args[0] if args else None)
        if found is None:
            self._check_disabled(module, ids, memory)
            return None
        name, config = found
        if ids is None:
            raise ValueError(
                "a conditional LoRA needs input_ids: inputs_embeds do not tell where compression tokens stand"
            )
        first = (config.comp_token_ids or [0])[0]
        comp = torch.where((ids >= first) & (ids < first + config.num_comp_tokens), ids - first, -1)
        has_comp = bool((comp >= 0).any())
        if memory is None and not has_comp:
            if getattr(cache, "_hf_dataopt_parallel", False):
                raise ValueError("a parallel forward's cache cannot be continued; use CompressedContextMemory.generate")
            if module.training and torch.is_grad_enabled():  # the loss of a batch without contexts has a gradient: zero
                CURRENT.set(Call(text_config(module), None, None, name, linked=_zero(module, name)))
            return None
        table = module.get_input_embeddings()
        if has_comp and (table.weight.shape[0] > first or not hasattr(table, EMBEDDINGS)):
            raise ValueError(
                f"the embedding table was replaced or resized after the adapter was put on: ids from {first} on can no longer "
                "stand for compression tokens; resize first"
            )
        kwargs = {**kwargs, "input_ids": ids.masked_fill(comp >= 0, 0)}
        if memory is not None:
            mask = kwargs.get("attention_mask")
            if mask is None:
                mask = torch.ones(
                    ids.shape[0], memory.get_seq_length() + ids.shape[1], dtype=torch.int64, device=ids.device
                )
            kwargs["attention_mask"] = mask
            positions = memory.text_positions(mask, ids.shape[1])
            kwargs["position_ids"] = kwargs.get("position_ids") if positions is None else positions
            kept = comp if has_comp else None
            call = Call(text_config(module), kept, None, name, memory.memory_length, rows=rows_of(comp))
        else:
            call = self._parallel(comp, kwargs, name, config, module, cache)
        if module.training and torch.is_grad_enabled():  # nothing is recomputed otherwise, and the walk costs time
            self._wrap_checkpointing(module)
        CURRENT.set(call)
        return args[1:] if args else args, kwargs

    @staticmethod
    def _check_disabled(module: Any, ids: Any, memory: MemoryCache | None) -> None:
        if memory is not None:
            raise ValueError("the adapter that wrote this memory is disabled; enable it to read the memory")
        size = module.get_input_embeddings().weight.shape[0]
        if isinstance(ids, torch.Tensor) and bool((ids >= size).any()):
            raise ValueError(
                f"ids of {size} and above are compression tokens, but the adapter is disabled; enable it or leave them out"
            )

    def _parallel(
        self, comp: torch.Tensor, kwargs: dict[str, Any], name: str, config: CCMConfig, module: Any, cache: Any
    ) -> Call:
        if cache is not None and cache.get_seq_length() > 0:
            raise ValueError("compression tokens after a plain cache: use CompressedContextMemory.append")
        mask = kwargs.get("attention_mask")
        if mask is None:
            mask = torch.ones_like(comp)
        if mask.ndim != 2 or mask.shape != comp.shape:
            raise ValueError(f"attention_mask must be 2-D like input_ids {tuple(comp.shape)}, got {tuple(mask.shape)}")
        kwargs["attention_mask"] = mask
        if kwargs.get("position_ids") is None:
            kwargs["position_ids"] = skip_positions(comp, mask.bool())
        positions = kwargs["position_ids"].expand_as(comp)
        if config.stream is not None and is_stream(comp, positions):
            layout = build_stream_layout(comp, mask.bool(), positions, config, Rotation(module))
        else:
            layout = build_layout(comp, mask.bool(), positions, config)
        return Call(text_config(module), comp, layout, name, rows=rows_of(comp))

    def leave(self, module: Any, args: Any, kwargs: Any, output: Any) -> None:
        """After the decoder, also after an error: nothing is said any more."""
        call = current_call()
        if call is None:
            return
        CURRENT.set(None)
        values = output.values() if isinstance(output, dict) else output if isinstance(output, tuple) else ()
        cache = cache_in(tuple(values), {})
        if call.layout is not None and cache is not None:
            cache._hf_dataopt_parallel = True  # its keys were visible by blocks; a plain continuation would see all

    def embed(self, module: Any, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor | None:
        """Put the trained rows where compression tokens stand."""
        call = current_call()
        if call is not None and call.linked is not None:
            return output + call.linked.to(output.dtype)
        if call is None or call.comp is None or call.comp.shape != output.shape[:-1]:
            return None
        trained = getattr(module, EMBEDDINGS)
        with loaded(trained):
            rows = trained[call.adapter].to(output.dtype)[call.comp.clamp(min=0)]
        return torch.where((call.comp >= 0)[..., None], rows, output)

    @staticmethod
    def _wrap_checkpointing(decoder: Any) -> None:
        """Let a recomputed layer run in the call of *its* forward: the hooks have closed it by then."""
        for module in decoder.modules():
            plain = checkpointing(module)
            if plain is not None and not hasattr(plain, "_hf_dataopt_ccm"):
                set_checkpointing(module, _Recompute(plain))


def _zero(decoder: Any, name: str) -> torch.Tensor:
    """A zero that depends on every parameter of the adapter, as DDP and `backward` need."""
    layers = [module for module in decoder.modules() if isinstance(module, LoraLayer) and name in module.lora_A]
    weights = [part[name].weight for layer in layers for part in (layer.lora_A, layer.lora_B)]
    weights.append(getattr(decoder.get_input_embeddings(), EMBEDDINGS)[name])
    return torch.stack([weight.float().sum() for weight in weights]).sum() * 0.0


class _Recompute:
    """A checkpoint function that remembers the call it was made in."""

    _hf_dataopt_ccm = True

    def __init__(self, plain: Any) -> None:
        self.plain = plain

    def __call__(self, function: Any, *args: Any) -> Any:
        call = current_call()

        def in_its_call(*inner: Any) -> Any:
            if call is None or call.linked is not None:
                return function(*inner)
            token = CURRENT.set(call)
            try:
                return function(*inner)
            finally:
                CURRENT.reset(token)

        return self.plain(in_its_call, *args)


def drop_counted_positions(model: Any, input_ids: torch.Tensor, inputs: dict[str, Any]) -> None:
    """Drop the positions that `generate` counted off the mask, where compression tokens would take room."""
    size = model.get_input_embeddings().weight.shape[0]
    if bool((input_ids >= size).any()):
        inputs.pop("position_ids", None)


def register_peft_type() -> None:
    """Enter `CCMConfig` into PEFT's tables; PEFT's own function takes members of its enum only."""
    for table, value in zip(peft_tables(), (CCMConfig, CCMModel, "lora_"), strict=True):
        for name in CCMPeftType:
            table[name] = value


register_peft_type()
