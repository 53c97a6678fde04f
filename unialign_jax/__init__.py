"""UniAlignment in JAX. `unialign_jax.Pipeline` makes images and texts from a bundle."""

__version__ = "0.1.0"


def __getattr__(name):
    # Imported when it is asked for: the data pipelines live in this package too, and do without JAX.
    if name == "Pipeline":
        from unialign_jax.inference.pipeline import Pipeline

        return Pipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
