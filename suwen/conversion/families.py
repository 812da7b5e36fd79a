"""Which family a checkpoint belongs to, its table and its config; a tensor that no table knows stops a conversion."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from torch import Tensor

from suwen.conversion import configs
from suwen.conversion.configs import Config
from suwen.conversion.tables import (
    BAICHUAN_7B,
    BAICHUAN_13B,
    CHATGLM,
    CHATGLM2,
    DROPPED,
    EXPERTS,
    INTERNLM2,
    LLAMA,
    QWEN,
    UNIT_HEAD,
    YI,
    Rule,
    deepseek_gates,
    no_additions,
    table,
)  # fmt: skip

WILDCARDS = {"i": r"\d+", "e": r"\d+", "p": "weight|bias"}


@dataclass(frozen=True)
class Family:
    """What becomes of one family.

    Attributes:
        name: value of --family.
        model_type: of the converted config.
        rules: the table; empty means that every tensor keeps its name.
        config: old config -> arguments of the new config class.
        template: the family's chat template in template.py, for tokenizers that bring none.
        required: settings that the table relies on; a config that says otherwise is refused.
        additions: tensors that the new class has and the old one lacks.
    """

    name: str
    model_type: str
    rules: tuple[Rule, ...]
    config: Callable[[Config], Config]
    template: str | None = None
    required: dict[str, Any] = field(default_factory=dict)
    additions: Callable[[Config], dict[str, Tensor]] = no_additions


GLM_REQUIRED = {
    "rmsnorm": True, "apply_residual_connection_post_layernorm": False, "post_layer_norm": True,
    "add_bias_linear": False, "original_rope": True, "pre_seq_len": None, "prefix_projection": False,
}  # fmt: skip
_ALL = [
    Family("baichuan-7b", "llama", table(BAICHUAN_7B), configs.llama_config, "baichuan"),
    Family("baichuan2-7b", "llama", table(BAICHUAN_7B | UNIT_HEAD), configs.llama_config, "baichuan2"),
    Family("baichuan-13b", "baichuan", table(BAICHUAN_13B), configs.baichuan_13b_config, "baichuan"),
    Family("baichuan2-13b", "baichuan", table(BAICHUAN_13B | UNIT_HEAD), configs.baichuan_13b_config, "baichuan2"),
    Family("internlm2", "llama", table(INTERNLM2), configs.internlm2_config, "internlm2"),
    Family("qwen", "qwen2", table(QWEN), configs.qwen_config, "chatml", {"no_bias": True, "rotary_pct": 1.0}),
    Family("chatglm2", "glm", table(CHATGLM2), configs.chatglm2_config, "chatglm2", GLM_REQUIRED),
    Family("chatglm3", "glm", table(CHATGLM2), configs.chatglm3_config, "chatglm3", GLM_REQUIRED),
    Family("glm4", "glm", table(CHATGLM2), configs.chatglm3_config, "glm4", GLM_REQUIRED),
    Family("chatglm", "chatglm", table(CHATGLM), configs.chatglm_config, "chatglm",
           {"position_encoding_2d": True, "pre_seq_len": None, "prefix_projection": False, "quantization_bit": 0}),
    Family("xverse", "llama", table(LLAMA), configs.llama_config, "xverse"),
    Family("yi", "llama", table(YI), configs.llama_config, "yi"),
    Family("orion", "stablelm", table(LLAMA), configs.orion_config, "orion"),
    Family("deepseek-moe", "qwen2_moe", table(LLAMA | EXPERTS), configs.deepseek_config, "deepseek",
           {"scoring_func": "softmax"}, deepseek_gates),
]  # fmt: skip
FAMILIES = {family.name: family for family in _ALL}
NATIVE = Family("native", "", (), lambda config: config)


def recognise(config: Config, code: str = "") -> Family | None:
    """The family of a checkpoint by its config.json; None for one that no table knows.

    Args:
        config: content of config.json.
        code: text of the folder's modelling file, which tells ChatGLM2 from ChatGLM3; it is read, never run.

    Raises:
        ValueError: a config of a known family whose members cannot be told apart.
    """
    kind, name = config.get("model_type"), None
    if kind == "baichuan" or str(config.get("architectures")).lower().count("baichuan"):
        name = _recognise_baichuan(config)
    elif kind == "chatglm":
        name = _recognise_chatglm(config, code)
    elif kind in ("Yi", "yi"):
        name = "yi"
    elif kind == "deepseek":
        name = "deepseek-moe"
    elif kind in ("internlm2", "qwen", "xverse", "orion"):
        name = str(kind)
    return FAMILIES[name] if name else None


def _recognise_baichuan(config: Config) -> str:
    size = "7b" if "max_position_embeddings" in config else "13b"
    if config.get("hidden_size") in (4096, 5120) and (size == "7b") != (config["hidden_size"] == 4096):
        raise ValueError(
            f"config.json: a Baichuan of width {config['hidden_size']} "
            f"{'with' if size == '7b' else 'without'} max_position_embeddings; say by --family whether its positions "
            "are rotary (baichuan-7b, baichuan2-7b) or ALiBi (baichuan-13b, baichuan2-13b)"
        )
    generation = {64000: "baichuan", 125696: "baichuan2"}.get(config.get("vocab_size", 0))
    if generation is None:
        raise ValueError(
            f"config.json: a Baichuan with vocab_size {config.get('vocab_size')}, expected 64000 (Baichuan) or 125696 "
            f"(Baichuan2, whose head is normalised); say by --family which it is: baichuan-{size} or baichuan2-{size}"
        )
    return f"{generation}-{size}"


def _recognise_chatglm(config: Config, code: str) -> str:
    if "inner_hidden_size" in config or "position_encoding_2d" in config:
        return "chatglm"
    if config.get("padded_vocab_size", 0) > 100_000:
        return "glm4"
    if config.get("rope_ratio", 1) in (1, None):
        return "chatglm3" if "<|assistant|>" in code else "chatglm2"  # the same function, another template
    if "base * self.rope_ratio" in code:
        return "chatglm3"
    if "/ self.rope_ratio" in code:
        return "chatglm2"
    raise ValueError(
        f"config.json: rope_ratio {config['rope_ratio']} divides the positions in ChatGLM2 and multiplies the base in "
        "ChatGLM3; say by --family which it is: chatglm2 or chatglm3"
    )


def check_settings(family: Family, config: Config) -> None:
    """Refuse settings that the family's table was not made for."""
    for name, expected in family.required.items():
        if name in config and config[name] != expected and (config[name] or expected):
            raise ValueError(f"config.json: {name} is {config[name]!r}, expected {expected!r} for a {family.name}")


