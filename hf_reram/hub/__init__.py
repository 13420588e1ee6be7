"""A robust checkpoint on the Hub: its card, upload and download, and the report beside its weights."""
