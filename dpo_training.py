"""Direct preference optimisation: pairs of a better and a worse answer -> a model that prefers the better one.

The reference is the model that the run starts from. Its log-probabilities are computed once, before the first step, so
there is never a second model in memory; the prompt that both answers share is computed once too. Dropout is off, that
of LoRA too, so that the model is compared with its reference without noise. An alarm is a line that says when better
answers become unlikely or answers begin to repeat themselves; it stops nothing and is kept in run.json.

    DATA=data/preference bash run_dpo.sh
    python dpo_training.py --model_name_or_path outputs/sft --train_file_dir data/preference --do_train
"""

from suwen.arguments import PreferenceArguments, StageArguments, parse_library_flags
from suwen.command_line import run
from suwen.entry import stage_main

# 5e-7: Zephyr's DPO (Tunstall et al. 2023, arXiv:2310.16944); 5e-6 for LoRA: alignment-handbook's QLoRA recipe.
LEARNING_RATE, LORA_LEARNING_RATE = 5e-7, 5e-6
HELP_DEFAULTS = {"learning_rate": f"{LEARNING_RATE}, with LoRA {LORA_LEARNING_RATE}", "num_train_epochs": 1}


@stage_main("dpo", __doc__, HELP_DEFAULTS, PreferenceArguments)
def main(args: StageArguments) -> None:
    from suwen import models, stage
    from suwen.alarms import PreferenceAlarms
    from suwen.data import cache_root, prepare_data
    from suwen.encoding import ChatEncoder, describe_row
    from suwen.rows import PreferenceRows, rows_of_pair
    from suwen.trainers import PairTrainer

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
    trainer = PairTrainer(
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
    trainer.compute_reference(cache_root(args.data), stage.reference_key(args, start, config, data))
    alarms = PreferenceAlarms(trainer, encoder)
    trainer.add_callback(alarms)
    example = describe_row(rows_of_pair(data.train[0])[0], tokenizer)
    stage.run_stage(trainer, args, data, start, encoder.stop_token_ids, example, {"alarms": alarms.raised})


if __name__ == "__main__":
    run(main)
