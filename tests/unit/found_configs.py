"""DeepSpeed JSONs of the kinds that trainers and DeepSpeed's own examples ship, as texts.

Their keys are those of axolotl, LLaVA and DeepSpeedExamples; each text stands for a kind of file that is met often.
"""

ACCEPTED = {
    "trainer, stage 1, everything auto": """{
      "zero_optimization": {"stage": 1, "overlap_comm": true},
      "bf16": {"enabled": "auto"},
      "fp16": {"enabled": "auto", "auto_cast": false, "loss_scale": 0, "initial_scale_power": 32,
               "loss_scale_window": 1000, "hysteresis": 2, "min_loss_scale": 1},
      "gradient_accumulation_steps": "auto", "gradient_clipping": "auto",
      "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto", "wall_clock_breakdown": false
    }""",
    "trainer, stage 2 with offload": """{
      "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}, "contiguous_gradients": true,
                            "overlap_comm": true},
      "bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto", "loss_scale": 0},
      "gradient_accumulation_steps": "auto", "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto"
    }""",
    "trainer, stage 3, keys without their prefix": """{
      "zero_force_ds_cpu_optimizer": false, "zero_allow_untested_optimizer": true,
      "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "cpu", "pin_memory": true},
        "offload_param": {"device": "cpu", "pin_memory": true},
        "overlap_comm": true, "contiguous_gradients": true, "sub_group_size": 0, "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto", "stage3_param_persistence_threshold": "auto",
        "max_live_parameters": 0, "max_reuse_distance": 0, "gather_16bit_weights_on_model_save": true
      },
      "bf16": {"enabled": true}, "gradient_accumulation_steps": "auto", "gradient_clipping": "auto",
      "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto"
    }""",
    "trainer, optimizer and scheduler auto, floats for counts": """{
      "fp16": {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16,
               "hysteresis": 2},
      "bf16": {"enabled": true},
      "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}},
      "scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto",
                                                  "warmup_num_steps": "auto"}},
      "zero_optimization": {"stage": 3, "sub_group_size": 1e9, "stage3_max_live_parameters": 1e9,
                            "stage3_max_reuse_distance": 1e9, "stage3_gather_16bit_weights_on_model_save": true},
      "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto", "steps_per_print": 1e5
    }""",
    "trainer, tensor parallel": """{
      "bf16": {"enabled": "auto"},
      "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}},
      "scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": "auto", "warmup_min_lr": "auto",
                                                       "warmup_max_lr": "auto", "warmup_num_steps": "auto"}},
      "zero_optimization": {"stage": 2, "gather_16bit_weights_on_model_save": true},
      "tensor_parallel": {"autotp_size": 4},
      "steps_per_print": 1, "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto"
    }""",
    "example, weights on NVMe, in Hjson": """{
      // one GPU, weights on an SSD
      "zero_optimization": {
        "stage": 3, "stage3_prefetch_bucket_size": "auto", "stage3_param_persistence_threshold": "auto",
        "stage3_max_live_parameters": "auto",
        "offload_param": {"device": "nvme", "nvme_path": "/local_nvme", "pin_memory": true, "buffer_size": "auto",
                          "buffer_count": 5}
      },
      "aio": {"block_size": 8388608, "queue_depth": 32, "intra_op_parallelism": 8, "single_submit": false,
              "overlap_events": true, "use_gds": false},
      # a trailing comma follows
      "train_batch_size": 1,
    }""",
    "example, ZenFlow": """{
      "train_batch_size": 8, "bf16": {"enabled": true},
      "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu", "pin_memory": true},
        "zenflow": {"topk_ratio": 0.1, "update_interval": 4, "full_warm_up_rounds": 0, "overlap_step": true}},
      "optimizer": {"type": "AdamW", "params": {"lr": 2e-5, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.01}},
      "gradient_accumulation_steps": 1, "gradient_clipping": 1.0, "zero_allow_untested_optimizer": true
    }""",
    "example, leaf modules": """{
      "bf16": {"enabled": true},
      "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 1e5,
                            "leaf_module": {"classes": ["some.module.SparseMoeBlock"]}},
      "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
      "scheduler": {"type": "WarmupCosineLR", "params": {"total_num_steps": 1000, "warmup_min_ratio": 0,
                    "warmup_num_steps": 100, "cos_min_ratio": 0.001, "warmup_type": "linear"}},
      "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 1, "steps_per_print": 10
    }""",
    "example, sequence parallel": """{
      "bf16": {"enabled": true}, "zero_optimization": {"stage": 0}, "gradient_accumulation_steps": 1,
      "compile": {"deepcompile": true, "passes": ["autosp"]},
      "gradient_clipping": "auto", "steps_per_print": 2000, "train_batch_size": 1,
      "train_micro_batch_size_per_gpu": 1, "sequence_parallel_size": 2
    }""",
    "example, fp16 with deprecated offload": """{
      "train_batch_size": 4, "steps_per_print": 2000,
      "optimizer": {"type": "Adam", "params": {"lr": 0.001, "betas": [0.8, 0.999], "eps": 1e-8, "weight_decay": 3e-7}},
      "scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": 0, "warmup_max_lr": 0.001,
                    "warmup_num_steps": 1000}},
      "gradient_clipping": 1.0, "prescale_gradients": false,
      "fp16": {"enabled": true, "fp16_master_weights_and_grads": true, "loss_scale": 0, "loss_scale_window": 500,
               "hysteresis": 2, "min_loss_scale": 1, "initial_scale_power": 15},
      "zero_optimization": {"stage": 2, "allgather_partitions": true, "reduce_scatter": true,
        "allgather_bucket_size": 50000000, "reduce_bucket_size": 50000000, "overlap_comm": true,
        "contiguous_gradients": true, "cpu_offload": true}
    }""",
    "example, one cycle": """{
      "train_batch_size": 512, "train_micro_batch_size_per_gpu": 32, "steps_per_print": 10,
      "optimizer": {"type": "Adam", "params": {"lr": 0.001, "betas": [0.8, 0.999], "eps": 1e-8, "weight_decay": 3e-7}},
      "scheduler": {"type": "OneCycle", "params": {"cycle_min_lr": 0.004, "cycle_max_lr": 0.015,
        "cycle_first_step_size": 1000, "cycle_second_step_size": 100, "cycle_first_stair_count": 100,
        "cycle_second_stair_count": 100, "decay_step_size": 1000, "decay_lr_rate": 0.01}}
    }""",
    "example, tuning": """{
      "train_micro_batch_size_per_gpu": "auto", "fp16": {"enabled": true},
      "autotuning": {"enabled": true, "overwrite": false, "fast": true,
                     "arg_mappings": {"train_micro_batch_size_per_gpu": "--per_device_train_batch_size"}}
    }""",
    "remarks at every depth": """{
      "_comment": "bf16 on 8 GPUs", "//": "one", "// ": {"stage": "two"},
      "train_batch_size": 8, "_train_batch_size_before": "16",
      "zero_optimization": {"_why": "the model fits", "//": "offload is slower", "stage": 2,
                            "offload_optimizer": {"device": "none", "__old": {"device": "cpu"}}},
      "optimizer": {"type": "AMCS", "//": "was AdamW", "params": {"lr": 5e-4, "_lr": 6e-4, "total_steps": 10}},
      "scheduler": {"type": "StepLR", "params": {"step_size": 2, "//": "in steps, not epochs"}}
    }""",
}
"""What DeepSpeed reads and this package accepts."""

