"""An extended vocabulary: fewer tokens, old ids and text unmoved, rows that start from what the model knew."""

import io
import json
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import pytest
import sentencepiece
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from suwen.arguments import LoraArguments
from suwen.conversion.families import NATIVE
from suwen.conversion.tokenizers import convert_tokenizer
from suwen.embedded import sample_texts
from suwen.lora_targets import trainable_token_indices
from suwen.models import lora_config
from suwen.vocabulary import (
    add_rows,
    check_extended,
    count_tokens,
    extend_tokenizer,
    learn_pieces,
    merge_steps,
    rank_pieces,
    sub_tokens,
)
from tools import extend_vocabulary

pytestmark = pytest.mark.training

ROOT = Path(__file__).parents[1]
TEXTS = list(sample_texts())[:800]
HELD_OUT = list(sample_texts())[800:900]
CONTROL = ["<|im_start|>", "<|im_end|>"]


@lru_cache
def sentencepiece_model() -> bytes:
    """A model of few Chinese pieces, as LLaMA's: characters from the first lines only, bytes for the others."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text.replace("\n", " ") for text in TEXTS[:15]), model_writer=model, vocab_size=1100,
        model_type="bpe", byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        num_threads=1, minloglevel=2,
    )  # fmt: skip
    return model.getvalue()


def write_tokenizer(kind: str, folder: Path):
    if kind == "byte":
        tiny_tokenizer(CONTROL).save_pretrained(folder)
    else:
        source = folder / "source"
        source.mkdir(parents=True)
        (source / "tokenizer.model").write_bytes(sentencepiece_model())
        added = {str(1100 + i): {"content": token, "special": True} for i, token in enumerate(CONTROL)}
        settings = {"added_tokens_decoder": added, "bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}
        (source / "tokenizer_config.json").write_text(json.dumps(settings))
        convert_tokenizer(source, folder, NATIVE, [])
    return AutoTokenizer.from_pretrained(folder)


@lru_cache
def learnt() -> list[str]:
    return learn_pieces(TEXTS, 1200, 5)


def test_pieces_are_runs_of_chinese_up_to_the_length_and_the_same_in_every_run():
    pieces = learnt()
    assert all("\u3400" <= character <= "\u9fff" for piece in pieces for character in piece)
    assert max(map(len, pieces)) <= 5 and "高血压" in pieces
    assert learn_pieces(TEXTS, 1200, 5) == pieces
    with pytest.raises(ValueError, match="found no Chinese"):
        learn_pieces(["only English"], 100, 5)


def test_pieces_are_ranked_by_the_tokens_they_save():
    tokenizer = tiny_tokenizer(CONTROL)
    ranked = rank_pieces(["瘘管", "患者", "脉"], ["瘘管，瘘管，患者脉脉"], tokenizer, 1)
    # counted by hand: two of the first, one of the second, two of the third
    counts = {piece.text: piece.count for piece in ranked}
    costs = {text: len(tokenizer(text).input_ids) for text in counts}
    assert all(piece.saved == counts[piece.text] * (costs[piece.text] - 1) for piece in ranked)
    assert counts["瘘管"] == 2 and counts["脉"] == 2
    assert [piece.saved for piece in ranked] == sorted((piece.saved for piece in ranked), reverse=True)
    assert rank_pieces(["瘘管"], ["瘘管"], tokenizer, 2) == []
    assert "血压" in tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
    assert rank_pieces(["压"], ["压痛"], tokenizer, 1) == [], "a part of a token would cut it apart"


@pytest.mark.parametrize("kind", ["byte", "sentencepiece"])
def test_extension_saves_tokens_and_leaves_special_ids_and_text_as_they_were(kind, tmp_path):
    before = write_tokenizer(kind, tmp_path / "old")
    pieces = [piece.text for piece in rank_pieces(learnt(), TEXTS, before, 3)[:300]]
    new = extend_tokenizer(tmp_path / "old", before, pieces, tmp_path / "new", HELD_OUT)
    after = AutoTokenizer.from_pretrained(tmp_path / "new")
    assert count_tokens(after, HELD_OUT) < 0.8 * count_tokens(before, HELD_OUT)
    assert after.convert_tokens_to_ids(CONTROL) == before.convert_tokens_to_ids(CONTROL)
    assert after.convert_tokens_to_ids(new) == list(range(len(before), len(before) + len(new)))
    assert len(after) == len(before) + len(new) and set(pieces) <= set(new)
    for line in [*HELD_OUT, "<|im_start|>user\n高血压<|im_end|>\n"]:
        assert after.decode(after(line).input_ids) == before.decode(before(line).input_ids)
    english = "The patient has a fever, 38.5 °C."
    assert after(english).input_ids == before(english).input_ids
    assert after(english).input_ids[:1] == before(english).input_ids[:1]
    single = sum(len(sub_tokens(after, piece)) == 1 for piece in pieces)
    assert single > 0.95 * len(pieces)


def test_a_piece_is_put_together_from_old_tokens_left_to_right():
    processor = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model())
    assert processor.encode("高血压", out_type=str)[-1] != "▁高血压"
    for piece in ("高血压", "瘘管瘤", "鼾龘"):
        steps = merge_steps(processor, piece)
        assert steps[-1] == piece
        known = {processor.id_to_piece(i) for i in range(processor.get_piece_size())} | set(steps)
        for step in (step for step in steps if len(step) > 1):
            assert any(step[:cut] in known and step[cut:] in known for cut in range(1, len(step)))


def test_a_tokenizer_that_puts_blanks_around_added_tokens_is_refused(tmp_path):
    tokenizer = tiny_tokenizer(CONTROL, style="metaspace")
    tokenizer.save_pretrained(tmp_path / "old")
    with pytest.raises(ValueError, match="give a model folder with its sentencepiece file"):
        extend_tokenizer(tmp_path / "old", tokenizer, ["压患者"], tmp_path / "new", ["高血压患者应当休息"])


def test_moved_special_tokens_are_refused(tmp_path):
    tiny_tokenizer(CONTROL[::-1]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="special token .* would move from"):
        check_extended(tiny_tokenizer(CONTROL), tmp_path, [], [])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("padding", [0, 40])
def test_new_rows_are_the_means_of_the_old_tokens(tied, padding):
    tokenizer = tiny_tokenizer(CONTROL)
    model = tiny_model(tokenizer)
    model.config.tie_word_embeddings = tied
    if tied:
        model.tie_weights()
    model.resize_token_embeddings(len(tokenizer) + padding)
    old = {t: model.get_parameter(t).clone() for t in ("model.embed_tokens.weight", "lm_head.weight")}
    cut = {"糖尿病足": [5, 6, 7], "瘘管": [20, 9]}
    ids = {"糖尿病足": len(tokenizer), "瘘管": len(tokenizer) + 1}
    add_rows(model, cut, ids)
    for name, before in old.items():
        table = model.get_parameter(name)
        assert len(table) == max(len(tokenizer) + padding, len(tokenizer) + 2)
        torch.testing.assert_close(table[ids["糖尿病足"]], (before[5] + before[6] + before[7]) / 3)
        torch.testing.assert_close(table[ids["瘘管"]], (before[20] + before[9]) / 2)
        assert torch.equal(table[: len(tokenizer)], before[: len(tokenizer)])
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


@pytest.mark.training
@pytest.mark.parametrize("tied", [True, False])
def test_lora_trains_the_new_rows_and_no_other_and_merges_exactly(tied, tmp_path):
    tokenizer = tiny_tokenizer(CONTROL)
    model = tiny_model(tokenizer)
    model.config.tie_word_embeddings = tied
    if tied:
        model.tie_weights()
    new = len(tokenizer)
    add_rows(model, {"新": [5, 6], "词": [7]}, {"新": new, "词": new + 1})
    (tmp_path / "vocabulary.json").write_text(json.dumps({"new_tokens": {"新": new, "词": new + 1}}))
    indices = trainable_token_indices(model, tmp_path)
    assert indices == dict.fromkeys(["embed_tokens"] if tied else ["embed_tokens", "lm_head"], [new, new + 1])
    before = model.model.embed_tokens.weight.detach().clone()
    peft = get_peft_model(model, LoraConfig(target_modules=["q_proj"], r=2, trainable_token_indices=indices))
    optimizer = torch.optim.AdamW([p for p in peft.parameters() if p.requires_grad], lr=1e-2)
    ids = torch.tensor([[5, new, new + 1, 8, new]])
    for _ in range(3):
        peft(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    trained = peft(ids).logits
    peft.save_pretrained(tmp_path / "lora")
    fresh = tiny_model(tokenizer)
    fresh.config.tie_word_embeddings = tied
    if tied:
        fresh.tie_weights()
    add_rows(fresh, {"新": [5, 6], "词": [7]}, {"新": new, "词": new + 1})
    merged = PeftModel.from_pretrained(fresh, tmp_path / "lora").merge_and_unload()
    torch.testing.assert_close(merged(ids).logits, trained, atol=1e-5, rtol=1e-5)
    moved = (merged.model.embed_tokens.weight - before).abs().amax(1) > 0
    assert moved.nonzero()[:, 0].tolist() == [new, new + 1]


def test_rows_of_new_words_are_trained_beside_modules_that_are_trained_in_full(tmp_path):
    tokenizer = tiny_tokenizer()
    model, new = tiny_model(tokenizer), len(tokenizer)
    add_rows(model, {"新": [5, 6]}, {"新": new})
    (tmp_path / "vocabulary.json").write_text(json.dumps({"new_tokens": {"新": new}}))

    def trained(names: str) -> LoraConfig:
        return lora_config(LoraArguments(use_peft=True, modules_to_save=names), model, str(tmp_path))

    assert trained("embed_tokens").trainable_token_indices == {"lm_head": [new]}
    assert trained("embed_tokens,lm_head").trainable_token_indices is None
    settings = trained("norm")
    assert settings.trainable_token_indices == {"embed_tokens": [new], "lm_head": [new]}
    assert settings.modules_to_save == ["norm"]
    peft = get_peft_model(model, settings)
    ids = torch.tensor([[5, new, 8, new]])
    peft(ids, labels=ids).loss.backward()
    moved = {name for name, weight in peft.named_parameters() if weight.grad is not None and weight.grad.any()}
    assert {part for part in ("embed_tokens", "lm_head", "model.norm") if any(part in name for name in moved)} == {
        "embed_tokens", "lm_head", "model.norm"
    }  # fmt: skip
    model = tiny_model(tokenizer)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    assert trained("norm").trainable_token_indices == {"embed_tokens": [new]}
    with pytest.raises(ValueError, match="--modules_to_save: found one of embed_tokens and lm_head, which are one"):
        trained("lm_head")


def test_a_vocabulary_as_it_was_asks_for_no_trained_rows(tmp_path):
    assert trainable_token_indices(tiny_model(tiny_tokenizer()), tmp_path) is None


def test_each_flag_of_the_tool_has_its_effect(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    tokenizer = tiny_tokenizer(CONTROL)
    tokenizer.save_pretrained(tmp_path / "old")
    tiny_model(tokenizer).save_pretrained(tmp_path / "old")
    texts = [text.replace("\n", " ") for text in TEXTS[:200]]
    for name, lines in (("learn", texts), ("judge", [text for text in HELD_OUT if text.strip()][:7])):
        rows = [json.dumps({"text": line}, ensure_ascii=False) for line in lines]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows), encoding="utf-8")

    def extend(name: str, *words: str) -> tuple[set[str], dict, str]:
        common = f"--model_name_or_path {tmp_path}/old --train_file_dir {tmp_path}/learn.jsonl --num_new_tokens 40"
        extend_vocabulary.main([*common.split(), "--output_dir", str(tmp_path / name), *words])
        record = json.loads((tmp_path / name / "vocabulary.json").read_text())
        return set(record["new_tokens"]), record, capsys.readouterr().out

    plain, _, _ = extend("plain", "--min_frequency", "3")
    short, record, said = extend(
        "short", "--min_frequency", "3", "--longest", "2", "--validation_file_dir", str(tmp_path / "judge.jsonl")
    )
    assert max(map(len, plain)) > 2 >= max(map(len, short))
    assert "held-out text: 7 texts" in said
    few, _, said = extend("few", "--min_frequency", "3", "--max_characters", "2000")
    assert few != plain and "note: text beyond 2,000 characters is not read (--max_characters)" in said
    (tmp_path / "words.model").write_bytes(sentencepiece_model())
    taken, _, _ = extend("taken", "--min_frequency", "100000", "--words_file", str(tmp_path / "words.model"))
    processor = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model())
    known = {processor.id_to_piece(i) for i in range(processor.get_piece_size())}
    assert taken and {word for word in taken if len(sub_tokens(tokenizer, word)) > 1} & known
    with pytest.raises(ValueError, match="--words_file .*none.model: "):
        extend("none", "--words_file", str(tmp_path / "none.model"))


def test_the_tool_writes_a_model_whose_new_words_are_single_tokens(tmp_path, monkeypatch):
    tokenizer = tiny_tokenizer(CONTROL)
    tokenizer.save_pretrained(tmp_path / "old")
    tiny_model(tokenizer).to(torch.bfloat16).save_pretrained(tmp_path / "old")
    (tmp_path / "words.txt").write_text("鼾症\n糖尿病足\n", encoding="utf-8")

    options = ["--model_name_or_path", str(tmp_path / "old"), "--train_file_dir", "data/pretrain"]
    words = ["--words_file", str(tmp_path / "words.txt")]
    target = ["--output_dir", str(tmp_path / "new")]
    found = subprocess.run(
        [sys.executable, "tools/extend_vocabulary.py", *options, *target, *words, "--num_new_tokens", "200"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    assert "saved)" in found.stdout
    extended = AutoTokenizer.from_pretrained(tmp_path / "new")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    assert len(extended.tokenize("鼾症")) == 1 and model.dtype == torch.bfloat16
    assert model.get_input_embeddings().weight.shape[0] == len(extended)

    monkeypatch.chdir(ROOT)
    with pytest.raises(ValueError, match="expected a new or empty folder"):
        extend_vocabulary.main([*options, *target])
    (tmp_path / "words.txt").write_text("鼾症\nword\n", encoding="utf-8")
    with pytest.raises(ValueError, match="word 2: found 'word', expected Chinese"):
        extend_vocabulary.main([*options, "--output_dir", str(tmp_path / "other"), *words])
