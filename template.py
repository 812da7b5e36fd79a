"""Named prompt templates, each one a Jinja chat template.

A model that brings a chat template should keep it (`--template_name auto`). For a base model without one choose that of
its family here; loading sets `tokenizer.chat_template` to it, so training, evaluation and serving, also by other
programs from the saved tokenizer, read one and the same text:

    tokenizer.chat_template = get_template("qwen3").jinja
    tokenizer.apply_chat_template(messages, add_generation_prompt=True, enable_thinking=False)

A template gets `messages` (an optional system message, then user and assistant in turn; `reasoning_content` is the
thinking part of an answer), `add_generation_prompt`, `bos_token`, `eos_token`, and `enable_thinking` where the family
can think. Other roles raise. The text follows the family's own public format to the blank; `source` says where that
stands. The prompt up to the last question plus generation prompt is always an exact prefix of the text with the answer
appended, if `enable_thinking` is the same in both.

Three families of format differ in how an answer ends:

- most end every answer with a stop token (the tokenizer's end of sequence, or `<|im_end|>` and the like);
- chatglm, chatglm2, baichuan, baichuan2 end only the newest answer with it: their models never saw it in the history;
- chatglm3, glm4, glm4_moe write nothing after an answer: the header `<|user|>` of the next turn is the stop token.

This module needs the standard library only.
"""

import json
import re
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class PromptTemplate:
    """One prompt format.

    Attributes:
        name: the value of `--template_name`.
        jinja: the chat template.
        special_tokens: control tokens written out in the template; the tokenizer must hold each as a single token.
        source: where the official format is published.
        stop_token: the text of the token that ends an answer; None means the tokenizer's end of sequence.
    """

    name: str
    jinja: str
    special_tokens: tuple[str, ...]
    source: str
    stop_token: str | None = None


def get_template(name: str) -> PromptTemplate:
    """Look a template up by name; raises ValueError, which lists the known names, if there is none."""
    if name not in TEMPLATES:
        raise ValueError(f"unknown --template_name {name!r}; known: auto, {', '.join(sorted(TEMPLATES))}")
    return TEMPLATES[name]


_VARIABLES = {"bos": "(bos_token or '')", "eos": "(eos_token or '')"}


def _expression(pattern: str) -> str:
    """Jinja expression for a pattern, in which `{...}` is a Jinja expression and the rest stands for itself."""
    parts = re.split(r"\{([^{}]+)\}", pattern)
    literals = [json.dumps(text, ensure_ascii=False) if text else "" for text in parts[0::2]]
    values = [_VARIABLES.get(value, value if value.isidentifier() else f"({value})") for value in parts[1::2]]
    pieces = [literals[0]] + [piece for pair in zip(values, literals[1:], strict=True) for piece in pair]
    return " + ".join(filter(None, pieces)) or "''"


