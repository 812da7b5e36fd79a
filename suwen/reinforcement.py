"""A stage of reinforcement learning from its first rollout to its result: log, evaluations, alarms, checkpoints."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from suwen import stage
from suwen.arguments import StageArguments
from suwen.checkpoint import Saves, list_checkpoints, named_step
from suwen.lineage import read_json
from suwen.nonfinite import require_finite_weights
from suwen.policy_alarms import Limits, find_alarm
from suwen.ppo import PolicyTrainer, describe_updates
from suwen.progress import main_process, say
from suwen.records import draw_curves, write_json
from suwen.resuming import about_run, find_damage_once, finished_before, resume_from
from suwen.saved_weights import require_equal, state_bytes, taken_up
from suwen.stage_tasks import ask_at_step, ask_result, ask_saved, forget_steps_after

if TYPE_CHECKING:
    from suwen.data import PreparedData

STATE = "trainer_state.json"
TRAINED, OPTIMIZER = "trained.safetensors", "optimizer.safetensors"
# What a log line shows, in this order; the rest is in TensorBoard and in trainer_state.json.
SHOWN = {
    "score": "score", "kl": "KL", "entropy": "entropy", "length": "tokens", "truncation": "cut",
    "explained_variance": "explained", "clip_fraction": "clipped", "eval_score": "held-out score",
    "eval_held_out_reward": "held-out reward", "eval_length": "tokens", "eval_truncation": "cut",
}  # fmt: skip


def run(trainer: PolicyTrainer, args: StageArguments, data: PreparedData, start: str) -> dict[str, Any]:
    """Announce, resume, train, evaluate and save, as `suwen.stage.run_stage` does for the other stages.

    Where an alarm stops the run, the weights of the best evaluation are saved, and the record says why.

    Returns:
        The content of run.json; without training, of evaluation.json.

    Raises:
        ValueError: an alarm, after everything is saved.
    """
    config, output = trainer.args, Path(args.run.output_dir)
    given = args.own
    record = stage.describe_run(trainer, args, data, start, {"rewards": {r.name: r.weight for r in trainer.rewards}})
    example = trainer.ask_row(data.train, 0, 0)
    say(
        *data.report.lines(),
        *held_out_prompts(trainer, data),
        "example prompt:",
        trainer.processing_class.decode(example[2]),
        describe_updates(config, given, len(data.train)),
        f"training {record['trained_parameters']:,} of {record['parameters']:,} parameters in "
        f"{'/'.join(record['trained_dtype'])} on {config.world_size} x {config.device.type}",
    )
    if not config.do_train:
        record["evaluation"] = trainer.evaluate()
        write_lines(output / "held_out_answers.jsonl", trainer.last_evaluation)
        stage.finish(trainer, record, output, "evaluation.json")
        return record
    checkpoint = resume_from(args, record, output)
    if earlier := finished_before(args, record, output, checkpoint):
        stage.finish(trainer, earlier, output)
        if args.run.eval_tasks and main_process():
            ask_saved(args, start)
        return earlier
    if main_process():
        write_json(output / "run.json", record)
        shutil.copyfile(data.sketch, output / data.sketch.name)
    if checkpoint:
        load_checkpoint(trainer, checkpoint)
    forget_lines_after(output, trainer.step if checkpoint else -1)
    if main_process():
        forget_steps_after(output, trainer.step)
    limits = Limits(**{name.removeprefix("alarm_"): value for name, value in vars(given).items() if "alarm_" in name})
    trainer.accelerator.init_trackers(args.stage)
    seen, began = trainer.tokens_seen, trainer.step
    about = about_run(record)
    trainer.nonfinite.choose(args.run.on_nonfinite, trainer.is_deepspeed_enabled)
    with trainer.signals:
        reason = train(trainer, args, start, limits, about)
    for tracker in trainer.accelerator.trackers:  # not end_training: it would leave the process group too
        tracker.finish()
    trainer.signals.leave(trainer.step, output)
    say(*stage.changed_since(data))
    updates = [entry for entry in trainer.history if "kl" in entry]
    seconds = sum(e["rollout_seconds"] + e["update_seconds"] for e in updates if e["step"] > began)
    record["training"] = {
        "steps": trainer.step,
        "loss": updates[-1]["loss"] if updates else 0.0,
        "kl": updates[-1]["kl"] if updates else 0.0,
        "tokens": trainer.tokens_seen,
        "seconds": round(seconds, 2),
        "tokens_per_second": round((trainer.tokens_seen - seen) / max(seconds, 1e-9), 1),
        "resumed_from": str(checkpoint) if checkpoint else None,
        **trainer.nonfinite.counted(),
    }
    best = best_evaluation(trainer.history)
    if best:
        record["best"] = best
        record["evaluation"] = evaluations(trainer.history)[-1]
    keeps = True
    if reason:
        keeps, what = settle_on_best(trainer, output, best)
        if best and keeps:
            record["evaluation"] = next(e for e in evaluations(trainer.history) if e["step"] == best["step"])
        record["stopped"] = reason = f"{reason}. {what}"
    if keeps:
        require_finite_weights(trainer)
        record["files"] = stage.save_result(trainer, output, trainer.encoder.stop_token_ids, record)
    record["finished"] = reason is None
    if main_process():
        shutil.rmtree(output / "rollout_adapters", ignore_errors=True)
        draw_curves(trainer.history, output / "training_curves.png", f"{given.algorithm}: {start}", "update")
    stage.finish(trainer, record, output, "run.json")
    if reason:
        raise ValueError(reason)
    if args.run.eval_tasks and main_process():
        ask_result(trainer, args, start)
    return record


def train(
    trainer: PolicyTrainer, args: StageArguments, start: str, limits: Limits, about: dict[str, Any]
) -> str | None:
    """Updates to the last one, to a signal, or to an alarm, whose reason is returned."""
    config, total, output = trainer.args, trainer.planned_updates(), Path(args.run.output_dir)
    evaluates = trainer.eval_dataset is not None and config.eval_strategy != "no"
    if evaluates and not trainer.history:
        evaluate(trainer, output, total)
    with tqdm(
        total=total, initial=trainer.step, desc="updates", disable=config.disable_tqdm or not main_process()
    ) as bar:
        while trainer.step < total:
            entry = trainer.update()
            trainer.history.append({**entry, "step": trainer.step})
            bar.update()
            last = trainer.step == total
            if trainer.step % max(1, int(config.logging_steps)) == 0 or last:
                log(trainer, trainer.history[-1], total)
                write_lines(output / "samples.jsonl", trainer.last_samples)
            improved = False
            if evaluates and (last or trainer.step % max(1, int(config.eval_steps or total)) == 0):
                evaluate(trainer, output, total)
                improved = (best_evaluation(trainer.history) or {}).get("step") == trainer.step
            # An alarm comes first: a checkpoint of what it is about would be resumed
            if reason := find_alarm(trainer.history, limits):
                return f"stopped at update {trainer.step}: {reason}"
            regular = config.save_strategy != "no" and (last or trainer.step % max(1, int(config.save_steps)) == 0)
            # A signal reaches the ranks in different updates; all stop after the same one
            stops = trainer.signals.agreed() > 0
            if improved or regular or stops:
                save_checkpoint(trainer, output, about)
            if stops:
                break
            if args.run.eval_tasks_steps and trainer.step % args.run.eval_tasks_steps == 0 and not last:
                if main_process():
                    trainer.accelerator.log(ask_at_step(trainer, args, start, trainer.step), step=trainer.step)
                trainer.accelerator.wait_for_everyone()
    return None


def evaluate(trainer: PolicyTrainer, output: Path, total: int) -> None:
    trainer.history.append({**trainer.evaluate(), "step": trainer.step})
    log(trainer, trainer.history[-1], total)
    write_lines(output / "held_out_answers.jsonl", trainer.last_evaluation)


def log(trainer: PolicyTrainer, entry: dict[str, Any], total: int) -> None:
    trainer.accelerator.log({name: value for name, value in entry.items() if name != "step"}, step=trainer.step)
    if main_process():
        parts = [f"{name} {entry[key]:.4g}" for key, name in SHOWN.items() if key in entry]
        tqdm.write(f"update {trainer.step}/{total}  " + "  ".join(parts), file=sys.stdout)
        sys.stdout.flush()


def evaluations(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [entry for entry in history if "eval_score" in entry]


def held_out_prompts(trainer: PolicyTrainer, data: PreparedData) -> list[str]:
    """How many of the held-out rows are asked, where some of them share their prompt."""
    rows, asked = (len(found or ()) for found in (data.validation, trainer.eval_dataset))
    return [f"  held out: {asked:,} different prompts in {rows:,} rows, each asked once"] if asked < rows else []


def best_evaluation(history: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Update and score of the best evaluation, by the held-out reward where there is one; of equals the first."""
    found = evaluations(history)
    if not found:
        return None
    name = "eval_held_out_reward" if "eval_held_out_reward" in found[0] else "eval_score"
    best = max(found, key=lambda entry: entry[name])
    return {"step": best["step"], "by": name, "value": best[name]}


