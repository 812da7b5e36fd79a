"""Which checkpoint a run goes on from."""

import json
from pathlib import Path

import pytest

from suwen.checkpoint import find_checkpoint, identity_difference


def write_checkpoint(folder: Path, step: int, state: str | None = '{"global_step": 1}') -> Path:
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "model.safetensors").write_bytes(b"x")
    if state is not None:
        (path / "trainer_state.json").write_text(state)
    return path


def test_the_newest_whole_checkpoint_is_taken(tmp_path):
    write_checkpoint(tmp_path, 5)
    newest = write_checkpoint(tmp_path, 10)
    write_checkpoint(tmp_path, 9)
    assert find_checkpoint(tmp_path, "auto")[0] == newest


@pytest.mark.parametrize("state", [None, '{"global_st'])
def test_a_checkpoint_cut_short_is_moved_aside_and_named(tmp_path, state):
    whole = write_checkpoint(tmp_path, 5)
    write_checkpoint(tmp_path, 10, state)
    found, lines = find_checkpoint(tmp_path, "auto")
    assert found == whole
    assert "checkpoint-10" in lines[0]
    assert list(tmp_path.glob("incomplete-*/checkpoint-10/model.safetensors"))


def test_never_keeps_the_earlier_run_out_of_the_way(tmp_path):
    write_checkpoint(tmp_path, 5)
    found, lines = find_checkpoint(tmp_path, "never")
    assert found is None and "moved" in lines[0]
    assert list(tmp_path.glob("earlier-*/checkpoint-5/trainer_state.json"))


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(ValueError, match="--resume.*no whole checkpoint"):
        find_checkpoint(tmp_path, str(tmp_path / "checkpoint-7"))


def test_a_given_checkpoint_is_taken(tmp_path):
    chosen = write_checkpoint(tmp_path, 5)
    write_checkpoint(tmp_path, 10)
    assert find_checkpoint(tmp_path, str(chosen))[0] == chosen


def test_the_difference_between_two_runs_names_both_values():
    assert identity_difference({"learning_rate": 1e-4, "data": "a"}, {"learning_rate": 2e-4, "data": "a"}) == (
        "learning_rate was 0.0001, is 0.0002"
    )
    assert identity_difference(json.loads('{"a": 1}'), {"a": 1}) is None
