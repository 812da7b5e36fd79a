"""The prompt templates against the official ones: TRL's copies of their Jinja, and texts written down from elsewhere.

No expected text here was made with template.py. Short names of the sources, all on github.com at the commit given:

    FastChat       lm-sys/FastChat@0e6d3e4 fastchat/conversation.py (texts: its own get_prompt() on this conversation)
    LLaMA-Factory  hiyouga/LLaMA-Factory@5fb5d7e src/llamafactory/data/template.py, the last one with the older models
    xinference     xorbitsai/inference@7ecec16 xinference/model/llm/llm_family.json, which stores official chat
                   templates (texts: that Jinja rendered on this conversation)
"""

import ast
import sys
from functools import cache
from pathlib import Path

import pytest
import trl
from tiny import tiny_tokenizer
from transformers import PreTrainedTokenizerBase

from template import ALIASES, TEMPLATES, get_template

TRL_TEMPLATES = Path(trl.__file__).parent / "chat_templates"

SYSTEM = {"role": "system", "content": "你是医生。"}
FIRST = [{"role": "user", "content": "头痛怎么办？"}, {"role": "assistant", "content": "多休息。"}]
SECOND = [{"role": "user", "content": "要吃药吗？"}, {"role": "assistant", "content": "可以服用布洛芬。"}]
CONVERSATIONS = {
    "single turn": FIRST,
    "several turns": FIRST + SECOND + FIRST,
    "system": [SYSTEM] + FIRST,
    "system and several turns": [SYSTEM] + FIRST + SECOND,
    "blanks, line breaks and emptiness": [
        {"role": "system", "content": " Be brief.\n"},
        {"role": "user", "content": "  a\n\n b "},
        {"role": "assistant", "content": "\n x {{ y }} \"'\\ \n"},
        {"role": "user", "content": "中文<b>\t"},
        {"role": "assistant", "content": " "},
    ],
}

# template: (TRL's file, variables for both, further variables of ours for the generation prompt)
OFFICIAL = [
    ("chatml", "qwen3_instruct_2507", {}, {}),
    ("qwen", "qwen2_5", {}, {}),
    ("qwen3", "qwen3", {}, {}),
    ("qwen3", "qwen3", {"enable_thinking": True}, {}),
    ("qwen3", "qwen3", {"enable_thinking": False}, {}),
    ("qwen3_nothink", "qwen3", {"enable_thinking": False}, {}),
    ("llama3", "llama3", {}, {}),
    ("cohere", "cohere", {}, {}),
    ("glm4_moe", "glm4moe", {}, {}),
    ("glm4_moe", "glm4moe", {"enable_thinking": True}, {}),
    ("glm4_moe", "glm4moe", {"enable_thinking": False}, {}),
    # TRL's copy is that of DeepSeek-R1, whose generation prompt opens the think block; V3 itself has none (see GOLDEN)
    ("deepseek3", "deepseekv3", {}, {"enable_thinking": True}),
    ("deepseek3", "deepseek_r1_distill", {}, {"enable_thinking": True}),
]


@cache
def tokenizer_for(name: str) -> PreTrainedTokenizerBase:
    template = TEMPLATES[name]
    return tiny_tokenizer(template.special_tokens, chat_template=template.jinja)


def render(name: str, messages: list[dict], prompt: bool = False, **variables) -> str:
    tokenizer = tokenizer_for(name)
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt, **variables)


@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize(("name", "file", "variables", "for_prompt"), OFFICIAL)
def test_text_and_ids_are_those_of_the_official_jinja(name, file, variables, for_prompt, conversation, prompt):
    messages = CONVERSATIONS[conversation][: -1 if prompt else None]
    tokenizer = tokenizer_for(name)
    ours = variables | (for_prompt if prompt else {})
    official = (TRL_TEMPLATES / f"{file}.jinja").read_text(encoding="utf-8")
    rendered, expected = (
        [
            tokenizer.apply_chat_template(
                messages, chat_template=jinja, tokenize=ids, add_generation_prompt=prompt, return_dict=False, **values
            )
            for ids in (False, True)
        ]
        for jinja, values in ((None, ours), (official, variables))
    )
    assert rendered == expected
    assert tokenizer.convert_tokens_to_ids(TEMPLATES[name].special_tokens[0]) in expected[1]


