"""A `datasets.Dataset` as parquet files and the card metadata by which `load_dataset` finds them, columns and names kept."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..decoding import MOST_PIXELS, picture_size
from ..progress import told
from .record import ABOUT, belongs, read_about
from .safe_files import parse_json, read_table

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

_SHARD_BYTES = 500 * 2**20
# pictures of one file may unpack to this many times its bytes, and always to this many pixels
_MOST_RATIO, _LEAST_PIXELS = 256, 2**28


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
    from datasets import Dataset, DatasetInfo, SplitDict, SplitInfo
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
            # pictures that are only named by a path would be lost with this machine; all at once, since every call reads the
            # names of all classes
            shard = Dataset(embed_table_storage(shard.with_format("arrow")[:]))
        path = folder / "data" / f"{split}-{index:05d}-of-{shards:05d}.parquet"
        shard.with_format(None).to_parquet(path, write_page_checksum=True)  # a flipped bit of a number is seen
        stored += path.stat().st_size
    info = DatasetInfo(features=dataset.features, dataset_size=dataset.data.nbytes, download_size=stored)
    info.splits = SplitDict({split: SplitInfo(name=split, num_bytes=dataset.data.nbytes, num_examples=len(dataset))})
    return {
        "dataset_info": info._to_yaml_dict(),
        "configs": [{"config_name": "default", "data_files": [{"split": split, "path": f"data/{split}-*"}]}],
    }


def read_parquet(folder: Path) -> Dataset:
    """All rows of an artifact's `data/` folder: of the files that its record lists, or of all where it lists none.

    Raises:
        ValueError: no parquet files, or files that cannot be read.
    """
    from datasets import concatenate_datasets

    about = read_about(folder) if (folder / ABOUT).is_file() else {"kind": "cleaned_dataset"}
    data = folder / "data"
    paths = sorted(path for path in belongs(folder, about) if path.parent == data and path.suffix == ".parquet")
    if not paths:
        raise ValueError(f"{folder / 'data'} holds no parquet files; get the whole artifact again")
    parts = [_read_shard(path) for path in paths]
    for path, part in zip(paths, parts, strict=True):
        if part.features != parts[0].features:
            raise ValueError(f"{path} has other columns than {paths[0].name}; get the whole artifact again")
    return concatenate_datasets(parts)


def _read_shard(path: Path) -> Dataset:
    from datasets import Dataset, Features

    from .tables import UNREADABLE

    table = read_table(path)
    try:
        if own := (table.schema.metadata or {}).get(b"huggingface"):
            parse_json(own.decode("utf-8"), "what it says of its columns")
        features = Features.from_arrow_schema(table.schema)
        _check_media(table, features, max(_LEAST_PIXELS, _MOST_RATIO * path.stat().st_size))
        return Dataset(table.cast(features.arrow_schema))
    except UNREADABLE as error:
        # the libraries' messages quote names of columns
        raise ValueError(f"{path} is no parquet file that can be read ({told(error)}); get it again") from None


def _check_media(table: Any, features: Any, most: int) -> None:
    """Pictures and sounds lie in the file, not anywhere on this machine, and pictures are as large as they may be.

    Raises:
        ValueError: a row that names a path instead, that is no picture, or one with too many pixels, alone or together.
    """
    pixels = 0
    for name, feature in features.items():
        kind = type(feature).__name__
        if kind not in ("Image", "Audio", "Video"):
            if _has_media(feature):
                raise ValueError(f"the column {name!r:.40} holds lists of pictures or sounds; none of ours does")
            continue
        for row, cell in enumerate(table[name]):
            value = cell.as_py()
            if value is None:
                continue
            if not isinstance(value, dict) or value.get("bytes") is None:
                raise ValueError(f"row {row} of {name!r:.40} names a file of some other machine; embed it")
            if kind != "Image":
                continue
            try:
                width, height = picture_size(value)
            except ValueError as error:
                raise ValueError(f"row {row} of {name!r:.40} is no picture ({error})") from None
            pixels += width * height
            if width * height > MOST_PIXELS:
                raise ValueError(f"row {row} of {name!r:.40} has {width} x {height} pixels, at most {MOST_PIXELS:,}")
            if pixels > most:
                raise ValueError(
                    f"the pictures up to row {row} of {name!r:.40} have {pixels:,} pixels, at most {most:,}"
                )


def _has_media(feature: Any) -> bool:
    """Whether a picture or sound lies somewhere inside a feature."""
    if type(feature).__name__ in ("Image", "Audio", "Video", "Pdf", "Nifti"):
        return True
    inner = feature.values() if isinstance(feature, dict) else feature
    if not isinstance(feature, dict | list):
        inner = [feature.feature] if hasattr(feature, "feature") else []
    return any(map(_has_media, inner))
