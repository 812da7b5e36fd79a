"""Load what a stage starts from: tokenizer, weights, adapters and where they came from."""

from __future__ import annotations

import copy
import math
import os
import re
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.utils import load_peft_weights
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
)
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from suwen import architectures, experts, two_bit
from suwen.conversion.configs import load_native
from suwen.conversion.convert import command_for
from suwen.conversion.tokenizer_files import unknown_class
from suwen.encoding import apply_template
from suwen.head import add_reward_forward, add_scoring_head, init_reward_head
from suwen.lineage import (
    adapter_base,
    adapter_shapes,
    has_reward_head,
    is_adapter_dir,
    is_reward_model,
    needs_code,
    read_json,
    refuse_reward_model,
    require_model,
    resolve_lineage,
)
from suwen.lora_targets import linear_names, lora_targets, trainable_token_indices
from suwen.network import ask_hub
from suwen.progress import say
from suwen.readers import first_line

PROBE_SENTENCES = (
    "高血压患者每天的食盐摄入量应控制在多少克以内？长期超量会对肾脏和血管造成哪些损害？",
    "孩子发烧到三十九度，伴有咳嗽和流鼻涕，应该先物理降温还是马上服用退烧药？",
    "糖尿病足的早期表现包括足部麻木、刺痛、皮肤温度下降，应尽早就诊并控制血糖。",
)

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed, where it is installed, warns on stdout


def load_tokenizer(path: str, template_name: str | None = None) -> Any:
    """Tokenizer with the chat template in place and a padding token.

    `template_name` None leaves the template alone (pretraining needs none); otherwise see `apply_template`.
    """
    folder = Path(path)
    if folder.is_dir() and is_adapter_dir(folder) and not (folder / "tokenizer_config.json").is_file():
        return load_tokenizer(adapter_base(folder), template_name)
    if not folder.is_dir():
        ask_hub()
    settings, tokenizer = read_json(folder / "tokenizer_config.json"), None
    try:
        settings = settings or get_tokenizer_config(path)  # of a hub name: what AutoTokenizer would fetch
        if not unknown_class(settings):
            tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        if "trust_remote_code" not in str(error):  # the library advises to let the code run
            raise ValueError(f"tokenizer {path!r}: {first_line(error)}") from None
    if tokenizer is None:
        raise ValueError(
            f"tokenizer {path!r}: class {settings.get('tokenizer_class')!r} needs code from its folder, which never "
            f"runs; convert the checkpoint: {command_for(path)}"
        )
    if tokenizer.is_fast and (folder / "tokenizer.model").is_file() and not (folder / "tokenizer.json").is_file():
        command = command_for(folder, adapter_base(folder) or "BASE" if is_adapter_dir(folder) else None)
        raise ValueError(
            f"tokenizer {path!r}: found tokenizer.model without tokenizer.json, which transformers would cut otherwise "
            f"than sentencepiece did in the training; convert once: {command}"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.eos_token_id is None:
        raise ValueError(f"tokenizer {path!r}: has no EOS token, expected one")
    if template_name is not None:
        apply_template(tokenizer, template_name)
    return tokenizer


def load_config(path: str) -> Any:
    """Config of a model folder, a hub name or a LoRA folder, with the positions that its adapter was trained on."""
    base, *adapters = resolve_lineage(path)
    return config_of_lineage(base, adapters)


def config_of_lineage(base: str, adapters: list[str]) -> Any:
    """Config of a base as the last of its adapters was trained, with stretched positions where it had them."""
    if not Path(base).is_dir():
        ask_hub()
    try:
        content, _ = PreTrainedConfig.get_config_dict(base)  # of a hub name: what AutoConfig would fetch
        if reason := needs_code(content, base):
            raise ValueError(reason)
        config = load_native(base)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"model {base!r}: {first_line(error)}") from None
    for adapter in reversed(adapters):
        if positions := read_json(Path(adapter) / "run.json").get("positions"):
            config.rope_parameters = positions["rope_parameters"]
            config.max_position_embeddings = positions["max_position_embeddings"]
            break
    return config


