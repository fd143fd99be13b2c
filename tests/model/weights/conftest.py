"""A small model, in a Hugging Face folder and as our checkpoint."""

import pytest

from tests.model import weights_files as files


@pytest.fixture(scope="module")
def model():
    return files.small_model()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    return files.write_folder(tmp_path_factory.mktemp("whole") / "hf", model)


@pytest.fixture
def copy(folder, tmp_path):
    return files.copy_of(folder, tmp_path / "hf")


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory):
    return files.save_ours(model, tmp_path_factory.mktemp("ours") / "model.safetensors")
