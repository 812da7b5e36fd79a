"""The knowledge-injection experiment: which commands it runs, in which order, and what it refuses."""

import re
import shlex

import pytest

from tools import build_data, experiment


@pytest.fixture
def planned(monkeypatch, capsys, tmp_path):
    """Commands of an experiment that is only shown, as (variables, words); away from what a real one has left here."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DRY_RUN", "1")
    monkeypatch.delenv("MODEL", raising=False)

    def plan(*words):
        experiment.main(list(words))
        commands = []
        for line in capsys.readouterr().out.splitlines():
            if re.search(r"\.(py|sh) ", line) and not line.startswith(("=", "Done")):
                parts = shlex.split(line)
                given = dict(part.split("=", 1) for part in parts if re.fullmatch(r"[A-Z]+=.*", part))
                commands.append((given, parts[len(given) :]))
        return commands

    return plan


def files(commands):
    return [words[1].rsplit("/", 1)[-1] for _, words in commands]


def flag_of(words, name):
    """The last value of a flag: of one given twice the later wins."""
    return [after for word, after in zip(words, words[1:], strict=False) if word == name][-1]


def test_stages_follow_one_another_each_on_the_model_before(planned):
    commands = planned("--output_dir", "my outputs")
    names = ["build_data.py", "run_pt.sh", "run_sft.sh", "run_dpo.sh", "merge_peft_adapter.py", "evaluation.py"]
    assert files(commands) == names
    seed = "my outputs/seed-1"
    assert flag_of(commands[0][1], "--output_dir") == f"{seed}/data"
    variables = [given for given, _ in commands[1:4]]
    assert [given["MODEL"] for given in variables] == ["", f"{seed}/pt", f"{seed}/sft"]
    assert [given["DATA"] for given in variables] == [
        f"{seed}/data/{name}" for name in ("pretrain", "sft", "preference")
    ]
    assert [given["OUTPUT"] for given in variables] == [f"{seed}/{name}" for name in ("pt", "sft", "dpo")]
    assert all(flag_of(words, "--eval_data_dir") == f"{seed}/data/evaluation" for _, words in commands[1:4])
    assert all(flag_of(words, "--eval_tasks") == "injection" for _, words in commands[1:4])
    assert flag_of(commands[4][1], "--lora_model") == f"{seed}/dpo"


def test_other_graphs_are_other_seeds(planned):
    built = [words for _, words in planned("--seed=7", "--seeds", "2") if words[1].endswith("build_data.py")]
    assert [flag_of(words, "--seed") for words in built] == ["7", "8"]


def test_an_own_model_starts_the_first_stage_and_learns_by_lora(planned, monkeypatch):
    by_flag = planned("--model", "a b")
    monkeypatch.setenv("MODEL", "a b")
    assert planned() == by_flag
    variables, words = by_flag[1]
    assert variables["MODEL"] == "a b" and "--use_peft" not in words
    assert by_flag[2][0]["MODEL"] == "outputs/pipeline/seed-1/pt"


def test_retrieval_adds_reading_to_the_data_and_passages_to_the_questions(planned):
    commands = planned("--size", "full")
    names = ["build_data.py", "run_sft.sh", "build_data.py", "run_pt.sh", "run_sft.sh", "run_dpo.sh"]
    assert files(commands)[:6] == names
    data, pt, sft, dpo = (words for _, words in commands[2:6])
    assert float(flag_of(data, "--reading")) > 0
    tasks = ["injection", "injection,retrieved", "injection,retrieved"]
    assert [flag_of(words, "--eval_tasks") for words in (pt, sft, dpo)] == tasks
    assert flag_of(commands[-1][1], "--tasks") == "injection,retrieved"
    assert flag_of(planned()[0][1], "--reading") == "0"


def test_the_warm_up_is_made_once_and_starts_every_seed(planned):
    commands = planned("--seeds", "2", "--stages", "warmup,sft")
    trained = [command for command in commands if command[1][1].endswith("run_sft.sh")]
    (warm, words), (first, _), (second, _) = trained
    assert warm["OUTPUT"] == first["MODEL"] == second["MODEL"] == "outputs/pipeline/warmup/model"
    assert warm["DATA"] == "outputs/pipeline/warmup/data/sft" and "--eval_tasks" not in words


def test_ppo_learns_from_the_reward_model_and_goes_on_from_sft(planned):
    commands = planned("--stages", "sft,rm,ppo")
    assert files(commands)[1:4] == ["run_sft.sh", "run_rm.sh", "run_ppo.sh"]
    rm, ppo = commands[2], commands[3]
    assert rm[0]["MODEL"] == ppo[0]["MODEL"] == "outputs/pipeline/seed-1/sft"
    assert flag_of(ppo[1], "--reward") == "model:outputs/pipeline/seed-1/rm=1.0" and "--eval_tasks" not in rm[1]
    assert flag_of(ppo[1], "--eval_tasks") == "injection"


def test_ablations_reach_the_data_and_the_stages(planned):
    commands = planned("--exposures", "20", "--wordings", "1", "--shuffle", "False", "--lora", "True")
    data, pt = commands[0][1], commands[1][1]
    assert [flag_of(data, name) for name in ("--passes", "--wordings", "--shuffle")] == ["4", "1", "False"]
    assert flag_of(pt, "--use_peft") == "True" and int(flag_of(pt, "--num_train_epochs")) * 4 == 20


def test_a_folder_keeps_to_the_data_that_its_models_have_learnt_from(planned, monkeypatch, tmp_path):
    folder = tmp_path / "my outputs"
    first = ("--stages", "warmup,sft", "--exposures", "5", "--output_dir", str(folder))
    other = ("--stages", "warmup,sft", "--exposures", "10", "--wordings", "1", "--output_dir", str(folder))
    monkeypatch.setattr(experiment, "DATA", "--recipe fictional --size 10 --num_proc 1")
    monkeypatch.setattr(experiment, "WARM_UP", "--recipe reading --size 5 --num_proc 1")
    for _, words in planned(*first):
        if words[1].endswith("build_data.py"):
            build_data.main(words[2:])
    assert "build_data.py" not in files(planned(*first)), "the same data is not built twice"
    assert files(planned(*other)).count("build_data.py") == 1, "nothing has learnt from it: built anew"

    (folder / "seed-1" / "sft").mkdir()
    assert "build_data.py" not in files(planned(*first))
    message = "seed-1/sft has learnt from, was built with --passes 1, and this call asks for --passes 2, --wordings 1; "
    with pytest.raises(ValueError, match=message + "expected another --output_dir"):
        planned(*other)
    card = folder / "seed-1" / "data" / "data_card.json"
    written = card.read_text("utf-8")
    card.write_text(written.replace('"generated": 0', '"generated": 3'), "utf-8")
    with pytest.raises(ValueError, match="data: 3 training rows give away what is evaluated"):
        planned(*first)
    card.write_text(written, "utf-8")
    (folder / "warmup" / "model").mkdir()
    monkeypatch.setattr(experiment, "WARM_UP", "--recipe reading --size 6 --num_proc 1")
    with pytest.raises(ValueError, match="warmup/model has learnt from, was built with --size 5, and this call asks"):
        planned(*first)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--stages", "pt,sleep"], "--stages: found pt,sleep, expected some of warmup, pt"),
        (["--stages", "pt,pt"], "each once"),
        (["--stages", "retrieval"], "--stages: found retrieval"),
        (["--stages", "pt,warmup"], "warmup comes before all others"),
        (["--stages", "warmup"], "another stage after it"),
        (["--stages", "sft,ppo"], "ppo needs the reward model"),
        (["--stages", "pt,retrieval"], "retrieval is asked of sft"),
        (["--seeds", "0"], "--seeds: found 0, expected 1 or more"),
        (["--exposures", "0"], "--exposures: found 0"),
    ],
)
def test_what_cannot_work_is_refused(words, message):
    with pytest.raises(ValueError, match=message):
        experiment.parse_arguments(words)