def refuse_labels_in_prompts(path: str) -> None:
    """Refuse --train_on_inputs where a prompt sees itself in both directions: a loss there would teach copying."""
    config = load_config(path)
    if isinstance(config, architectures.ChatGLMConfig):
        raise ValueError(
            f"--train_on_inputs: the prompts of model type {config.model_type!r} see themselves in both directions, so "
            "that a loss on them would teach copying; leave it out"
        )


def positions_of(config: Any) -> dict[str, Any] | None:
    """What run.json keeps of rotary positions, for `config_of_lineage`; None for models without."""
    if not getattr(config, "rope_parameters", None) or not hasattr(config, "max_position_embeddings"):
        return None
    return {
        "rope_parameters": dict(config.rope_parameters),
        "max_position_embeddings": config.max_position_embeddings,
    }


def scale_rope(config: Any, kind: str, length: int) -> None:
    """Stretch rotary positions so that `length` tokens fit, in the way transformers 5 stores it.

    linear: Chen et al. 2023 (arXiv:2306.15595); yarn: Peng et al. 2023 (arXiv:2309.00071); dynamic: NTK-aware,
    acts only beyond the model's own window. llama3: Llama 3.1 (arXiv:2407.21783), low frequencies alone, with its
    released factors 1 and 4.
    """
    parameters = getattr(config, "rope_parameters", None)
    if not parameters or "rope_theta" not in parameters:
        raise ValueError(
            f"--rope_scaling: model type {config.model_type!r} has no rotary positions that can be stretched"
        )
    if parameters.get("rope_type", "default") != "default":
        raise ValueError(
            f"--rope_scaling {kind}: the model's positions are stretched already ({parameters['rope_type']}); leave "
            "the flag out, or start from the model before that"
        )
    window = config.max_position_embeddings
    if length <= window:
        raise ValueError(f"--rope_scaling: --max_length {length} already fits the model's window of {window}")
    factor = length / window if kind == "yarn" else float(math.ceil(length / window))
    config.rope_parameters = {**parameters, "rope_type": kind, "factor": factor}
    if kind == "llama3":
        config.rope_parameters |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    if kind in ("yarn", "llama3"):
        config.rope_parameters["original_max_position_embeddings"] = window
    if kind != "dynamic":  # dynamic scaling starts where the model's own window ends
        config.max_position_embeddings = length


