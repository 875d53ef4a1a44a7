"""The registry in an MLflow server."""

from apt_ray.optional import require

require("mlflow", extra="registry")
