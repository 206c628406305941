"""A `datasets.Dataset` as parquet files and the card metadata by which `load_dataset` finds them, columns and names kept."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

_SHARD_BYTES = 500 * 2**20


def write_parquet(dataset: Dataset, folder: Path, split: str = "train") -> dict[str, Any]:
    """Write `data/SPLIT-....parquet`, in shards of at most 500 MB, with pictures and sounds inside.

    Args:
        dataset: any columns.
        folder: of the artifact; `data/` in it is made.
        split: name of the split.

    Returns:
        Card metadata: `dataset_info` (features, sizes) and `configs` (where the files are).

    Raises:
        ValueError: no rows, or a split name that the Hub does not take.
    """
    from datasets import DatasetInfo, SplitDict, SplitInfo
    from datasets.features.features import require_storage_embed
    from datasets.table import embed_table_storage

    if len(dataset) == 0:
        raise ValueError("the data set is empty; there is nothing to publish")
    if not split.replace("_", "").replace(".", "").isalnum() or not split.isascii():
        raise ValueError(f"{split!r:.80} is no name of a split; use letters, digits, underscores and dots")
    shards = max(1, -(-int(dataset.data.nbytes * len(dataset) / max(len(dataset.data), 1)) // _SHARD_BYTES))
    embed = any(require_storage_embed(feature) for feature in dataset.features.values())
    (folder / "data").mkdir(parents=True, exist_ok=True)
    stored = 0
    for index in range(shards):
        shard: Any = dataset.shard(shards, index, contiguous=True)
        if embed:
            # pictures that are only named by a path would be lost with this machine
            shard = shard.with_format("arrow").map(
                embed_table_storage, batched=True, batch_size=100, keep_in_memory=True
            )
        path = folder / "data" / f"{split}-{index:05d}-of-{shards:05d}.parquet"
        shard.with_format(None).to_parquet(path)
        stored += path.stat().st_size
    info = DatasetInfo(features=dataset.features, dataset_size=dataset.data.nbytes, download_size=stored)
    info.splits = SplitDict({split: SplitInfo(name=split, num_bytes=dataset.data.nbytes, num_examples=len(dataset))})
    return {
        "dataset_info": info._to_yaml_dict(),
        "configs": [{"config_name": "default", "data_files": [{"split": split, "path": f"data/{split}-*"}]}],
    }


def read_parquet(folder: Path) -> Dataset:
    """All rows of an artifact's `data/` folder, its files read one by one from there and from nowhere else.

    Raises:
        ValueError: no parquet files, or files that cannot be read.
    """
    import pyarrow.parquet
    from datasets import Dataset, Features, concatenate_datasets
    from pyarrow.lib import ArrowException

    paths = sorted((folder / "data").glob("*.parquet"))
    if not paths:
        raise ValueError(f"{folder / 'data'} holds no parquet files; get the whole artifact again")
    parts = []
    for path in paths:
        try:
            table = pyarrow.parquet.read_table(path)
            parts.append(Dataset(table.cast(Features.from_arrow_schema(table.schema).arrow_schema)))
        except (ArrowException, OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is no parquet file that can be read ({error!s:.200}); get it again") from error
    return concatenate_datasets(parts)


def read_dataset(name: str, split: str, config: str | None = None) -> Any:
    """A dataset from the Hub, from `save_to_disk`, or from a file.

    Raises:
        ValueError: nothing there, or no such split.
    """
    import datasets

    path = Path(name)
    if path.is_dir() and ((path / "state.json").exists() or (path / "dataset_dict.json").exists()):
        found = datasets.load_from_disk(name)
        if isinstance(found, datasets.DatasetDict):
            if split not in found:
                raise ValueError(f"{name} has the splits {list(found)}, not {split!r}; set --split")
            return found[split]
        return found
    kinds = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
    if path.is_file():
        if path.suffix not in kinds:
            raise ValueError(
                f"{name} is no {', '.join(kinds)} file; save the dataset with save_to_disk and name the folder"
            )
        return datasets.load_dataset(kinds[path.suffix], data_files=str(path), split="train")
    return datasets.load_dataset(name, config, split=split)
