"""Odds-ratio preference optimisation (ORPO): pairs of a better and a worse answer -> a model that gives the better one.

SFT and preference in one stage: the better answer is trained as in SFT while the odds of the worse one fall. There is
no reference model; the prompt that both answers share is computed once. Dropout is off, that of LoRA too.

    DATA=data/preference bash run_orpo.sh
    python orpo_training.py --model_name_or_path outputs/sft --train_file_dir data/preference --do_train
"""

from suwen.arguments import OddsRatioArguments, StageArguments, parse_library_flags
from suwen.command_line import run
from suwen.entry import stage_main

# 5e-6: the authors' Mistral-ORPO (Hong et al. 2024, arXiv:2403.07691, app. C); LoRA wants ten times the rate of all
# weights (Schulman et al. 2025, "LoRA Without Regret").
LEARNING_RATE, LORA_LEARNING_RATE = 5e-6, 5e-5
HELP_DEFAULTS = {"learning_rate": f"{LEARNING_RATE}, with LoRA {LORA_LEARNING_RATE}", "num_train_epochs": 1}


@stage_main("orpo", __doc__, HELP_DEFAULTS, OddsRatioArguments)
def main(args: StageArguments) -> None:
    from suwen import models, stage
    from suwen.data import prepare_data
    from suwen.encoding import ChatEncoder, describe_row
    from suwen.rows import PreferenceRows, rows_of_pair
    from suwen.trainers import OddsRatioTrainer

    library = parse_library_flags(args)
    start, precision, length = stage.begin(args, library)

    # Data: preference pairs -> ids of the prompt and of both answers
    tokenizer = models.load_tokenizer(args.model.tokenizer_name_or_path or start, args.data.template_name)
    encoder = ChatEncoder(tokenizer, stage.thinking_mode(args.data.thinking))
    data = prepare_data(args.data, "preference", PreferenceRows(encoder, length), args.run.written_to)

    # Model: base weights, quantised if asked, adapters on top
    defaults = {
        "learning_rate": LORA_LEARNING_RATE if args.lora.use_peft else LEARNING_RATE,
        "num_train_epochs": 1,
    }
    config = stage.training_config(args, library, precision, defaults, data)
    if args.run.dry_run:
        return stage.dry_run(args, config, data)
    model = models.load_for_training(start, args.model, args.lora, precision, length)
    models.check_vocabulary(model, tokenizer)
    packing = stage.choose_packing(args, config, model, tokenizer, pairs=True)

    # Training: resumes by itself, evaluates, saves
    trainer = OddsRatioTrainer(
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
    stage.run_stage(
        trainer, args, data, start, encoder.stop_token_ids, describe_row(rows_of_pair(data.train[0])[0], tokenizer)
    )


if __name__ == "__main__":
    run(main)
