"""What of transformers, accelerate and DeepSpeed is needed beyond their public names."""
