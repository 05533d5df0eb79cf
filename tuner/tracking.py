"""MLflow beyond the life of one run, for whoever runs many: the parent of a sweep, and run folders replayed into it."""

from tuner.logging.mlflow import MLflowLogger
from tuner.logging.mlflow_run import MlflowRecord, MlflowRun
from tuner.logging.mlflow_store import silent, sqlite_file, store_errors, without_password
from tuner.verbs.sync import sync

__all__ = ["LOGGER", "MlflowRecord", "MlflowRun", "silent", "sqlite_file", "store_errors", "sync", "without_password"]

LOGGER = f"{MLflowLogger.__module__}.{MLflowLogger.__qualname__}"
"""The `_target_` by which a configuration names the MLflow logger."""