def _chat(
    *,
    user: str,
    header: str,
    answer: str,
    past_answer: str | None = None,
    start: str = "",
    system: str = "{content}",
    system_before: str = "all",
    default_system: str = "",
    between: str = "",
    thinking: tuple[str, str] | None = None,
) -> str:
    """Write a chat template from patterns (see `_expression`).

    `{content}` is the message, `{ns.round|string}` counts from 1.

    Args:
        user: a user message.
        header: the generation prompt.
        answer: what follows the header in the newest assistant turn.
        past_answer: an assistant turn with a later user message, header included; as the newest if None.
        start: the beginning of the text.
        system: the system message.
        system_before: where it stands: before "all", or inside the "first" or the "last" user message.
        default_system: the system message where none is given; none if empty.
        between: what separates an answer from the next user message.
        thinking: what the generation prompt adds if enable_thinking is true and if it is false; None: cannot think.
    """
    newest, past = header + answer, header + answer if past_answer is None else past_answer
    default = system.replace("{content}", default_system) if default_system else ""
    inside = system_before != "all"
    # Names are looked up in every row that is rendered, so a template has only those that its patterns ask for
    ahead = inside or past != newest or "ns.users" in user
    rounds = inside or bool(between) or "ns.round" in user
    names = f"{{%- set ns = namespace(system={_expression(default)}, users=0, last_user=-1, round=0) %}}"
    lines = [
        *([names] if ahead or rounds else []),
        *_emit(start),
        "{%- if messages and messages[0]['role'] == 'system' %}",
        "    {%- set turns = messages[1:] %}",
        "    {%- set content = messages[0]['content'] %}",
        *([f"    {{%- set ns.system = {_expression(system)} %}}"] if inside else _emit(system, indent=4)),
        "{%- else %}",
        "    {%- set turns = messages %}",
        *([] if inside else _emit(default, indent=4)),
        "{%- endif %}",
        *(_LOOK_AHEAD if ahead else ()),
        "{%- for message in turns %}",
        "    {%- set content = message['content'] %}",
        "    {%- if message['role'] == 'user' %}",
        *(["        {%- set ns.round = ns.round + 1 %}"] if rounds else []),
        *_emit(between, "ns.round > 1", indent=8),
        *_SYSTEM_IN_USER[system_before],
        *_emit(user, indent=8),
        "    {%- elif message['role'] == 'assistant' %}",
        *(_REASONING if thinking else ()),
        *_emit(newest, "loop.index0 > ns.last_user" if past != newest else "", indent=8),
        *_emit(past if past != newest else "", "loop.index0 < ns.last_user", indent=8),
        "    {%- else %}",
        "        {{- raise_exception('a message is from ' ~ message['role'] ~ "
        "', expected user, assistant, or system as the first message') }}",
        "    {%- endif %}",
        "{%- endfor %}",
        *_emit(header, "add_generation_prompt"),
    ]
    if thinking:
        lines.insert(0, "{%- set thinking = enable_thinking if enable_thinking is defined else none %}")
        lines += _emit(thinking[0], "add_generation_prompt and thinking is true")
        lines += _emit(thinking[1], "add_generation_prompt and thinking is false")
    return "\n".join(lines)


def _emit(pattern: str, condition: str = "", indent: int = 0) -> list[str]:
    """The line that writes a pattern, if the condition holds; no line for an empty pattern."""
    output = f"{{{{- {_expression(pattern)} }}}}"
    line = f"{{%- if {condition} %}}{output}{{%- endif %}}" if condition else output
    return [" " * indent + line] if pattern else []


# Before the turns: how many are the user's, and which is the last of them
_LOOK_AHEAD = (
    "{%- for message in turns %}",
    "    {%- if message['role'] == 'user' %}",
    "        {%- set ns.users = ns.users + 1 %}",
    "        {%- set ns.last_user = loop.index0 %}",
    "    {%- endif %}",
    "{%- endfor %}",
)
_SYSTEM_IN_USER = {
    "all": [],
    "first": ["        {%- if ns.round == 1 %}{%- set content = ns.system ~ content %}{%- endif %}"],
    "last": ["        {%- if ns.round == ns.users %}{%- set content = ns.system ~ content %}{%- endif %}"],
}

# The thinking part of an answer: a field of its own, or inside the content between <think> and </think>. With
# enable_thinking=false it is left out, so that the text still begins with the generation prompt.
_REASONING = (
    "        {%- set reasoning = '' %}",
    "        {%- if message['reasoning_content'] is string %}",
    "            {%- set reasoning = message['reasoning_content'] %}",
    "        {%- elif '</think>' in content %}",
    "            {%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}",
    "            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}",
    "        {%- endif %}",
    "        {%- if thinking is false %}{%- set reasoning = '' %}{%- endif %}",
)

_IM = ("<|im_start|>", "<|im_end|>")
_GLM_ROLES = ("<|system|>", "<|user|>", "<|assistant|>")


def _chatml(start: str = "", default_system: str = "", **thinking) -> str:
    """ChatML: every message between <|im_start|>role and <|im_end|>."""
    turn = "<|im_start|>%s\n{content}<|im_end|>\n"
    patterns = {"header": "<|im_start|>assistant\n", "answer": "{content}<|im_end|>\n", **thinking}
    return _chat(start=start, system=turn % "system", user=turn % "user", default_system=default_system, **patterns)


