"""Where hf_reram reaches into other libraries: transformers' quantizers and pipelines, PEFT, DeepSpeed."""