@pytest.mark.parametrize("inline", [False, True])
@pytest.mark.parametrize(("name", "file"), [("qwen3", "qwen3"), ("glm4_moe", "glm4moe")])
def test_thinking_is_rendered_in_the_newest_answer_only_as_in_the_official_jinja(name, file, inline):
    def answer(thought: str, text: str) -> dict:
        if inline:
            return {"role": "assistant", "content": f"<think>\n{thought}\n</think>\n\n{text}"}
        return {"role": "assistant", "content": text, "reasoning_content": thought}

    messages = [FIRST[0], answer("先问病史", "多休息。"), SECOND[0], answer("看禁忌\n再答", "可以。")]
    official = (TRL_TEMPLATES / f"{file}.jinja").read_text(encoding="utf-8")
    text = render(name, messages)
    assert text == render(name, messages, chat_template=official)
    assert "看禁忌\n再答" in text and "先问病史" not in text


def test_deepseek3_thinks_as_r1_does_and_forgets_old_thinking():
    think = {"role": "assistant", "content": "可以。", "reasoning_content": "看禁忌"}
    old = {"role": "assistant", "content": "<think>\n先问病史\n</think>\n\n多休息。"}
    text = render("deepseek3", [FIRST[0], old, SECOND[0], think], enable_thinking=True)
    # TRL's deepseekv3.jinja for the history and the prompt ("<think>\n"); "\n</think>\n\n" as R1 itself goes on
    assert text == (
        "<s><｜User｜>头痛怎么办？<｜Assistant｜>\n\n多休息。<｜end▁of▁sentence｜>"
        "<｜User｜>要吃药吗？<｜Assistant｜><think>\n看禁忌\n</think>\n\n可以。<｜end▁of▁sentence｜>"
    )


VICUNA = (
    "<s>A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
    "detailed, and polite answers to the user's questions. "
)
ALPACA = (
    "<s>Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n### Instruction:\n"
)
IM_PROMPT = (
    "<|im_start|>system\n你是医生。<|im_end|>\n<|im_start|>user\n头痛怎么办？<|im_end|>\n<|im_start|>assistant\n多休息。"
    "<|im_end|>\n<|im_start|>user\n要吃药吗？<|im_end|>\n<|im_start|>assistant\n"
)