def _qwen3() -> str:
    """ChatML whose newest answer carries a think block, empty if there was no thinking; older ones lose theirs."""
    block = "<think>\n{reasoning.strip('\\n')}\n</think>\n\n{content.lstrip('\\n')}<|im_end|>\n"
    past = "<|im_start|>assistant\n{content}<|im_end|>\n"
    return _chatml(answer=block, past_answer=past, thinking=("", "<think>\n\n</think>\n\n"))


def _human_assistant(user: str, header: str, start: str = "") -> str:
    """Named speakers in plain text; the formats know no system role, so it stands first, as a paragraph."""
    return _chat(start=start, system="{content}\n\n", user=user, header=header, answer="{content}{eos}")


def _baichuan(user: str, assistant: str) -> str:
    past = assistant + "{content}"
    return _chat(user=user + "{content}", header=assistant, answer="{content}{eos}", past_answer=past)


_FASTCHAT = "github.com/lm-sys/FastChat fastchat/conversation.py@0e6d3e4"
_LLAMA_FACTORY = "github.com/hiyouga/LLaMA-Factory src/llamafactory/data/template.py@5fb5d7e"
_XINFERENCE = "github.com/xorbitsai/inference xinference/model/llm/llm_family.json@7ecec16"
_TRL = "github.com/huggingface/trl 1.16.0 trl/chat_templates/"

