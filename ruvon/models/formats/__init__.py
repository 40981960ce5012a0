"""How families of models are talked to: one file a format."""