def settle_on_best(trainer: PolicyTrainer, output: Path, best: dict[str, Any] | None) -> tuple[bool, str]:
    """Put the best evaluation's weights in place of those that an alarm is about, if their checkpoint is whole.

    Without evaluations the newest whole checkpoint is taken for it. Returns whether there is something to save, and
    what.
    """
    trainer.accelerator.wait_for_everyone()
    saved, problem = list_checkpoints(output), "there is no checkpoint before it"
    if best:
        saved = [path for path in saved if named_step(path) == best["step"]]
        problem = f"checkpoint-{best['step']} of the best evaluation is gone" if best["step"] else "the start was best"
    while saved and (damage := find_damage_once(saved[-1])):
        problem = f"{saved.pop().name} is damaged ({damage})"
    if not saved:
        return False, f"No weights are saved: {problem}"
    history = trainer.history  # what led to the alarm stays in the curves
    load_checkpoint(trainer, saved[-1])
    trainer.history = history
    return True, f"The weights saved are those of {saved[-1].name}" + (", the best evaluation" if best else "")


def write_lines(file: Path, rows: list[dict[str, Any]]) -> None:
    if main_process():
        with open(file, "a", encoding="utf-8") as stream:
            stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def forget_lines_after(output: Path, step: int) -> None:
    """Drop what was written down after the update that a run goes on from; it will be written again."""
    for file in (output / "samples.jsonl", output / "held_out_answers.jsonl"):
        if main_process() and file.is_file():
            lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
            file.write_text("".join(kept), encoding="utf-8")