# template, messages, generation prompt, text. <s> and </s> are the tokenizer's BOS and EOS, by whatever name the family
# calls them.
GOLDEN = [
    # FastChat vicuna_v1.1; its train.py lets the Llama tokenizer put BOS in front
    ("vicuna", FIRST, False, VICUNA + "USER: 头痛怎么办？ ASSISTANT: 多休息。</s>"),
    (
        "vicuna",
        FIRST + SECOND,
        False,
        VICUNA + "USER: 头痛怎么办？ ASSISTANT: 多休息。</s>USER: 要吃药吗？ ASSISTANT: 可以服用布洛芬。</s>",
    ),
    (
        "vicuna",
        [SYSTEM] + FIRST + SECOND[:1],
        True,
        "<s>你是医生。 USER: 头痛怎么办？ ASSISTANT: 多休息。</s>USER: 要吃药吗？ ASSISTANT:",
    ),
    # tatsu-lab/stanford_alpaca@761dc5b train.py: prompt_no_input, then the output and EOS; no line break between.
    # Later turns: LLaMA-Factory alpaca (EOS and an empty line after an answer)
    ("alpaca", FIRST[:1], True, ALPACA + "头痛怎么办？\n\n### Response:"),
    ("alpaca", FIRST, False, ALPACA + "头痛怎么办？\n\n### Response:多休息。</s>"),
    (
        "alpaca",
        FIRST + SECOND,
        False,
        ALPACA + "头痛怎么办？\n\n### Response:多休息。</s>\n\n"
        "### Instruction:\n要吃药吗？\n\n### Response:可以服用布洛芬。</s>",
    ),
    # huggingface/trl@0b972a6 examples/research_projects/stack_llama/scripts/rl_training.py: one question; EOS is ours
    ("question_answer", FIRST[:1], True, "<s>Question: 头痛怎么办？\n\nAnswer: "),
    ("question_answer", FIRST, False, "<s>Question: 头痛怎么办？\n\nAnswer: 多休息。</s>"),
    # IDEA-CCNL/Fengshenbang-LM@c8fb7b8 fengshen/examples/ziya_llama/finetune_ziya_llama.py, LlamaSFTCollator (EOS
    # after each answer, no line break between turns, texts stripped); BOS: llama_generate.py, the Llama tokenizer's
    (
        "ziya",
        FIRST + SECOND,
        False,
        "<s><human>:头痛怎么办？\n<bot>:多休息。</s><human>:要吃药吗？\n<bot>:可以服用布洛芬。</s>",
    ),
    ("ziya", [{"role": "user", "content": " 头痛怎么办？\n"}], True, "<s><human>:头痛怎么办？\n<bot>:"),
    # LLaMA-Factory xverse
    (
        "xverse",
        FIRST + SECOND,
        False,
        "Human: 头痛怎么办？\n\nAssistant: 多休息。</s>Human: 要吃药吗？\n\nAssistant: 可以服用布洛芬。</s>",
    ),
    ("xverse", FIRST[:1], True, "Human: 头痛怎么办？\n\nAssistant: "),
    # xinference orion-chat; LLaMA-Factory orion is the same
    (
        "orion",
        FIRST + SECOND,
        False,
        "<s>Human: 头痛怎么办？\n\nAssistant: </s>多休息。</s>Human: 要吃药吗？\n\nAssistant: </s>可以服用布洛芬。</s>",
    ),
    ("orion", FIRST[:1], True, "<s>Human: 头痛怎么办？\n\nAssistant: </s>"),
    # deepseek-ai/DeepSeek-LLM@6712a86 README.md and xinference deepseek-chat (FastChat deepseek-chat is the same)
    (
        "deepseek",
        FIRST + SECOND,
        False,
        "<s>User: 头痛怎么办？\n\nAssistant: 多休息。</s>User: 要吃药吗？\n\nAssistant: 可以服用布洛芬。</s>",
    ),
    (
        "deepseek",
        [SYSTEM] + FIRST + SECOND[:1],
        True,
        "<s>你是医生。\n\nUser: 头痛怎么办？\n\nAssistant: 多休息。</s>User: 要吃药吗？\n\nAssistant:",
    ),
    # xinference deepseek-v3-0324
    (
        "deepseek3",
        [SYSTEM] + FIRST + SECOND[:1],
        True,
        "<s>你是医生。<｜User｜>头痛怎么办？<｜Assistant｜>多休息。<｜end▁of▁sentence｜>"
        "<｜User｜>要吃药吗？<｜Assistant｜>",
    ),
    # xinference Yi-chat
    (
        "yi",
        FIRST,
        False,
        "<|im_start|>user\n头痛怎么办？<|im_end|>\n<|im_start|>assistant\n多休息。<|im_end|>\n",
    ),
    ("yi", [SYSTEM] + FIRST + SECOND[:1], True, IM_PROMPT),
    # InternLM/InternLM@fe4c2eb chat/chat_format.md; BOS: LLaMA-Factory intern2
    ("internlm2", [SYSTEM] + FIRST + SECOND[:1], True, "<s>" + IM_PROMPT),
    (
        "internlm2",
        FIRST,
        False,
        "<s><|im_start|>user\n头痛怎么办？<|im_end|>\n<|im_start|>assistant\n多休息。<|im_end|>\n",
    ),
    # meta-llama/llama@689c7f2 llama/generation.py, chat_completion; the same: xinference llama-2-chat
    ("llama2", FIRST, False, "<s>[INST] 头痛怎么办？ [/INST] 多休息。 </s>"),
    (
        "llama2",
        [SYSTEM] + FIRST + SECOND,
        False,
        "<s>[INST] <<SYS>>\n你是医生。\n<</SYS>>\n\n头痛怎么办？ [/INST] 多休息。 </s>"
        "<s>[INST] 要吃药吗？ [/INST] 可以服用布洛芬。 </s>",
    ),
    (
        "llama2",
        [SYSTEM] + FIRST + SECOND[:1],
        True,
        "<s>[INST] <<SYS>>\n你是医生。\n<</SYS>>\n\n头痛怎么办？ [/INST] 多休息。 </s><s>[INST] 要吃药吗？ [/INST]",
    ),
    # xinference mistral-instruct-v0.3
    ("mistral", FIRST, False, "<s>[INST] 头痛怎么办？[/INST] 多休息。</s>"),
    (
        "mistral",
        [SYSTEM] + FIRST + SECOND[:1],
        True,
        "<s>[INST] 头痛怎么办？[/INST] 多休息。</s>[INST] 你是医生。\n\n要吃药吗？[/INST]",
    ),
    # mistralai/mistral-common@bc022b9 tests/test_tokenize_v2.py, test_system_multiturn
    (
        "mistral",
        [
            {"role": "system", "content": "SYSTEM"},
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b"},
            {"role": "user", "content": "c"},
            {"role": "assistant", "content": "d"},
        ],
        False,
        "<s>[INST] a[/INST] b</s>[INST] SYSTEM\n\nc[/INST] d</s>",
    ),
    # FastChat baichuan-chat; the EOS after the newest answer: LLaMA-Factory baichuan (efficient_eos)
    (
        "baichuan",
        [SYSTEM] + FIRST + SECOND[:1],
        True,
        "你是医生。<reserved_102>头痛怎么办？<reserved_103>多休息。<reserved_102>要吃药吗？<reserved_103>",
    ),
    (
        "baichuan",
        FIRST + SECOND,
        False,
        "<reserved_102>头痛怎么办？<reserved_103>多休息。<reserved_102>要吃药吗？<reserved_103>可以服用布洛芬。</s>",
    ),
    # FastChat baichuan2-chat; the one EOS: baichuan-inc/Baichuan2@ed1cf0f fine-tune/fine-tune.py, preprocessing
    (
        "baichuan2",
        [SYSTEM] + FIRST + SECOND[:1],
        True,
        "你是医生。<reserved_106>头痛怎么办？<reserved_107>多休息。<reserved_106>要吃药吗？<reserved_107>",
    ),
    (
        "baichuan2",
        FIRST + SECOND,
        False,
        "<reserved_106>头痛怎么办？<reserved_107>多休息。<reserved_106>要吃药吗？<reserved_107>可以服用布洛芬。</s>",
    ),
    # THUDM/ChatGLM-6B@401bf3a ptuning/main.py (rounds from 0, a first question alone); [gMASK]<sop> behind the question
    # and EOS behind the answer: build_inputs_with_special_tokens of its tokenizer (a copy:
    # greensheng/chatglm-6b@8b7d335 tokenization_chatglm.py); system: FastChat chatglm
    ("chatglm", FIRST, False, "头痛怎么办？[gMASK]<sop>多休息。</s>"),
    (
        "chatglm",
        FIRST + SECOND,
        False,
        "[Round 0]\n问：头痛怎么办？\n答：多休息。\n[Round 1]\n问：要吃药吗？\n答：[gMASK]<sop>可以服用布洛芬。</s>",
    ),
    (
        "chatglm",
        [SYSTEM] + FIRST + SECOND[:1],
        True,
        "你是医生。\n[Round 0]\n问：头痛怎么办？\n答：多休息。\n[Round 1]\n问：要吃药吗？\n答：[gMASK]<sop>",
    ),
    # FastChat chatglm2; [gMASK]sop, here [gMASK]<sop>, in front and EOS at the end: build_prompt and
    # build_inputs_with_special_tokens of the tokenizer (a copy: bq-xiao/chatglm2-6b-model@06510a8
    # tokenization_chatglm.py)
    ("chatglm2", FIRST, False, "[gMASK]<sop>[Round 1]\n\n问：头痛怎么办？\n\n答：多休息。</s>"),
    (
        "chatglm2",
        FIRST + SECOND,
        False,
        "[gMASK]<sop>[Round 1]\n\n问：头痛怎么办？\n\n答：多休息。\n\n"
        "[Round 2]\n\n问：要吃药吗？\n\n答：可以服用布洛芬。</s>",
    ),
    (
        "chatglm2",
        [SYSTEM] + FIRST + SECOND[:1],
        True,
        "[gMASK]<sop>你是医生。\n\n[Round 1]\n\n问：头痛怎么办？\n\n答：多休息。\n\n"
        "[Round 2]\n\n问：要吃药吗？\n\n答：",
    ),
    # ggml-org/llama.cpp@03f94f1 tests/test-chat-template.cpp, "ChatGLM3": the chat template of THUDM/chatglm3-6b and
    # what it must give, with <sop> for sop
    (
        "chatglm3",
        [
            {"role": "system", "content": "You are a helpful assistant"},
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": "Hi there"},
            {"role": "user", "content": "Who are you"},
            {"role": "assistant", "content": "   I am an assistant   "},
            {"role": "user", "content": "Another question"},
        ],
        True,
        "[gMASK]<sop><|system|>\n You are a helpful assistant<|user|>\n Hello<|assistant|>\n Hi there<|user|>\n Who "
        "are you<|assistant|>\n    I am an assistant   <|user|>\n Another question<|assistant|>",
    ),
    # xinference glm4-chat and glm4-0414
    ("glm4", FIRST, False, "[gMASK]<sop><|user|>\n头痛怎么办？<|assistant|>\n多休息。"),
    (
        "glm4",
        [SYSTEM] + FIRST + SECOND[:1],
        True,
        "[gMASK]<sop><|system|>\n你是医生。<|user|>\n头痛怎么办？<|assistant|>\n多休息。<|user|>\n要吃药吗？<|assistant|>",
    ),
]


