"""The mathematics of each model family, and what belongs to a model: weights, tokenizer, chat."""
