"""The embedded base model: a tiny untrained Llama with a tokenizer of the project's own texts.

It stands in where no model is given, so that every stage runs on a bare machine without a download. It knows
nothing: what it can say after a stage is what that stage taught it.
"""

import hashlib
import json
import math
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from suwen.cache import find_entry
from suwen.fictional import name_parts
from suwen.manifest import MANIFEST, publish
from suwen.phrasings import GENERIC, PHRASINGS
from suwen.retrieval.grounding import CLOSING, INSTRUCTION, OPENING

PROJECT_ROOT = Path(__file__).resolve().parent.parent
VERSION = 4  # to be raised when the recipe below changes, so that no old cache is taken for the new model
VOCABULARY_SIZE = 2296
HIDDEN_SIZE = 192
SEED = 42
END_OF_TEXT, PAD, TURN_START, TURN_END = SPECIAL_TOKENS = ("<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>")

# A Chinese character is a token, and so is a digit or a punctuation mark; letters of other scripts merge to words. A
# model this small learns words that it meets in few sentences badly. Of the facts that it had only read it recalled
# 26 % with tokens of two characters, 68 % with tokens that cut across characters, and 92 % with these and the heads
# below (run_pipeline.sh, on one graph).
WORD_PATTERN = r"\p{Han}| ?[\p{L}&&[^\p{Han}]]+|\p{N}| ?[^\s\p{L}\p{N}]|\s+(?!\S)|\s+"
PLACEHOLDER = re.compile(r"\{[a-z]\}")  # of a wording


def build_embedded_model(directory: Path | None = None) -> Path:
    """Build the embedded base model, or find it already built.

    The same sample files give the same bytes. Two processes may call this at once: one builds, the other waits. What is
    damaged is set aside and built again.

    Args:
        directory: the model folder to write; default `.cache/embedded-<fingerprint>` under the project root.

    Returns:
        The folder with weights, tokenizer and chat template, ready for `from_pretrained`.

    Raises:
        ValueError: the sample files are missing, or `directory` holds something else.
    """
    from filelock import FileLock

    from template import TEMPLATES

    chat_template = TEMPLATES["chatml"].jinja
    fingerprint = _fingerprint(chat_template)
    target = Path(directory) if directory else PROJECT_ROOT / ".cache" / f"embedded-{fingerprint[:16]}"
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.parent / f".{target.name}.lock"):
        if _is_built(target, fingerprint):
            return target
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise ValueError(f"{target}: found other content, expected a new or empty folder for the embedded model")
        # Written beside the target and renamed: a build that is killed leaves nothing that looks finished.
        unfinished = target.with_name(f".{target.name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        count = _write_model(unfinished, chat_template)
        (unfinished / "embedded.json").write_text(json.dumps({"fingerprint": fingerprint}) + "\n", encoding="utf-8")
        if target.exists():
            target.rmdir()
        publish(unfinished, target, {})
    print(f"Built the embedded base model ({count / 1e6:.1f} million untrained parameters): {target}", flush=True)
    return target


def sample_files() -> list[Path]:
    """The sample files in data/, in a fixed order. Files that a user puts beside them do not change the model.

    Raises:
        ValueError: there are none.
    """
    folders = [PROJECT_ROOT / "data" / name for name in ("pretrain", "sft", "preference")]
    files = [file for folder in folders for file in sorted(folder.glob("sample_*"))]
    if not files:
        raise ValueError(f"{PROJECT_ROOT / 'data'}: found no sample files, expected pretrain/sample_*.txt and others")
    return files


def sample_texts() -> Iterator[str]:
    """Every text in the sample files: lines of .txt, and string values of .jsonl other than speakers' names."""
    for file in sample_files():
        for line in file.read_text(encoding="utf-8").splitlines():
            if file.suffix == ".jsonl":
                yield from _strings(json.loads(line))
            elif line:
                yield line


def _tokenizer_texts() -> list[str]:
    """What the tokenizer learns its words from: the samples, the wordings of facts, and the parts of invented names.

    Wordings and parts come often enough to become tokens; else an invented name would be a string of bytes.
    """
    wordings = [
        part
        for phrasings in (*PHRASINGS.values(), GENERIC)
        for wording in (*phrasings.statements, *phrasings.questions, *phrasings.answers, *phrasings.follow_ups)
        for part in PLACEHOLDER.split(wording)
        if part
    ]
    grounding = f"{INSTRUCTION}\n\n{OPENING}\n[1] \n{CLOSING}\n\n问题："
    return [*sample_texts(), *3 * [*wordings, grounding], *40 * name_parts()]


def _strings(value) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            if key not in ("from", "role", "id"):
                yield from _strings(item)


def _fingerprint(chat_template: str) -> str:
    recipe = [VERSION, VOCABULARY_SIZE, HIDDEN_SIZE, SEED, WORD_PATTERN]
    content = json.dumps([recipe, chat_template, _tokenizer_texts()], ensure_ascii=False)
    return hashlib.sha256(content.encode()).hexdigest()


def _is_built(target: Path, fingerprint: str) -> bool:
    if (target / MANIFEST).is_file() and not find_entry(target, math.inf):  # a build of an earlier version has none
        return False
    try:
        return json.loads((target / "embedded.json").read_text(encoding="utf-8"))["fingerprint"] == fingerprint
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _write_model(directory: Path, chat_template: str) -> int:
    """Write weights, tokenizer and generation settings; return the number of parameters."""
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    tokenizer = _train_tokenizer(chat_template)
    end, pad, turn_end = tokenizer.convert_tokens_to_ids([END_OF_TEXT, PAD, TURN_END])
    config = LlamaConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=HIDDEN_SIZE,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=True,  # as Qwen 2 has it; see _plant_induction_heads
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        # Llama's 0.02 is meant for widths of thousands; at this one it learns visibly slower (loss 6.0 against 5.1
        # after 175 steps on the samples).
        initializer_range=HIDDEN_SIZE**-0.5,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=pad,
    )
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):  # the caller's random state stays as it was
        torch.manual_seed(SEED)
        model = LlamaForCausalLM(config).float()
        _plant_induction_heads(model)
    model.generation_config = GenerationConfig(eos_token_id=[end, turn_end], pad_token_id=pad, bos_token_id=None)
    progress_bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # one small shard needs none
    try:
        model.save_pretrained(directory)
    finally:
        if progress_bars:
            logging.enable_progress_bar()
    tokenizer.save_pretrained(directory)
    return model.num_parameters()


