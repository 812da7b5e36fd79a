"""Do reinforcement and preference learning learn? On the embedded model, by the key of exam questions.

    python -m benchmarks.reinforcement                # three seeds each, with their curves in outputs/reinforcement
    python -m benchmarks.reinforcement --algorithms grpo --seeds 1 --updates 8
    python -m benchmarks.reinforcement --reward model --algorithms ppo

The questions are made of the names in data/kg: "哪一项是药品？" with the names of a drug, a disease and a symptom, in
random order. They are easy on purpose: the embedded model knows nothing, and has to find out in minutes on one core
which of three names is a drug, and to say the letter that stands before it. Names occur in several questions, a
question (its three names in their order) in one of the parts alone: warm-up, learning, held-out.

A short supervised warm-up, the same for all runs, teaches the form of an answer and a little of the matter. From there
PPO, RLOO and GRPO learn from the exam key alone, without ever being shown an answer, and DPO and ORPO from pairs of the
right letter and a wrong one. Measured on the held-out questions, by the likeliest answers: accuracy before and after,
its difference with the exact McNemar test on the same questions, beside the best constant letter, and the KL to the
start of those that are held to it by one. It says that the algorithms work, not that a model knows medicine.

With `--reward model` the key is never seen either: a reward model is trained on those pairs, for each seed its own, and
the policy on its scores. Then its score of the held-out answers is measured, too, with a paired bootstrap.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

ALGORITHMS = ("ppo", "rloo", "grpo", "dpo", "orpo")
PREFERENCE_RATES = {"dpo": 1e-4, "orpo": 1e-4}  # learning rates of the two that learn from pairs
POLICY_RATES = {"ppo": 5e-5, "rloo": 2e-4, "grpo": 1e-4}  # those without a critic take one step an update, PPO several
REWARD_MODEL = {"learning_rate": 5e-4, "num_train_epochs": 2, "use_peft": False, "validation_split_fraction": 0.1}
KINDS = ("药品", "疾病", "症状")  # the first is asked for
SIZES = {"held_out": 200, "warm_up": 1000, "train": 2000}
WARM_UP_STEPS, WARM_UP_EVERY = 60, 2  # optimiser steps at most, and between two looks at what has been learnt
# Token accuracy on held-out answers, a letter and its stop token, which is always right: 60 % of the letters
WARMED_UP = 0.8
LONGEST_NAME = 6  # characters, to keep prompts short


def write_questions(folder: Path, seed: int = 0) -> dict[str, Path]:
    """Files of conversations, of SIZES; no question is in two of them."""
    with open(ROOT / "data" / "kg" / "entities.csv", encoding="utf-8-sig") as stream:
        entities = list(csv.DictReader(stream))
    names = {
        kind: [e["name"] for e in entities if e["type"] == kind and len(e["name"]) <= LONGEST_NAME] for kind in KINDS
    }
    rng = random.Random(seed)
    rows: dict[str, str] = {}
    while len(rows) < sum(SIZES.values()):
        options = [(kind, rng.choice(names[kind])) for kind in KINDS]
        rng.shuffle(options)
        lines = [f"{letter} {name}" for letter, (_, name) in zip("ABC", options, strict=True)]
        rows["\n".join([f"哪一项是{KINDS[0]}？", *lines])] = "ABC"[[kind for kind, _ in options].index(KINDS[0])]
    folder.mkdir(parents=True, exist_ok=True)
    files, left = {}, iter(rows.items())
    for name, size in SIZES.items():
        files[name] = folder / f"{name}.jsonl"
        with open(files[name], "w", encoding="utf-8") as stream:
            for _ in range(size):
                question, answer = next(left)
                turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
                stream.write(json.dumps({"messages": turns}, ensure_ascii=False) + "\n")
    files["pairs"] = folder / "pairs.jsonl"
    with open(files["train"], encoding="utf-8") as rows_read, open(files["pairs"], "w", encoding="utf-8") as stream:
        for line in rows_read:
            *prompt, chosen = json.loads(line)["messages"]
            rejected = chosen | {"content": rng.choice([letter for letter in "ABC" if letter != chosen["content"]])}
            pair = {"prompt": prompt, "chosen": [chosen], "rejected": [rejected]}
            stream.write(json.dumps(pair, ensure_ascii=False) + "\n")
    return files


def run_script(script: str, output: Path, flags: dict[str, Any], threads: int) -> None:
    """A stage in a process of its own; its words go to <output>.log."""
    common = {
        "output_dir": output, "cache_dir": output.parent / "cache", "outputs": output.parent / "none", "num_proc": 1,
        "max_length": 512, "use_cpu": True, "bf16": False, "disable_tqdm": True, "report_to": "none",
        "lr_scheduler_type": "constant", "warmup_steps": 0, "save_strategy": "no",
    }  # fmt: skip
    words = [word for name, value in (common | flags).items() for word in (f"--{name}", str(value))]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": ""}
    with open(output.with_suffix(".log"), "w", encoding="utf-8") as log:
        result = subprocess.run([sys.executable, str(ROOT / script), *words], env=environment, stdout=log, stderr=log)
    if result.returncode:
        raise ValueError(f"{script} ended with code {result.returncode}, see {output.with_suffix('.log')}")


def warm_up(files: dict[str, Path], output: Path, threads: int) -> Path:
    """The first checkpoint of a supervised run that is WARMED_UP: from there, there is something left to learn.

    How many steps it takes depends on the last bit of the start.
    """
    flags = {
        "train_file_dir": files["warm_up"], "validation_file_dir": files["held_out"], "max_steps": WARM_UP_STEPS,
        "learning_rate": 1e-3, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2,
        "eval_strategy": "steps", "eval_steps": WARM_UP_EVERY, "save_strategy": "steps", "save_steps": WARM_UP_EVERY,
        "save_total_limit": WARM_UP_STEPS,
    }  # fmt: skip
    run_script("supervised_finetuning.py", output, flags, threads)
    state = json.loads((output / f"checkpoint-{WARM_UP_STEPS}" / "trainer_state.json").read_text(encoding="utf-8"))
    found = {e["step"]: e["eval_token_accuracy"] for e in state["log_history"] if "eval_token_accuracy" in e}
    for step, accuracy in sorted(found.items()):
        if accuracy >= WARMED_UP:
            return output / f"checkpoint-{step}"
    raise ValueError(
        f"warm-up: {max(found.values()):.1%} of held-out tokens after {WARM_UP_STEPS} steps, expected more"
    )


def learn(
    algorithm: str,
    seed: int,
    updates: int,
    start: Path,
    files: dict[str, Path],
    output: Path,
    reward: str,
    threads: int,
) -> dict[str, Any]:
    """One run; what each held-out answer was worth before and after, and what run.json says."""
    began = time.monotonic()
    asked = {
        "train_file_dir": files["train"], "validation_file_dir": files["held_out"], "reward": reward,
        "held_out_reward": "exam=1.0", "max_new_tokens": 4, "generation_batch_size": 128, "seed": seed,
        "resume": "never",
    }  # fmt: skip
    kl = None
    if algorithm in PREFERENCE_RATES:
        flags = {
            "model_name_or_path": start, "train_file_dir": files["pairs"], "learning_rate": PREFERENCE_RATES[algorithm],
            "num_train_epochs": 1, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1,
            "validation_split_fraction": 0.02, "seed": seed, "resume": "never",
        }  # fmt: skip
        run_script(f"{algorithm}_training.py", output, flags, threads)
        answers = []
        for model in (start, output):
            folder = output.with_name(f"{output.name}-{'before' if model is start else 'after'}")
            run_script("ppo_training.py", folder, asked | {"model_name_or_path": model, "do_eval": True}, threads)
            answers.append(read_scores(folder)[0])
    else:
        flags = asked | {
            "algorithm": algorithm, "model_name_or_path": start, "max_steps": updates,
            "eval_steps": max(1, updates // 3), "learning_rate": POLICY_RATES[algorithm],
            "per_device_train_batch_size": 8, "gradient_accumulation_steps": 8, "num_generations": 4, "kl_coef": 0.02,
        }  # fmt: skip
        run_script("ppo_training.py", output, flags, threads)
        kl = json.loads((output / "run.json").read_text(encoding="utf-8"))["training"]["kl"]
        steps = read_scores(output)
        answers = [steps[0], steps[max(steps)]]
    seconds = time.monotonic() - began
    return {"before": answers[0], "after": answers[1], "kl": kl, "seconds": seconds}


def read_scores(output: Path) -> dict[int, list[tuple[bool, float]]]:
    """For each step at which the held-out questions were asked: was an answer right, and what did the reward say?"""
    lines = (output / "held_out_answers.jsonl").read_text(encoding="utf-8").splitlines()
    found: dict[int, list[tuple[bool, float]]] = {}
    for answer in map(json.loads, lines):
        found.setdefault(answer["step"], []).append((answer["scores"]["exam"] > 0.5, answer["score"]))
    return found


def train_reward_model(seed: int, start: Path, files: dict[str, Path], folder: Path, threads: int) -> str:
    """A reward model of the pairs, as a reward."""
    output = folder / f"rm-{seed}"
    flags = REWARD_MODEL | {"model_name_or_path": start, "train_file_dir": files["pairs"], "seed": seed}
    flags |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "resume": "never"}
    run_script("reward_modeling.py", output, flags, threads)
    return f"model:{output}=1.0"


def constant_letter(file: Path) -> float:
    """Accuracy of the best answer that does not look at the question."""
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    letters = Counter(row["messages"][-1]["content"] for row in rows)
    return max(letters.values()) / len(rows)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algorithms", nargs="+", choices=ALGORITHMS, default=list(ALGORITHMS))
    parser.add_argument("--reward", choices=("exam", "model"), default="exam", help="the key, or a model (exam)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each algorithm (default: 3)")
    parser.add_argument("--updates", type=int, default=20, help="of ppo, rloo, grpo, 64 answers each (default: 20)")
    parser.add_argument("--threads", type=int, default=1, help="cores (default: 1)")
    parser.add_argument("--output_dir", default="outputs/reinforcement")
    args = parser.parse_args(argv)
    import numpy as np

    from suwen.statistics import compare_correct, compare_scores

    folder = Path(args.output_dir)
    files = write_questions(folder / "questions")
    start = warm_up(files, folder / "warm_up", args.threads)
    floor = constant_letter(files["held_out"])
    print(f"held out: {SIZES['held_out']} questions; the best constant letter is right in {floor:.1%}\n")
    by_model = args.reward == "model"
    rewards = dict.fromkeys(range(1, args.seeds + 1), "exam=1.0")
    if by_model:
        rewards = {seed: train_reward_model(seed, start, files, folder, args.threads) for seed in rewards}
    scores = (" score before | after | difference (95 %) | p (bootstrap) |", "---:|---:|---|---|")
    head, line = scores if by_model else ("", "")
    print("| algorithm | seed | before | after | difference (95 %) | p (McNemar) | KL, nats an answer |" + head)
    print("|---|---:|---:|---:|---|---|---:|" + line, flush=True)
    results = []
    for algorithm in args.algorithms:
        for seed, reward in rewards.items():
            output = folder / f"{algorithm}-{seed}"
            found = learn(algorithm, seed, args.updates, start, files, output, reward, args.threads)
            before, after = (np.array(found[name], dtype=float) for name in ("before", "after"))
            right = compare_correct(before[:, 0] > 0, after[:, 0] > 0)
            entry = {"algorithm": algorithm, "seed": seed, "constant_letter": floor, "kl": found["kl"]}
            entry |= {"before": before[:, 0].mean(), "after": after[:, 0].mean(), "p": right.p}
            line = f"| {algorithm} | {seed} | {entry['before']:.1%} | {entry['after']:.1%} | {right.value:+.1%}"
            line += f" ({right.low:+.1%} to {right.high:+.1%}) | {right.p:.1e} |"
            line += " |" if found["kl"] is None else f" {found['kl']:.2f} |"
            if by_model:
                score = compare_scores(before[:, 1:], after[:, 1:])
                entry |= {"score_before": before[:, 1].mean(), "score_after": after[:, 1].mean(), "score_p": score.p}
                line += f" {entry['score_before']:.2f} | {entry['score_after']:.2f} | {score.value:+.2f}"
                line += f" ({score.low:+.2f} to {score.high:+.2f}) | {score.p:.1e} |"
            print(line, flush=True)
            results.append(entry | {"seconds": found["seconds"]})
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(f"\ncurves: {folder}/*/training_curves.png")


if __name__ == "__main__":
    main()