# Checkpoints


def save_checkpoint(trainer: PolicyTrainer, output: Path, about: dict[str, Any] | None = None) -> None:
    """Everything that decides the next updates, verified and published; every rank takes part.

    Trained weights with the critic, optimiser, place in the schedule and in the data, KL coefficient and history.
    There is no random state: see `suwen.ppo`.

    Args:
        about: see `suwen.checkpoint.Saves`.
    """
    require_finite_weights(trainer)

    def write(folder: Path) -> None:
        if trainer.is_deepspeed_enabled:
            tag = f"global_step{trainer.step}"
            trainer.engine.save_checkpoint(str(folder), tag=tag, exclude_frozen_parameters=True)
        weights = trained_weights(trainer)
        if main_process():
            save_file(weights, folder / TRAINED)
            require_equal(weights, [folder / TRAINED])
            if not trainer.is_deepspeed_enabled:
                write_optimizer(trainer, folder)
            write_state(trainer, folder)

    best = best_evaluation(trainer.history)
    saves = Saves(output, main_process(), trainer.accelerator.wait_for_everyone)
    saves.save(
        trainer.step,
        write,
        about or {},
        needed_bytes=state_bytes(trainer.policy, trainer.raw_optimizer, trainer.is_deepspeed_enabled),
        limit=trainer.args.save_total_limit,
        keep=[best["step"]] if best else [],
    )
    saves.finish()
    trainer.accelerator.wait_for_everyone()