def quantization_config(
    quantization: str, compute_dtype: torch.dtype, skip: list[str] | None = None
) -> BitsAndBytesConfig:
    """bitsandbytes settings: LLM.int8 (arXiv:2208.07339), or NF4 with double quantisation (QLoRA, arXiv:2305.14314).

    `skip`: modules that stay as they are; None for the head of a language model.
    """
    if quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        llm_int8_skip_modules=skip,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def load_base(
    path: str,
    dtype: torch.dtype | str,
    quantization: str = "none",
    compute_dtype: torch.dtype = torch.float32,
    device: str | None = None,
    attn_implementation: str | None = None,
    config: Any = None,
    reward: bool = False,
) -> Any:
    """A full model from a folder or the hub, without its adapters; `reward`: with a head of one score, `score`."""
    require_model(path)
    config = config or config_of_lineage(path, [])
    options: dict[str, Any] = {"config": config, "dtype": dtype, "use_safetensors": True, "trust_remote_code": False}
    options["attn_implementation"] = attn_implementation
    if reward:
        if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
            raise ValueError(f"model {path!r}: model type {config.model_type!r} has no class with a head for scores")
        trained_head = has_reward_head(config)
        config.num_labels = 1
    else:
        refuse_reward_model(path)
    place = {"": device or ("cuda" if torch.cuda.is_available() else "cpu")}
    exported = bool(getattr(config, "quantization_config", None))  # by tools/quantize_model.py
    if exported and quantization != "none":
        raise ValueError(f"--quantization {quantization}: {path!r} is quantised already; leave it out")
    if exported:
        options["device_map"] = place
    if quantization in ("8bit", "4bit"):
        skip = ["score"] if reward else None
        options["quantization_config"] = quantization_config(quantization, compute_dtype, skip)
        options["device_map"] = place
    try:
        model = (AutoModelForSequenceClassification if reward else AutoModelForCausalLM).from_pretrained(
            path, **options
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ValueError(f"model {path!r}: {first_line(error)}") from None
    if reward and not hasattr(model, "score"):
        raise ValueError(f"model {path!r}: found a {type(model).__name__}, expected a decoder with a head for scores")
    if reward and not trained_head:
        init_reward_head(model.score)
    keep_nf4_as_it_is(model)
    if quantization == "2bit":
        before = None if reward else probe_loss(model, path)
        report = model.two_bit_report = two_bit.quantize_model(model, device)
        if before is not None:
            report.loss_before, report.loss_after = before, probe_loss(model, path)
        return model
    return model.to(device) if device and quantization == "none" and not exported else model


@torch.no_grad()
def probe_loss(model: Any, path: str) -> float | None:
    """Mean loss a token on a few sentences, for a word on what quantising costs; None without a tokenizer."""
    try:
        tokenizer = load_tokenizer(path)
    except ValueError:
        return None
    losses, count = 0.0, 0
    for text in PROBE_SENTENCES:
        ids = torch.tensor([tokenizer(text)["input_ids"]], device=model.device)
        logps = model(input_ids=ids, use_cache=False).logits[0, :-1].float().log_softmax(-1)
        losses -= logps.gather(1, ids[0, 1:, None]).sum().item()
        count += ids.shape[1] - 1
    return losses / max(count, 1)


def keep_nf4_as_it_is(model: Any) -> None:
    """Keep bitsandbytes 0.50 from repacking NF4 weights in place at the first evaluation on a CPU with AVX512-BF16.

    It rounds their scales to bfloat16, fails at widths that are no multiple of 64, and has no backward pass: a training
    would go on without the gradients that flow through the base.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def load_causal_lm(
    path: str,
    dtype: str = "auto",
    quantization: str = "none",
    device: str | None = None,
    attn_implementation: str | None = None,
    config: Any = None,
    trainable: bool = False,
    reward: bool = False,
) -> Any:
    """A model ready for use from a full model, a hub name or a LoRA folder.

    Unquantised, the adapters of a LoRA folder are merged into their base in float32, one after the other. Quantised,
    the last adapter stays on the quantised base as it was trained (merging would quantise twice); adapters before it
    were trained on other bases and cannot be put there.

    Args:
        path: full model folder, hub name, or LoRA folder.
        dtype: auto (the checkpoint's own), float32, bfloat16 or float16.
        quantization: none, 8bit, 4bit or 2bit.
        device: cpu, cuda, cuda:N, or None to leave it where it was loaded.
        trainable: a quantised LoRA folder's adapter can be trained further.
        reward: with a head of one score in the place of the vocabulary, a new one where the folder has none.
    """
    if not reward:
        refuse_reward_model(path)
    base, *adapters = resolve_lineage(path)
    config = config or config_of_lineage(base, adapters)
    torch_dtype = "auto" if dtype == "auto" else getattr(torch, dtype)
    if not adapters:
        compute = torch.float32 if dtype == "auto" else torch_dtype
        if dtype == "auto" and quantization != "none" and torch.cuda.is_available():
            compute = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
        return load_base(base, torch_dtype, quantization, compute, device, attn_implementation, config, reward)
    if quantization != "none":
        if len(adapters) > 1:
            raise ValueError(
                f"--quantization {quantization}: {path!r} stands on the adapter {adapters[-2]!r}; merge that one "
                "first with merge_peft_adapter.py"
            )
        compute = torch.float32 if dtype == "auto" else torch_dtype
        model = load_base(base, torch_dtype, quantization, compute, device, attn_implementation, config, reward)
        return load_adapter(model, adapters[0], trainable)
    if is_deepspeed_zero3_enabled() or os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING") == "true":
        raise ValueError(
            f"model {path!r}: a LoRA folder cannot be merged while its base is spread over the processes (ZeRO-3, "
            "FSDP); merge it first with merge_peft_adapter.py"
        )
    model = load_merged(base, adapters, dtype, device, attn_implementation, config, reward)
    # The folder that this model stands for: an adapter trained on it names it as its base.
    model.config._name_or_path = path
    model.name_or_path = path
    return model


def load_merged(
    base: str,
    adapters: list[str],
    dtype: str,
    device: str | None,
    attn_implementation: str | None = None,
    config: Any = None,
    reward: bool = False,
) -> Any:
    """Merge adapters in order, in float32 and in main memory; the device receives the result in its own precision."""
    config = config or config_of_lineage(base, adapters)
    own = getattr(config.get_text_config(), "dtype", None) or torch.float32
    model = load_base(base, torch.float32, attn_implementation=attn_implementation, config=config, reward=reward)
    for adapter in adapters:
        untie_if_needed(model, adapter)
        model = load_adapter(model, adapter).merge_and_unload(safe_merge=True)
    model = model.to(own if dtype == "auto" else getattr(torch, dtype))
    return model.to(device) if device else model


def untie_if_needed(model: Any, adapter: str) -> None:
    """Part a tied output layer from the input embedding when LoRA changes one of them: a merge would change both."""
    source, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or head.weight is not source.weight:
        return
    modules = {id(module): name for name, module in model.named_modules()}
    tables = (modules[id(source)], modules[id(head)])
    touched = {name for key in adapter_shapes(adapter) for name in tables if f".{name}.lora_" in key}
    if len(touched) == 1:
        head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)
        model.config.get_text_config().tie_word_embeddings = model.config.tie_word_embeddings = False


def load_adapter(model: Any, adapter: str, trainable: bool = False) -> Any:
    """Put the adapter of a LoRA folder on its base; grows the vocabulary when the adapter carries a larger one."""
    tables = re.compile(r"(embed_tokens|wte|word_embeddings)\.weight$")
    rows = [shape[0] for name, shape in adapter_shapes(adapter).items() if tables.search(name)]
    if rows and rows[0] > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(rows[0])
    try:
        config = PeftConfig.from_pretrained(adapter)
        if hasattr(model, "score") and not is_reward_model(adapter):
            if trainable:
                return adapter_with_new_head(model, adapter, config)
            config.task_type = None  # of a language model: it fits the backbone alone
        return PeftModel.from_pretrained(model, adapter, is_trainable=trainable, config=config)
    except (RuntimeError, ValueError, KeyError) as error:
        base = getattr(model, "name_or_path", "the base")
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"adapter {adapter!r}: does not fit the base {base!r}: {reason}") from None


def adapter_with_new_head(model: Any, adapter: str, config: PeftConfig) -> Any:
    """A language model's adapter on a reward model, to be trained further together with the head."""
    config.task_type, config.inference_mode = "SEQ_CLS", False
    weights = load_peft_weights(adapter, device="cpu")
    weights["base_model.model.score.weight"] = model.score.weight.detach().clone()
    model = get_peft_model(model, config)
    set_peft_model_state_dict(model, weights)
    return model


def check_vocabulary(model: Any, tokenizer: Any) -> None:
    rows = model.get_input_embeddings().weight.shape[0]
    if is_deepspeed_zero3_enabled():
        return  # the weights are partitioned: their shapes say nothing here
    if len(tokenizer) > rows:
        raise ValueError(
            f"tokenizer and model do not fit: the tokenizer has {len(tokenizer)} tokens, the model's embedding {rows}"
            " rows; give the tokenizer that belongs to the model"
        )


def compute_precision(library: dict[str, Any]) -> str:
    """bf16, fp16 or fp32: the user's choice, else what the hardware does well.

    CUDA: bf16 from compute capability 8.0 on, else fp16 with a loss scaler. CPU: bf16 where AVX512_BF16 or AMX exists;
    it was faster there for all models measured, of widths from 192 to 1024 (benchmarks/README.md).
    """
    if library.get("bf16") and library.get("fp16"):
        raise ValueError("--bf16 and --fp16: give one of them")
    if library.get("bf16"):
        return "bf16"
    if library.get("fp16"):
        if library.get("use_cpu") or not torch.cuda.is_available():
            raise ValueError("--fp16: needs a GPU; on the CPU use --bf16, or neither for fp32")
        return "fp16"
    if library.get("bf16") is False or library.get("fp16") is False:
        return "fp32"
    if torch.cuda.is_available() and not library.get("use_cpu"):
        return "bf16" if torch.cuda.get_device_capability()[0] >= 8 else "fp16"
    return "bf16" if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported() else "fp32"


def takes_shifted_attention(config: Any) -> bool:
    """Whether a model's attention can be replaced by one that its rotary positions fit."""
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    return bool(getattr(model_class, "_supports_attention_backend", False) and positions_of(config))


def refuse_flags(config: Any, model_args: Any, max_length: int) -> None:
    """Refuse, before a weight is loaded, what a model of this config cannot have."""
    if model_args.rope_scaling:
        scale_rope(copy.deepcopy(config), model_args.rope_scaling, max_length)
    if model_args.shift_attn and not takes_shifted_attention(config):
        raise ValueError(
            f"--shift_attn: model type {config.model_type!r} cannot have it (its attention cannot be replaced, or it"
            " has no rotary positions); leave it out"
        )


def load_for_training(
    path: str, model_args: Any, lora: Any, precision: str, max_length: int, reward: bool = False
) -> Any:
    """Weights for a stage: float32 for what is trained, the compute precision for what LoRA freezes.

    `reward`: with a head of one score in the place of the vocabulary.
    """
    config = load_config(path)
    if getattr(config, "quantization_config", None):
        raise ValueError(
            f"model {path!r}: is a quantised export, for serving; train from the model it was made from, with"
            " --quantization"
        )
    if model_args.rope_scaling:
        scale_rope(config, model_args.rope_scaling, max_length)
    dtype = model_args.dtype
    if dtype == "auto":
        frozen = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}[precision]
        dtype = "bfloat16" if model_args.pure_bf16 else (frozen if lora.use_peft else "float32")
    device = None
    if model_args.quantization != "none":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    model = load_causal_lm(
        path, dtype, model_args.quantization, device, model_args.attn_implementation, config, True, reward
    )
    if report := getattr(without_adapter(model), "two_bit_report", None):
        say(report.line())
    prepare_experts(without_adapter(model), model_args, lora.use_peft, reward)
    return model


def prepare_experts(model: Any, model_args: Any, use_peft: bool, reward: bool) -> None:
    """Give a model the forward pass of its stage, with the routers' loss for a mixture of experts.

    Raises:
        ValueError: --router_aux_loss_coef for a model without experts.
    """
    add_forward = add_reward_forward if reward else add_scoring_head
    if not experts.find_routers(model):
        if model_args.router_aux_loss_coef:
            raise ValueError(
                f"--router_aux_loss_coef: model type {model.config.model_type!r} has no experts, expected such a model"
            )
        return add_forward(model)
    config = model.config.get_text_config()
    config.router_aux_loss_coef = experts.coefficient(model_args.router_aux_loss_coef, config, use_peft)
    if is_deepspeed_zero3_enabled():
        experts.mark_leaf_modules(model)
    count, dtype = experts.stacked_experts(model)
    if model_args.quantization != "none" and count:
        say(f"note: --quantization {model_args.quantization} leaves the stacked experts, {count:,} weights, in {dtype}")
    add_forward(model, experts.RouterWatch(model) if config.router_aux_loss_coef else None)


def without_adapter(model: Any) -> Any:
    """The model under an adapter, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def without_dropout(model: Any) -> None:
    """Switch dropout off, that of LoRA too: a policy is compared with its reference without noise."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0


def lora_config(lora: Any, model: Any, start: str) -> LoraConfig | None:
    """PEFT settings of a new adapter; None for full training, or where the model already carries the adapter.

    Where the vocabulary of the start was extended, the rows of its new words are trained too.
    """
    if not lora.use_peft or isinstance(model, PeftModel):
        return None
    saved = [name.strip() for name in lora.modules_to_save.split(",")] if lora.modules_to_save else []
    names = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
    if missing := [name for name in saved if name not in names]:
        raise ValueError(
            f"--modules_to_save: found {', '.join(missing)}, expected names of this model: "
            f"{', '.join(linear_names(model))}, embed_tokens, lm_head and the like"
        )
    return LoraConfig(
        task_type="SEQ_CLS" if hasattr(model, "score") else "CAUSAL_LM",  # SEQ_CLS trains the head too, and saves it
        r=lora.lora_rank,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        target_modules=lora_targets(model, lora.target_modules),
        trainable_token_indices=trainable_token_indices(model, start, saved),
        modules_to_save=saved or None,
    )
