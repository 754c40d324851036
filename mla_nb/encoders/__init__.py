"""How each modality becomes a vector: one module per family of encoders."""
