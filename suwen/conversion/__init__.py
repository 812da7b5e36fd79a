"""Checkpoints whose architecture needs code from their folder, converted once to classes that need none.

`families` knows each family by its config; `tables` and `configs` say what becomes of its tensors and settings;
`weights` does it shard by shard, `adapters` for LoRA, `tokenizers` for the tokenizer, which it checks line by line;
`originals` holds the forward passes that a conversion is checked against; `convert` puts it all together.
"""

from typing import Literal

# The names in suwen.conversion.families.FAMILIES, for flags that answer before torch loads; a test compares them.
FamilyName = Literal[
    "baichuan-7b", "baichuan2-7b", "baichuan-13b", "baichuan2-13b", "internlm2", "qwen", "chatglm2", "chatglm3", "glm4",
    "chatglm", "xverse", "yi", "orion", "deepseek-moe",
]  # fmt: skip