def convert_config(family: Family, config: Config) -> Any:
    """The config object of the converted model."""
    from transformers import CONFIG_MAPPING

    import suwen.architectures  # noqa: F401  (registers its classes)

    check_settings(family, config)
    try:
        arguments = family.config(config)
    except KeyError as error:
        raise ValueError(f"config.json: found no {error.args[0]}, expected one in a {family.name} config") from None
    arguments.setdefault("tie_word_embeddings", False)
    return CONFIG_MAPPING[family.model_type](**arguments)


@lru_cache
def _compiled(pattern: str) -> re.Pattern:
    return re.compile("".join(
        f"(?P<{part[1:-1]}>{WILDCARDS[part[1:-1]]})" if part.startswith("{") else re.escape(part)
        for part in re.split(r"(\{\w\})", pattern)
    ))  # fmt: skip


def find_rule(family: Family, name: str) -> tuple[Rule, tuple[str, ...]] | None:
    """The rule for a tensor of the original and the names of what it becomes; None if the table does not know it."""
    if not family.rules:
        dropped = any(_compiled(pattern).fullmatch(name) for pattern in DROPPED)
        return (Rule(name, ()), ()) if dropped else (Rule(name, (name,)), (name,))
    for rule in family.rules:
        if match := _compiled(rule.source).fullmatch(name):
            return rule, tuple(target.format(**match.groupdict()) for target in rule.targets)
    return None


def apply_rule(rule: Rule, tensor: Tensor, config: Config) -> Sequence[Tensor]:
    return rule.change(tensor, config) if rule.change else (tensor,)
