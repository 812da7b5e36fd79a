import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from suwen.embedded import PROJECT_ROOT, VOCABULARY_SIZE, build_embedded_model, sample_files, sample_texts
from suwen.fictional import name_parts
from template import TEMPLATES

pytestmark = pytest.mark.training


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return build_embedded_model(tmp_path_factory.mktemp("embedded") / "base")


def digests(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir() if file.is_file()}


def start_build(folder: Path, **environment: str) -> subprocess.Popen:
    code = "import sys; from suwen.embedded import build_embedded_model, Path; build_embedded_model(Path(sys.argv[1]))"
    environment = {**os.environ, "PYTHONPATH": str(PROJECT_ROOT), "HF_HUB_OFFLINE": "1", **environment}
    command = [sys.executable, "-c", code, str(folder)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def test_two_builds_give_the_same_bytes(folder, tmp_path):
    process = start_build(tmp_path / "b", PYTHONHASHSEED="7", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
    process.communicate(timeout=120)
    assert process.returncode == 0
    assert digests(folder) == digests(tmp_path / "b")


def test_two_processes_may_build_at_once(tmp_path):
    processes = [start_build(tmp_path / "b") for _ in range(2)]
    printed = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert sum("Built the embedded base model" in text for text in printed) == 1
    assert [entry.name for entry in tmp_path.iterdir() if entry.is_dir()] == ["b"]


def test_a_built_model_is_not_built_again(folder, capsys):
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert build_embedded_model(folder) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", ["tokenizer.json", "model.safetensors", "embedded.json"])
def test_a_damaged_model_is_named_set_aside_and_built_again(folder, tmp_path, capfd, name):
    model = tmp_path / "base"
    shutil.copytree(folder, model)
    os.truncate(model / name, 50)
    assert digests(build_embedded_model(model)) == digests(folder)
    assert f"{model}: damaged ({name} has 50 bytes, not " in capfd.readouterr().err
    assert len(list(tmp_path.glob(f"damaged-*/base/{name}"))) == 1
    (model / "MANIFEST.json").unlink()  # as an earlier version left it
    assert build_embedded_model(model) == model and not (model / "MANIFEST.json").exists()


def test_a_killed_build_does_not_stand_in_the_way(tmp_path):
    unfinished = tmp_path / ".base.unfinished"
    unfinished.mkdir()
    (unfinished / "model.safetensors").write_bytes(b"half")
    assert AutoModelForCausalLM.from_pretrained(build_embedded_model(tmp_path / "base")).num_parameters() > 0
    assert not unfinished.exists()


def test_building_leaves_the_random_state_alone(tmp_path):
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    build_embedded_model(tmp_path / "base")
    assert torch.equal(torch.rand(3), expected)


def test_a_folder_with_other_content_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="found other content"):
        build_embedded_model(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_files_a_user_adds_to_data_do_not_change_the_model():
    assert all(file.name.startswith("sample_") for file in sample_files())


def test_the_model_loads_offline_with_tied_fp32_weights(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    assert model.config.model_type == "llama"
    assert model.dtype == torch.float32
    assert model.config.vocab_size == len(AutoTokenizer.from_pretrained(folder)) == VOCABULARY_SIZE
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert 2e6 < model.num_parameters() < 3e6
    assert model.config.bos_token_id is None
    assert sorted(file.suffix for file in folder.iterdir()).count(".safetensors") == 1


def test_an_untrained_model_knows_no_more_than_chance(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("发热、咳嗽、咳痰，应当到呼吸内科就诊。", return_tensors="pt").input_ids
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss.item()
    # Logits of about unit variance: ln V, and half a nat more for their spread.
    assert loss == pytest.approx(math.log(VOCABULARY_SIZE) + 0.5, abs=0.7)


def test_generation_stops_at_the_end_of_text_and_of_a_turn(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    settings = GenerationConfig.from_pretrained(folder)
    assert settings.eos_token_id == tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    assert settings.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (None, "<|endoftext|>", "<|pad|>")


@pytest.mark.parametrize(
    "text",
    [
        "血压 140/90 mmHg，体温38.5℃。",
        "  two  spaces\r\n\ttab\n\n",
        "龘靐齉 𠮷野家 emoji 🩺👩‍⚕️ عربى ไทย",
        "it's ATP's 1,000.5 µg/mL (α-葡萄糖苷酶) <think>",
        "\x00\x7f\u200b\ufeff",
        "",
    ],
)
def test_any_text_decodes_to_itself(folder, text):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_nothing_is_added_to_a_text(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert not set(tokenizer("患者发热。").input_ids) & set(tokenizer.all_special_ids)


def test_a_token_is_one_chinese_character_or_a_word_of_other_letters(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [*sample_texts(), *name_parts()]
    characters = {character for text in texts for character in text if "\u4e00" <= character <= "\u9fff"}
    whole = [character for character in characters if len(tokenizer(character).input_ids) == 1]
    assert len(whole) > 0.99 * len(characters) > 1600
    for token in map(tokenizer.decode, range(4, len(tokenizer))):
        assert len(token) == 1 or token.replace("\ufffd", "").strip().isascii()


def test_the_chat_template_is_chatml_and_its_marks_are_single_tokens(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == TEMPLATES["chatml"].jinja
    messages = [{"role": "user", "content": "头痛怎么办？"}, {"role": "assistant", "content": "请到神经内科就诊。"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == "<|im_start|>user\n头痛怎么办？<|im_end|>\n<|im_start|>assistant\n请到神经内科就诊。<|im_end|>\n"
    counts = Counter(tokenizer(text).input_ids)
    assert [counts[tokenizer.convert_tokens_to_ids(mark)] for mark in ("<|im_start|>", "<|im_end|>")] == [2, 2]


def test_sample_files_are_well_formed_and_small():
    for file in sample_files():
        content = file.read_bytes()
        assert len(content) < 500_000 and b"\r" not in content and content.endswith(b"\n"), file
        for line in content.decode("utf-8").splitlines():
            assert line.strip(), file
            if file.suffix == ".jsonl":
                assert isinstance(json.loads(line), dict), file


def test_sample_pairs_have_distinct_answers_and_prompts():
    prompts = []
    for file in sample_files():
        if file.parent.name == "preference":
            for line in file.read_text(encoding="utf-8").splitlines():
                row = json.loads(line)
                assert row["chosen"] != row["rejected"]
                prompts.append(json.dumps(row.get("prompt", row.get("conversations")), ensure_ascii=False))
    assert len(prompts) >= 300 and len(set(prompts)) == len(prompts)
