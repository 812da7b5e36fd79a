"""Classes that transformers does not have; importing this package lets its Auto classes find them.

import suwen.architectures
model = AutoModelForCausalLM.from_pretrained("baichuan-13b-converted")
"""

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from suwen.architectures.baichuan import BaichuanConfig, BaichuanForCausalLM
from suwen.architectures.chatglm import ChatGLMConfig, ChatGLMForConditionalGeneration
from suwen.architectures.sentencepiece import SentencePieceTokenizer

for config, model in ((BaichuanConfig, BaichuanForCausalLM), (ChatGLMConfig, ChatGLMForConditionalGeneration)):
    AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoModelForCausalLM.register(config, model, exist_ok=True)
    AutoTokenizer.register(config, slow_tokenizer_class=SentencePieceTokenizer, exist_ok=True)

__all__ = [
    "BaichuanConfig",
    "BaichuanForCausalLM",
    "ChatGLMConfig",
    "ChatGLMForConditionalGeneration",
    "SentencePieceTokenizer",
]
