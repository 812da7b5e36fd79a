"""Reinforcement learning: the model answers, its answers are scored, and it learns to answer better.

PPO with a critic on the policy's own backbone, or RLOO or GRPO without one. Scores come from rules (the key of exam
questions, form, length, repetition, language), from a reward model, or both. With LoRA one backbone is policy, critic
and reference. Prompts are those of SFT, preference and exam files, with the turns before them.

    DATA=data/evaluation/exam.csv bash run_ppo.sh --reward exam=1.0,format=0.2
    python ppo_training.py --model_name_or_path outputs/sft --train_file_dir data/sft --reward model:outputs/rm=1.0
"""

from suwen.arguments import PolicyArguments, StageArguments, parse_library_flags
from suwen.command_line import run
from suwen.entry import stage_main

# 3e-6: Huang et al. 2024 (arXiv:2403.17031), table 2; 1e-5 for LoRA, whose few weights need larger steps.
LEARNING_RATE, LORA_LEARNING_RATE = 3e-6, 1e-5
DEFAULTS = {
    "num_train_epochs": 1, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 16, "logging_steps": 1,
    "eval_steps": 20, "save_steps": 20, "lr_scheduler_type": "linear", "warmup_steps": 0,
}  # fmt: skip
HELP_DEFAULTS = {"learning_rate": f"{LEARNING_RATE}, with LoRA {LORA_LEARNING_RATE}", **DEFAULTS}


@stage_main("ppo", __doc__, HELP_DEFAULTS, PolicyArguments)
def main(args: StageArguments) -> None:
    from suwen import models, reinforcement, rewards, stage
    from suwen.data import prepare_data
    from suwen.encoding import ChatEncoder
    from suwen.ppo import PolicyTrainer, describe_updates
    from suwen.rows import PromptRows

    given = args.own
    library = parse_library_flags(args)
    if library.get("neftune_noise_alpha"):
        raise ValueError("--neftune_noise_alpha: noise would part the policy from what it drew; not with this stage")
    if args.model.router_aux_loss_coef:
        raise ValueError("--router_aux_loss_coef: is no part of this stage's loss; leave it out")
    args.model.router_aux_loss_coef = 0.0
    given.reward = rewards.find_rewards(given.reward, args.model.outputs)
    start, precision, length = stage.begin(args, library)

    # Data: conversations, pairs and exam questions -> prompts and answer keys
    tokenizer = models.load_tokenizer(args.model.tokenizer_name_or_path or start, args.data.template_name)
    encoder = ChatEncoder(tokenizer, stage.thinking_mode(args.data.thinking))
    prompts = PromptRows(encoder, rewards.prompt_room(length, given.max_new_tokens))
    data = prepare_data(args.data, "prompt", prompts, args.run.written_to)

    # Model: base weights, quantised if asked, adapters on top; reward models beside it
    defaults = {**DEFAULTS, "learning_rate": LORA_LEARNING_RATE if args.lora.use_peft else LEARNING_RATE}
    config = stage.training_config(args, library, precision, defaults, data)
    if args.run.dry_run:
        return stage.dry_run(args, config, data, [describe_updates(config, given, len(data.train))])
    model = models.load_for_training(start, args.model, args.lora, precision, length)
    models.check_vocabulary(model, tokenizer)
    packing = stage.choose_packing(args, config, model, tokenizer)
    scored = rewards.load_rewards(given.reward, given, config.device)
    held_out = rewards.load_rewards(given.held_out_reward, given, config.device) if given.held_out_reward else []

    # Training: resumes by itself, evaluates, stops at alarms, saves
    trainer = PolicyTrainer(
        model=model,
        settings=given,
        args=config,
        train_dataset=data.train,
        eval_dataset=data.validation,
        encoder=encoder,
        rewards=scored,
        held_out_rewards=held_out,
        peft_config=models.lora_config(args.lora, model, start),
        max_length=length,
        pure_bf16=args.model.pure_bf16,
        **packing,
    )
    reinforcement.run(trainer, args, data, start)


if __name__ == "__main__":
    run(main)
