"""Continued pretraining: raw medical text -> a base model that has read it.

On a server, and by hand:

    MODEL=Qwen/Qwen3-8B DATA=data/pretrain bash run_pt.sh
    python pretraining.py --model_name_or_path MODEL --train_file_dir data/pretrain --output_dir outputs/pt --do_train
"""

from suwen.arguments import StageArguments, parse_library_flags
from suwen.command_line import run
from suwen.entry import stage_main

# 2e-5 for all weights, 2e-4 for LoRA: MedicalGPT's run_pt.sh.
LEARNING_RATE, LORA_LEARNING_RATE = 2e-5, 2e-4
HELP_DEFAULTS = {"learning_rate": f"{LEARNING_RATE}, with LoRA {LORA_LEARNING_RATE}", "num_train_epochs": 1}


@stage_main("pt", __doc__, HELP_DEFAULTS)
def main(args: StageArguments) -> None:
    from suwen import models, stage
    from suwen.data import prepare_data
    from suwen.encoding import describe_row
    from suwen.rows import DocumentRows
    from suwen.trainers import LanguageModelTrainer

    library = parse_library_flags(args)
    start, precision, length = stage.begin(args, library)

    # Data: documents -> token ids, an EOS after each
    tokenizer = models.load_tokenizer(args.model.tokenizer_name_or_path or start)
    data = prepare_data(args.data, "text", DocumentRows(tokenizer, length), args.run.written_to)

    # Model: base weights, quantised if asked, adapters on top
    defaults = {"learning_rate": LORA_LEARNING_RATE if args.lora.use_peft else LEARNING_RATE, "num_train_epochs": 1}
    config = stage.training_config(args, library, precision, defaults, data)
    if args.run.dry_run:
        return stage.dry_run(args, config, data)
    model = models.load_for_training(start, args.model, args.lora, precision, length)
    models.check_vocabulary(model, tokenizer)
    packing = stage.choose_packing(args, config, model, tokenizer)

    # Training: resumes by itself, evaluates, saves
    trainer = LanguageModelTrainer(
        model=model,
        args=config,
        train_dataset=data.train,
        eval_dataset=data.validation,
        processing_class=tokenizer,
        peft_config=models.lora_config(args.lora, model, start),
        max_length=length,
        pure_bf16=args.model.pure_bf16,
        **packing,
    )
    stage.run_stage(trainer, args, data, start, [tokenizer.eos_token_id], describe_row(data.train[0], tokenizer))


if __name__ == "__main__":
    run(main)
