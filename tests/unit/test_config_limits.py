"""Settings that exclude each other, and what a machine or its ranks cannot do."""

from __future__ import annotations

import pytest
from refusals import changed, refusal

from toolkit.config import validate


@pytest.mark.parametrize(
    ("assignments", "sentence"),
    [
        (["prescale_gradients=true"], "prescale_gradients is set, and DeepSpeed does not have it at zero_optimization"),
        (["gradient_predivide_factor=2"], "gradient_predivide_factor is set, and DeepSpeed does not have it at"),
        (["optimizer.params={}", "optimizer.params.amsgrad=true"], "which DeepSpeed's AdamW does not support"),
        (["optimizer.params.betas=[0.9, 0.9, 0.9]"], "betas is [0.9, 0.9, 0.9], but AdamW takes two"),
        (["optimizer.type=Adadelta", "optimizer.params={}"], "set zero_allow_untested_optimizer to true"),
        (["optimizer.type=Lamb", "optimizer.params={}", "zero_allow_untested_optimizer=true"], "needs fp16.enabled"),
        (['optimizer={"type": "LBFGS"}'], "a step of torch.optim.LBFGS with {} fails with TypeError"),
        (['optimizer={"type": "SGD", "params": {"nesterov": true}}'], "a step of torch.optim.SGD with"),
        (["bf16.bf16_master_weights_and_grads=true"], "needs zero_optimization.offload_optimizer and DeepSpeed's Adam"),
        (
            ["zero_optimization.zenflow={}"],
            "zero_optimization.zenflow needs zero_optimization.stage 1, 2 or 3, offload",
        ),
        (
            ["bf16.enabled=false", "fp16.enabled=true", "torch_autocast.enabled=true"],
            "torch_autocast.dtype is not given, but the model is in fp16; give 'fp16'",
        ),
        (
            [
                "zero_optimization.stage=0",
                "bf16.enabled=false",
                "fp16.enabled=true",
                'torch_autocast={"enabled": true, "dtype": "fp16"}',
            ],
            "torch_autocast.enabled and fp16.enabled at stage 0 scale the loss twice",
        ),
        (
            [
                "zero_optimization.zenflow={}",
                'zero_optimization.offload_optimizer={"device": "cpu"}',
                'optimizer={"type": "AdamW"}',
            ],
            "zero_optimization.zenflow needs optimizer.params, if only an empty one",
        ),
    ],
)
def test_what_deepspeed_refuses_later_is_refused_for_its_own_optimizers(assignments: list[str], sentence: str) -> None:
    assert sentence in refusal(changed("adamw_zero2", *assignments))


@pytest.mark.parametrize(
    ("assignment", "sentence"),
    [
        (
            "tensor_parallel.autotp_size=3",
            "tensor_parallel.autotp_size is 3, which does not divide the number of ranks",
        ),
        ("sequence_parallel_size=3", "sequence_parallel_size is 3, which does not divide the number of ranks, 4"),
        ("sequence_parallel_size=2", "does not add up the gradients of ranks that share a sequence (Ulysses)"),
        ("zero_optimization.zero_hpz_partition_size=3", "zero_hpz_partition_size is 3, which does not divide"),
        ("tensorboard.enabled=true", "tensorboard needs the package tensorboard, which is not installed"),
    ],
)
def test_what_the_machine_or_the_ranks_cannot_do_is_refused_for_a_run(assignment: str, sentence: str) -> None:
    config = changed("amcs_zero3", assignment)
    validate(config, origin="my.json")
    with pytest.MonkeyPatch.context() as absent:
        absent.setattr("importlib.util.find_spec", lambda name: None)
        assert sentence in refusal(config, 4)


@pytest.mark.parametrize(
    "assignment",
    [
        "steps_per_print=Infinity",
        "communication_data_type=Bf16",
        "gradient_allreduce_op=MEAN",
        "wall_clock_breakdown=0",
        "prescale_gradients=1",
        "gradient_predivide_factor=4",
        "zero_optimization.parameter_alignment=true",
        "optimizer._note=x",
    ],
)
def test_what_harms_nobody_is_accepted(assignment: str) -> None:
    validate(changed("amcs_zero2", assignment), origin="my.json", world_size=1)
