"""Whether a run may go on from what lies in its output folder: the same model, data and arguments, or refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from suwen.arguments import StageArguments
from suwen.checkpoint import find_checkpoint, identity_difference
from suwen.lineage import read_json
from suwen.manifest import find_damage, read_manifest, set_aside
from suwen.progress import main_process, say
from suwen.rescale import engine_in_use, fit_processes
from suwen.results import find_result_damage, result_weights

if TYPE_CHECKING:
    from suwen.data import PreparedData

# Arguments that do not change what is learned: a run may be resumed with other values.
FREE_TO_CHANGE = {
    "output_dir", "resume", "outputs", "do_train", "do_eval", "logging_steps", "logging_first_step", "save_steps",
    "save_strategy", "save_total_limit", "eval_steps", "eval_strategy", "report_to", "run_name", "num_proc",
    "cache_dir", "logging_dir", "logging_nan_inf_filter",
    "dataloader_num_workers", "disable_tqdm", "on_bad_rows", "max_eval_samples", "per_device_eval_batch_size",
    "log_level", "held_out_reward", "generation_batch_size", "rollout_server", "alarm_kl", "alarm_entropy",
    "alarm_length", "alarm_repetition", "alarm_truncation", "alarm_patience",
}  # fmt: skip
# The library's arguments that do.
LEARNING = {
    "learning_rate", "num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps",
    "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "weight_decay", "max_grad_norm", "optim", "optim_args",
    "optim_target_modules", "adam_beta1", "adam_beta2", "adam_epsilon", "bf16", "fp16", "tf32", "neftune_noise_alpha",
    "seed", "data_seed", "train_sampling_strategy", "dataloader_drop_last", "ignore_data_skip",
}  # fmt: skip


def identity(
    args: StageArguments, start: str, lineage: list[dict[str, str]], config: Any, data: PreparedData
) -> dict[str, Any]:
    """Everything that decides what a run learns: a checkpoint may only be resumed by the same."""
    values: dict[str, Any] = {"start": start, "data": data.report.fingerprint, "world_size": config.world_size}
    values["weights of the start"] = " + ".join(
        (link.get("fingerprint") or link.get("sha256") or "")[:16] for link in lineage
    )
    for part in (args.model, args.data, args.lora, args.own):
        values |= dataclasses.asdict(part) if part else {}
    values |= {name: getattr(config, name) for name in LEARNING}
    values.pop("model_name_or_path")
    return {
        k: v if isinstance(v, (int, float, bool, type(None))) else str(v)
        for k, v in values.items()
        if k not in FREE_TO_CHANGE
    }


def at_its_place(recorded: dict[str, Any], current: dict[str, Any]) -> dict[str, Any]:
    """What a run was, had its start and its data lain where they lie now; those that hold something else stay apart."""
    places = {"weights of the start": ("start",), "data": ("train_file_dir", "validation_file_dir")}
    for content, names in places.items():
        if recorded.get(content) and recorded[content] == current[content]:
            recorded = recorded | {name: current[name] for name in names if name in current}
    return recorded


def about_run(record: dict[str, Any]) -> dict[str, Any]:
    """What the manifest of a checkpoint keeps of the run, so that another run is told from it."""
    return {name: record[name] for name in ("stage", "versions", "world_size", "identity")} | {
        "data": record["data"]["contents"]
    }


def resume_from(args: StageArguments, record: dict[str, Any], output: Path) -> Path | None:
    """The checkpoint to go on from, the same on every rank; refuses one of a run that learned from something else."""
    found: list[Any] = [None]
    if main_process():
        checkpoint, lines = find_checkpoint(output, args.run.resume)
        say(*lines)
        refuse_another_run(args, record, output, checkpoint)
        if checkpoint:
            say(f"going on from {checkpoint}, verified")
        found = [checkpoint]
    return from_main(found)


def from_main(found: list[Any]) -> Any:
    """What the main process has found, on every rank; `found` holds it there, and anything on the others."""
    if torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(found, src=0)
    return found[0]


def find_damage_once(checkpoint: Path) -> str | None:
    """`find_damage`, looked for by the main process and known to every rank, all of which take part."""
    return from_main([find_damage(checkpoint) if main_process() else None])


def finished_before(
    args: StageArguments, record: dict[str, Any], output: Path, checkpoint: Path | None
) -> dict[str, Any] | None:
    """The record of this very run where it has come to its end in this folder, which is said; then nothing is left.

    Where its result is not whole any more, the run goes on from `checkpoint` to make it again.
    """
    earlier = read_json(output / "run.json")
    if args.run.resume != "auto" or not earlier.get("finished") or not earlier.get("identity"):
        return None
    if identity_difference(at_its_place(earlier["identity"], record["identity"]), record["identity"]):
        return None
    damage = None
    if main_process() and (damage := find_result_damage(output, earlier.get("files", {}))):
        say(f"this very run has finished, but {damage}: its result is made again, from {checkpoint or 'its start'}")
        if left := result_weights(output):
            say(f"weights that were there moved to {set_aside(left, output, 'damaged')}")
    if from_main([damage]):
        return None
    say("this very run has finished already: nothing is trained again (--resume never starts anew)")
    return earlier


def refuse_another_run(args: StageArguments, record: dict[str, Any], output: Path, checkpoint: Path | None) -> None:
    """
    Raises:
        ValueError: the checkpoint, or the finished result in the folder, is of another run; not with --resume_force.
    """
    if args.run.resume == "never":
        return
    if checkpoint:
        manifest = read_manifest(checkpoint)
        recorded = fit_processes(checkpoint, manifest["identity"], record["identity"], engine_in_use())
        contents = manifest["data"]
        if (before := manifest["versions"]) != record["versions"]:
            say(f"note: other versions than before: {identity_difference(before, record['versions'])}")
    else:
        earlier = read_json(output / "run.json")
        if not earlier.get("finished") or not earlier.get("identity"):
            return
        recorded, contents = earlier["identity"], earlier["data"].get("contents", {})
    difference = identity_difference(at_its_place(recorded, record["identity"]), record["identity"])
    if difference is None:
        return
    if recorded.get("data") != record["identity"]["data"]:
        now = record["data"]["contents"]
        other = sorted(path for path in contents.keys() | now.keys() if contents.get(path) != now.get(path))
        difference += f"; files that differ: {', '.join(other) or 'none, they are read in another way'}"
    if args.run.resume_force:
        say(f"--resume_force: {checkpoint or output} is of another run ({difference})")
        return
    raise ValueError(
        f"{checkpoint or output}: is of another run ({difference}); give another --output_dir, --resume never to "
        "start anew, or --resume_force to go on all the same"
    )