_ALL = [
    # Plain text
    PromptTemplate(
        "question_answer",
        _chat(
            system="{content}\n\n",
            start="{bos}",
            user="Question: {content}\n\n",
            header="Answer: ",
            answer="{content}{eos}",
            between="\n\n",
        ),
        (),
        "github.com/huggingface/trl examples/research_projects/stack_llama/scripts/rl_training.py@0b972a6",
    ),
    PromptTemplate(
        "vicuna",
        _chat(
            start="{bos}",
            system="{content} ",
            default_system="A chat between a curious user and an artificial intelligence assistant. "
            "The assistant gives helpful, detailed, and polite answers to the user's questions.",
            user="USER: {content} ",
            header="ASSISTANT:",
            answer=" {content}{eos}",
        ),
        (),
        f"{_FASTCHAT} vicuna_v1.1",
    ),
    PromptTemplate(
        "alpaca",
        _chat(
            start="{bos}",
            system="{content}\n\n",
            default_system="Below is an instruction that describes a task. "
            "Write a response that appropriately completes the request.",
            user="### Instruction:\n{content}\n\n",
            header="### Response:",
            answer="{content}{eos}",
            between="\n\n",  # the original knows single turns only; several as in LLaMA-Factory
        ),
        (),
        "github.com/tatsu-lab/stanford_alpaca train.py@761dc5b prompt_no_input",
    ),
    PromptTemplate(
        "ziya",
        _chat(
            start="{bos}",
            system="{content}\n",
            user="<human>:{content|trim}\n",
            header="<bot>:",
            answer="{content|trim}{eos}",
        ),
        (),
        "github.com/IDEA-CCNL/Fengshenbang-LM fengshen/examples/ziya_llama/finetune_ziya_llama.py@c8fb7b8",
    ),
    PromptTemplate(
        "xverse",
        _human_assistant("Human: {content}\n\n", "Assistant: "),
        (),
        f"{_LLAMA_FACTORY} xverse",
    ),
    PromptTemplate(
        "orion",
        _human_assistant("Human: {content}\n\n", "Assistant: {eos}", start="{bos}"),  # the header really ends with it
        (),
        f"{_LLAMA_FACTORY} orion; {_XINFERENCE} orion-chat",
    ),
    PromptTemplate(
        "deepseek",
        _chat(
            start="{bos}",
            system="{content}\n\n",
            user="User: {content}\n\n",
            header="Assistant:",
            answer=" {content}{eos}",
        ),
        (),
        f"github.com/deepseek-ai/DeepSeek-LLM README.md@6712a86; {_XINFERENCE} deepseek-chat",
    ),
    # ChatML
    PromptTemplate("chatml", _chatml(), _IM, f"{_TRL}qwen3_instruct_2507.jinja", "<|im_end|>"),
    PromptTemplate("yi", _chatml(), _IM, f"{_FASTCHAT} Yi-34b-chat; {_XINFERENCE} Yi-chat", "<|im_end|>"),
    PromptTemplate(  # the long self-introduction of its demo is not part of the tokenizer's template, nor of this one
        "internlm2",
        _chatml(start="{bos}"),
        _IM,
        f"github.com/InternLM/InternLM chat/chat_format.md@fe4c2eb; {_LLAMA_FACTORY} intern2",
        "<|im_end|>",
    ),
    PromptTemplate(  # Qwen2.5's, with its default system prompt
        "qwen",
        _chatml(default_system="You are Qwen, created by Alibaba Cloud. You are a helpful assistant."),
        _IM,
        f"{_TRL}qwen2_5.jinja",
        "<|im_end|>",
    ),
    PromptTemplate("qwen3", _qwen3(), _IM, f"{_TRL}qwen3.jinja", "<|im_end|>"),
    PromptTemplate(
        "qwen3_nothink",
        "{%- set enable_thinking = false %}\n" + _qwen3(),
        _IM,
        f"{_TRL}qwen3.jinja with enable_thinking=false",
        "<|im_end|>",
    ),
    # Llama and Mistral
    PromptTemplate(
        "llama2",
        _chat(
            system="<<SYS>>\n{content}\n<</SYS>>\n\n",
            system_before="first",
            user="{bos}[INST] {content|trim} [/INST]",
            header="",
            answer=" {content|trim} {eos}",
        ),
        (),
        "github.com/meta-llama/llama llama/generation.py@689c7f2 chat_completion",
    ),
    PromptTemplate(
        "llama3",
        _chat(
            start="{bos}",
            system="<|start_header_id|>system<|end_header_id|>\n\n{content|trim}<|eot_id|>",
            user="<|start_header_id|>user<|end_header_id|>\n\n{content|trim}<|eot_id|>",
            header="<|start_header_id|>assistant<|end_header_id|>\n\n",
            answer="{content|trim}<|eot_id|>",
        ),
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        f"{_TRL}llama3.jinja",
        "<|eot_id|>",
    ),
    PromptTemplate(  # that of Mistral-7B-Instruct-v0.3: the system message moves along to the newest question
        "mistral",
        _chat(
            start="{bos}",
            system="{content}\n\n",
            system_before="last",
            user="[INST] {content}[/INST]",
            header="",
            answer=" {content|trim}{eos}",
        ),
        ("[INST]", "[/INST]"),
        f"github.com/mistralai/mistral-common tests/test_tokenize_v2.py@bc022b9; {_XINFERENCE} mistral-instruct-v0.3",
    ),
    # Baichuan
    PromptTemplate(
        "baichuan",
        _baichuan("<reserved_102>", "<reserved_103>"),
        ("<reserved_102>", "<reserved_103>"),
        f"{_LLAMA_FACTORY} baichuan; {_FASTCHAT} baichuan-chat",
    ),
    PromptTemplate(
        "baichuan2",
        _baichuan("<reserved_106>", "<reserved_107>"),
        ("<reserved_106>", "<reserved_107>"),
        f"github.com/baichuan-inc/Baichuan2 fine-tune/fine-tune.py@ed1cf0f; {_LLAMA_FACTORY} baichuan2",
    ),
    # GLM
    PromptTemplate(  # a first question stands alone, rounds are numbered from 0 once there is a history
        "chatglm",
        _chat(
            system="{content}\n",
            user="{'[Round ' ~ (ns.round - 1) ~ ']\\n问：' ~ content ~ '\\n答：' if ns.users > 1 else content}",
            header="[gMASK]<sop>",
            answer="{content}{eos}",
            past_answer="{content}\n",
        ),
        ("[gMASK]", "<sop>"),
        "github.com/THUDM/ChatGLM-6B ptuning/main.py@401bf3a",
    ),
    PromptTemplate(  # the token that ChatGLM2 and 3 call sop is <sop> once converted, as "esophagus" holds the word
        "chatglm2",
        _chat(
            start="[gMASK]<sop>",
            system="{content}\n\n",
            user="[Round {ns.round|string}]\n\n问：{content}\n\n答：",
            header="",
            answer="{content}{eos}",
            past_answer="{content}\n\n",
        ),
        ("[gMASK]", "<sop>"),
        "github.com/THUDM/ChatGLM2-6B ptuning/main.py@cb8e8b4 and its tokenizer's build_prompt",
    ),
    PromptTemplate(  # the blank after the newline is what its tokenizer makes of a header and a text encoded apart
        "chatglm3",
        _chat(
            start="[gMASK]<sop>",
            system="<|system|>\n {content}",
            user="<|user|>\n {content}",
            header="<|assistant|>",
            answer="\n {content}",
        ),
        ("[gMASK]", "<sop>", *_GLM_ROLES),
        "github.com/THUDM/ChatGLM3 PROMPT.md@732294f; huggingface.co/THUDM/chatglm3-6b tokenizer_config.json@103caa4",
        "<|user|>",
    ),
    PromptTemplate(
        "glm4",
        _chat(
            start="[gMASK]<sop>",
            system="<|system|>\n{content}",
            user="<|user|>\n{content}",
            header="<|assistant|>",
            answer="\n{content}",
        ),
        ("[gMASK]", "<sop>", *_GLM_ROLES),
        f"{_LLAMA_FACTORY} glm4; {_XINFERENCE} glm4-chat",
        "<|user|>",
    ),
    PromptTemplate(  # GLM-4.5
        "glm4_moe",
        _chat(
            start="[gMASK]<sop>",
            system="<|system|>\n{content}",
            user="<|user|>\n{content}{'/nothink' if thinking is false and not content.endswith('/nothink') else ''}",
            header="<|assistant|>",
            answer="\n<think>{reasoning.strip()}</think>{'\\n' ~ content.strip() if content.strip() else ''}",
            past_answer="<|assistant|>\n<think></think>{'\\n' ~ content.strip() if content.strip() else ''}",
            thinking=("", "\n<think></think>"),
        ),
        ("[gMASK]", "<sop>", *_GLM_ROLES),
        f"{_TRL}glm4moe.jinja",
        "<|user|>",
    ),
    # Others
    PromptTemplate(  # of DeepSeek-V3; with enable_thinking=true that of R1, whose prompt opens the think block
        "deepseek3",
        _chat(
            start="{bos}",
            user="<｜User｜>{content}",
            header="<｜Assistant｜>",
            answer="{'<think>\\n' ~ reasoning.strip('\\n') ~ '\\n</think>\\n\\n' if reasoning or thinking else ''}"
            "{content}<｜end▁of▁sentence｜>",
            past_answer="<｜Assistant｜>{message['content'].split('</think>')[-1]}<｜end▁of▁sentence｜>",
            thinking=("<think>\n", ""),
        ),
        ("<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>"),
        f"{_TRL}deepseekv3.jinja; {_XINFERENCE} deepseek-v3-0324",
        "<｜end▁of▁sentence｜>",
    ),
    PromptTemplate(
        "cohere",
        _chat(
            start="{bos}",
            system="<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>{content}<|END_OF_TURN_TOKEN|>",
            user="<|START_OF_TURN_TOKEN|><|USER_TOKEN|>{content|trim}<|END_OF_TURN_TOKEN|>",
            header="<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
            answer="{content|trim}<|END_OF_TURN_TOKEN|>",
        ),
        ("<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|SYSTEM_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>"),
        f"{_TRL}cohere.jinja",
        "<|END_OF_TURN_TOKEN|>",
    ),
]

ALIASES = {"default": "question_answer", "bloomz": "vicuna", "intern2": "internlm2"}

TEMPLATES: dict[str, PromptTemplate] = {template.name: template for template in _ALL}
TEMPLATES.update({alias: replace(TEMPLATES[name], name=alias) for alias, name in ALIASES.items()})
