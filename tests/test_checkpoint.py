"""Checkpoints are whole or not there, and a run goes on from the newest that verifies."""

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import tiny_model, tiny_tokenizer
from torch.utils.file_baton import FileBaton
from transformers import AutoModelForCausalLM, MixtralConfig, Qwen3MoeConfig

from suwen import interruption
from suwen.checkpoint import UNFINISHED, Saves, find_checkpoint, identity_difference, list_checkpoints
from suwen.interruption import StopSignals
from suwen.locking import LOCK, hold, refuse_abandoned_builds
from suwen.manifest import MANIFEST, files_below, find_damage, read_manifest, set_aside
from suwen.records import command_without_secrets, without_secrets
from suwen.results import find_result_damage, publish_result
from suwen.resuming import at_its_place
from suwen.saved_weights import require_equal, require_saved, save_compared, taken_up

ROOT = Path(__file__).parents[1]
CONTENT = {"model.safetensors": b"weights" * 100, "optimizer.pt": b"moments" * 50, "global_step5/rank_0.pt": b"engine"}


def save(folder: Path, step: int, **options) -> Path:
    def write(aside: Path) -> None:
        for name, content in CONTENT.items():
            (aside / name).parent.mkdir(exist_ok=True)
            (aside / name).write_bytes(content)

    folder.mkdir(exist_ok=True)
    saves = Saves(folder, wait=options.pop("wait", lambda: None))
    saves.save(step, write, {"identity": {"seed": 1}}, **options)
    saves.finish()
    return folder / f"checkpoint-{step}"


