"""Settings shared by every test: quiet, loopback-only Ray, and where the real sample data lies."""

import os
from pathlib import Path

# Before ray is imported anywhere: no usage report, no progress bars, a fast controller poll.
for _key, _value in {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "disabled",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_worker_niceness": "0",  # Ray's own is 15: beside other tests a run would wait for all of them
    "RAY_memory_monitor_refresh_ms": "0",  # it would kill workers for the memory that others take
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "OMP_WAIT_POLICY": "PASSIVE",
}.items():
    os.environ.setdefault(_key, _value)
os.environ.pop("RAY_ADDRESS", None)  # tests join the clusters that they have started, and no other

import pytest  # noqa: E402


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow sqlite file with its tables: making one takes seconds, copying it none."""
    from mpformer.tracking.mlflow_store import client

    file = tmp_path_factory.mktemp("store") / "mlflow.db"
    client(f"sqlite:///{file}").search_experiments()
    return file


@pytest.fixture(scope="session")
def sample_data() -> Path:
    """The folder of real annotated samples; tests that use it are skipped where it is absent."""
    root = Path(os.environ.get("MPFORMER_SAMPLE_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not root.is_dir():
        pytest.skip(f"no real sample data at {root}: set MPFORMER_SAMPLE_DATA to a folder that holds it")
    return root
