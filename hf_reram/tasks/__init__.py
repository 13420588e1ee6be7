"""What models are finetuned for, with data and metrics; the comparison that every recipe makes; the demo.

Importing it lets ``transformers.pipeline`` answer questions.
"""

from ..integrations.register import register_pipelines

register_pipelines()