def _plant_induction_heads(model) -> None:
    """Start with heads that look for what followed the same token before (induction heads).

    Language models grow them in their first billion tokens (Olsson et al. 2022, arXiv:2209.11895), and copying from the
    context, retrieved passages above all, is built on them. This model sees a few million tokens: from plain random
    weights 0.3 million tokens of repeated random strings left it at 30 % of the copies, from here 0.1 million at 99 %.

    A head of the first layer looks at the token before, by its biases alone, and writes down what it sees. Two heads of
    the second layer compare the token at hand with that note, in the dimensions that RoPE hardly turns, and bring what
    stands there, each a part of it. Everything else is random, and all of it is trained like any other weight.
    """
    import torch

    config = model.config
    width, size = config.hidden_size, config.head_dim
    frequencies = model.model.rotary_emb.inv_freq
    half = len(frequencies)
    slow = [place for place in range(half) if frequencies[place] < 2 * math.pi / 400]  # less than a turn in 400 tokens
    slow = torch.tensor([*slow, *(place + half for place in slow)])
    axes = torch.eye(width)
    read, write, *brought = (axes[size * part : size * (part + 1)] for part in range(width // size))
    first, second = (layer.self_attn for layer in model.model.layers[:2])
    shared = config.num_attention_heads // config.num_key_value_heads
    with torch.no_grad():
        for layer in model.model.layers:  # the stream begins as the embeddings, not as the noise of random layers
            layer.self_attn.o_proj.weight *= 0.1
            layer.mlp.down_proj.weight *= 0.1
        # The token before: a query and a key that are constants, which RoPE brings together one position apart
        for fast in range(10):
            turn = frequencies[fast]
            first.q_proj.bias[fast] = 6.0
            first.k_proj.bias[fast], first.k_proj.bias[fast + half] = 6 * turn.cos(), 6 * turn.sin()
        first.q_proj.weight[:size] = first.k_proj.weight[:size] = 0
        first.v_proj.weight[:size] = read
        first.o_proj.weight[:, :size] = write.T / size**0.5
        # The same token: what was noted of the token before a position, against the token at hand
        for head in range(config.num_key_value_heads):
            query, key = head * shared * size, head * size
            parts = torch.arange(head * len(slow), (head + 1) * len(slow)) % size
            second.q_proj.weight[query : query + size] = second.k_proj.weight[key : key + size] = 0
            second.q_proj.weight[query + slow] = 2 * read[parts]
            second.k_proj.weight[key + slow] = 2 * 2**0.5 * write[parts]
            second.v_proj.weight[key : key + size] = brought[head]
            second.o_proj.weight[:, query : query + size] = 3 * brought[head].T / size**0.5


def _train_tokenizer(chat_template: str):
    """Byte-level BPE (Sennrich et al. 2016; bytes as in GPT-2): any text encodes, and decodes to itself."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="isolated")
    characters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, characters])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_tokenizer_texts(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        pad_token=PAD,
        extra_special_tokens=[TURN_START, TURN_END],
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
        chat_template=chat_template,
    )
