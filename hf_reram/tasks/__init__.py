"""What models are finetuned for, with data and metrics; the comparison that every recipe makes; the demo."""
