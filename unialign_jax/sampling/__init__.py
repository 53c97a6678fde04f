"""Samplers of images and texts, and the compiled programs of inference."""

# How the text sampler chooses the tokens to reveal (`sampling.text`); here, where no JAX is needed to know the names.
DECODINGS = ("ancestral", "confidence", "entropy", "top_k")