@pytest.mark.parametrize(("name", "messages", "prompt", "text"), GOLDEN)
def test_text_is_that_of_the_public_source(name, messages, prompt, text):
    assert render(name, messages, prompt) == text


def test_every_template_is_held_against_an_official_text():
    checked = {name for name, *_ in OFFICIAL} | {name for name, *_ in GOLDEN}
    assert checked == set(TEMPLATES) - set(ALIASES)
    assert all(template.source and template.name == name for name, template in TEMPLATES.items())


THINKING = [{}, {"enable_thinking": True}, {"enable_thinking": False}]


@pytest.mark.parametrize("thinking", THINKING)
@pytest.mark.parametrize("name", TEMPLATES)
def test_generation_prompt_begins_the_text_with_the_answer(name, thinking):
    plain = CONVERSATIONS["system and several turns"]
    thoughtful = [*plain[:-1], {**plain[-1], "reasoning_content": "看禁忌"}]
    for messages in (plain, plain[1:], plain[:3], FIRST, thoughtful):
        prompt, text = render(name, messages[:-1], True, **thinking), render(name, messages, **thinking)
        assert text.startswith(prompt)
        assert messages[-1]["content"] in text[len(prompt) :]


@pytest.mark.parametrize("name", TEMPLATES)
def test_system_and_several_turns_are_rendered_in_their_order(name):
    text = render(name, CONVERSATIONS["system and several turns"])
    contents = [message["content"] for message in CONVERSATIONS["system and several turns"]]
    if name == "mistral":  # puts the system message before the last question
        contents = [*contents[1:3], contents[0], *contents[3:]]
    places = [text.index(content) for content in contents]
    assert places == sorted(places)
    assert all(text.count(content) == 1 for content in contents)