REMOVED = {
    "onebit": (
        '{"train_batch_size": 8, "optimizer": {"type": "OneBitAdam", "params": {"lr": 1e-5, "freeze_step": 2000}}}',
        "optimizer.type 'OneBitAdam' is no longer part of DeepSpeed",
    ),
    "sparse attention": (
        '{"train_batch_size": 8, "sparse_attention": {"mode": "fixed", "block": 16}}',
        "sparse_attention is no longer part of DeepSpeed",
    ),
    "compression": (
        '{"train_batch_size": 8, "compression_training": {"layer_reduction": {"enabled": false}}}',
        "compression_training is no longer part of DeepSpeed",
    ),
    "curriculum": (
        '{"train_batch_size": 8, "curriculum_learning": {"enabled": true}}',
        "curriculum_learning is no longer part of DeepSpeed",
    ),
    "mics": (
        '{"train_batch_size": 8, "zero_optimization": {"stage": 3, "mics_shard_size": 8}}',
        "zero_optimization.mics_shard_size is no longer part of DeepSpeed",
    ),
    "torch.compile": (
        '{"train_batch_size": 8, "compile": {"disable": false, "backend": "inductor"}}',
        "compile.disable is no longer part of DeepSpeed: a model is compiled by engine.compile()",
    ),
    "threads of aio": (
        '{"train_batch_size": 8, "aio": {"block_size": 1048576, "thread_count": 2}}',
        "aio.thread_count is no longer part of DeepSpeed: it is intra_op_parallelism now",
    ),
    "overlap": (
        '{"train_batch_size": 8, "zero_optimization": {"stage": 2, "comm_overlap": true}}',
        "zero_optimization.comm_overlap is no longer part of DeepSpeed: it is overlap_comm now",
    ),
}
"""What DeepSpeed once read: the text, and how the refusal begins."""
