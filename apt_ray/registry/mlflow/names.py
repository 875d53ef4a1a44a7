"""What things are called in MLflow."""

EXPERIMENT = "apt-ray"
TRIALS_EXPERIMENT = "apt-ray-trials"
MODEL_PREFIX = "apt-"


def model_name(category: str) -> str:
    """The name of a category's registered model."""
    return f"{MODEL_PREFIX}{category}"
