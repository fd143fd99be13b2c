"""Results of files on their way between processes."""

import pyarrow as pa
import pytest

from mpformer.evaluate.batch_job import _ROW, _from_row, _to_row
from mpformer.evaluate.file_results import FileResult, ImageFile, predict_all
from tests.evaluate.scenes import ColourModel, scenes, tiny_config


@pytest.mark.parametrize("task", ["instance", "panoptic", "semantic"])
def test_a_result_comes_back_as_it_was(tmp_path, task):
    (tmp_path / "a.png").write_bytes(scenes(1).records[0].image)
    (tmp_path / "b.png").write_bytes(b"hello")
    paths = [ImageFile(str(tmp_path / f"{name}.png"), name) for name in "ab"]
    results = list(predict_all(ColourModel(), paths, tiny_config(task)))
    assert results[0].prediction is not None
    assert results[1].problem
    table = pa.Table.from_pylist([_to_row(i, result) for i, result in enumerate(results)], _ROW)
    back = [_from_row(row, file.name) for row, file in zip(table.to_pylist(), paths)]
    assert back == [results[0], FileResult(problem=results[1].problem)]
