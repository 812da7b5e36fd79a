"""Reward modelling: pairs of a better and a worse answer -> a model that scores answers.

The score is one number at an answer's stop token, from a new head on the backbone and by the prompt template of the
model that the run starts from; the prompt that both answers share is computed once. What the scores are worth on
held-out pairs (prompts that were not trained) is written to score_report.json and score_report.png.

    DATA=data/preference bash run_rm.sh
    python reward_modeling.py --model_name_or_path outputs/sft --train_file_dir data/preference --do_train
"""

from suwen.arguments import RewardArguments, StageArguments, parse_library_flags
from suwen.command_line import run
from suwen.entry import stage_main

# 1e-5, one epoch, as more overfits, and a short memory of AdamW: Llama 2's (Touvron et al. 2023, arXiv:2307.09288,
# section 3.2.2); LoRA wants ten times the rate of all weights (Schulman et al. 2025, "LoRA Without Regret"). Obvious
# faults are learnt first, with large gradients; as long as AdamW remembers them, subtle ones are hardly learnt.
LEARNING_RATE, LORA_LEARNING_RATE = 1e-5, 1e-4
DEFAULTS = {"num_train_epochs": 1, "adam_beta2": 0.95}
HELP_DEFAULTS = {"learning_rate": f"{LEARNING_RATE}, with LoRA {LORA_LEARNING_RATE}", **DEFAULTS}


@stage_main("rm", __doc__, HELP_DEFAULTS, RewardArguments)
def main(args: StageArguments) -> None:
    if args.run.eval_tasks:
        raise ValueError("--eval_tasks: a reward model writes no answers; its own report is in score_report.json")
    from suwen import models, score_report, stage
    from suwen.data import prepare_data
    from suwen.encoding import ChatEncoder
    from suwen.rows import PreferenceRows
    from suwen.trainers import RewardTrainer

    library = parse_library_flags(args)
    start, precision, length = stage.begin(args, library)

    # Data: preference pairs -> ids of the prompt and of both answers
    tokenizer = models.load_tokenizer(args.model.tokenizer_name_or_path or start, args.data.template_name)
    encoder = ChatEncoder(tokenizer, stage.thinking_mode(args.data.thinking))
    data = prepare_data(args.data, "preference", PreferenceRows(encoder, length), args.run.written_to)
    if "margin" in data.train.column_names and not args.own.margin_scale:
        stage.say("note: margins of the pairs are left aside; --margin_scale 1 asks for them")

    # Model: base weights, quantised if asked, adapters on top, and a head of one score
    defaults = {"learning_rate": LORA_LEARNING_RATE if args.lora.use_peft else LEARNING_RATE, **DEFAULTS}
    config = stage.training_config(args, library, precision, defaults, data)
    if args.run.dry_run:
        return stage.dry_run(args, config, data)
    model = models.load_for_training(start, args.model, args.lora, precision, length, reward=True)
    models.check_vocabulary(model, tokenizer)
    packing = stage.choose_packing(args, config, model, tokenizer, pairs=True)

    # Training: resumes by itself, evaluates, saves
    trainer = RewardTrainer(
        model=model,
        settings=args.own,
        args=config,
        train_dataset=data.train,
        eval_dataset=data.validation,
        processing_class=tokenizer,
        peft_config=models.lora_config(args.lora, model, start),
        max_length=length,
        pure_bf16=args.model.pure_bf16,
        **packing,
    )
    stage.run_stage(trainer, args, data, start, [], score_report.describe_pair(data.train[0], tokenizer))
    score_report.write_report(trainer.held_out_scores, data, args.run.output_dir)


if __name__ == "__main__":
    run(main)
