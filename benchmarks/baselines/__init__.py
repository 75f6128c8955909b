"""Baselines with the model's own interface: `embed_dialogues`, `embed_images`, `embed_texts`."""