@pytest.mark.parametrize("name", TEMPLATES)
def test_an_answer_ends_with_the_stop_token_or_the_next_header_is_it(name):
    stop = TEMPLATES[name].stop_token or "</s>"
    text = render(name, FIRST)
    if stop == "<|user|>":
        assert text.endswith("多休息。")
        assert render(name, FIRST + SECOND).startswith(text + stop)
    else:
        assert text.strip().endswith(f"多休息。{stop}") or name == "llama2" and text.endswith("多休息。 </s>")
    tokenizer = tokenizer_for(name)
    assert tokenizer.decode(tokenizer.encode(stop, add_special_tokens=False)) == stop
    assert len(tokenizer.encode(stop, add_special_tokens=False)) == 1


@pytest.mark.parametrize("name", TEMPLATES)
def test_special_tokens_are_those_written_in_the_template(name):
    text = render(name, CONVERSATIONS["system and several turns"], True)
    assert [token for token in TEMPLATES[name].special_tokens if token not in text] == []


def test_tokenizers_without_bos_get_none():
    tokenizer = tiny_tokenizer(bos_token=None, eos_token="<|endoftext|>", chat_template=get_template("vicuna").jinja)
    text = tokenizer.apply_chat_template(FIRST, tokenize=False)
    assert text.startswith("A chat between") and text.endswith("多休息。<|endoftext|>")


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("messages", [[*FIRST, {"role": "tool", "content": "1"}], [*FIRST, SYSTEM, *SECOND]])
def test_roles_that_a_template_cannot_express_are_refused(name, messages):
    with pytest.raises(Exception, match="a message is from (tool|system), expected user, assistant, or system as the"):
        render(name, messages)


@pytest.mark.parametrize(("alias", "name"), ALIASES.items())
def test_aliases_are_what_they_stand_for(alias, name):
    left, right = get_template(alias), get_template(name)
    assert (left.jinja, left.special_tokens, left.stop_token, left.source) == (
        right.jinja,
        right.special_tokens,
        right.stop_token,
        right.source,
    )


def test_unknown_names_are_answered_with_the_known_ones():
    with pytest.raises(ValueError, match="unknown --template_name 'qwen4'") as error:
        get_template("qwen4")
    assert all(name in str(error.value) for name in [*TEMPLATES, "auto"])


def test_template_module_imports_the_standard_library_only():
    source = Path(sys.modules["template"].__file__).read_text(encoding="utf-8")
    imported = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imported |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.split(".")[0])
    assert imported <= sys.stdlib_module_names


def test_templates_give_the_same_text_whatever_the_block_settings_of_the_engine():
    # transformers sets trim_blocks and lstrip_blocks; other programs that read the saved tokenizer may not
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    for name, template in TEMPLATES.items():
        plain = ImmutableSandboxedEnvironment().from_string(template.jinja)
        for messages in CONVERSATIONS.values():
            variables = {"messages": messages, "add_generation_prompt": True, "bos_token": "<s>", "eos_token": "</s>"}
            assert plain.render(**variables) == render(name, messages, True)
