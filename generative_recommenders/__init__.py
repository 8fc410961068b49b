"""Sequential and generative recommenders: data, models, training, evaluation and use."""