def write_optimizer(trainer: PolicyTrainer, folder: Path) -> None:
    tensors: dict[str, torch.Tensor] = {}
    numbers: dict[str, float] = {}
    for place, values in trainer.raw_optimizer.state_dict()["state"].items():
        for name, value in values.items():
            key = f"{place}.{name}"
            if isinstance(value, torch.Tensor):
                tensors[key] = value.contiguous()
            else:
                numbers[key] = value
    save_file(tensors, folder / OPTIMIZER)
    write_json(folder / "optimizer.json", numbers)


def write_state(trainer: PolicyTrainer, folder: Path) -> None:
    scaler = trainer.accelerator.scaler
    write_json(
        folder / STATE,
        {
            "global_step": trainer.step,
            "num_input_tokens_seen": trainer.tokens_seen,
            "kl_coefficient": trainer.kl_coefficient,
            "learning_rates": trainer.scheduler.get_last_lr(),
            "scaler": scaler.state_dict() if scaler else None,
            "skipped_steps": trainer.nonfinite.skipped,
            "log_history": trainer.history,
        },
    )


def trained_weights(trainer: PolicyTrainer) -> dict[str, torch.Tensor]:
    """Each trained tensor once, under its first name; every rank takes part, and under DeepSpeed one gets them."""
    trained = {name: parameter for name, parameter in trainer.policy.named_parameters() if parameter.requires_grad}
    if not trainer.is_deepspeed_enabled:
        return {name: parameter.detach().contiguous() for name, parameter in trained.items()}
    from deepspeed import zero

    found = {}
    for name, parameter in trained.items():
        with zero.GatheredParameters([parameter]):
            if main_process():
                found[name] = parameter.detach().to("cpu", copy=True).contiguous()
    return found


def load_checkpoint(trainer: PolicyTrainer, checkpoint: Path) -> None:
    """Go on from `checkpoint`; every rank takes part."""
    state = read_json(checkpoint / STATE)
    if trainer.is_deepspeed_enabled:
        trainer.engine.load_checkpoint(
            str(checkpoint), tag=f"global_step{state['global_step']}", load_module_strict=False
        )
        weights = trained_weights(trainer)
        if main_process():
            with taken_up(checkpoint):
                require_equal(weights, [checkpoint / TRAINED])
    else:
        weights = load_file(checkpoint / TRAINED)
        with torch.no_grad():
            for name, parameter in trainer.policy.named_parameters():
                if parameter.requires_grad:
                    parameter.copy_(weights[name])
        moments: dict[int, dict[str, Any]] = {}
        for key, value in {**load_file(checkpoint / OPTIMIZER), **read_json(checkpoint / "optimizer.json")}.items():
            place, _, name = key.partition(".")
            moments.setdefault(int(place), {})[name] = value
        groups = trainer.raw_optimizer.state_dict()["param_groups"]
        trainer.raw_optimizer.load_state_dict({"state": moments, "param_groups": groups})
    trainer.step, trainer.history = state["global_step"], state["log_history"]
    trainer.nonfinite.skipped = state["skipped_steps"]
    trainer.tokens_seen, trainer.kl_coefficient = state["num_input_tokens_seen"], state["kl_coefficient"]
    if state["scaler"]:
        trainer.accelerator.scaler.load_state_dict(state["scaler"])
    schedule = trainer.scheduler
    schedule.last_epoch = trainer.step * trainer.steps_an_update
    schedule._step_count = schedule.last_epoch + 1
    schedule._last_lr = state["learning_rates"]
    for group, rate in zip(trainer.raw_optimizer.param_groups, state["learning_rates"], strict=True):
        group["lr"] = rate
