"""Finetuning on simulated crossbars: losses, distillation, the trainer, its checkpoints and its diagnosis."""