def test_the_manifest_names_every_file_with_its_size_and_hash(tmp_path):
    path = save(tmp_path, 5)
    manifest = read_manifest(path)
    assert manifest["step"] == 5 and manifest["identity"] == {"seed": 1}
    assert {name: entry["bytes"] for name, entry in manifest["files"].items()} == {
        n: len(c) for n, c in CONTENT.items()
    }
    # sha256 of b"engine", by sha256sum
    expected = "".join(os.popen("printf engine | sha256sum")).split()[0]
    assert manifest["files"]["global_step5/rank_0.pt"]["sha256"] == expected
    assert find_damage(path) is None and [entry.name for entry in tmp_path.iterdir()] == ["checkpoint-5"]


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def test_every_flipped_bit_of_every_file_is_found(tmp_path):
    path = save(tmp_path, 5)
    for file in files_below(path):
        for bit in range(0, 8 * file.stat().st_size, 97):
            flip(file, bit)
            assert find_damage(path), f"bit {bit} of {file.name}"
            flip(file, bit)
    assert find_damage(path) is None


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda path: (path / "optimizer.pt").write_bytes(b"moments"), "optimizer.pt has 7 bytes, not 350"),
        (lambda path: (path / "optimizer.pt").unlink(), "optimizer.pt is missing"),
        (lambda path: (path / "pytorch_model.bin").write_bytes(b"x"), "pytorch_model.bin is not in its manifest"),
        (lambda path: flip(path / "optimizer.pt", 9), "optimizer.pt does not have its SHA-256"),
        (lambda path: (path / MANIFEST).unlink(), f"{MANIFEST} is missing"),
        (lambda path: (path / MANIFEST).write_text("{"), f"{MANIFEST} is damaged"),
        (lambda path: (path / MANIFEST).write_text("[]"), f"{MANIFEST} is damaged"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_set_aside(tmp_path, damage, expected):
    whole, broken = save(tmp_path, 5), save(tmp_path, 10)
    damage(broken)
    found, lines = find_checkpoint(tmp_path, "auto")
    assert found == whole
    assert lines[0] == f"checkpoint-10: damaged, not used ({expected})"
    assert list(tmp_path.glob("damaged-*/checkpoint-10"))
    with pytest.raises(ValueError, match="--resume .*no whole checkpoint"):
        find_checkpoint(tmp_path, str(next(tmp_path.glob("damaged-*/checkpoint-10"))))


def test_a_link_in_a_checkpoint_is_not_followed(tmp_path):
    path = save(tmp_path, 5)
    (tmp_path / "elsewhere").write_bytes(CONTENT["optimizer.pt"])
    (path / "optimizer.pt").unlink()
    (path / "optimizer.pt").symlink_to(tmp_path / "elsewhere")
    assert find_damage(path) == "optimizer.pt is not in its manifest"


def test_the_newest_whole_checkpoint_is_taken(tmp_path):
    for step in (5, 10, 9):
        save(tmp_path, step)
    assert find_checkpoint(tmp_path, "auto")[0] == tmp_path / "checkpoint-10"


def test_a_save_that_was_cut_short_is_removed_and_named(tmp_path):
    (tmp_path / UNFINISHED / "checkpoint-7").mkdir(parents=True)
    found, lines = find_checkpoint(tmp_path, "auto")
    assert found is None and "checkpoint-7" in lines[0] and not (tmp_path / UNFINISHED).exists()


def test_never_keeps_the_earlier_run_out_of_the_way(tmp_path):
    save(tmp_path, 5)
    found, lines = find_checkpoint(tmp_path, "never")
    assert found is None and "moved" in lines[0]
    assert find_damage(next(tmp_path.glob("earlier-*/checkpoint-5"))) is None


def test_folders_set_aside_within_a_second_do_not_fall_on_one_another(tmp_path):
    targets = {set_aside([save(tmp_path, 5)], tmp_path, "earlier") for _ in range(3)}
    assert len(targets) == 3 and all(find_damage(target / "checkpoint-5") is None for target in targets)


def test_a_given_checkpoint_is_taken_and_what_came_after_it_set_aside(tmp_path):
    chosen = save(tmp_path, 5)
    save(tmp_path, 10)
    assert find_checkpoint(tmp_path, str(chosen))[0] == chosen
    assert list_checkpoints(tmp_path) == [chosen] and list(tmp_path.glob("later-*/checkpoint-10"))


def test_a_checkpoint_of_a_foreign_folder_is_refused(tmp_path):
    foreign = save(tmp_path / "foreign", 5)
    with pytest.raises(ValueError, match="is not below --output_dir .* pickles"):
        find_checkpoint(tmp_path / "own", str(foreign))
    with pytest.raises(ValueError, match="--resume nowhere.*no whole checkpoint"):
        find_checkpoint(tmp_path, "nowhere")


def test_older_checkpoints_are_rotated_after_the_new_one_is_there(tmp_path):
    seen = []
    for step in range(1, 6):
        save(tmp_path, step, limit=2, keep=[2], wait=lambda: seen.append([p.name for p in list_checkpoints(tmp_path)]))
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-4", "checkpoint-5"]
    assert all(names for names in seen[3:]), "there is a whole checkpoint at every moment"


@pytest.mark.parametrize("limit", [None, 0])
def test_without_a_limit_all_are_kept(tmp_path, limit):
    for step in range(3):
        save(tmp_path, step, limit=limit)
    assert len(list_checkpoints(tmp_path)) == 3


def test_a_failed_save_leaves_the_last_checkpoint_and_says_so(tmp_path):
    save(tmp_path, 5)

    def write(folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(
        ValueError, match="step 6: .*No space left on device.*the last whole checkpoint is .*checkpoint-5"
    ):
        Saves(tmp_path).save(6, write, {})
    assert find_checkpoint(tmp_path, "auto") == (tmp_path / "checkpoint-5", [])


@pytest.mark.parametrize("place", ["/dev/full", "/nowhere/model.pt"])
def test_what_torch_says_of_a_disk_is_told_as_such(place, tmp_path):
    with pytest.raises(ValueError, match="step 6: the checkpoint could not be written .*no checkpoint yet"):
        Saves(tmp_path).save(6, lambda folder: torch.save(torch.ones(100_000), place), {})


@pytest.mark.parametrize(
    "failure",
    [
        RuntimeError("[gloo/transport/tcp/pair.cc:538] Connection closed by peer [127.0.0.1]:54321"),
        torch.distributed.DistNetworkError("connection reset"),
        torch.OutOfMemoryError("CUDA out of memory"),
        ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"),
    ],
    ids=lambda failure: type(failure).__name__,
)
def test_a_lost_peer_and_memory_that_is_too_small_are_no_matter_of_the_disk(failure, tmp_path):
    def fail(*_: object) -> None:
        raise failure

    with pytest.raises(type(failure)) as error:
        Saves(tmp_path).save(6, fail, {})
    assert error.value is failure
    with pytest.raises(type(failure)) as error:
        Saves(tmp_path, wait=fail).save(6, lambda folder: None, {})
    assert error.value is failure


RESULT = {"model.safetensors": b"weights" * 100, "config.json": b"{}", "merges.txt": b"", "sub/a.jinja": b"x"}


def publish(folder: Path) -> dict:
    aside = folder / UNFINISHED / "result"
    for name, content in RESULT.items():
        (aside / name).parent.mkdir(parents=True, exist_ok=True)
        (aside / name).write_bytes(content)
    return publish_result(aside, folder)


def test_a_result_is_put_beside_what_is_there_and_takes_the_place_of_an_earlier_one(tmp_path):
    for name in ("run.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "model.safetensors"):
        (tmp_path / name).write_text("earlier")
    files = publish(tmp_path)
    assert {name: entry["bytes"] for name, entry in files.items()} == {n: len(c) for n, c in RESULT.items()}
    assert all((tmp_path / name).read_bytes() == content for name, content in RESULT.items())
    left = {path.name for path in tmp_path.iterdir()} - {UNFINISHED}
    assert left == {"model.safetensors", "config.json", "merges.txt", "sub", "run.json"}
    assert find_result_damage(tmp_path, files) is None


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors is missing"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b""), "model.safetensors has 0 bytes, not 700"),
        (lambda folder: flip(folder / "model.safetensors", 5), "model.safetensors does not have its SHA-256"),
        (lambda folder: (folder / "config.json").write_bytes(b""), "config.json is missing or empty"),
        (lambda folder: (folder / "config.json").write_bytes(b'{"edited": "by hand"}'), None),
        (lambda folder: (folder / "merges.txt").unlink(), None),
    ],
)
def test_of_a_result_weights_must_be_as_they_were_and_settings_be_there(change, expected, tmp_path):
    files = publish(tmp_path)
    change(tmp_path)
    assert find_result_damage(tmp_path, files) == expected


def test_a_result_of_an_earlier_version_is_believed_if_there_are_weights(tmp_path):
    for recorded in ({}, {"adapter_model.safetensors": "0" * 64}):
        assert find_result_damage(tmp_path, recorded) == "its weights are missing"
    (tmp_path / "adapter_model.safetensors").write_bytes(b"x")
    assert find_result_damage(tmp_path, {"adapter_model.safetensors": "0" * 64}) is None


def test_a_step_is_saved_once(tmp_path):
    saves, written = Saves(tmp_path), []
    for step in (3, 3, 4):
        saves.save(step, written.append, {})
    saves.finish()
    assert [path.name for path in written] == ["checkpoint-3", "checkpoint-4"]


def test_a_failed_publication_is_told_at_the_next_save_or_at_the_end(tmp_path):
    saves = Saves(save(tmp_path, 5).parent)
    for step, end in ((6, saves.finish), (7, lambda: saves.save(8, lambda folder: None, {}))):
        saves.save(step, lambda folder: (folder / "gone").symlink_to(tmp_path / "nowhere"), {})
        with pytest.raises(
            ValueError, match=f"step {step}: .*No such file.*the last whole checkpoint is .*checkpoint-5"
        ):
            end()
    saves.finish()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-5"]


def test_space_is_asked_for_before_anything_is_written(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    written: list[Path] = []
    with pytest.raises(ValueError, match="needs .* GB on the disk of .* GB are free.*there is no checkpoint yet"):
        Saves(tmp_path).save(1, written.append, {}, needed_bytes=2 * free)
    assert not written


def test_the_difference_between_two_runs_names_all_values():
    assert identity_difference({"learning_rate": 1e-4, "data": "a"}, {"learning_rate": 2e-4, "data": "a"}) == (
        "learning_rate was 0.0001, is 0.0002"
    )
    assert (
        identity_difference({"a": 1, "b": 2}, {"a": 2, "c": 3}) == "a was 1, is 2; b was 2, is None; c was None, is 3"
    )
    assert identity_difference(json.loads('{"a": 1}'), {"a": 1}) is None


def test_what_lies_elsewhere_but_holds_the_same_is_the_same_run():
    was = {"start": "/a/m", "weights of the start": "f0", "data": "d0", "train_file_dir": "data/sft", "seed": 1}
    now = was | {"start": "/b/m", "train_file_dir": "/b/data/sft"}
    assert identity_difference(at_its_place(was, now), now) is None
    other = now | {"data": "d1"}
    found = identity_difference(at_its_place(was, other), other)
    assert found == "data was 'd0', is 'd1'; train_file_dir was 'data/sft', is '/b/data/sft'"
    unknown = was | {"weights of the start": ""}, now | {"weights of the start": ""}
    assert identity_difference(at_its_place(*unknown), unknown[1]) == "start was '/a/m', is '/b/m'"


def hold_in_another_process(folder: Path) -> str:
    script = f"from pathlib import Path; from suwen.locking import hold; hold(Path({str(folder)!r})); print('held')"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    return result.stdout.strip() or result.stderr.strip().splitlines()[-1]


def test_a_lock_that_a_killed_build_has_left_is_named_and_one_that_is_held_is_not(tmp_path):
    refuse_abandoned_builds(tmp_path / "none")
    lock = tmp_path / "py311_cpu" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    builder = FileBaton(str(lock))
    assert builder.try_acquire()
    refuse_abandoned_builds(tmp_path)
    os.close(builder.fd)  # as the kernel does when the build is killed
    with pytest.raises(ValueError, match=r"deepspeed_shm_comm/lock: left by a build .* remove it"):
        refuse_abandoned_builds(tmp_path)
    lock.unlink()
    refuse_abandoned_builds(tmp_path)


def test_a_folder_is_held_by_one_process_and_free_when_that_one_is_dead(tmp_path):
    for _ in range(2):
        assert hold_in_another_process(tmp_path) == "held"
    for _ in range(2):  # a run after another in one process
        hold(tmp_path)
    expected = f"ValueError: --output_dir {tmp_path}: in use by process {os.getpid()} on "
    assert hold_in_another_process(tmp_path).startswith(expected)


def test_a_process_that_ends_by_itself_leaves_no_lock(tmp_path):
    assert hold_in_another_process(tmp_path) == "held" and not (tmp_path / LOCK).exists()


def test_a_lock_that_its_holder_removes_while_it_is_taken_is_taken_anew(tmp_path, monkeypatch):
    lock = fcntl.lockf
    removed = []

    def remove_then_lock(file, how):
        if not removed:
            removed.append((tmp_path / LOCK).unlink())  # as its holder does at its end, between opening and locking
        lock(file, how)

    monkeypatch.setattr(fcntl, "lockf", remove_then_lock)
    hold(tmp_path)
    expected = f"ValueError: --output_dir {tmp_path}: in use by process {os.getpid()} on "
    assert hold_in_another_process(tmp_path).startswith(expected)


def test_a_signal_is_noted_and_a_later_one_ends_the_process(tmp_path, monkeypatch, capfd):
    with StopSignals() as signals:
        for _ in range(2):  # the second passed on by a launcher
            os.kill(os.getpid(), signal.SIGINT)
        assert signals.received == signal.SIGINT
        monkeypatch.setattr(interruption, "SAME_SIGNAL_SECONDS", 0.0)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    assert capfd.readouterr().out.count("SIGINT: stopping after this step") == 1
    with pytest.raises(SystemExit) as end:
        signals.leave(7, tmp_path)
    assert end.value.code == 130
    assert "stopped at step 7 by SIGINT; there is no checkpoint yet" in capfd.readouterr().out


def test_weights_that_are_not_those_in_memory_are_found(tmp_path):
    live = {"a": torch.arange(6.0), "tied": torch.ones(2)}
    live["tied.alias"] = live["tied"]
    file = tmp_path / "model.safetensors"
    save_file({"a": live["a"], "tied": live["tied"]}, file)
    require_equal(live, [file])
    for wrong in ({"a": live["a"] + 1e-6}, {"a": live["a"].double()}, {"a": live["a"].view(2, 3)}):
        with pytest.raises(RuntimeError, match="a is not what is in memory"):
            require_equal(live | wrong, [file])
    with pytest.raises(RuntimeError, match="b: is not in the files"):
        require_equal(live | {"b": torch.ones(1)}, [file])
    with pytest.raises(RuntimeError, match="there are no weights to be saved"):
        require_equal({}, [])


def test_an_adapter_on_an_adapter_is_saved_without_a_question_to_the_hub(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    model = tiny_model(tiny_tokenizer())
    model.name_or_path = str(tmp_path / "adapter")  # what the weights came from has no config.json
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_compared(model, tmp_path)
    assert not [name for name in load_file(tmp_path / "adapter_model.safetensors") if "lora" not in name]


@pytest.mark.parametrize("kind", [MixtralConfig, Qwen3MoeConfig])
def test_experts_under_other_names_are_compared_one_by_one(kind, tmp_path):
    sizes = {"moe_intermediate_size": 12, "num_experts": 3} if kind is Qwen3MoeConfig else {"num_local_experts": 3}
    config = kind(vocab_size=16, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
                  num_key_value_heads=2, head_dim=4, num_experts_per_tok=2, **sizes)  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    save_compared(model, tmp_path, model.state_dict())
    file = tmp_path / "model.safetensors"
    saved = load_file(file)
    names = [name for name in saved if ".experts." in name]
    assert len(names) == 2 * 3 * 3 and not set(names) & model.state_dict().keys()
    one, other = names[0], names[0].replace("experts.0.", "experts.1.")
    for wrong in ({one: saved[other], other: saved[one]}, {one: saved[one] + 1e-7}):
        save_file(saved | wrong, file)
        with pytest.raises(RuntimeError, match=r"experts.0.* is not what is in memory"):
            require_saved(model, tmp_path)
    save_file({name: tensor for name, tensor in saved.items() if name != one}, file)
    with pytest.raises(RuntimeError, match=f"{one}: is not in the files"):
        require_saved(model, tmp_path)
    with pytest.raises(ValueError, match=r"was not taken up as it was saved .*--resume never"), taken_up(tmp_path):
        require_saved(model, tmp_path)


def test_secrets_are_not_written_down():
    words = ["--hub_token", "hf_x", "--api_key=sk-1", "--max_new_tokens", "8", "--rollout_server", "http://u:pw@host:1"]
    assert command_without_secrets(words) == [
        "--hub_token", "***", "--api_key=***", "--max_new_tokens", "8", "--rollout_server", "http://***@host:1",
    ]  # fmt: skip
    kept = without_secrets({"hub_token": "hf_x", "tokenizer_name_or_path": "m", "url": "http://u:pw@h", "token": 3})
    assert kept == {"tokenizer_name_or_path": "m", "url": "http://***@h", "token": 3}
