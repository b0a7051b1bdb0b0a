"""The command line of a training run: every setting, and what is typed wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from toolkit.errors import UserError
from toolkit.records.activations import Activations
from toolkit.records.lora import LoRA
from toolkit.run.settings import RunSettings, parse


def test_command_line_fills_every_setting(tmp_path: Path) -> None:
    line = (
        f"--local_rank=1 --deepspeed --model qwen3-134m --tokenizer mistral-32k --data fineweb --data-subset s "
        f"--text-column body --bad-documents stop --val-data held.txt --deepspeed_config soam_zero3 "
        f"--set a.b=1 --set c=x "
        f"--plugin {tmp_path}/p.py --steps 7 --seq-len 33 --micro-batch 2 --grad-accum 3 --global-batch 12 "
        f"--lr 1e-3 --warmup 0.2 --seed 5 --eval-every 0 --eval-sequences 9 --run-dir {tmp_path}/run "
        "--activations checkpoint:2,offload --loss plain "
        "--from-checkpoint --save-every 6 --keep-last 4 --keep-every 12 "
        "--resume none --convert-state --max-skipped 3 --memory-profile full --deterministic --peak-tflops 2.5 "
        "--trust-pickle --chat-template chatml --lora r=8 --report_to wandb --json --start-anyway --compile-model"
    )
    settings = parse(line.split())
    assert settings == RunSettings(
        model="qwen3-134m",
        from_checkpoint=True,
        tokenizer="mistral-32k",
        data="fineweb",
        data_subset="s",
        text_column="body",
        bad_documents="stop",
        val_data="held.txt",
        config="soam_zero3",
        overrides=["a.b=1", "c=x"],
        plugins=[tmp_path / "p.py"],
        steps=7,
        seq_len=33,
        micro_batch=2,
        grad_accum=3,
        global_batch=12,
        lr=1e-3,
        warmup=0.2,
        seed=5,
        eval_every=0,
        eval_sequences=9,
        run_dir=tmp_path / "run",
        save_every=6,
        keep_last=4,
        keep_every=12,
        resume="none",
        convert_state=True,
        max_skipped=3,
        activations=Activations(checkpoint=True, blocks=2, offload=True),
        loss="plain",
        memory_profile="full",
        peak_tflops=2.5,
        deterministic=True,
        trust_pickle=True,
        chat_template="chatml",
        lora=LoRA(8, 16),
        track="wandb",
        print_json=True,
        start_anyway=True,
        compile_model=True,
    )
    defaults = parse([])
    assert defaults == RunSettings()
    assert all(value != getattr(defaults, name) for name, value in settings)


def test_help_is_no_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse(["--help"]) is None
    shown = capsys.readouterr().out
    assert "--global-batch" in shown and "local_rank" not in shown


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--steps 0", "--steps is 0, but must be above 0."),
        ("--micro-batch -1", "--micro-batch is -1, but must be above 0."),
        ("--lr nan", "--lr is nan, but must be a finite number."),
        ("--lr -1", "--lr is -1.0, but must be above 0."),
        ("--lr inf", "--lr is inf, but must be a finite number."),
        ("--warmup -0.1", "--warmup is -0.1, but must be at least 0."),
        ("--warmup 2.5", "--warmup is 2.5, but must be a fraction below 1 or a whole number of steps."),
        ("--seed -1", "--seed is -1, but must be at least 0."),
        ("--steps many", "--steps"),
        ("--loss tiny", "'chunked'"),
        ("--memory-profile some", "'summary'"),
        ("--stepz 3", "--steps"),
        ("--optimizer adamw", "--config amcs_zero2, soam_zero2, adamw_zero2"),
        ("--batch-size 4", "--micro-batch (sequences per rank and forward pass) or --global-batch"),
        ("--batch_size 4", "--micro-batch"),
        ("--lr-rate 1", "Use --lr."),
        ("--lr much", "--lr is 'much', but must be a rate, as in 1e-3, or auto."),
        ("--lr 0", "--lr is 0.0, but must be above 0"),
        ("--epochs 3", "--steps, in optimizer steps"),
        ("--num_train_epochs 3", "--steps, in optimizer steps"),
        ("--out a", "there is no option --out. Use --run-dir."),
        ("--logging_steps 5", "every step is in metrics.jsonl"),
        ("--run_name a", "--run-dir names the folder"),
        ("--do_train", "--eval-every says how often"),
        ("--lora_r 8", "--lora r=16,alpha=32"),
        ("--num_gpus 2", "goes before the script: deepspeed --num_gpus N"),
        ("--num-gpus=2", "goes before the script"),
        ("--master_port 1", "goes before the script"),
        ("--hostfile h", "goes before the script"),
        ("--total-batch-size 9", "Use --global-batch (sequences per step, all ranks)."),
        ("--warmup_ratio 0.1", "a fraction of the run is --warmup below 1"),
        ("--bf16", "--set bf16.enabled=true"),
        ("--weight_decay 0.1", "--set optimizer.params.weight_decay=0.1"),
        ("--zero-stage 3", "--set zero_optimization.stage=2"),
        ("--deepspeed ds.json", "a DeepSpeed JSON is given with --config"),
        ("--zzzzzz", "--help lists what there is"),
        ("--tokenizer=", "--tokenizer is empty"),
        ("--steps", "--steps"),
        ("extra", "there is no place for 'extra'; see --help."),
    ],
)
def test_wrong_settings_are_one_sentence(line: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(line.split())
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_an_empty_value_is_no_folder() -> None:
    with pytest.raises(UserError, match="--run-dir is empty; is a variable of the shell not set"):
        parse(["--run-dir", ""])


@pytest.mark.parametrize("line", ["--resume", "--resume --steps 3", "--steps 3 --resume", "--resume auto"])
def test_a_bare_resume_is_auto(line: str) -> None:
    settings = parse(line.split())
    assert settings is not None and settings.resume == "auto"


def test_only_what_is_typed_is_set() -> None:
    settings = parse(["--steps", "500", "--set", "a.b=1", "--set", "c=", "--deepspeed", "--local_rank", "1"])
    assert settings is not None and settings.model_fields_set == {"steps", "overrides"}
    assert settings.overridden() == ["a.b", "c"]
