"""Find passages that look like instructions to a model instead of knowledge.

Nothing finds all of them (OWASP LLM01): this is one of several defences, together with the data block that a passage
cannot close and the encoder that never makes a control token of text. The patterns see text in lower case, in half
width and without spaces between Chinese characters. Each alternative begins with a plain character (and a repeated set
stands once before it may repeat): of those the compiled search makes one set, and looks closer only where one stands.
"""

from __future__ import annotations

import re

from suwen.retrieval.terms import HAN, normalise

# Invisible characters hide a text from people who check a source; soft hyphens and BOMs are common in honest files.
HIDDEN = re.compile("[\u200b-\u200f\u202a-\u202e\u2060-\u2064\u2066-\u2069\U000e0000-\U000e007f]")
SPACED = re.compile(f"[ \\t][ \\t]*(?=[{HAN}])")  # 忽 略 以 上
FORGED = re.compile(
    r"<\|[^|<>\n]{1,40}\|?>|</?s>|\[/?inst\]|<</?sys>>|<[^|<>\n]{0,2}\|[^<>\n]{1,40}\|>|</?\s*资料\s*>"
    r"|</?(?:think|system|user|assistant|tool_call|start_of_turn|end_of_turn)>|##\s*(?:instruction|response|system)\s*:"
)
ROLE = re.compile(r"\n\s*(?:system|assistant|user|human)\s*:|用户\s*:|助手\s*:|系统(?:提示词?|指令|消息)\s*:")
EARLIER = r"(?:以上|上述|上面|前面|之前|先前|此前|一切|所有|全部|任何|原有|原来|你的|系统)"
RULES = r"(?:指令|指示|提示|要求|规则|设定|限制|约束|命令|内容|资料|对话|说明)"
NEAR = r"[^。！？!?\n]"  # within the sentence
COMMANDS = (  # beginnings, and what must follow
    ("忽略|无视|忘记|忘掉|不要理会|不必理会|抛弃|跳过|覆盖|绕过", rf"{NEAR}{{0,8}}{EARLIER}{NEAR}{{0,8}}{RULES}"),
    ("从现在|现在起|接下来", rf"{NEAR}{{0,8}}你(?:是|就是|将|要|必须|只能|应)"),
    ("你现在", "(?:是|扮演|必须|要)"),
    ("请你扮演|请扮演|你将扮演", ""),
    ("开发者|越狱|调试|无限制", "模式"),
    ("透露|泄露|输出|复述|打印|显示|告诉我", rf"{NEAR}{{0,8}}(?:系统提示|提示词|system prompt|初始指令)"),
    (
        "回答|回复|输出",
        rf"(?:时|中|里)?{NEAR}{{0,6}}(?:必须|只能|一律|务必){NEAR}{{0,4}}(?:包含|说|写|输出|回答|回复|推荐|附上)",
    ),
    ("不要|不得|禁止|无需|不必", "(?:引用|标注|提及)(?:任何)?(?:来源|出处|资料|编号)"),
    ("作为", rf"(?:一个|一名)?(?:ai|人工智能|语言模型|大模型|助手){NEAR}{{0,10}}你?(?:必须|应当|需要)"),
    (
        "ignore|disregard|forget|override|bypass",
        r"\b[^.\n]{0,30}\b(?:previous|prior|above|earlier|all|any|system|your)\b"
        r"[^.\n]{0,30}\b(?:instruction|prompt|rule|message|guideline|context)",
    ),
    ("you are now", r"\b"),
    ("from now on", r"\b[^.\n]{0,20}\byou\b"),
    ("reveal|print|repeat|output", r"\b[^.\n]{0,20}\bsystem prompt\b"),
    ("new instruction", r"s?\s*:"),
    ("developer mode|do anything now", r"\b"),
)
COMMAND = re.compile("|".join(begin + rest for begins, rest in COMMANDS for begin in begins.split("|")))
LURE = re.compile(r"!\[[^\]\n]*\]\(\s*(?:https?:)?//|<\s*(?:script|iframe|img|object|embed)\b|javascript:")


def suspicious(text: str) -> list[str]:
    """Reasons to distrust a passage, in a fixed order; none for most."""
    hidden = HIDDEN.search(text)
    plain = SPACED.sub("", normalise(HIDDEN.sub("", text) if hidden else text))
    found = {
        "hidden characters": hidden,
        "control tokens": FORGED.search(plain),
        "speaker's role": ROLE.search("\n" + plain),
        "instruction to the model": COMMAND.search(plain),
        "active content": LURE.search(plain),
    }
    return [reason for reason, match in found.items() if match]
